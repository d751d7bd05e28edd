"""How the ranks of a job find each other: from what their launcher leaves in the environment to a store they share."""

import hashlib
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from .errors import InputError

# What launchers leave in the environment. SLURM_NTASKS is not among it: a batch script's own shell has it too.
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
SIZE_VARIABLES = ("WORLD_SIZE", *MPI_SIZE_VARIABLES, "SLURM_STEP_NUM_TASKS")
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
PATIENCE = timedelta(minutes=30)  # with ranks that are still to come


class NoMeeting(InputError):
    """Where a rank could not join the others. Each rank says it for itself."""


@dataclass
class Meeting:
    """What a rank knows of its job when all have met.

    :ivar store: the key-value store that all ranks share.
    :ivar local_rank, local_size: its number among its node's ranks, and how many those are.
    :ivar comm: MPI's communicator, under an MPI launcher.
    :ivar guarded: whether the launcher is known to end all ranks when one dies.
    """

    store: dist.Store
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    comm: object = None
    guarded: bool = True


def launcher_rank():
    """This process's rank by the launcher's environment variables: known before, and without, setup_dist()."""
    return _from_environment(RANK_VARIABLES, 0)


def _from_environment(names, default):
    """The number in the first of these variables that is set."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def meet():
    """Wait for the job's other ranks: a Meeting. One process without a launcher meets itself.

    :raises InputError: where they do not come together.
    """
    world_size = max((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), default=1)
    if world_size == 1:
        return Meeting(dist.HashStore(), 0, 1, 0, 1)
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:  # torchrun, or a cluster that sets what it sets
        return _meet_by_variables(world_size)
    if any(name in os.environ for name in MPI_SIZE_VARIABLES):
        return _meet_by_mpi()
    return _meet_by_slurm()


def _meet_by_variables(world_size):
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    with _where(os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT")):
        store, rank, world_size = next(dist.rendezvous("env://", int(os.environ["RANK"]), world_size))
    store = _unused_part(store, rank, world_size)
    local_rank, local_size = _from_environment(LOCAL_RANK_VARIABLES, 0), _from_environment(LOCAL_SIZE_VARIABLES, 1)
    guarded = torchrun and local_size == world_size  # one on several nodes ends the ranks of its own only
    return Meeting(store, rank, world_size, local_rank, local_size, guarded=guarded)


def _meet_by_mpi():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:
        raise InputError(
            f"started by an MPI launcher, but mpi4py finds no MPI library ({str(e).splitlines()[0]}): "
            f"pip install mpi4py mpich, or use the launcher and library of the cluster"
        ) from None
    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    rank, world_size = comm.Get_rank(), comm.Get_size()
    one_node = comm.allreduce(node.Get_size(), MPI.MIN) == world_size
    host, store = "127.0.0.1" if one_node else _own_address(), None
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    host, port = comm.bcast((host, store.port) if rank == 0 else None)
    if rank != 0:
        store = dist.TCPStore(host, port, is_master=False)
    guarded = "SLURM_STEP_ID" not in os.environ  # srun may be the launcher
    return Meeting(store, rank, world_size, node.Get_rank(), node.Get_size(), comm, guarded)


def _meet_by_slurm():
    """Under srun without MPI: on the step's first node, at a port that follows from the job's and the step's number."""
    import subprocess

    missing = [
        name for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST") if name not in os.environ
    ]
    if missing:
        raise NoMeeting(
            "the environment tells of several ranks (WORLD_SIZE or its like), but not which this is: start them by "
            "mpiexec, torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if "[" in nodes or "," in nodes:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
    host = os.environ.get("MASTER_ADDR") or nodes.split()[0]
    step = 101 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", 0))
    port = int(os.environ.get("MASTER_PORT") or 20000 + step % 20000)
    with _where(host, port):
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0)
    local_size = -(-world_size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1)))
    return Meeting(store, rank, world_size, int(os.environ["SLURM_LOCALID"]), local_size, guarded=False)


@contextmanager
def _where(host, port):
    """Say in one line where ranks could not meet."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise NoMeeting(
            f"ranks cannot meet at port {port} of {host} ({str(e).splitlines()[0]}): set MASTER_ADDR to rank 0's node "
            f"and MASTER_PORT to a free port there, the same for all ranks"
        ) from None


def _own_address():
    """This node's address as other nodes see it."""
    import socket

    return socket.gethostbyname(socket.getfqdn())


def _unused_part(store, rank, world_size):
    """A part of the store, the same on all ranks, that holds nothing yet.

    torchrun keeps its store when it starts ranks anew (--max_restarts), as do ranks that meet again. What the dead have
    left there would have the living call them, and wait. So each leaves a word of its own, and a part's name is the
    words of all: they have met when all have read the same. A dead rank's word, read in place of one to come, makes a
    name that not all will use.
    """
    store.set(f"word of {rank}", os.urandom(8).hex())
    words, deadline = None, time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        read = store.multi_get([f"word of {r}" for r in range(world_size)])
        if read != words:
            words, name = read, hashlib.sha256(b" ".join(read)).hexdigest()
            store.add(name, 1)
        if store.add(name, 0) == world_size:
            return dist.PrefixStore(name, store)
        time.sleep(0.02 + 0.001 * world_size)
    raise NoMeeting(f"not all of {world_size} ranks have started within {PATIENCE}")
