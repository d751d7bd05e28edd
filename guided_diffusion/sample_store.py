"""Samples on disk: shards as they are made, and one .npz in the end.

A job's folder holds

    shards/job.json               what decides the images: the flags, and the weights' fingerprints
    shards/000000032-000000048.npz    samples 32 to 47: arr_0 the images, arr_1 their labels
    samples_50000x64x64x3.npz     all of them, once they are there; the shards are removed then
    samples_50000x64x64x3.json    what shards/job.json said

Nothing here knows of ranks: rank 0 alone reads and writes.
"""

import json
import re
import zipfile
import zlib
from contextlib import suppress

import numpy as np

from . import files, logger
from .errors import InputError

SHARDS, JOB = "shards", "job.json"


class SampleStore:
    """The samples of one job, as far as they are made.

    :param folder: the job's folder.
    :param shape: of all samples together: (N, H, W, C).
    :param job: what decides the images: a flat dict of names and plain values.
    :param labels: int64 [N], or None.
    """

    def __init__(self, folder, shape, job, labels=None):
        self.folder = folder
        self.shape = tuple(shape)
        self.job = json.loads(json.dumps(job))
        self.labels = labels
        self.shards = files.join(folder, SHARDS)
        self.stem = files.join(folder, f"samples_{'x'.join(map(str, self.shape))}")
        self.finished = {}  # the shards' paths, by (start, stop)

    def open(self):
        """Take stock of what is there already.

        :return: the samples that are missing: a sorted list of (start, stop).
        :raises InputError: when the folder holds another job's samples.
        """
        if files.exists(f"{self.stem}.npz"):
            self._check_job(f"{self.stem}.json")
            self.remove_shards()
            return []
        files.make_dirs(self.shards)
        job_path = files.join(self.shards, JOB)
        self._check_job(job_path)
        if not files.exists(job_path):
            self._write_job(job_path)
        for name in files.list_dir(self.shards):
            path = files.join(self.shards, name)
            if name.endswith(".tmp"):  # of a process that was killed while it wrote
                files.remove(path)
            elif match := re.fullmatch(r"(\d{9})-(\d{9})\.npz", name):
                span = tuple(map(int, match.groups()))
                try:
                    self._read(path, span)
                    self.finished[span] = path
                except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                    logger.warn(f"{path} is damaged: these samples are made again")
                    files.remove(path)
        return self.missing()

    def missing(self):
        """The samples that no shard holds: a sorted list of (start, stop)."""
        gaps, position = [], 0
        for start, stop in [*sorted(self.finished), (self.shape[0], self.shape[0])]:
            if position < min(start, self.shape[0]):
                gaps.append((position, min(start, self.shape[0])))
            position = max(position, stop)
        return gaps

    def write(self, start, images):
        """Keep samples start, start + 1, ... : uint8 [n, H, W, C]."""
        span = (start, start + len(images))
        path = files.join(self.shards, f"{span[0]:09d}-{span[1]:09d}.npz")
        arrays = [images] if self.labels is None else [images, np.asarray(self.labels[slice(*span)])]
        with self._explained(path), files.write_atomically(path) as f:
            np.savez(f, *arrays)
        self.finished[span] = path

    def assemble(self):
        """Stream all shards into one .npz, of which no more than a shard is in memory; return its path.

        The shards stay until remove_shards().
        """
        path = f"{self.stem}.npz"
        if files.exists(path):
            return path
        self._write_job(f"{self.stem}.json")  # first: what has the .npz must also have what it is of
        with (
            self._explained(path),
            files.write_atomically(path) as f,
            zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                _write_header(out, np.dtype(np.uint8), self.shape)
                for part in self.parts():
                    out.write(part.tobytes())
            if self.labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as out:
                    labels = np.asarray(self.labels, dtype=np.int64)
                    _write_header(out, labels.dtype, labels.shape)
                    out.write(labels.tobytes())
        return path

    def parts(self):
        """All images in order, a part at a time: of the shards, or where those have gone of the .npz."""
        if not self.finished:
            images = NpzArray(f"{self.stem}.npz", "arr_0")
            for start in range(0, self.shape[0], 64):
                yield images[start : start + 64]
        position = 0
        for span in sorted(self.finished):
            start, stop = max(span[0], position), min(span[1], self.shape[0])
            if start < stop:
                yield self._read(self.finished[span], span)[start - span[0] : stop - span[0]]
                position = stop

    def images(self, indices):
        """Some samples: uint8 [len(indices), H, W, C]."""
        wanted = np.asarray(indices)
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for span in sorted(self.finished):
            inside = (span[0] <= wanted) & (wanted < span[1])
            if inside.any():
                out[inside] = self._read(self.finished[span], span)[wanted[inside] - span[0]]
        return out

    def remove_shards(self):
        """Remove the shards, once the .npz holds what they do."""
        if not files.is_dir(self.shards):
            return
        for name in files.list_dir(self.shards):
            if name != JOB:
                files.remove(files.join(self.shards, name))
        with suppress(OSError):
            files.remove(files.join(self.shards, JOB))
            files.remove_dir(self.shards)

    def _read(self, path, span):
        """A shard's images. The archive's checksums are compared as it is read."""
        with files.open_file(path) as f, np.load(f) as arrays:
            images = arrays["arr_0"]
            if self.labels is not None and not np.array_equal(arrays["arr_1"], self.labels[slice(*span)]):
                raise ValueError("other labels")
        if images.dtype != np.uint8 or images.shape != (span[1] - span[0], *self.shape[1:]):
            raise ValueError("other images")
        return images

    def _write_job(self, path):
        with files.write_atomically(path) as f:
            f.write((json.dumps(self.job, indent=1) + "\n").encode())

    def _check_job(self, path):
        """Refuse to mix samples with those of another job."""
        if not files.exists(path):
            if path.endswith(f"{SHARDS}/{JOB}"):
                return
            raise InputError(f"{self.stem}.npz is in the way, and nothing says what it is of: give another --log_dir")
        with files.open_file(path) as f:
            job = json.loads(f.read())
        for name in {**job, **self.job}:
            if job.get(name) != self.job.get(name):
                raise InputError(
                    f"{path}: this folder holds samples made with --{name} {job.get(name)}, not {self.job.get(name)}: "
                    f"give another --log_dir, or the flag they were made with"
                )

    def _explained(self, path):
        return files.disk_errors(path, f"{self.count()} of {self.shape[0]} samples are kept in {self.shards}")

    def count(self):
        """How many samples there are."""
        return self.shape[0] - sum(stop - start for start, stop in self.missing())


class NpzArray:
    """An array in an .npz file, of which only what is asked for is read, as long as the file is not compressed.

    :param path: a local path or a URL; what is compressed or remote is read whole.
    :param name: the array's, without .npy.
    :raises KeyError: when there is no such array.
    """

    def __init__(self, path, name):
        self.array = None if files.is_url(path) else _map(path, f"{name}.npy")
        if self.array is None:
            with files.open_file(path) as f, np.load(f, allow_pickle=False) as arrays:
                self.array = arrays[name]
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return np.array(self.array[index])


def _map(path, member):
    """Map a member of an uncompressed .npz into memory; None where that cannot be done."""
    with open(path, "rb") as f, zipfile.ZipFile(f) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(info) as header:  # its position counts from the member's first byte
            version = np.lib.format.read_magic(header)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                return None
            shape, fortran, dtype = read[version](header)
            in_member = header.tell()
        f.seek(info.header_offset)
        local = f.read(30)
        start = info.header_offset + 30 + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28)) + in_member
    if dtype.hasobject or 0 in shape:
        return None
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _write_header(out, dtype, shape):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, header)
