"""Ranks, devices and what passes between ranks. Everything here also works in one process without a process group.

Jobs start under mpiexec, torchrun, srun or plain python; the environment that the launcher leaves says which.
"""

import atexit
import ctypes
import errno
import os
import pickle
import platform
import re
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta

import torch as th
import torch.distributed as dist

from . import files
from .errors import InputError, end_quietly
from .rendezvous import NoMeeting, launcher_rank, meet
from .watch import ENDS_WELL, FAILS, Watch

GPUS_PER_NODE = 8  # an assumption of old scripts that import it; the device follows from the rank within the node
BROKEN = "broken"  # in place of a GPU's name
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
GRACE_S = 3.0  # how long a rank with bad input waits to learn whether all have it

_job = None  # the Meeting of this job's ranks
_cpu_group = None  # where the default group is nccl's: one of CPUs
_watch = None  # over another rank, where the launcher keeps none
_pid = None  # of the process that joined: what it forks ends by itself


def get_rank():
    """This process's rank: 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of ranks: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_dist():
    """Join the job's other ranks and choose this rank's device. Does nothing when called again.

    Afterwards torch.distributed is initialised, by nccl on GPUs and gloo on CPUs, and an exception that nothing
    catches ends all ranks.
    """
    global _job, _cpu_group, _watch, _pid
    if dist.is_initialized():
        return
    sys.excepthook = _end_all_ranks  # for mistakes that show while ranks meet
    _pid = os.getpid()
    _job = job = meet()
    if not th.cuda.is_available():
        _reuse_memory()
    backend = _choose_backend(job.store, job.rank, job.world_size, job.local_rank)
    if job.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:  # the node's cores are shared among its ranks
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        th.set_num_threads(max(1, cores // job.local_size))
    dist.init_process_group(
        backend, store=job.store, rank=job.rank, world_size=job.world_size, timeout=COLLECTIVE_TIMEOUT
    )
    if backend == "nccl" and job.world_size > 1:
        _cpu_group = dist.new_group(backend="gloo")
    if not job.guarded and _watch is None:
        _watch = Watch()
    sys.excepthook = _end_all_ranks  # in place of torch's own, which would call this one
    atexit.register(_leave)
    if job.rank == 0:
        job.store.set("seed", str(int.from_bytes(os.urandom(6), "little")))


def _choose_backend(store, rank, world_size, local_rank):
    """nccl where each rank has a GPU of its own, which it asks for; otherwise gloo. The same on all ranks.

    :raises InputError: where some ranks have a GPU and others none, or one that does not work.
    """
    try:
        store.set(f"device of {rank}", _choose_device(local_rank))
    except RuntimeError:
        store.set(f"device of {rank}", BROKEN)  # others must not wait
        raise
    names = [name.decode() for name in store.multi_get([f"device of {r}" for r in range(world_size)])]
    if BROKEN in names:
        raise InputError(f"rank {names.index(BROKEN)} cannot use its GPU, and says why")
    without = [r for r, name in enumerate(names) if not name]
    if without and any(names):
        raise InputError(
            f"{len(without)} of {world_size} ranks find no GPU, rank {without[0]} the first: give every rank one, or "
            f"hide them from all (CUDA_VISIBLE_DEVICES=)"
        )
    if without:
        return "gloo"
    if len(set(names)) == world_size and dist.is_nccl_available():
        return "nccl"
    if rank == 0 and world_size > 1:
        print("warning: ranks share a GPU, or torch has no nccl: gradients take the slow way, by gloo", file=sys.stderr)
    return "gloo"


def _choose_device(local_rank):
    """Take this rank's GPU: what tells it from all others; "" without one."""
    if not th.cuda.is_available():
        return ""
    th.cuda.set_device(local_rank % th.cuda.device_count())
    return f"{platform.node()} {th.cuda.get_device_properties(th.cuda.current_device()).uuid}"


def _reuse_memory():
    """Let freed memory stay this process's, and come in large pages: on a CPU, together a tenth of a training step.

    glibc gives much of it back to the system after each step, from which it comes anew page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first makes a tensor
    trim_threshold, mmap_max = -1, -4  # glibc's numbers of these two options
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    except (OSError, AttributeError):  # another system's library
        pass


def dev():
    """This rank's device: its GPU, or the CPU."""
    return th.device("cuda", th.cuda.current_device()) if th.cuda.is_available() else th.device("cpu")


# What passes between ranks


def load_state_dict(path, **kwargs):
    """Load a file of tensors. Not a collective: each rank that calls it reads the file.

    :param kwargs: for torch.load, such as map_location.
    :raises InputError: when the file is missing or holds anything but tensors and plain containers.
    """
    try:
        with files.open_file(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles that it refuses a moment later
            return th.load(f, **{**kwargs, "weights_only": True})
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, where a checkpoint file was expected") from None
    except PermissionError:
        raise InputError(f"{path}: cannot be read: permission denied") from None
    except th.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:
        if "CUDA" in str(e):
            raise
        if "weights only" in str(e).lower():
            reason = "it holds other things than tensors and plain containers, which could run code when loaded"
        else:
            reason = "damaged, or no checkpoint at all"
        raise InputError(f"{path}: refused: {reason}") from None


@th.no_grad()
def sync_params(params):
    """Give every rank the tensors of rank 0, in place."""
    if get_world_size() > 1:
        for p in params:
            dist.broadcast(p.detach(), 0)


@th.no_grad()
def average_gradients(params):
    """Replace every gradient by its mean over the ranks, in one all-reduce, in float32 whatever their dtypes.

    A trainable parameter without a gradient counts as one of zeros: a rank may have skipped what another used.
    """
    if get_world_size() == 1:
        return
    params = [p for p in params if p.requires_grad]
    for p in params:
        if p.grad is None:
            p.grad = th.zeros_like(p)
    grads = [p.grad for p in params]
    if grads:
        flat = th.cat([g.reshape(-1).float() for g in grads])
        dist.all_reduce(flat)
        flat /= get_world_size()
        for g, f in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(f.view_as(g))


def _exchange_device():
    """Where tensors must lie to be passed around: nccl takes GPUs' alone, gloo all kinds of exchange only CPUs'."""
    return dev() if dist.get_backend() == "nccl" else th.device("cpu")


def all_gather_uneven(tensor):
    """Gather tensors that differ between ranks in their first dimension only: a list, in the order of ranks."""
    if get_world_size() == 1:
        return [tensor]
    device = _exchange_device()
    sizes = [th.zeros(1, dtype=th.int64, device=device) for _ in range(get_world_size())]
    dist.all_gather(sizes, th.tensor([len(tensor)], device=device))
    longest = max(int(s) for s in sizes)
    padded = tensor.new_zeros(longest, *tensor.shape[1:], device=device)
    padded[: len(tensor)] = tensor
    gathered = [th.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [g[: int(s)].to(tensor.device) for g, s in zip(gathered, sizes)]


def broadcast_object(value):
    """Give every rank rank 0's `value` (anything that pickles)."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_exchange_device())
    return box[0]


def from_rank_0(function):
    """The value of `function()`, called on rank 0 alone, on every rank. Every rank must call it.

    A user's mistake that it finds is raised on every rank.
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


def any_rank(flag):
    """Whether `flag` is true on any rank. Every rank must call it."""
    if get_world_size() == 1:
        return bool(flag)
    votes = th.tensor([int(flag)])
    dist.all_reduce(votes, group=_cpu_group)  # a question that must not wait for the GPU's queue
    return bool(votes)


def gather_objects(value):
    """Every rank's `value`, in the order of ranks, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def job_seed():
    """A random number that is the same on all ranks of a job and differs from job to job. Not a collective."""
    return int(_job.store.get("seed")) if _job is not None else int.from_bytes(os.urandom(6), "little")


def barrier():
    """Wait for all ranks."""
    if get_world_size() > 1:
        dist.barrier()


# How ranks end


def _leave():
    """At the end of the process: the group's threads must have done with Python before the group and interpreter go.

    A gloo thread may still have to free the last exchange's tensor, for which it waits for the interpreter's lock. The
    group's end waits for that thread, in torch before 2.13 without letting go of the lock: a deadlock. And asking for
    the lock of an interpreter that is shutting down aborts the process. So let go of it for a moment first.
    """
    if os.getpid() != _pid:
        return
    if _watch is not None:
        _watch.tell(ENDS_WELL)
    if dist.is_initialized():
        if get_world_size() > 1:
            time.sleep(0.1)
        dist.destroy_process_group()  # before the wait: who still wants an exchange must not wait for this rank
    if _watch is not None:
        _watch.wait()


def _end_all_ranks(kind, error, trace):
    """The hook for uncaught exceptions: say what happened, once where all ranks failed alike, and end every rank."""
    if _pid not in (None, os.getpid()):
        return sys.__excepthook__(kind, error, trace)
    status = 130 if issubclass(kind, KeyboardInterrupt) else 1
    error = _as_mistake(error)
    kind = type(error)
    everywhere = issubclass(kind, (InputError, KeyboardInterrupt)) and _all_ranks_failed()
    follows = not everywhere and isinstance(error, RuntimeError) and _another_said_why()
    if not follows and (not everywhere or _rank() == 0 or isinstance(error, NoMeeting)):
        with suppress(OSError, ValueError):  # nobody may be reading any more
            print(_last_words(kind, error, trace, everywhere), file=sys.stderr)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if _job is None or _job.world_size == 1:
        return
    if everywhere:
        if _watch is not None:
            _watch.tell(ENDS_WELL)  # or the next rank's might end it before it has spoken
        _wait_for_the_speaker()
    elif _job.comm is not None:
        time.sleep(0.5)  # for the launcher to pass the message on: aborting drops what it has not read
        _job.comm.Abort(status)
    else:
        _let_others_follow()
    if _job.comm is not None:
        _finalize_mpi(status)
    os._exit(status)


def _rank():
    """This process's rank, also before and after there is a process group."""
    return launcher_rank() if _job is None else _job.rank


def _last_words(kind, error, trace, everywhere):
    """What to tell the user of an exception."""
    if issubclass(kind, InputError):
        text = f"error: {error}"
    elif issubclass(kind, KeyboardInterrupt):
        text = "interrupted"
        end_quietly()
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
    if everywhere or _job is None or _job.world_size == 1:
        return text
    # On a line of its own: rank 0's progress bar may have left the cursor within one.
    return "\n" + "\n".join(f"rank {_rank()}: {line}" for line in text.splitlines())


def _as_mistake(error):
    """What the system refuses (memory, a full disk, a folder that is read-only) is told in one line, too."""
    if isinstance(error, th.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        return InputError(
            f"out of {'GPU' if isinstance(error, th.OutOfMemoryError) else 'main'} memory"
            f"{f', where {wanted[1]} more were needed' if wanted else ''}: lower --batch_size; in training, "
            f"--microbatch and --use_checkpoint True help, too"
        )
    if isinstance(error, MemoryError):
        return InputError(f"out of main memory ({error or 'no more to be had'}): lower --image_size or --batch_size")
    if isinstance(error, RuntimeError) and "unable to allocate shared memory" in str(error):
        return InputError(
            "/dev/shm is full, through which --num_workers pass images: give a container more of it (docker run "
            "--shm-size), or use --num_workers 0"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return InputError(
            f"a process that reads images has died ({str(error).splitlines()[0]}): main memory may be full: lower "
            f"--num_workers"
        )
    if type(error).__module__.split(".")[0] == "blobfile":
        return InputError(" ".join(str(error).split()))
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
        return InputError(f"{error.filename or 'a file of this run'}: {error.strerror}")
    return error


def _another_said_why():
    """Whether this rank's trouble is only that another one has ended, which has said why."""
    try:
        if _watch is not None:
            _watch.wait(GRACE_S)  # it then ends this rank
            return False
        return _job is not None and _job.world_size > 1 and _job.store.add("said", 0) > 0
    except RuntimeError:
        return False


def _let_others_follow():
    """Where this rank has said why it ends: let the others, whose exchanges fail now, hear that, and add nothing."""
    with suppress(RuntimeError):
        if _watch is not None:
            _watch.tell(FAILS)
        else:
            _job.store.add("said", 1)


def _all_ranks_failed():
    """Whether every rank ends for a user's mistake within a moment: then one rank speaks for all."""
    if _job is None or _job.world_size == 1:  # what fails before the ranks have met fails on all
        return True
    try:
        _job.store.add("failed", 1)
        return _counts_to("failed", _job.world_size)
    except RuntimeError:  # the store is another rank's, which has gone
        return False


def _wait_for_the_speaker():
    """Let rank 0 say why before others end, whose launcher may kill it then; and it let them hear that it has.

    It may keep the store, and torch's own code prints many lines on a rank that loses the store at a question. MPI lets
    all go at the same time.
    """
    with suppress(RuntimeError):
        if _job.rank == 0:
            _job.store.add("spoken", 1)
            if _job.comm is None:
                _counts_to("heard", _job.world_size - 1)
        else:
            _counts_to("spoken", 1)
            _job.store.add("heard", 1)


def _counts_to(key, number):
    """Wait a moment for a counter that the ranks share to reach a number. Whether it does."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if _job.store.add(key, 0) >= number:
            return True
        time.sleep(0.02)
    return False


def _finalize_mpi(status):
    """Leave MPI in good order, so that the launcher adds nothing to the message; but don't wait long for others."""
    from mpi4py import MPI

    timer = threading.Timer(GRACE_S, os._exit, [status])
    timer.daemon = True
    timer.start()
    MPI.Finalize()


def wait_for_all():
    """Wait for all ranks, however long they take."""
    barrier()
