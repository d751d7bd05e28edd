"""Ranks, devices and collectives. All functions also work in a single process without a process group.

A job is started by mpiexec, torchrun, srun or plain python. A rank that fails prints the reason and exits, and the
launcher then ends the other ranks. mpiexec and torchrun always do so; srun needs --kill-on-bad-exit=1.
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
TIMEOUT = timedelta(minutes=10)  # for connecting the ranks, and for every collective
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # read by torch
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_patient_group = None  # a gloo group of all ranks with a timeout of a year
_group_numbers = itertools.count()  # distinguishes the process groups that one process creates one after another
_mpi_comm = None  # the MPI communicator of all ranks, if MPI launched the job


# Starting


def setup_dist():
    """Join the job's process group and select this rank's GPU. Do nothing if a process group already exists.

    After setup_dist, an uncaught exception on one rank ends all ranks. CPU tensors are exchanged by gloo. GPU tensors
    are exchanged by nccl if each rank has its own GPU, and otherwise by gloo.
    """
    global _patient_group
    if dist.is_initialized():
        return
    sys.excepthook = _end_job  # for errors before the process group exists
    _fill_in_environment()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(max(1, th.get_num_threads() // local_size))  # the ranks of a node share its cores
    store, gpus = _meet(rank, world_size, _select_gpu(local_rank))
    backend = choose_backend(gpus)
    if rank == 0 and backend == "gloo" and any(gpus):
        print("warning: ranks share a GPU, or torch lacks nccl: gloo will average gradients slowly", file=sys.stderr)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    if world_size > 1:
        _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    sys.excepthook = _end_job  # again, because init_process_group installs its own hook, which buffers stderr
    atexit.register(_leave)


def _fill_in_environment():
    """Set torch's environment variables for the ranks if MPI or srun launched this process.

    torchrun has already set torch's variables. Without a launcher, the variables stay unset.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # users who set RANK may omit it
    elif max(int(os.environ.get(name, 1)) for name in MPI_SIZE_VARIABLES) > 1:
        os.environ.update(zip(VARIABLES, map(str, _ranks_of_mpi())))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # SLURM_NTASKS is also set in sbatch's own shell
        os.environ.update(zip(VARIABLES, map(str, _ranks_of_slurm())))


def _ranks_of_mpi():
    """Return the values of VARIABLES. MPI numbers the ranks, and rank 0 broadcasts its address and a free port."""
    global _mpi_comm
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:
        raise InputError(f"mpi4py finds no MPI: pip install mpi4py mpich ({reason(e)})") from None
    _mpi_comm = comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = comm.allreduce(node.Get_size(), MPI.MIN) == comm.Get_size()
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    address, port = comm.bcast(("127.0.0.1" if one_node else socket.gethostbyname(socket.getfqdn()), port))
    return comm.Get_rank(), comm.Get_size(), node.Get_rank(), node.Get_size(), address, port


def _ranks_of_slurm():
    """Return the values of VARIABLES. Rank 0 is on the first node of the Slurm step.

    The port is computed from the numbers of the Slurm job and step, so that all ranks choose the same port.
    """
    world_size, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), os.environ["SLURM_STEP_NODELIST"]
    local_size = -(-world_size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1)))
    first_node = re.sub(r"\[(\d+).*", r"\1", nodes.split(",")[0])  # "gpu[07-09,12]" becomes "gpu07"
    step = 101 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", 0))
    address = os.environ.get("MASTER_ADDR") or first_node
    port = os.environ.get("MASTER_PORT") or 20000 + step % 20000
    return os.environ["SLURM_PROCID"], world_size, os.environ["SLURM_LOCALID"], local_size, address, port


def _meet(rank, world_size, gpu):
    """Wait until all ranks are connected. Return their shared key-value store, and the name of each rank's GPU."""
    if world_size == 1:
        return dist.HashStore(), [gpu]
    try:
        store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # torchrun keeps its store when it restarts ranks
        store = dist.PrefixStore(f"attempt {attempt}, process group {next(_group_numbers)}", store)
        store.set(f"GPU of rank {rank}", gpu)
        return store, [store.get(f"GPU of rank {r}").decode() for r in range(world_size)]  # store.get waits for the key
    except (RuntimeError, ValueError) as e:
        advice = "check RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        raise InputError(f"ranks cannot connect: {advice} ({reason(e)})") from None


def _select_gpu(local_rank):
    """Make one of this node's GPUs the current device. Return a unique name of the GPU, or "" without a GPU."""
    if not th.cuda.is_available():
        return ""
    th.cuda.set_device(local_rank % th.cuda.device_count())
    return f"{platform.node()} {th.cuda.get_device_properties(th.cuda.current_device()).uuid}"


def choose_backend(gpus):
    """Return the backend for the process group.

    :param gpus: the name of each rank's GPU, or "" for a rank without a GPU.
    :raises InputError: if some ranks have a GPU and others have none.
    """
    if "" in gpus and any(gpus):
        raise InputError(f"rank {gpus.index('')} has no GPU but others do: give every rank a GPU, or hide all GPUs")
    one_each = any(gpus) and len(set(gpus)) == len(gpus)
    return "cpu:gloo,cuda:nccl" if one_each and dist.is_nccl_available() else "gloo"


def get_rank():
    """Return the rank of this process, or 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """Return the number of ranks, or 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def dev():
    """Return the device of this rank: the current GPU, or the CPU if there is no GPU."""
    return th.device("cuda", th.cuda.current_device()) if th.cuda.is_available() else th.device("cpu")


# Exchanging tensors and objects


def load_state_dict(path, **kwargs):
    """Load a file of tensors. This function is not a collective: each rank that calls load_state_dict reads the file.

    :param kwargs: keyword arguments for torch.load, such as map_location.
    :raises InputError: if the file cannot be read, or holds objects other than tensors and plain containers.
    """
    try:
        with files.open_file(path) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles before it refuses to load them
            return th.load(f, **{**kwargs, "weights_only": True})
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {reason(e)}") from None
    except (RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:
        if "CUDA" in str(e):  # an error of the GPU, not of the file
            raise
        unsafe = "the file holds objects that could run code when loaded; save only tensors and plain containers"
        trouble = unsafe if "weights only" in str(e).lower() else "the file is damaged, or is not a checkpoint"
        raise InputError(f"{path}: refused: {trouble}") from None


@th.no_grad()
def sync_params(params):
    """Copy the tensors of rank 0 to all other ranks, in place."""
    if get_world_size() > 1:
        for p in params:
            dist.broadcast(p.detach(), 0)


@th.no_grad()
def average_gradients(params):
    """Replace each gradient by its mean over the ranks. One all-reduce in float32 averages all gradients.

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
    """Return a list of the tensors of all ranks, in rank order. Only their first dimensions may differ."""
    return [t.to(tensor.device) for t in gather_objects(tensor.cpu())]


def broadcast_object(value):
    """Return rank 0's `value`, which can be any picklable object, on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank_0(function):
    """Call `function` on rank 0 alone and return its result on every rank. Every rank must call from_rank_0.

    If `function` raises InputError, every rank raises InputError.
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
    """Return a list of every rank's `value`, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all():
    """Wait for all ranks, however long they take. All other collectives fail after TIMEOUT."""
    if get_world_size() > 1:
        dist.barrier(_patient_group)


# Ending


def _leave():
    """Destroy the process group when the process exits.

    A gloo thread may still need the GIL to free the last collective's tensor. Before torch 2.13, destroy_process_group
    waits for gloo threads without releasing the GIL, which can deadlock. A short pause lets the gloo thread finish.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


def _end_job(kind, error, trace):
    """Hook for uncaught exceptions: print the reason and end the job."""
    rank, several = launcher_rank(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    text, status = describe_failure(error)
    if rank > 0:
        time.sleep(1)  # rank 0 prints first; if all ranks fail alike, the launcher then ends this rank
        text = f"\nrank {rank}: {text}"  # start a new line, because rank 0's progress bar may not have ended its line
    with suppress(OSError, ValueError):  # stderr may be closed
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if not several:
        return  # Python exits with a non-zero status
    if _mpi_comm is not None:
        time.sleep(0.3)  # MPI's Abort discards output that the launcher has not read yet
        _mpi_comm.Abort(status)
    os._exit(status)
