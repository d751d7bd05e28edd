"""Errors that users can fix, each reported as one line."""

import errno
import math
import os
import re
import sys
import traceback

# Variables in which launchers give each process its rank: torchrun, Open MPI, MPICH and Intel MPI, MVAPICH, srun.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# In the errors that gloo and nccl raise when another rank has ended.
LOST_CONNECTION = ("by peer", "Broken pipe", "Timed out waiting", "remote process exited")


class InputError(ValueError):
    """Bad input from a user: a flag, a file, or arguments that contradict each other.

    The message names the flag or file, says what is wrong with it and what to do. `dist_util` prints it without a
    traceback, and ends every rank with a non-zero status.
    """


class RunStopped(InputError):
    """A run that cannot go on, such as one that diverged or filled its disk. It is reported like an InputError."""


def launcher_rank():
    """This process's rank according to the launcher's environment variables; needs no process group."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def end_quietly():
    """Silence the errors that Python prints about half-constructed objects, such as a progress bar, while it exits."""
    sys.unraisablehook = lambda unraisable: None


def as_input_error(error):
    """Convert an error whose cause lies outside the program into an InputError.

    Such causes are: no memory left, a full disk, a permission denied, another rank that has ended. Returns any other
    error unchanged.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        return InputError(f"out of main memory ({text or 'no details'}): lower --image_size or --batch_size")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
        return InputError(f"{error.filename or 'a file of this run'}: {error.strerror}")
    if type(error).__module__.split(".")[0] == "blobfile":
        return InputError(" ".join(text.split()))
    if not isinstance(error, RuntimeError):
        return error
    on_gpu = "out of memory" in text
    if on_gpu or "DefaultCPUAllocator" in text:
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        return InputError(
            f"out of {'GPU' if on_gpu else 'main'} memory{f' ({wanted[1]} more needed)' if wanted else ''}: lower "
            f"--batch_size; in training, --microbatch and --use_checkpoint True also save memory"
        )
    if "unable to allocate shared memory" in text:
        return InputError(
            "/dev/shm is full, through which --num_workers pass images: give the container more of it (docker run "
            "--shm-size), or use --num_workers 0"
        )
    if text.startswith("DataLoader worker"):
        reason = text.splitlines()[0]
        return InputError(f"a worker process died ({reason}): main memory may be full: lower --num_workers")
    if any(words in text for words in LOST_CONNECTION):
        reason = text.splitlines()[0]
        return InputError(f"lost the connection to another rank, which has probably failed: {reason}")
    return error


def describe_failure(error):
    """The message and the exit status for an exception that ends the program: one line unless it is a bug."""
    error = as_input_error(error)
    if isinstance(error, InputError):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        end_quietly()
        return "interrupted", 130
    return "".join(traceback.format_exception(error)).rstrip(), 1


def choose(what, name, known):
    """Return `known[name]`; refuse an unknown `name` with the list of the known ones."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(map(str, known))}")
    return known[name]


def check_at_least(least, **flags):
    """Refuse flags whose value is less than `least`, or infinite."""
    for name, value in flags.items():
        if not least <= value < math.inf:
            raise InputError(f"--{name} {value}: must be at least {least}{' and finite' if value == math.inf else ''}")
