"""What the user got wrong, or the machine denies, said in one line."""

import math
import sys


class InputError(ValueError):
    """Bad input from a user: a flag, a file, or arguments that contradict each other.

    The message names the flag or file, says what is wrong with it and what to do. `dist_util` prints it once, without
    a traceback, and ends every rank with a non-zero status.
    """


class RunStopped(InputError):
    """A run that cannot go on, such as one that diverged or filled its disk. It is said as an InputError is."""


def end_quietly():
    """No more from this process about objects that are half made as it ends, such as a progress bar at a Ctrl-C."""
    sys.unraisablehook = lambda unraisable: None


def choose(what, name, known):
    """Return `known[name]`; an unknown `name` is refused with the list of the known ones."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(map(str, known))}")
    return known[name]


def check_at_least(least, **flags):
    """Refuse flags whose value is less than `least`, or infinite."""
    for name, value in flags.items():
        if not least <= value < math.inf:
            raise InputError(f"--{name} {value}: must be at least {least}{' and finite' if value == math.inf else ''}")
