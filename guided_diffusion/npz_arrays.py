"""Arrays in .npz files that may be larger than memory: read a few rows at a time, written as a stream."""

import math
import zipfile
import zlib

import numpy as np

from . import files

# Exceptions by which reading a damaged .npz fails
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NpzArray:
    """An array of an .npz file. Indexing by a slice or an array of indices reads these rows.

    Arrays at URLs and arrays in Fortran order are read as a whole. In a compressed file, reading rows before the last
    ones read decompresses from the start again.

    :param path: the file.
    :param name: the array's name, without .npy.
    :raises KeyError: if there is no such array; any of DAMAGED if the file cannot be read.
    """

    def __init__(self, path, name):
        self.whole = None
        if files.is_url(path):
            with files.open_file(path) as f, np.load(f, allow_pickle=False) as arrays:
                self.whole = arrays[name]
        else:
            self._open(path, f"{name}.npy")
        if self.whole is not None:
            self.shape, self.dtype = self.whole.shape, self.whole.dtype

    def _open(self, path, member):
        archive = zipfile.ZipFile(path)
        info = archive.getinfo(member)
        self.file = archive.open(info)
        self.shape, fortran, self.dtype = read_npy_header(self.file)
        self.start = self.file.tell()
        if fortran or not self.shape:
            self.whole = np.lib.format.read_array(archive.open(info), allow_pickle=False)
        elif info.file_size != self.start + math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{member} has another size than its header says")
        elif info.compress_type == zipfile.ZIP_STORED:  # seek in the file itself: in an archive it reads what it skips
            self.file = open(path, "rb")
            self.file.seek(info.header_offset)
            local = self.file.read(30)
            self.start += info.header_offset + 30 + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if self.whole is not None:
            return self.whole[index]
        rows = np.arange(len(self))[index]
        if isinstance(index, slice) and index.step in (None, 1):
            return self._read(rows[0] if len(rows) else 0, len(rows))
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for place, row in np.ndenumerate(rows):
            out[place] = self._read(row, 1)[0]
        return out

    def _read(self, first, count):
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.file.seek(self.start + int(first) * size)
        data = bytearray(self.file.read(count * size))  # of bytes alone the array would be read-only
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


def read_npy_header(f):
    """The shape, Fortran order and dtype of an .npy stream, which is left at the first row."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"unknown version {version} of the .npy format")
    # Version 3 differs from 2 in the encoding of field names, which arrays of plain numbers lack.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(f)
    if dtype.hasobject or dtype.names:
        raise ValueError("not an array of plain numbers")
    return shape, fortran, dtype


def write_npz(f, arrays):
    """Write an uncompressed .npz as a stream.

    :param f: a binary file.
    :param arrays: {name: (shape, dtype, iterable of arrays that hold the rows in order)}.
    """
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, parts) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(out, header)
                for part in parts:
                    out.write(np.ascontiguousarray(part, dtype).tobytes())
