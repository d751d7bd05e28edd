"""Messages to the user, and files that are complete or absent."""

import sys
from contextlib import contextmanager

from guided_diffusion import dist_util, files


def say(text):
    """Print a message to stderr, on rank 0 only: stdout is for the figures."""
    if dist_util.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def write_output(path):
    """Yield a binary file that becomes `path` once it is complete. Creates the folder if necessary.

    :raises InputError: if the file cannot be written.
    """
    with files.disk_errors(path, "or write elsewhere"):
        files.make_dirs(files.dirname(path) or ".")
        with files.write_atomically(path) as f:
            yield f
