"""How jobs end: a failing rank prints its error and ends all ranks, and a successful job does not hang."""

import blobfile
import pytest
import torch as th
from launch import run
from sampling import run_ranks

from guided_diffusion.errors import InputError, as_input_error

FAILING = """
import os, signal, sys, time
from guided_diffusion import dist_util
from guided_diffusion.errors import InputError
dist_util.setup_dist()
rank = dist_util.get_rank()
dist_util.wait_for_all()
if rank == 1:
    open(sys.argv[1], "w").write(str(time.time()))
{failure}
for _ in range(1000):
    dist_util.wait_for_all()
    time.sleep(0.1)
"""
BAD_FLAG = 'raise InputError("--flag 7: too many")'
BAD_IMAGE = 'if rank == 1: raise InputError("image.png: broken")'
BUG = 'if rank == 1: raise RuntimeError("the disk is on fire")'
KILLED = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "launcher, failure, line",
    [
        ("mpiexec", BAD_FLAG, "error: --flag 7: too many"),
        ("mpiexec", BUG, "RuntimeError: the disk is on fire"),
        ("torchrun", BAD_IMAGE, "rank 1: error: image.png: broken"),
        ("mpiexec", KILLED, "signal 9"),  # printed by mpiexec
        ("torchrun", KILLED, "error: lost the connection to another rank"),
    ],
)
def test_a_failing_rank_ends_the_job_and_says_why(launcher, failure, line, tmp_path):
    note = tmp_path / "failed_at.txt"
    done = run(["-c", FAILING.format(failure=failure), str(note)], ranks=2, launcher=launcher)
    assert done.returncode != 0 and done.ended - float(note.read_text()) < 10, done.output
    assert line in done.output
    assert "<string>" not in done.output or failure == BUG, done.output  # no traceback from a rank


@pytest.mark.parametrize(
    "code",
    [
        "if rank == 1: time.sleep(1)",
        "x = th.ones(4)\ndist.send(x, 1) if rank == 0 else dist.recv(x, 0) if rank == 1 else None",
        "dist.destroy_process_group(); dist_util.setup_dist(); dist_util.wait_for_all()",
    ],
    ids=["one rank finishes later", "point-to-point messages", "a second process group"],
)
def test_successful_jobs_end_without_errors(code):
    start = "import time, torch as th, torch.distributed as dist\nfrom guided_diffusion import dist_util\n"
    outcome, _ = run_ranks(3, [], f"{start}dist_util.setup_dist(); rank = dist_util.get_rank()\n{code}\n")
    assert outcome.returncode == 0 and not outcome.output, outcome.output


# A thread needs the GIL at exit. With this switch interval, only a thread that sleeps or waits releases the GIL.
GIL_WANTED = """
import atexit, sys, threading
import torch.distributed as dist
from guided_diffusion import dist_util
dist_util.setup_dist()
ending, done = threading.Event(), threading.Event()
threading.Thread(target=lambda: (ending.wait(), done.set()), daemon=True).start()
atexit.register(ending.set)
dist.destroy_process_group = lambda: print(f"the thread has finished: {done.is_set()}", flush=True)
sys.setswitchinterval(1000)
"""


def test_threads_get_the_gil_before_the_process_group_is_destroyed():
    # Before torch 2.13, destroy_process_group joined gloo's threads while it held the GIL, so jobs hung at exit.
    assert "the thread has finished: True" in run_ranks(2, [], GIL_WANTED)[0].check().output


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("Unable to allocate 2.73 TiB"), ["main memory", "(Unable to allocate 2.73 TiB)", "--image_size"]),
        (RuntimeError("unable to allocate shared memory(shm) for file </t>"), ["/dev/shm", "--num_workers 0"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ["pid 7", "--num_workers"]),
        (blobfile.Error("Unrecognized path: 's3://b/m.pt'"), ["Unrecognized path: 's3://b/m.pt'"]),
        (PermissionError(13, "Permission denied", "runs/log.txt"), ["runs/log.txt: Permission denied"]),
        (th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), ["GPU memory", "2.50 GiB", "lower"]),
        (None, ["main memory", "4000000000000000 bytes", "--batch_size"]),
    ],
)  # fmt: skip
def test_system_errors_become_one_line_messages(error, words):
    if error is None:
        with pytest.raises(RuntimeError) as caught:
            th.empty(10**15)
        error = caught.value
    mistake = as_input_error(error)
    assert type(mistake) is InputError and all(word in str(mistake) for word in words) and "\n" not in str(mistake)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError("no file, no number")])
def test_other_errors_keep_their_traceback(error):
    assert as_input_error(error) is error
