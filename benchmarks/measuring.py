"""Helpers for benchmarks: measure times, the machine's peak rate, memory, and the load of other processes."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def timed(work, rounds, warmup=1):
    """Return the median wall time of work() in seconds."""
    import torch as th

    seconds = []
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        work()
        if th.cuda.is_available():
            th.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def matmul_rate(dtype, device="cpu", side=0):
    """Return the machine's rate for a large square matrix product in operations per second, to compute utilisation.

    On GPUs, float32 is measured with TF32, which PyTorch's convolutions use by default.
    """
    import torch as th

    side = side or (8192 if th.device(device).type == "cuda" else 2048)
    x = th.randn(side, side, device=device).to(dtype)
    before = th.backends.cuda.matmul.allow_tf32
    th.backends.cuda.matmul.allow_tf32 = True
    try:
        return 2 * side**3 / timed(lambda: x @ x, rounds=7, warmup=3)
    finally:
        th.backends.cuda.matmul.allow_tf32 = before


def count_operations(work):
    """Return the floating-point operations of the matrix products and convolutions in work()."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_rss_mb():
    """Return this process's peak resident memory in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class OtherLoad:
    """Context manager that measures how many CPU cores other processes keep busy, on average. Linux only.

    :ivar cores: the number of busy cores. If it is above 0.1, timings in the context are unreliable.
    """

    def __enter__(self):
        self.cores = float("nan")
        self._start = self._read()
        return self

    def __exit__(self, *_):
        now, before = self._read(), self._start
        self.cores = max(0.0, ((now[1] - before[1]) - (now[2] - before[2])) / (now[0] - before[0]))

    @staticmethod
    def _read():
        """Return the time, and the CPU seconds used so far by the whole machine and by this process."""
        own = sum(os.times()[:4])
        try:
            with open("/proc/stat") as f:
                ticks = [int(x) for x in f.readline().split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except OSError:
            busy = float("nan")
        return time.perf_counter(), busy, own


def in_own_process(script, *args):
    """Run a script in a new process, which has its own peak memory. Return the last line of stdout as parsed JSON."""
    argv = [sys.executable, os.path.abspath(script), *map(str, args)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])
