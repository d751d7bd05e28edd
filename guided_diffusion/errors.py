"""Errors that users can fix. Each of these errors is reported in one line."""

import math
import os
import sys
import traceback

# The environment variables that hold a process's rank under torchrun, Open MPI, MPICH or Intel MPI, MVAPICH, and srun.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")

LESS_MEMORY = "lower --batch_size; in training, a lower --microbatch and --use_checkpoint True also save memory"
LOST_RANK = "lost the connection to another rank, which has probably failed"
ADVICE = {  # advice to the user, by words in the message of a RuntimeError
    "out of memory": f"out of GPU memory: {LESS_MEMORY}",
    "DefaultCPUAllocator": f"out of main memory: {LESS_MEMORY}",
    "unable to allocate shared memory": "/dev/shm, where worker processes put images, is full: make /dev/shm larger "
    "(docker run --shm-size), or use --num_workers 0",
    "DataLoader worker": "a worker process died, perhaps for lack of main memory: lower --num_workers",
    **dict.fromkeys(["by peer", "Broken pipe", "Timed out waiting", "remote process exited"], LOST_RANK),
}


class InputError(ValueError):
    """An error that the user can fix: a bad flag, a bad file, or arguments that contradict each other.

    The message names the flag or file, the problem, and a remedy. `dist_util` prints the message without a traceback,
    and ends every rank with a non-zero status.
    """


class RunStopped(InputError):
    """Raised when a run cannot continue, for example because training diverged or the disk is full."""


def launcher_rank():
    """Return the rank of this process from the launcher's environment variables, without a process group."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def reason(error):
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def as_input_error(error):
    """Return an InputError for an error whose cause is outside the program, and any other error unchanged.

    Causes outside the program are a lack of memory, a full disk, missing permissions, and another rank that failed.
    """
    if isinstance(error, MemoryError):
        return InputError(f"out of main memory: lower --image_size or --batch_size ({reason(error)})")
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if type(error).__module__.split(".")[0] == "blobfile":
        return InputError(reason(error))
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cause = reason(getattr(error, "inner_exception", error))  # torch before 2.7 wraps the cause
        needs = "install a C++ compiler (g++), and Triton for GPUs, or leave --compile out"
        return InputError(f"--compile True: torch cannot compile here ({cause}): {needs}")
    if isinstance(error, RuntimeError):
        for words, advice in ADVICE.items():
            if words in str(error):
                return InputError(f"{advice} ({reason(error)})")
    return error


def describe_failure(error):
    """Return the message and exit status for an exception that ends the program. Only a bug gets a full traceback."""
    error = as_input_error(error)
    if isinstance(error, InputError):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return "".join(traceback.format_exception(error)).rstrip(), 1


def run(main):
    """Run the main function of a single-process script. On failure, print the error and exit with a non-zero status."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        message, status = describe_failure(e)
        print(message, file=sys.stderr)
        sys.exit(status)


def choose(what, name, known):
    """Return `known[name]`. Raise InputError with the list of known names if `name` is unknown."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(map(str, known))}")
    return known[name]


def check_at_least(least, **flags):
    """Raise InputError for a flag whose value is less than `least`, infinite or NaN."""
    for name, value in flags.items():
        if not least <= value < math.inf:
            raise InputError(f"--{name} {value}: must be at least {least}{' and finite' if value == math.inf else ''}")
