"""Samples on disk: shards as they are made, and one .npz in the end.

A job's folder holds

    shards/job.json               what decides the images: the flags, and the weights' fingerprints
    shards/000000032-000000048.npz    samples 32 to 47: arr_0 the images, arr_1 their labels
    samples_50000x64x64x3.npz     all of them, once they are there; the shards are removed then
    samples_50000x64x64x3.json    what shards/job.json said

Nothing here knows of ranks: rank 0 alone reads and writes.
"""

import json
import math
import re
import zipfile
import zlib
from contextlib import suppress

import numpy as np

from . import files, logger
from .errors import InputError

SHARDS, JOB = "shards", "job.json"
# What reading a damaged .npz may raise
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


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
        self.name = f"samples_{'x'.join(map(str, self.shape))}"
        self.stem = files.join(folder, self.name)
        self.finished = {}  # the shards' paths, by (start, stop)
        self.count = 0  # how many samples there are

    def open(self):
        """Take stock of what is there already.

        :return: the samples that are missing: a sorted list of (start, stop).
        :raises InputError: when the folder holds another job's samples, or a finished file that is damaged.
        """
        job_path = files.join(self.shards, JOB)
        if files.exists(f"{self.stem}.npz"):
            self._check_job(f"{self.stem}.json")
            self._check_whole(f"{self.stem}.npz")
            self._check_labels(f"{self.stem}.npz", (0, self.shape[0]))
            self._remove_leftovers(self.folder, self.name)
            if not self._list_shards() or self._read_job(job_path) == self.job:
                self.remove_shards()
            self.count = self.shape[0]
            return []
        with self.explained(job_path):
            files.make_dirs(self.shards)
        shards = self._list_shards()
        if shards:
            self._check_job(job_path)
        else:
            self._write_job(job_path)
        self._remove_leftovers(self.folder, self.name)
        self._remove_leftovers(self.shards)
        for span, path in shards:
            if self._is_whole(path, span):
                self.finished[span] = path
            else:
                logger.warn(f"{path} is damaged: these samples are made again")
                files.remove(path)
        missing = self.missing()
        self.count = self.shape[0] - sum(stop - start for start, stop in missing)
        return missing

    def _list_shards(self):
        names = files.list_dir(self.shards) if files.is_dir(self.shards) else []
        found = [re.fullmatch(r"(\d{9,})-(\d{9,})\.npz", name) for name in names]
        return [(tuple(map(int, match.groups())), files.join(self.shards, match[0])) for match in found if match]

    def _is_whole(self, path, span):
        try:
            self._read(path, span)
            self._check_labels(path, span)
        except InputError:
            raise
        except DAMAGED:
            return False
        return True

    def _remove_leftovers(self, folder, beginning=""):
        """Remove the temporary files of a process that was killed while it wrote: they may be large."""
        for name in files.list_dir(folder):
            if name.startswith(beginning) and name.endswith(".tmp"):
                files.remove(files.join(folder, name))

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
        with self.explained(path), files.write_atomically(path) as f:
            np.savez(f, *arrays)
        self.finished[span] = path
        self.count += len(images)

    def assemble(self):
        """Stream all shards into one .npz, of which no more than a shard is in memory; return its path.

        The shards stay until remove_shards().
        """
        path = f"{self.stem}.npz"
        if files.exists(path):
            return path
        self._write_job(f"{self.stem}.json")  # first: what has the .npz must also have what it is of
        with (
            self.explained(path),
            files.write_atomically(path) as f,
            zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                _write_header(out, np.dtype(np.uint8), self.shape)
                for _, read in self.parts():
                    out.write(read().tobytes())
            if self.labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as out:
                    labels = np.asarray(self.labels, dtype=np.int64)
                    _write_header(out, labels.dtype, labels.shape)
                    out.write(labels.tobytes())
        return path

    def parts(self):
        """All images in order, a part at a time: of the shards, or where those have gone of the .npz.

        :return: yields pairs of the first image's index and a function that reads the part: uint8 [n, H, W, C].
        """
        if not self.finished and files.exists(f"{self.stem}.npz"):
            images = NpzArray(f"{self.stem}.npz", "arr_0")
            for start in range(0, self.shape[0], 64):
                yield start, lambda start=start: images[start : start + 64]
        position = 0
        for span in sorted(self.finished):
            start, stop = max(span[0], position), min(span[1], self.shape[0])
            if start < stop:
                inside = slice(start - span[0], stop - span[0])
                yield start, lambda span=span, inside=inside: self._read(self.finished[span], span)[inside]
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
        """Remove the shards whose samples the .npz holds. Those beyond, of a longer run, stay."""
        for span, path in self._list_shards():
            if span[1] <= self.shape[0]:
                files.remove(path)
        if not self._list_shards():
            with suppress(OSError):  # it may have gone already: the last to be removed is the folder
                files.remove(files.join(self.shards, JOB))
            with suppress(OSError):
                files.remove_dir(self.shards)

    def explained(self, path):
        """A context in which a write to `path` that the system refuses ends the run with a message of one line."""
        return files.disk_errors(path, f"{self.count} of {self.shape[0]} samples are kept in {self.folder}")

    def _read(self, path, span):
        """A shard's images. The archive's checksums are compared as it is read."""
        with files.open_file(path) as f, np.load(f) as arrays:
            images = arrays["arr_0"]
        if images.dtype != np.uint8 or images.shape != (span[1] - span[0], *self.shape[1:]):
            raise ValueError("other images")
        return images

    def _write_job(self, path):
        with self.explained(path), files.write_atomically(path) as f:
            f.write((json.dumps(self.job, indent=1) + "\n").encode())

    def _read_job(self, path):
        try:
            with files.open_file(path) as f:
                return dict(json.loads(f.read()))
        except (OSError, ValueError, TypeError):
            return None

    def _check_job(self, path):
        """Refuse to mix samples with those of another job."""
        job = self._read_job(path)
        if job is None:
            raise InputError(
                f"{self.folder} holds samples, and no readable {path} says what they are of: give another --log_dir"
            )
        for name in {**job, **self.job}:
            if job.get(name) != self.job.get(name):
                raise InputError(
                    f"{path}: this folder holds samples made with --{name} {job.get(name)}, not {self.job.get(name)}: "
                    f"give another --log_dir, or the flag they were made with"
                )

    def _check_whole(self, path):
        """Refuse a finished file that is damaged. All that is wanted of it is read, a block at a time."""
        wanted = {"arr_0.npy": (self.shape, np.dtype(np.uint8))}
        if self.labels is not None:
            wanted["arr_1.npy"] = (self.shape[:1], np.dtype(np.int64))
        try:
            with files.open_file(path) as f, zipfile.ZipFile(f) as archive:
                for member, (shape, dtype) in wanted.items():
                    *header, start = _read_checked_header(archive, member)
                    size = start + math.prod(shape) * dtype.itemsize
                    if header != [shape, False, dtype] or archive.getinfo(member).file_size != size:
                        raise ValueError(f"{member} is not what was written")
        except DAMAGED as e:
            reason = " ".join(str(e).split()) or "cut short"
            raise InputError(f"{path}: damaged ({reason}): remove it and run this again") from None

    def _check_labels(self, path, span):
        """Refuse samples of the same flags with other labels, as a changed file of classes gives."""
        if self.labels is None:
            return
        wanted = self.labels[slice(*span)]  # of a job for fewer samples, this may be a part of the shard's
        same = np.array_equal(NpzArray(path, "arr_1")[: len(wanted)], wanted)
        if not same:
            raise InputError(
                f"{path}: these samples have other labels than those asked for: the file, or the names of the "
                f"classes, that they come from has changed: give another --log_dir"
            )


class NpzArray:
    """An array in an .npz file, of which only what is asked for is in memory. Its checksum is compared at once.

    :param path: a local path; or a URL, where the array is read whole. So is one in Fortran's order, whose rows lie
        scattered.
    :param name: the array's, without .npy.
    :raises KeyError: when there is no such array; any of DAMAGED for what cannot be read.
    """

    def __init__(self, path, name):
        if files.is_url(path):
            with files.open_file(path) as f, np.load(f, allow_pickle=False) as arrays:
                self.array = arrays[name]
        else:
            self.array = _open_member(path, f"{name}.npy")
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return self.array[index]


class _Rows:
    """An array in a file, read row by row. In a compressed one reading goes forward; going back starts anew.

    :param file: of bytes, with seek and read.
    :param start: where in the file the first row begins.
    """

    def __init__(self, file, start, shape, dtype):
        self.file, self.start, self.shape, self.dtype = file, start, shape, dtype

    def __getitem__(self, index):
        rows = np.arange(self.shape[0])[index]
        out = np.empty((rows.size, *self.shape[1:]), self.dtype)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        for place, row in enumerate(rows.flat):
            self.file.seek(self.start + int(row) * size)
            out[place] = np.frombuffer(self.file.read(size), self.dtype).reshape(self.shape[1:])
        return out.reshape(*rows.shape, *self.shape[1:])


def _open_member(path, member):
    """Something to index that reads an array in an archive: see NpzArray."""
    archive = zipfile.ZipFile(path)
    info = archive.getinfo(member)
    shape, fortran, dtype, start = _read_checked_header(archive, info)
    if fortran or 0 in shape or not shape:
        return np.lib.format.read_array(archive.open(info), allow_pickle=False)
    if info.compress_type != zipfile.ZIP_STORED:
        return _Rows(archive.open(info), start, shape, dtype)
    file = open(path, "rb")
    file.seek(info.header_offset)
    local = file.read(30)
    start += info.header_offset + len(local) + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    return _Rows(file, start, shape, dtype)


def _read_checked_header(archive, member):
    """The shape, Fortran order and dtype of an array in an archive, and where in the member its first row begins."""
    with archive.open(member) as content:  # first: numpy's errors at a damaged header are of many kinds
        while content.read(2**20):  # to its end, where the checksum is
            pass
    with archive.open(member) as content:
        return *_read_header(content), content.tell()


def _read_header(f):
    """The shape, Fortran order and dtype of an array in numpy's format, of any version."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of numpy's format")
    # Version 3 is 2 with names of fields in UTF-8: of plain numbers they read the same.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(f)
    if dtype.hasobject or dtype.names:
        raise ValueError("not an array of plain numbers")
    return shape, fortran, dtype


def _write_header(out, dtype, shape):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, header)
