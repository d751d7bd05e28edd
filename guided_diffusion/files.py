"""File operations that accept local paths and blob URLs (gs://, az://, https://), and atomic writes."""

import io
import os
from contextlib import contextmanager, suppress

import blobfile
from blobfile import dirname, exists, join, remove, rmdir  # noqa: F401  these functions also accept local paths
from blobfile import isdir as is_dir  # noqa: F401
from blobfile import makedirs as make_dirs  # noqa: F401

from .errors import RunStopped, reason

READ_ERRORS = (OSError, blobfile.Error)  # the exceptions of failed reads


def is_url(path):
    """Return whether `path` is a blob URL rather than a local path."""
    return "://" in str(path)


def open_file(path):
    """Open a file for reading in binary mode."""
    return blobfile.BlobFile(path, "rb") if is_url(path) else open(path, "rb")


def list_dir(path):
    """Return the sorted names of the entries of a folder."""
    return sorted(blobfile.listdir(path) if is_url(path) else os.listdir(path))


@contextmanager
def disk_errors(path, kept):
    """Report a failed write inside a `with` block, for example to a full disk, in one line.

    :param path: the file or folder that is written, for the error message.
    :param kept: a clause about data that is safe despite the failure, for the error message.
    :raises RunStopped: in place of an OSError, or of a RuntimeError that torch.save raises after an OSError.
    """
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise RunStopped(f"{path}: cannot be written ({reason(cause)}): make room; {kept}") from None


@contextmanager
def write_atomically(path, sync=True):
    """Yield a binary file to write. The file appears at `path` only if the `with` block ends without an exception.

    A local file is written beside its destination under a temporary name, flushed to the disk and renamed. An object at
    a blob URL appears when its upload is complete.

    :param sync: wait until the content is on the disk, so that the file is complete even after a power failure.
    """
    if is_url(path):
        buffer = io.BytesIO()
        yield buffer
        with blobfile.BlobFile(path, "wb") as f:
            f.write(buffer.getbuffer())
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            if sync:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # os.replace has moved the temporary file
            os.remove(temporary)
