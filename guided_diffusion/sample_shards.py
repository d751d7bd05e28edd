"""The files of a sampling job: shards during the job, and one .npz file at the end.

    shards/job.json                   the job: flags, and fingerprints of the weights
    shards/000000032-000000048.npz    samples 32 to 47: arr_0 the images, arr_1 their labels
    samples_50000x64x64x3.npz         all samples; the shards are removed when this file is complete
    samples_50000x64x64x3.json        a copy of shards/job.json

Every rank writes shards. Rank 0 alone calls `SampleStore.open`, `assemble` and `remove_shards`.
"""

import json
import re
from contextlib import suppress

import numpy as np

from . import files, logger
from .errors import InputError
from .npz_arrays import DAMAGED, NpzArray, write_npz

JOB = "job.json"


class SampleStore:
    """The samples of one job.

    :param folder: the folder of the job.
    :param shape: the shape (N, H, W, C) of all samples.
    :param job: the settings that determine the images, as a dict of plain values.
    :param labels: the labels of all samples, int64 [N], or None.
    """

    def __init__(self, folder, shape, job, labels=None):
        self.folder, self.shape, self.labels = folder, tuple(shape), labels
        self.job = json.loads(json.dumps(job))  # the same types as after reading job.json
        self.shards = files.join(folder, "shards")
        self.stem = files.join(folder, f"samples_{'x'.join(map(str, self.shape))}")
        self.path = f"{self.stem}.npz"

    def open(self):
        """Prepare the folder, and remove the unfinished files of a killed job.

        :return: the missing samples, a sorted list of (start, stop).
        :raises InputError: if the folder holds samples of another job, or a finished file that is damaged.
        """
        job_path = files.join(self.shards, JOB)
        if files.exists(self.path):
            self._check_job(f"{self.stem}.json")
            if not self._is_whole(self.path, (0, self.shape[0])):
                raise InputError(f"{self.path}: damaged: remove it and run this again")
            if not self._spans() or self._read_job(job_path) == self.job:
                self.remove_shards()
            return []
        with self.explained(job_path):
            files.make_dirs(self.shards)
        if self._spans():
            self._check_job(job_path)
        else:
            self._write_job(job_path)
        for folder in (self.folder, self.shards):
            for name in files.list_dir(folder):
                if re.fullmatch(r"(samples_|\d{9,}-|job).*\.tmp", name):
                    files.remove(files.join(folder, name))
        for span, path in self._spans():
            if not self._is_whole(path, span):
                logger.warn(f"{path} is damaged: its samples will be made again")
                files.remove(path)
        return self.missing()

    def write(self, start, images):
        """Write a shard with the samples start, start + 1, ...: uint8 [n, H, W, C]."""
        span = (start, start + len(images))
        arrays = [images] if self.labels is None else [images, self.labels[slice(*span)]]
        path = files.join(self.shards, "{:09d}-{:09d}.npz".format(*span))
        with self.explained(path), files.write_atomically(path) as f:
            np.savez(f, *arrays)

    def missing(self):
        """Return the samples that are in no shard, a sorted list of (start, stop)."""
        gaps, position, total = [], 0, self.shape[0]
        for start, stop in [*(span for span, _ in self._spans()), (total, total)]:
            if position < min(start, total):
                gaps.append((position, min(start, total)))
            position = max(position, stop)
        return gaps

    def parts(self):
        """Yield the images in order, in parts of (first index, uint8 array [n, H, W, C], slice of the array's rows)."""
        if files.exists(self.path):
            images = NpzArray(self.path, "arr_0")
            for start in range(0, self.shape[0], 64):
                yield start, images, slice(start, start + 64)
            return
        position = 0
        for (start, stop), path in self._spans():
            first, last = max(start, position), min(stop, self.shape[0])
            if first < last:
                yield first, NpzArray(path, "arr_0"), slice(first - start, last - start)
                position = last

    def assemble(self):
        """Copy all shards to one .npz file without loading them all. `remove_shards` removes the shards afterwards."""
        self._write_job(f"{self.stem}.json")  # first, because a finished .npz without this file cannot be reused
        arrays = {"arr_0": (self.shape, np.uint8, (images[rows] for _, images, rows in self.parts()))}
        if self.labels is not None:
            arrays["arr_1"] = (self.labels.shape, np.int64, [self.labels])
        with self.explained(self.path), files.write_atomically(self.path) as f:
            write_npz(f, arrays)

    def remove_shards(self):
        """Remove the shards whose samples are in the .npz file. Shards of a run with more samples are kept."""
        for span, path in self._spans():
            if span[1] <= self.shape[0]:
                files.remove(path)
        if not self._spans():
            with suppress(OSError):  # a killed run may have removed the file already
                files.remove(files.join(self.shards, JOB))
            with suppress(OSError):
                files.rmdir(self.shards)

    def explained(self, path):
        """Return a context manager that reports an error of the disk in one line."""
        return files.disk_errors(path, f"the finished samples are kept in {self.folder}")

    def _spans(self):
        """Return the shards, a sorted list of ((start, stop), path)."""
        names = files.list_dir(self.shards) if files.is_dir(self.shards) else []
        found = [re.fullmatch(r"(\d{9,})-(\d{9,})\.npz", name) for name in names]
        return sorted((tuple(map(int, m.groups())), files.join(self.shards, m[0])) for m in found if m)

    def _is_whole(self, path, span):
        try:
            images = NpzArray(path, "arr_0")
            labels = None if self.labels is None else NpzArray(path, "arr_1")[:]
        except DAMAGED:
            return False
        if labels is not None:
            wanted = self.labels[slice(*span)]  # a shard of a run with more samples may have more labels
            if not np.array_equal(labels[: len(wanted)], wanted):
                raise InputError(
                    f"{path}: these samples have other labels than this job's: the classes have changed: give another "
                    f"--log_dir"
                )
        return images.dtype == np.uint8 and images.shape == (span[1] - span[0], *self.shape[1:])

    def _write_job(self, path):
        with self.explained(path), files.write_atomically(path) as f:
            f.write((json.dumps(self.job, indent=1) + "\n").encode())

    def _read_job(self, path):
        try:
            with files.open_file(path) as f:
                return dict(json.loads(f.read()))
        except (OSError, ValueError, TypeError):
            return {}

    def _check_job(self, path):
        """Raise InputError if the folder holds samples of another job or of an unknown job."""
        job = self._read_job(path)
        for name in {**job, **self.job}:
            if job.get(name) != self.job.get(name):
                raise InputError(
                    f"{path}: this folder holds samples made with --{name} {job.get(name)}, not {self.job.get(name)}: "
                    f"give another --log_dir, or the flag they were made with"
                )
