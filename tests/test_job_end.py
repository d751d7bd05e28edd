"""How jobs end: one rank's end is the end of all, one rank says why, and what the system denies is one line."""

import os
import sys
import threading

import blobfile
import pytest
import torch as th
from launch import run
from sampling import run_ranks

from guided_diffusion import dist_util, rendezvous
from guided_diffusion.errors import InputError

FAILING = """
import os, signal, sys, time
from guided_diffusion import dist_util
from guided_diffusion.errors import InputError
dist_util.setup_dist()
dist_util.barrier()
if dist_util.get_rank() == 1:
    open(sys.argv[1], "w").write(str(time.time()))
    {failure}
for _ in range(1000):
    dist_util.barrier()
    time.sleep(0.1)
"""


def fail(tmp_path, failure, launcher):
    """Let rank 1 of 2 fail while the other waits for it: the outcome, and the seconds from the failure to the end."""
    note = tmp_path / "failed_at.txt"
    done = run(["-c", FAILING.format(failure=failure), str(note)], ranks=2, launcher=launcher)
    return done, done.ended - float(note.read_text())


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_an_exception_on_one_rank_ends_all(launcher, tmp_path):
    done, seconds = fail(tmp_path, 'raise RuntimeError("the disk is on fire")', launcher)
    assert done.returncode != 0
    assert seconds < 10
    assert "rank 1: RuntimeError: the disk is on fire" in done.output


def test_a_killed_rank_ends_all(tmp_path):
    done, seconds = fail(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "mpiexec")
    assert done.returncode != 0
    assert seconds < 10
    assert "signal 9" in done.output  # the launcher's own words: a killed process has none


def test_bad_input_on_one_rank_ends_all(tmp_path):
    done, seconds = fail(tmp_path, 'raise InputError("image.png: broken")', "mpiexec")
    assert done.returncode != 0
    assert seconds < 10
    assert done.output.count("error: image.png: broken") == 1
    assert "Traceback" not in done.output


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_bad_input_on_all_ranks_is_said_once(launcher):
    snippet = (
        "from guided_diffusion import dist_util; from guided_diffusion.errors import InputError; "
        "dist_util.setup_dist(); raise InputError('--flag 7: too many')"
    )
    done = run(["-c", snippet], ranks=3, launcher=launcher)
    assert done.returncode != 0
    lines = done.output.splitlines()
    assert lines.count("error: --flag 7: too many") == 1
    assert sum("error: --flag 7" in line for line in lines) == 1
    if launcher == "mpiexec":  # torchrun adds a report of its own
        assert lines == ["error: --flag 7: too many"]


ONE_FAILS = """
import os, signal, sys, time
import torch.distributed as dist
from guided_diffusion import dist_util
from guided_diffusion.errors import InputError
dist_util.GRACE_S = 1
dist_util.setup_dist()
dist_util.barrier()
if dist_util.get_rank() == {rank}:
    {failure}
{others}
"""
BUSY, WAITING = "time.sleep(60)", "dist_util.barrier()"
DEATH = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "rank, failure, others, says, last",
    [
        (0, 'raise InputError("image.png: broken")', BUSY, 0, "error: image.png: broken"),
        (0, 'raise ValueError("a bug")', WAITING, 0, "ValueError: a bug"),
        (1, 'raise ValueError("a bug")', BUSY, 1, "ValueError: a bug"),
        (1, 'raise RuntimeError("a bug")', WAITING, 1, "RuntimeError: a bug"),
        (0, DEATH, WAITING, 1, "error: rank 0 has died, so the job ends"),
        (2, DEATH, BUSY, 0, "error: rank 2 has died, so the job ends"),
    ],
)
def test_one_rank_s_end_is_the_job_s_and_one_says_why(rank, failure, others, says, last):
    """Without a launcher's help, as under srun without MPI."""
    outcome, _ = run_ranks(3, [], ONE_FAILS.format(rank=rank, failure=failure, others=others))
    assert outcome.returncode != 0 and outcome.seconds < 8
    lines = [line for line in outcome.output.splitlines() if line]
    assert all(line.startswith(f"rank {says}: ") for line in lines), outcome.output
    assert lines[-1] == f"rank {says}: {last}" and (len(lines) == 1) == ("Error(" not in failure or "Input" in failure)


DEAF = "r, w = os.pipe(); os.close(r); os.dup2(w, 2); import time; time.sleep(60)"


@pytest.mark.parametrize("failure", ["os.fork() or sys.exit(); os.wait(); os.kill(os.getpid(), signal.SIGKILL)", DEATH])
def test_a_death_is_noticed_in_spite_of(failure):
    """A child that ended well before, and with its parent's connections; ranks whose words nobody reads."""
    outcome, _ = run_ranks(3, [], ONE_FAILS.format(rank=1, failure=failure, others=BUSY if "fork" in failure else DEAF))
    assert outcome.returncode != 0 and outcome.seconds < 8
    assert outcome.output.split("\n")[1:2] == (
        ["rank 2: error: rank 1 has died, so the job ends"] * ("fork" in failure)
    )


def test_a_mistake_after_the_group_s_end_is_said():
    failure = 'dist.destroy_process_group(); raise InputError("image.png: broken")'
    outcome, _ = run_ranks(3, [], ONE_FAILS.format(rank=1, failure=failure, others=BUSY))
    assert outcome.returncode == 1 and outcome.output == "\nrank 1: error: image.png: broken\n"


@pytest.mark.parametrize(
    "code",
    [
        "if rank == 1: time.sleep(3.4)",
        "if rank == 1: dist.destroy_process_group(); sys.exit()\nif rank == 0: time.sleep(1)",
        "x = th.ones(4)\ndist.send(x, (rank + 1) % 3) if rank == 0 else dist.recv(x, rank - 1) if rank == 1 else None",
        "th.set_default_device('meta')",
        "dist.destroy_process_group(); dist_util.setup_dist(); dist_util.barrier()",
        "os.fork() or sys.exit(); os.wait(); dist_util.barrier()",
    ],
)
def test_healthy_jobs_end_well(code):
    """Some ranks earlier than others; with messages of the user's own; without the group, or with a second one."""
    start = "import os, sys, time, torch as th, torch.distributed as dist\nfrom guided_diffusion import dist_util\n"
    outcome, _ = run_ranks(3, [], f"{start}dist_util.setup_dist(); rank = dist_util.get_rank()\n{code}\n")
    assert outcome.returncode == 0 and not outcome.output, outcome.output


def test_torchrun_on_several_nodes_does_not_end_them_all(monkeypatch):
    """Each node's one ends its own ranks: so a rank watches another one there."""
    store = dist_util.dist.HashStore()
    monkeypatch.setattr(rendezvous.dist, "rendezvous", lambda *args: iter([(store, 0, 2)]))
    monkeypatch.setattr(rendezvous, "_unused_part", lambda *args: store)
    for local_size, guarded in [("1", False), ("2", True)]:
        for name, value in dict(
            MASTER_ADDR="a",
            MASTER_PORT="1",
            RANK="0",
            WORLD_SIZE="2",
            TORCHELASTIC_RUN_ID="x",
            LOCAL_WORLD_SIZE=local_size,
        ).items():
            monkeypatch.setenv(name, value)
        assert rendezvous.meet().guarded == guarded


def test_threads_that_wait_for_python_are_let_through_before_the_group_ends(monkeypatch):
    """The group's end joins its threads, and may keep the interpreter's lock while it does: jobs hung at their end."""
    awake, through, seen = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: (awake.wait(), through.set()))
    thread.start()
    monkeypatch.setattr(dist_util, "_pid", os.getpid())
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist_util.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist_util.dist, "destroy_process_group", lambda: seen.append(through.is_set()))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # so that the lock passes on only where it is let go
    try:
        awake.set()
        dist_util._leave()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert seen == [True]


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("Unable to allocate 2.73 TiB"), ["main memory (Unable to allocate 2.73 TiB)", "--image_size"]),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
            ["/dev/shm", "--num_workers 0"],
        ),
        (blobfile.Error("Unrecognized path: 's3://b/m.pt'"), ["Unrecognized path: 's3://b/m.pt'"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ["pid 7", "--num_workers"]),
    ],
)
def test_what_the_system_denies_is_a_mistake(error, words):
    mistake = dist_util._as_mistake(error)
    assert type(mistake) is InputError and all(word in str(mistake) for word in words) and "\n" not in str(mistake)


@pytest.mark.parametrize(
    "error, words",
    [
        (
            th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            "GPU memory, where 2.50 GiB",
        ),
        (None, "main memory, where 4000000000000000 bytes"),
    ],
)
def test_want_of_memory_is_said_in_one_line(error, words):
    if error is None:
        with pytest.raises(RuntimeError) as caught:
            th.empty(10**15)
        error = caught.value
    mistake = dist_util._as_mistake(error)
    assert type(mistake) is InputError and words in str(mistake) and "--batch_size" in str(mistake)
    assert "\n" not in str(mistake)
