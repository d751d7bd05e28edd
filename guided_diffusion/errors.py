"""Errors that users can fix, each reported as one line."""

import math
import os
import sys
import traceback

# Variables in which launchers give each process its rank: torchrun, Open MPI, MPICH and Intel MPI, MVAPICH, srun.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")

LESS_MEMORY = "lower --batch_size; in training, --microbatch and --use_checkpoint True also save memory"
LOST_RANK = "lost the connection to another rank, which has probably failed"
ADVICE = {  # by words in the message of torch's RuntimeError
    "out of memory": f"out of GPU memory: {LESS_MEMORY}",
    "DefaultCPUAllocator": f"out of main memory: {LESS_MEMORY}",
    "unable to allocate shared memory": "/dev/shm is full, through which --num_workers pass images: give the container "
    "more of it (docker run --shm-size), or use --num_workers 0",
    "DataLoader worker": "a worker process died: main memory may be full: lower --num_workers",
    **dict.fromkeys(["by peer", "Broken pipe", "Timed out waiting", "remote process exited"], LOST_RANK),
}


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


def reason(error):
    """The message of an exception in one line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def as_input_error(error):
    """Convert an error whose cause lies outside the program into an InputError.

    Such causes are: no memory left, a full disk, a permission denied, another rank that has ended. Returns any other
    error unchanged.
    """
    if isinstance(error, MemoryError):
        return InputError(f"out of main memory: lower --image_size or --batch_size ({reason(error)})")
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if type(error).__module__.split(".")[0] == "blobfile":
        return InputError(reason(error))
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cause = reason(getattr(error, "inner_exception", error))  # torch before 2.7 wraps it
        needs = "it needs a C++ compiler (g++), and on a GPU Triton; or leave --compile out"
        return InputError(f"--compile True: torch cannot compile here ({cause}): {needs}")
    if isinstance(error, RuntimeError):
        for words, advice in ADVICE.items():
            if words in str(error):
                return InputError(f"{advice} ({reason(error)})")
    return error


def describe_failure(error):
    """The message and the exit status for an exception that ends the program: one line unless it is a bug."""
    error = as_input_error(error)
    if isinstance(error, InputError):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return "".join(traceback.format_exception(error)).rstrip(), 1


def run(main):
    """Call the main function of a script without ranks. Errors that users can fix end it in one line."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        message, status = describe_failure(e)
        print(message, file=sys.stderr)
        sys.exit(status)


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
