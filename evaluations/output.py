"""Print messages to the user, and write files atomically."""

import sys
from contextlib import contextmanager

from guided_diffusion import dist_util, files


def say(text):
    """Print a message to stderr on rank 0. The metrics go to stdout."""
    if dist_util.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def write_output(path):
    """Yield a temporary binary file that is renamed to `path` when complete. Creates the folder if necessary.

    :raises InputError: if the file cannot be written.
    """
    with files.disk_errors(path, "or write elsewhere"):
        files.make_dirs(files.dirname(path) or ".")
        with files.write_atomically(path) as f:
            yield f
