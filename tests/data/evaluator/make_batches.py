"""Seeded synthetic uint8 image batches: smooth random colour blobs."""

import numpy as np


def blobs(n, size, seed, n_blobs=6, sharp=1.0, tint=0.0):
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:size, 0:size] / size
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        img = np.zeros((size, size, 3)) + rng.uniform(0.2, 0.8, 3)
        k = rng.integers(2, n_blobs + 1)
        for _ in range(k):
            cy, cx = rng.uniform(0, 1, 2)
            s = rng.uniform(0.03, 0.3) / sharp
            col = rng.uniform(-1, 1, 3)
            f = rng.uniform(2, 25)
            th = rng.uniform(0, np.pi)
            ph = rng.uniform(0, 2 * np.pi)
            wave = 0.5 + 0.5 * np.sin(2 * np.pi * f * (np.cos(th) * xx + np.sin(th) * yy) + ph)
            g = np.exp(-((yy - cy) ** 2 + (xx - cx) ** 2) / (2 * s * s))
            if rng.uniform() < 0.6:
                g = g * wave
            img += g[..., None] * col
        img += rng.normal(0, rng.uniform(0, 0.05), img.shape)
        img[..., 0] += tint
        out[i] = np.clip(img * 255, 0, 255).astype(np.uint8)
    return out
