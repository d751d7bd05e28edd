"""Helpers for the tests of evaluations: a network with known features, and metrics computed by their definitions."""

import json
import math
import sys

import numpy as np
import pytest
import torch as th

from evaluations import evaluator
from evaluations.batches import Batch
from evaluations.features import METRICS, Features, compare, reference_features
from guided_diffusion import dist_util
from guided_diffusion.errors import InputError

RNG = np.random.default_rng(0)
REFERENCE = RNG.integers(0, 255, (37, 3, 2, 3), dtype=np.uint8)
SAMPLES = (RNG.integers(0, 255, (26, 3, 2, 3)) * [0.9, 0.8, 0.5]).astype(np.uint8)
BAD = 255  # value of the first pixel of images whose features are to be non-finite
STORED = ("plain", "compressed", "fortran", "compressed fortran")
BATCH_SIZES = (1, 4, 13, 100)


class KnownNetwork:
    """Replaces Inception. An image's features are its pixels, so they do not depend on the batch.

    :param bad: the non-finite value that a bad image (see BAD) has as feature `place`.
    :param place: a feature's index: 0 to 5 for pool features, 6 to 9 for spatial features.
    :param interrupt_at: index of the batch at which to raise KeyboardInterrupt.
    :ivar seen: all batches that the network was called with.
    """

    pool_dim, spatial_dim, device = 6, 4, th.device("cpu")

    def __init__(self, bad=math.nan, place=0, interrupt_at=None):
        self.bad, self.place, self.interrupt_at, self.seen = bad, place, interrupt_at, []

    def __call__(self, images):
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(images.numpy().copy())
        flat = images.reshape(len(images), -1).float() / 64
        flat[images[:, 0, 0, 0] == BAD, self.place] = self.bad
        return flat[:, :6], flat[:, 6:10]

    def logits(self, pool):
        return 2 * pool[:, :5]


# Metrics by their definitions


def features(images):
    flat = images.reshape(len(images), -1) / 64
    return flat[:, :6], flat[:, 6:10]


def radii_by_hand(points, k):
    def radius(i):
        return sorted(((points[i] - p) ** 2).sum() for j, p in enumerate(points) if j != i)[k - 1]

    return [radius(i) for i in range(len(points))]


def by_hand(reference, samples, k=3):
    """Precision and recall, by comparing all pairs of points."""

    def covered(points, by):
        radii = radii_by_hand(by, k)
        return np.mean([any(((p - q) ** 2).sum() <= r for q, r in zip(by, radii)) for p in points])

    return covered(samples, reference), covered(reference, samples)


def truth(reference, samples):
    """All metrics for KnownNetwork's features: {name: value}."""

    def distance(a, b):
        (mu1, s1), (mu2, s2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
        root = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
        return ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * root

    (pool1, spatial1), (pool2, spatial2) = features(reference), features(samples)
    p = np.exp(2 * pool2[:, :5])
    p /= p.sum(axis=1, keepdims=True)
    score = np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    figures = {"is": score, "fid": distance(pool1, pool2), "sfid": distance(spatial1, spatial2)}
    figures["precision"], figures["recall"] = by_hand(pool1, pool2)
    return figures


def statistics(images):
    """The precomputed statistics that a reference batch may contain."""
    arrays = {}
    for suffix, x in zip(("", "_s"), features(images)):
        arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = x.mean(axis=0), np.cov(x, rowvar=False)
    return arrays


def check(figures, want=None):
    want = want or truth(REFERENCE, SAMPLES)
    assert figures == {name: pytest.approx(want[name], rel=1e-9) for name in figures}


# Running evaluations


def save(path, images, stored="plain"):
    """Write images to an .npz file in one of the storage formats STORED. Return the path."""
    array = np.asfortranarray(images) if "fortran" in stored else images
    (np.savez_compressed if "compressed" in stored else np.savez)(path, arr_0=array)
    return str(path)


def save_pair(folder, stored="plain"):
    return save(folder / "ref.npz", REFERENCE, stored), save(folder / "samples.npz", SAMPLES, stored)


def evaluate(pair, batch_size=32, wanted=METRICS, network=None, limit=0, **cache):
    """Metrics for the files (reference, samples). None on ranks other than 0."""
    network = network or KnownNetwork()
    reference, samples = map(Batch, pair)
    known = reference_features(network, reference, batch_size, wanted, **cache)
    found = Features(network, samples, batch_size, wanted, limit)
    return compare(wanted, reference, known, found) if dist_util.get_rank() == 0 else None


def survey(folders):
    """Evaluate with all storage formats and batch sizes, and with a limited number of samples.

    :param folders: {storage format: (reference, samples)}.
    :return: a dict of the metrics, the batches that the network saw on all ranks, and the metrics for 15 samples.
    """
    found = {"figures": [], "seen": {}}
    for pair in folders.values():
        for batch_size in BATCH_SIZES:
            network = KnownNetwork()
            found["figures"].append(evaluate(pair, batch_size, network=network))
            seen = dist_util.gather_objects([images.tobytes().hex() for images in network.seen])
            found["seen"][str(batch_size)] = sorted(sum(seen, []))
    found["limited"] = evaluate(folders["plain"], 4, limit=15)
    return found


def survey_on_ranks():
    """Entry point of one rank: run `survey` on the folders in sys.argv[1] (JSON). Rank 0 prints the result as JSON."""
    dist_util.setup_dist()
    found = survey(json.loads(sys.argv[1]))
    if dist_util.get_rank() == 0:
        print(json.dumps(found))


class Command:
    """Runs evaluator.py or make_reference.py in this process with KnownNetwork.

    :ivar network: the network that replaces Inception.
    """

    def __init__(self, monkeypatch, capsys, module=evaluator):
        self.monkeypatch, self.capsys, self.module, self.network = monkeypatch, capsys, module, KnownNetwork()

    def __call__(self, *args):
        """Run the command. Return its stdout and stderr."""
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [self.module.__name__, *map(str, args)])
            patch.setattr(self.module, "load_inception", lambda *args: (self.network, "known"))
            patch.setattr(dist_util, "setup_dist", lambda: None)
            self.capsys.readouterr()
            self.module.main()
        return self.capsys.readouterr()

    def refused(self, *args):
        """Run the command, which must refuse its arguments. Return the one-line error message."""
        with pytest.raises(InputError) as caught:
            self(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)
