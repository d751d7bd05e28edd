"""Batches of images in .npz files, which may be larger than memory, and statistics of whole data sets."""

import numpy as np

from guided_diffusion import files
from guided_diffusion.errors import InputError
from guided_diffusion.npz_arrays import DAMAGED, NpzArray

from .output import say

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class Batch:
    """An .npz with images arr_0 uint8 [N, H, W, C], and perhaps statistics of a whole data set.

    Where three channels are expected, grey images (C = 1) are evaluated as three equal channels.

    :param path: the file.
    :param channels: the number of channels that the network takes.
    :ivar shape: the shape of the images as the network sees them.
    :ivar statistics: {"pool": (mu, sigma), "spatial": (mu, sigma)}, or None.
    :raises InputError: if the file does not hold such images, or its statistics are incomplete.
    """

    def __init__(self, path, channels=3):
        self.path = path
        try:
            self.array = NpzArray(path, "arr_0")
            with files.open_file(path) as f, np.load(f, allow_pickle=False) as arrays:
                found = {name: np.asarray(arrays[name], np.float64) for name in STATISTICS if name in arrays.files}
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except DAMAGED as e:
            raise InputError(f"{path}: not an .npz with images (arr_0) that can be read ({e})") from None
        self._check_images(channels)
        self.shape = (*self.array.shape[:3], channels)
        self.statistics = self._check_statistics(found)
        if self.array.shape[3] != channels:
            say(f"{path}: grey images, evaluated as three equal channels")

    def __len__(self):
        return self.shape[0]

    def _check_images(self, channels):
        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or 0 in shape or shape[3] not in ({1, 3} if channels == 3 else {channels}):
            raise InputError(
                f"{self.path}: images of shape {'x'.join(map(str, shape))}; N x height x width x {channels} is expected"
            )
        if dtype != np.uint8:
            raise InputError(f"{self.path}: images of type {dtype}; uint8 from 0 to 255 is expected")

    def _check_statistics(self, found):
        if set(found) <= {"mu_s"}:
            return None
        if set(found) != set(STATISTICS):
            raise InputError(f"{self.path}: statistics {', '.join(found)} alone: {', '.join(STATISTICS)} are expected")
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if found[mean].ndim != 1 or found[covariance].shape != (found[mean].size,) * 2:
                shapes = [f"{name} is {'x'.join(map(str, found[name].shape))}" for name in (mean, covariance)]
                raise InputError(f"{self.path}: {', but '.join(shapes)}; a mean and its covariance are expected")
            if not (np.isfinite(found[mean]).all() and np.isfinite(found[covariance]).all()):
                raise InputError(f"{self.path}: {mean} or {covariance} has values that are not finite")
        return {"pool": (found["mu"], found["sigma"]), "spatial": (found["mu_s"], found["sigma_s"])}

    def images(self, start, stop, batch_size):
        """Yield the images start to stop - 1 in order, in arrays [n, H, W, C] of at most batch_size images."""
        for first in range(start, stop, batch_size):
            images = self._read(slice(first, min(first + batch_size, stop)))
            yield images.repeat(self.shape[3] // images.shape[3], axis=3)

    def _read(self, rows):
        try:
            return self.array[rows]
        except DAMAGED as e:
            raise InputError(f"{self.path}: its images cannot be read ({e}): truncated or damaged") from None

    def place(self, first, last):
        """Describe the images first to last, for messages."""
        return f"{self.path}: images {first} to {last}"
