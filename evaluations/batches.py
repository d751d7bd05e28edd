"""Batches of images in .npz files, which may be larger than memory, and statistics of whole data sets."""

import zipfile

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
            with files.open_file(path) as f, zipfile.ZipFile(f) as archive:
                self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except DAMAGED as e:
            raise InputError(f"{path}: not an .npz file ({e})") from None
        if "arr_0" not in self.names:
            raise InputError(
                f"{path}: no images in it: arr_0 is missing (it holds {', '.join(self.names) or 'nothing'})"
            )
        try:
            self.array = NpzArray(path, "arr_0")
        except DAMAGED as e:
            raise InputError(f"{path}: its images (arr_0) cannot be read ({e})") from None
        self._check_images(channels)
        self.shape = (*self.array.shape[:3], channels)
        self.statistics = self._read_statistics()
        if self.array.shape[3] != channels:
            say(f"{path}: grey images, evaluated as three equal channels")

    def __len__(self):
        return self.shape[0]

    def _check_images(self, channels):
        shape, dtype = self.array.shape, self.array.dtype
        named = f"{self.path}: images of shape {'x'.join(map(str, shape))}"
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{named}; Nx height x width x{channels} is expected")
        if shape[3] not in ({1, 3} if channels == 3 else {channels}):
            hint = "; they are channels first (NCHW): transpose them to NHWC" if shape[1] == channels else ""
            raise InputError(f"{named} have {shape[3]} channels in the last place; {channels} are expected{hint}")
        if dtype != np.uint8:
            hint = "; uint8 from 0 to 255 is expected"
            if dtype.kind == "f":
                first = self._read(slice(0, 8)).astype(float)
                low, high = first.min(), first.max()
                if np.isfinite([low, high]).all() and high <= 1.0:
                    scaled = "(x + 1) * 127.5" if low < 0 else "x * 255"
                    hint = f" with values from {low:.2g} to {high:.2g}: save {scaled}, rounded, as uint8"
            raise InputError(f"{self.path}: images of type {dtype}{hint}")

    def _read_statistics(self):
        found = [name for name in STATISTICS if name in self.names]
        if not found or found == ["mu_s"]:
            return None
        missing = [name for name in STATISTICS if name not in self.names]
        if missing:
            raise InputError(
                f"{self.path}: statistics {', '.join(found)} without {', '.join(missing)}: all four belong together"
            )
        read = {}
        with files.open_file(self.path) as f, np.load(f, allow_pickle=False) as arrays:
            for name in STATISTICS:
                try:
                    read[name] = np.asarray(arrays[name], dtype=np.float64)
                except DAMAGED as e:
                    raise InputError(f"{self.path}: its statistics ({name}) cannot be read ({e})") from None
                if not np.isfinite(read[name]).all():
                    raise InputError(f"{self.path}: {name} has values that are not finite")
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if read[mean].ndim != 1 or read[covariance].shape != (read[mean].size,) * 2:
                shapes = [f"{name} is {'x'.join(map(str, read[name].shape))}" for name in (mean, covariance)]
                raise InputError(f"{self.path}: {', but '.join(shapes)}; a mean and its covariance are expected")
        return {"pool": (read["mu"], read["sigma"]), "spatial": (read["mu_s"], read["sigma_s"])}

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
