"""Read batches of images, and statistics of whole data sets, from .npz files that may be larger than memory."""

import numpy as np

from guided_diffusion import files
from guided_diffusion.errors import InputError
from guided_diffusion.npz_arrays import DAMAGED, NpzArray

from .output import say

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class Batch:
    """An .npz file with images arr_0, uint8 [N, H, W, C], and optionally the statistics of a whole data set.

    For a network with three input channels, grey images (C = 1) are repeated to three equal channels.

    :param path: path of the .npz file.
    :param channels: the number of input channels of the network.
    :ivar shape: the shape [N, H, W, channels] of the images that the network receives.
    :ivar statistics: {"pool": (mu, sigma), "spatial": (mu, sigma)}, or None if the file has no statistics.
    :raises InputError: if the file does not hold uint8 images [N, H, W, C], or if its statistics are incomplete.
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
                f"{self.path}: arr_0 has shape {'x'.join(map(str, shape))}; N x height x width x {channels} is expected"
            )
        if dtype != np.uint8:
            raise InputError(f"{self.path}: arr_0 has dtype {dtype}; uint8 from 0 to 255 is expected")

    def _check_statistics(self, found):
        if set(found) <= {"mu_s"}:
            return None
        if set(found) != set(STATISTICS):
            raise InputError(f"{self.path}: has only {', '.join(found)}; {', '.join(STATISTICS)} are expected")
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if found[mean].ndim != 1 or found[covariance].shape != (found[mean].size,) * 2:
                shapes = [f"{name} is {'x'.join(map(str, found[name].shape))}" for name in (mean, covariance)]
                raise InputError(f"{self.path}: {', but '.join(shapes)}; a mean and its covariance are expected")
            if not (np.isfinite(found[mean]).all() and np.isfinite(found[covariance]).all()):
                raise InputError(f"{self.path}: {mean} or {covariance} contains NaN or infinite values")
        return {"pool": (found["mu"], found["sigma"]), "spatial": (found["mu_s"], found["sigma_s"])}

    def images(self, start, stop, batch_size):
        """Yield the images with indices start to stop - 1 in order, as arrays [n, H, W, C] with n <= batch_size."""
        for first in range(start, stop, batch_size):
            images = self._read(slice(first, min(first + batch_size, stop)))
            yield images.repeat(self.shape[3] // images.shape[3], axis=3)

    def _read(self, rows):
        try:
            return self.array[rows]
        except DAMAGED as e:
            raise InputError(f"{self.path}: truncated or damaged: cannot read its images ({e})") from None

    def place(self, first, last):
        """Return a description of the images with indices first to last, for error messages."""
        return f"{self.path}: images {first} to {last}"
