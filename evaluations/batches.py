"""Batches of images and statistics in .npz files, which may be larger than memory."""

import ast
import tempfile
import zipfile
import zlib

import numpy as np

from .errors import EvaluationError

DAMAGED = (OSError, ValueError, SyntaxError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class Batch:
    """An .npz with images arr_0 uint8 [N, H, W, 3], and perhaps statistics of a whole data set.

    :param path: the file.
    :param channels: the number of them that images must have.
    :raises EvaluationError: for anything else.
    """

    def __init__(self, path, channels=3):
        self.path, self.channels = path, channels
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        except FileNotFoundError:
            raise EvaluationError(f"{path}: no such file") from None
        except DAMAGED as e:
            raise EvaluationError(f"{path}: not an .npz file ({e})") from None
        if "arr_0" not in self.names:
            raise EvaluationError(
                f"{path}: no images in it: arr_0 is missing (it holds {', '.join(self.names) or 'nothing'})"
            )
        try:
            self.member = Member(path, "arr_0.npy")
        except DAMAGED as e:
            raise EvaluationError(f"{path}: its images (arr_0) cannot be read ({e})") from None
        self.shape = self.member.shape
        self._check_images()
        self.statistics = self._read_statistics()

    def __len__(self):
        return self.shape[0]

    def _check_images(self):
        shape, dtype = self.shape, self.member.dtype
        named = f"{self.path}: images of shape {'x'.join(map(str, shape))}"
        if len(shape) != 4 or 0 in shape:
            raise EvaluationError(f"{named}; Nx height x width x{self.channels} is expected")
        if shape[3] != self.channels:
            hint = "; they are channels first (NCHW): transpose them to NHWC" if shape[1] == self.channels else ""
            found = f"{named} have {shape[3]} channels in the last place"
            raise EvaluationError(f"{found}; {self.channels} are expected{hint}")
        if dtype != np.uint8:
            hint = ""
            if dtype.kind == "f":
                first = next(self.images(0, min(8, shape[0]), 8)).astype(float)
                low, high = first.min(), first.max()
                if np.isfinite([low, high]).all() and high <= 1.0:
                    scaled = "(x + 1) * 127.5" if low < 0 else "x * 255"
                    hint = f" with values from {low:.2g} to {high:.2g}: save {scaled}, rounded, as uint8"
            raise EvaluationError(f"{self.path}: images of type {dtype}{hint or '; uint8 from 0 to 255 is expected'}")

    def _read_statistics(self):
        """{"pool": (mu, sigma), "spatial": (mu, sigma)}, or None."""
        found = [name for name in STATISTICS if name in self.names]
        if not found or found == ["mu_s"]:
            return None
        missing = [name for name in STATISTICS if name not in self.names]
        if missing:
            raise EvaluationError(
                f"{self.path}: statistics {', '.join(found)} without {', '.join(missing)}: all four belong together"
            )
        read = {}
        with np.load(self.path, allow_pickle=False) as arrays:
            for name in STATISTICS:
                try:
                    read[name] = np.asarray(arrays[name], dtype=np.float64)
                except DAMAGED as e:
                    raise EvaluationError(f"{self.path}: its statistics ({name}) cannot be read ({e})") from None
                if not np.isfinite(read[name]).all():
                    raise EvaluationError(f"{self.path}: {name} has values that are not finite")
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            found, wanted = read[covariance].shape, (read[mean].size,) * 2
            if read[mean].ndim != 1 or found != wanted:
                shapes = [f"{name} is {'x'.join(map(str, read[name].shape))}" for name in (mean, covariance)]
                raise EvaluationError(f"{self.path}: {', but '.join(shapes)}; a mean and its covariance are expected")
        return {"pool": (read["mu"], read["sigma"]), "spatial": (read["mu_s"], read["sigma_s"])}

    def images(self, start, stop, batch_size):
        """Images start to stop - 1 in order, a batch at a time: arrays [n, H, W, 3]."""
        try:
            yield from self.member.rows(start, stop, batch_size)
        except DAMAGED as e:
            raise EvaluationError(f"{self.path}: its images cannot be read ({e}): cut short or damaged") from None


class Member:
    """An array in an .npz, read a few rows at a time: compressed or not, in C or Fortran order, of any .npy version."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        with zipfile.ZipFile(path) as archive, archive.open(name) as f:
            self.shape, self.fortran, self.dtype = read_npy_header(f)
            self.header_length = f.tell()
            self.stored = archive.getinfo(name).compress_type == zipfile.ZIP_STORED
        self._mapped = self._temporary = None

    def rows(self, start, stop, batch_size):
        if self.stored or self.fortran:
            mapped = self._map()
            for first in range(start, stop, batch_size):
                yield np.array(mapped[first : min(first + batch_size, stop)])
            return
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(self.name) as f:
            f.seek(self.header_length + start * row)  # decompresses what lies before
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                data = f.read(count * row)
                if len(data) != count * row:
                    raise EOFError("it ends early")
                rows = np.frombuffer(bytearray(data), self.dtype)  # of bytes alone it would be read-only
                yield rows.reshape(count, *self.shape[1:])

    def _map(self):
        """Map the array into memory: from the archive, or where that is compressed from a temporary copy."""
        if self._mapped is None:
            path, offset = self.path, None
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self.name)
                if self.stored:
                    with open(self.path, "rb") as f:
                        f.seek(info.header_offset)
                        local = f.read(30)
                    lengths = sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
                    offset = info.header_offset + 30 + lengths + self.header_length
                else:
                    self._temporary = tempfile.TemporaryFile()
                    with archive.open(info) as f:
                        while block := f.read(2**20):
                            self._temporary.write(block)
                    self._temporary.flush()
                    path, offset = self._temporary, self.header_length
            order = "F" if self.fortran else "C"
            self._mapped = np.memmap(path, self.dtype, "r", offset=offset, shape=self.shape, order=order)
        return self._mapped


def read_npy_header(f):
    """Shape, whether in Fortran order, and type of an .npy stream of version 1, 2 or 3; leaves it at the data."""
    magic = f.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("not an .npy array")
    length = int.from_bytes(f.read(2 if magic[6] == 1 else 4), "little")
    header = ast.literal_eval(f.read(length).decode("utf-8" if magic[6] == 3 else "latin1"))
    dtype = np.lib.format.descr_to_dtype(header["descr"])
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return tuple(header["shape"]), bool(header["fortran_order"]), dtype
