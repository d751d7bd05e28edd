"""Ranks, devices and collectives. Everything here also works in one process without a process group.

A job starts under mpiexec, torchrun, srun or plain python. When one rank fails it prints the reason and exits, and the
launcher ends the others: mpiexec and torchrun always do, srun with --kill-on-bad-exit=1.
"""

import atexit
import itertools
import os
import pickle
import platform
import re
import socket
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta

import torch as th
import torch.distributed as dist

from . import files
from .errors import InputError, describe_failure, launcher_rank, reason

GPUS_PER_NODE = 8  # unused; kept for scripts that import it
TIMEOUT = timedelta(minutes=10)  # of the start and of every collective
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torch's
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_patient_group = None  # of all ranks, without a timeout
_group_numbers = itertools.count()  # a process may destroy its group and set up another one
_mpi_comm = None  # MPI's communicator of all ranks, if MPI launched the job


# Starting


def setup_dist():
    """Join the job's process group and select this rank's GPU. Does nothing if there is a process group already.

    Afterwards an uncaught exception ends all ranks. CPU tensors are exchanged by gloo, GPU tensors by nccl where every
    rank has a GPU of its own.
    """
    global _patient_group
    if dist.is_initialized():
        return
    sys.excepthook = _end_job  # for errors until the process group exists
    _fill_in_environment()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(max(1, th.get_num_threads() // local_size))  # the ranks of a node share its cores
    store, gpus = _meet(rank, world_size, _select_gpu(local_rank))
    backend = choose_backend(gpus)
    if rank == 0 and backend == "gloo" and any(gpus):
        print("warning: ranks share a GPU, or torch lacks nccl: averaging gradients by gloo is slow", file=sys.stderr)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    if world_size > 1:
        _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    sys.excepthook = _end_job  # again: init_process_group installs a hook of its own, which buffers stderr
    atexit.register(_leave)


def _fill_in_environment():
    """Set torch's environment variables if MPI or srun launched this rank.

    torchrun has set them already. Without a launcher they stay unset.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # unset in some launches by hand
    elif max(int(os.environ.get(name, 1)) for name in MPI_SIZE_VARIABLES) > 1:
        os.environ.update(zip(VARIABLES, map(str, _ranks_of_mpi())))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # not SLURM_NTASKS, which sbatch's own shell has, too
        os.environ.update(zip(VARIABLES, map(str, _ranks_of_slurm())))


def _ranks_of_mpi():
    """The values of VARIABLES: MPI numbers the ranks, and rank 0 broadcasts its address and a free port."""
    global _mpi_comm
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:
        raise InputError(f"mpi4py finds no MPI (pip install mpi4py mpich): {reason(e)}") from None
    _mpi_comm = comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = comm.allreduce(node.Get_size(), MPI.MIN) == comm.Get_size()
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    address, port = comm.bcast(("127.0.0.1" if one_node else socket.gethostbyname(socket.getfqdn()), port))
    return comm.Get_rank(), comm.Get_size(), node.Get_rank(), node.Get_size(), address, port


def _ranks_of_slurm():
    """The values of VARIABLES: rank 0 is on the step's first node, the port follows from the step's numbers."""
    world_size, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), os.environ["SLURM_STEP_NODELIST"]
    local_size = -(-world_size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1)))
    first_node = re.sub(r"\[(\d+).*", r"\1", nodes.split(",")[0])  # "gpu[07-09,12]" becomes "gpu07"
    step = 101 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", 0))
    address = os.environ.get("MASTER_ADDR") or first_node
    port = os.environ.get("MASTER_PORT") or 20000 + step % 20000
    return os.environ["SLURM_PROCID"], world_size, os.environ["SLURM_LOCALID"], local_size, address, port


def _meet(rank, world_size, gpu):
    """Wait for all ranks. Returns a key-value store that they share, and the GPU of each."""
    if world_size == 1:
        return dist.HashStore(), [gpu]
    try:
        store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
        store = dist.PrefixStore(f"process group {next(_group_numbers)}", store)
        store.set(f"GPU of rank {rank}", gpu)
        return store, [store.get(f"GPU of rank {r}").decode() for r in range(world_size)]  # get waits for the key
    except (RuntimeError, ValueError) as e:
        advice = "check RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        raise InputError(f"ranks cannot connect: {advice}: {reason(e)}") from None


def _select_gpu(local_rank):
    """Make one of this node's GPUs the current device and return a name that no other GPU has; "" without a GPU."""
    if not th.cuda.is_available():
        return ""
    th.cuda.set_device(local_rank % th.cuda.device_count())
    return f"{platform.node()} {th.cuda.get_device_properties(th.cuda.current_device()).uuid}"


def choose_backend(gpus):
    """The backend of the process group.

    :param gpus: the name of each rank's GPU; "" for a rank without one.
    :raises InputError: if some ranks have a GPU and others have none.
    """
    if "" in gpus and any(gpus):
        raise InputError(f"rank {gpus.index('')} has no GPU but others do: give each rank one, or hide them from all")
    one_each = any(gpus) and len(set(gpus)) == len(gpus)
    return "cpu:gloo,cuda:nccl" if one_each and dist.is_nccl_available() else "gloo"


def get_rank():
    """This process's rank: 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of ranks: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def dev():
    """This rank's device: its GPU, or the CPU."""
    return th.device("cuda", th.cuda.current_device()) if th.cuda.is_available() else th.device("cpu")


# Exchanging tensors and objects


def load_state_dict(path, **kwargs):
    """Load a file of tensors. Not a collective: each rank that calls it reads the file.

    :param kwargs: for torch.load, such as map_location.
    :raises InputError: if the file cannot be read, or holds anything other than tensors and plain containers.
    """
    try:
        with files.open_file(path) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch then refuses
            return th.load(f, **{**kwargs, "weights_only": True})
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {reason(e)}") from None
    except (RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:
        if "CUDA" in str(e):  # the GPU's error, not the file's
            raise
        unsafe = "it holds more than tensors and plain containers, which could run code when loaded"
        trouble = unsafe if "weights only" in str(e).lower() else "it is damaged, or is not a checkpoint"
        raise InputError(f"{path}: refused: {trouble}") from None


@th.no_grad()
def sync_params(params):
    """Give every rank the tensors of rank 0, in place."""
    if get_world_size() > 1:
        for p in params:
            dist.broadcast(p.detach(), 0)


@th.no_grad()
def average_gradients(params):
    """Replace every gradient by its mean over the ranks, in one all-reduce, in float32 whatever their dtypes.

    The same parameters must have gradients on every rank.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if get_world_size() == 1 or not grads:
        return
    flat = th.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat)
    flat /= get_world_size()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def all_gather_uneven(tensor):
    """Gather tensors that differ between ranks in their first dimension only: a list, in the order of ranks."""
    return [t.to(tensor.device) for t in gather_objects(tensor.cpu())]


def broadcast_object(value):
    """Give every rank rank 0's `value` (anything that pickles)."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank_0(function):
    """The value of `function()`, called on rank 0 alone, on every rank. Every rank must call it.

    An InputError that it raises is raised on every rank.
    """
    if not dist.is_initialized():
        return function()
    value = mistake = None
    if get_rank() == 0:
        try:
            value = function()
        except InputError as e:
            mistake = str(e)
    value, mistake = broadcast_object((value, mistake))
    if mistake is not None:
        raise InputError(mistake)
    return value


def gather_objects(value):
    """Every rank's `value`, in the order of ranks, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all():
    """Wait for all ranks, however long they take. Other collectives fail after TIMEOUT."""
    if get_world_size() > 1:
        dist.barrier(_patient_group)


# Ending


def _leave():
    """Destroy the process group at the end of the process.

    A thread of gloo may still hold the last collective's tensor, and it needs the GIL to free it. destroy_process_group
    waits for that thread, before torch 2.13 without releasing the GIL: a deadlock. The pause lets the thread finish.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


def _end_job(kind, error, trace):
    """The hook for uncaught exceptions: print the reason and end the job."""
    rank, several = launcher_rank(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    text, status = describe_failure(error)
    if rank > 0:
        time.sleep(1)  # rank 0 speaks first: if all ranks failed alike, the launcher then ends this one
        text = f"\nrank {rank}: {text}"  # on a new line: rank 0's progress bar may have left the cursor within one
    with suppress(OSError, ValueError):  # stderr may be closed
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if not several:
        return  # Python exits with a non-zero status
    if _mpi_comm is not None:
        time.sleep(0.3)  # Abort discards output that the launcher has not read yet
        _mpi_comm.Abort(status)
    os._exit(status)
