"""Read a few rows at a time from .npz files that are larger than memory, and write such files as a stream."""

import zipfile
import zlib

import numpy as np

from . import files

# Exceptions that are raised when a damaged .npz is read
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NpzArray:
    """An array in an .npz file, mapped into memory. Indexing reads the selected rows and returns a copy.

    Compressed arrays and arrays at URLs are read as a whole.

    :param path: the path of the .npz file.
    :param name: the name of the array, without .npy.
    :raises KeyError: if the file has no such array.
    :raises DAMAGED: one of these exceptions, if the file cannot be read.
    """

    def __init__(self, path, name):
        with files.open_file(path) as f, zipfile.ZipFile(f) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                self.shape, fortran, self.dtype = _read_header(member)
                header_size = member.tell()
            if files.is_url(path) or info.compress_type != zipfile.ZIP_STORED or 0 in self.shape:
                with archive.open(info) as member:
                    self.rows = np.lib.format.read_array(member, allow_pickle=False)
            else:
                f.seek(info.header_offset + 26)  # the lengths of the two fields at the end of the zip member's header
                name_and_extra = np.frombuffer(f.read(4), "<u2").sum()
                start = info.header_offset + 30 + int(name_and_extra) + header_size
                self.rows = np.memmap(path, self.dtype, "r", start, self.shape, "F" if fortran else "C")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return np.array(self.rows[index])


def _read_header(f):
    """Read the header of an .npy stream: (shape, whether the order is Fortran's, dtype)."""
    # Versions 2 and 3 differ only in the encoding of field names, and arrays of plain numbers have no fields.
    first_version = np.lib.format.read_magic(f) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first_version else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(f)
    if dtype.hasobject:
        raise ValueError("not an array of plain numbers")
    return shape, fortran, dtype


def write_npz(f, arrays):
    """Write an uncompressed .npz file as a stream.

    :param f: a binary file, open for writing.
    :param arrays: {name: (shape, dtype, parts)}, where `parts` is an iterable of arrays with consecutive rows.
    """
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, parts) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(out, header)
                for part in parts:
                    out.write(np.ascontiguousarray(part, dtype).tobytes())
