"""What the user got wrong, said in one line."""


class InputError(ValueError):
    """Bad input from a user: a flag, a file, or arguments that contradict each other.

    The message names the flag or file, says what is wrong with it and what to do. `dist_util` prints it once, without
    a traceback, and ends every rank with a non-zero status.
    """


def choose(what, name, known):
    """Return `known[name]`; an unknown `name` is refused with the list of the known ones."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(map(str, known))}")
    return known[name]
