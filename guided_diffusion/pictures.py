"""Pictures of samples: uint8 arrays, PNG files, grids, and strips that show the sampling process."""

import math

import numpy as np
import torch as th
from PIL import Image

from . import files
from .errors import InputError

GRID = 64  # the number of samples in a grid without rows for classes


def to_uint8(sample, start=0):
    """Convert images [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C].

    :param start: the index of the first image, for the error message.
    :raises InputError: if an image contains NaN or infinite values.
    """
    bad = ~sample.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise InputError(
            f"sample {start + int(bad.nonzero()[0])} is not finite: check the model's weights, or use --use_fp16 False"
        )
    return ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def save_pngs(folder, images, start, labels=None):
    """Write samples start, start + 1, ... as INDEX.png, or as LABEL_INDEX.png, the file names that training expects.

    :param images: uint8 [n, H, W, C].
    :param labels: the labels of all samples, or None.
    """
    with files.disk_errors(folder, "the finished samples are kept"):
        files.make_dirs(folder)
        for index, image in enumerate(images, start):
            prefix = "" if labels is None else f"{labels[index]}_"
            with files.write_atomically(files.join(folder, f"{prefix}{index:06d}.png"), sync=False) as f:
                _picture(image).save(f, format="PNG")


class Strip:
    """A picture of the sampling process. Each row shows predictions of x_start for one sample, from noise to data."""

    def __init__(self, path, rows=8, columns=10):
        self.path, self.rows, self.columns = path, rows, columns
        self.seen = []

    def see(self, pred_xstart, step, num_steps):
        """Keep the predictions of a step, 1 to num_steps, if the picture shows it. The last step writes the picture."""
        wanted = {round(1 + i * (num_steps - 1) / (self.columns - 1)) for i in range(self.columns)}
        if step in wanted:
            self.seen.append(to_uint8(pred_xstart[: self.rows].float().nan_to_num()).cpu().numpy())
        if step == num_steps:
            rows = np.stack(self.seen, axis=1)
            with files.disk_errors(self.path, "the finished samples are kept"):
                save_grid(self.path, rows.reshape(-1, *rows.shape[2:]), columns=len(self.seen), rows=self.rows)


def grid_indices(num_samples, labels=None, columns=10):
    """The indices of the samples in a grid: the first 64, or the first of each class if there are 2 to 16 classes."""
    classes = [] if labels is None else np.unique(labels)
    if not 1 < len(classes) <= 16:
        return np.arange(min(num_samples, GRID))
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:columns] for c in classes]))


def save_grid(path, images, labels=None, columns=None, rows=16):
    """Write images [N, H, W, C] as one PNG: a row for each class if there are 2 to `rows` classes, otherwise a square.

    Images whose shorter side has at most 32 pixels are enlarged by an integer factor.

    :param columns: the number of images in a row. The default makes a square of at most 16 columns.
    """
    classes = [] if labels is None else sorted(set(labels.tolist()))
    if 1 < len(classes) <= rows:
        by_class = [images[labels == c][: columns or 16] for c in classes]
        columns = max(map(len, by_class))
    else:
        columns = columns or min(16, math.ceil(math.sqrt(len(images))))
        by_class = [images[i : i + columns] for i in range(0, min(len(images), columns * rows), columns)]
    height, width, channels = images.shape[1:]
    canvas = np.full((len(by_class), height + 1, columns, width + 1, channels), 255, np.uint8)  # with white lines
    for r, row in enumerate(by_class):
        for c, image in enumerate(row):
            canvas[r, :-1, c, :-1] = image
    canvas = canvas.reshape(len(by_class) * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    picture = _picture(canvas)
    factor = max(1, 64 // min(height, width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    with files.write_atomically(path) as f:
        picture.save(f, format="PNG")


def _picture(image):
    """Convert a uint8 array [H, W, C] to a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
