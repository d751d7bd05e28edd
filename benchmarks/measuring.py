"""What all benchmarks measure with: times, the machine's own rate, peak memory, and whether others were at work."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def timed(work, rounds, warmup=1):
    """The median wall time of work(), in seconds."""
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
    """The machine's rate for a large square matrix product: operations a second. What utilisation is relative to.

    On a GPU that of float32 is TF32's, in which torch's convolutions run by default.
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
    """The floating-point operations of work(), by torch's counter: matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_rss_mb():
    """The most memory that this process has had, in MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class OtherLoad:
    """How many cores other processes kept busy meanwhile (`cores`); above 0.1, times are not to be trusted. Linux only.

    Used as a context manager around what is measured.
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
        """The time, the machine's and this process' seconds of work."""
        own = sum(os.times()[:4])
        try:
            with open("/proc/stat") as f:
                ticks = [int(x) for x in f.readline().split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except OSError:
            busy = float("nan")
        return time.perf_counter(), busy, own


def in_own_process(script, *args):
    """Run a benchmark's part in a process of its own, for a peak of its own: what it prints last, parsed as JSON."""
    argv = [sys.executable, os.path.abspath(script), *map(str, args)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])
