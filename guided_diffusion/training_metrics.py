"""Metrics of a training run: losses by noise level, throughput, and memory."""

import datetime
import sys
import time
from contextlib import contextmanager

import torch as th

from . import logger


def log_loss_dict(diffusion, ts, losses):
    """Log the mean of each loss over all timesteps, and over each quartile of the timesteps (NAME_q0 has the least
    noise).

    :param ts: timesteps [N].
    :param losses: a dict of tensors [N].
    """
    quartiles = [int(4 * t / diffusion.num_timesteps) for t in ts.tolist()]
    for key, values in losses.items():
        values = values.detach().tolist()
        for quartile, value in zip(quartiles, values):
            logger.logkv_mean(key, value)
            logger.logkv_mean(f"{key}_q{quartile}", value)


class Throughput:
    """Measures the speed of training between two log rows."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self):
        """Count the time in a `with` block as time spent waiting for data, and count a step."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        self.steps += 1

    def metrics(self, images_per_step, steps_left=None):
        """Return the metrics of a log row, and start measuring for the next row.

        :param images_per_step: the number of images per step on all ranks.
        :param steps_left: the number of steps until the end of the run, or None if the run has no end.
        :return: a dict of steps_per_s; images_per_s on all ranks; data_wait, the fraction of the time that this rank
            waited for data; memory_mb, see peak_memory_mb; and eta, the time left.
        """
        seconds = time.perf_counter() - self.start
        rate = self.steps / seconds
        found = dict(steps_per_s=rate, images_per_s=rate * images_per_step, data_wait=self.waited / seconds)
        found["memory_mb"] = peak_memory_mb()
        if steps_left is not None:
            found["eta"] = str(datetime.timedelta(seconds=round(steps_left / rate)))
        self._restart()
        return found


def peak_memory_mb():
    """Return the peak memory of this process in MiB: allocated GPU memory, or the resident set without a GPU."""
    if th.cuda.is_available():
        return th.cuda.max_memory_allocated() / 2**20
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
