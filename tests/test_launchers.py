"""Finding one's rank from what different launchers leave in the environment."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from launch import clean_environment, run

REPORT = """
import json
import torch as th
from guided_diffusion import dist_util
dist_util.setup_dist()
ranks = dist_util.all_gather_uneven(th.tensor([dist_util.get_rank()]))
print(json.dumps([dist_util.get_rank(), dist_util.get_world_size(), th.get_num_threads(), th.cat(ranks).tolist()]))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_two(environments):
    """What each of two processes reports of itself."""
    ours = {k: v for k, v in clean_environment().items() if not k.startswith("SLURM_") and k != "OMP_NUM_THREADS"}
    processes = [
        subprocess.Popen([sys.executable, "-c", REPORT], env={**ours, **env}, stdout=subprocess.PIPE, text=True)
        for env in environments
    ]
    return [json.loads(p.communicate(timeout=60)[0].splitlines()[-1]) for p in processes]


def check_two(reports, ranks_on_node):
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_on_node)
    assert reports == [[0, 2, threads, [0, 1]], [1, 2, threads, [0, 1]]]


def test_srun():
    # What srun sets without MPI. Ranks that overlooked it would each train alone, and write the same files.
    step = dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID="77")
    step["MASTER_PORT"] = free_port()
    check_two(start_two([dict(step, SLURM_PROCID=str(r), SLURM_LOCALID=str(r)) for r in (0, 1)]), ranks_on_node=2)


def test_a_batch_script_s_own_shell_is_one_process():
    # There, SLURM_NTASKS counts tasks that nobody has started.
    done = run(["-c", REPORT], env=dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="77")).check()
    assert json.loads(done.output.splitlines()[-1])[:2] == [0, 1]


def test_rank_and_size_alone():
    # Some clusters set no LOCAL_RANK: one process a node.
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    check_two(start_two([dict(meeting, RANK=str(r)) for r in (0, 1)]), ranks_on_node=1)


def test_a_launcher_without_its_library_is_told_in_one_line():
    done = run(["-c", REPORT], env=dict(PMI_SIZE="2", PMI_RANK="0", MPI4PY_LIBMPI="/nonexistent/libmpi.so"))
    assert done.returncode != 0
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1 and done.output.startswith("error: started by an MPI launcher")


@pytest.mark.parametrize(
    "job",
    [
        dict(WORLD_SIZE="2", RANK="0"),
        dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NODELIST="n", SLURM_JOB_ID="7"),
    ],
)
def test_a_port_that_is_taken_is_named(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(["-c", REPORT], env=dict(job, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    assert done.returncode == 1
    assert len(done.output.strip().splitlines()) == 1 and done.output.startswith(
        f"error: ranks cannot meet at port {port}"
    )


def test_a_number_of_ranks_alone_is_refused():
    done = run(["-c", REPORT], env=dict(WORLD_SIZE="2"))
    assert done.returncode == 1 and done.output.count("\n") == 1
    assert done.output.startswith("error: the environment tells of several ranks") and "RANK" in done.output


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_threads_are_shared_among_a_node_s_ranks(launcher):
    snippet = "import os; os.environ.pop('OMP_NUM_THREADS', None)\n" + REPORT
    done = run(["-c", snippet], ranks=2, launcher=launcher).check()
    # torchrun may put what two ranks print in one line
    reports = sorted(map(json.loads, re.findall(r"\[\d+, \d+, \d+, \[[\d, ]*\]\]", done.output)))
    check_two(reports, ranks_on_node=2)
