"""Files that are there whole or not at all."""

import os
from contextlib import contextmanager

import numpy as np

from .errors import EvaluationError


@contextmanager
def write_whole(path):
    """A file to write bytes to, which gets its name when it is complete.

    :raises EvaluationError: where it cannot be written.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    except OSError as e:
        raise EvaluationError(f"{path}: cannot be written ({e.strerror or e})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_arrays(path, arrays):
    """Write an .npz."""
    with write_whole(path) as f:
        np.savez(f, **arrays)
