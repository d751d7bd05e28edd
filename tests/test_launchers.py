"""Finding the rank and world size in the environment variables that different launchers set."""

import json
import re
import socket
import subprocess
import sys

import pytest
from launch import clean_environment, run

REPORT = """
import json, os
os.environ.pop("OMP_NUM_THREADS", None)
import torch as th
from guided_diffusion import dist_util
cores = th.get_num_threads()
dist_util.setup_dist()
ranks = dist_util.gather_objects(dist_util.get_rank())
print(json.dumps([dist_util.get_rank(), dist_util.get_world_size(), cores, th.get_num_threads(), ranks]))
"""


def check_two(output, ranks_on_node):
    """Check that two ranks have formed a process group and divided the cores of their node."""
    # torchrun may print the reports of two ranks on one line.
    reports = sorted(map(json.loads, re.findall(r"\[\d+, \d+, \d+, \d+, \[[\d, ]*\]\]", output)))
    assert [[rank, size, ranks] for rank, size, _, _, ranks in reports] == [[0, 2, [0, 1]], [1, 2, [0, 1]]], output
    for _, _, cores, threads, _ in reports:
        assert threads == max(1, cores // ranks_on_node)


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_ranks_started_by_a_launcher_find_each_other(launcher):
    check_two(run(["-c", REPORT], ranks=2, launcher=launcher).check().output, ranks_on_node=2)


@pytest.mark.parametrize(
    "job, rank_names, ranks_on_node",
    [
        # If ranks ignored the variables of srun, every rank would train alone and overwrite the others' files.
        (
            dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="127.0.0.[1-2,4]", SLURM_JOB_ID="77"),
            ["SLURM_PROCID", "SLURM_LOCALID"],
            2,
        ),
        (dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2"), ["RANK"], 1),  # some clusters do not set LOCAL_RANK
    ],
    ids=["srun", "by hand"],
)
def test_ranks_started_with_environment_variables_find_each_other(job, rank_names, ranks_on_node):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {k: v for k, v in clean_environment(MASTER_PORT=port).items() if not k.startswith("SLURM_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT],
            env={**env, **job, **dict.fromkeys(rank_names, str(rank))},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    check_two("".join(p.communicate(timeout=60)[0] for p in processes), ranks_on_node)


def test_a_process_in_the_shell_of_a_slurm_batch_script_is_alone():
    # In a batch script's shell, SLURM_NTASKS counts tasks that srun has not started yet.
    done = run(["-c", REPORT], env=dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="77")).check()
    assert json.loads(done.output.splitlines()[-1])[:2] == [0, 1]


@pytest.mark.parametrize(
    "env, words",
    [
        (dict(PMI_SIZE="2", PMI_RANK="0", MPI4PY_LIBMPI="/nonexistent/libmpi.so"), "mpi4py finds no MPI"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="{taken}"), "MASTER_PORT"),
        (dict(WORLD_SIZE="2"), "RANK"),
    ],
    ids=["no MPI library", "a port that is taken", "no rank"],
)
def test_ranks_that_cannot_connect_print_a_one_line_error(env, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(["-c", REPORT], env={name: value.format(taken=port) for name, value in env.items()})
    assert done.returncode == 1
    assert len(done.output.strip().splitlines()) == 1 and done.output.startswith("error: ") and words in done.output
