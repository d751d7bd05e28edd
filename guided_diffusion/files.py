"""Files on local disks and at blob URLs (gs://, az://, https://) alike; and writing them whole or not at all."""

import io
import os
from contextlib import contextmanager, suppress

import blobfile
from blobfile import dirname, exists, join, remove, rmdir  # noqa: F401  they take local paths, too
from blobfile import isdir as is_dir  # noqa: F401
from blobfile import makedirs as make_dirs  # noqa: F401

from .errors import RunStopped, reason

READ_ERRORS = (OSError, blobfile.Error)  # the exceptions by which reading fails


def is_url(path):
    """Whether `path` is a blob URL rather than a local path."""
    return "://" in str(path)


def open_file(path):
    """Open a file to read bytes."""
    return blobfile.BlobFile(path, "rb") if is_url(path) else open(path, "rb")


def list_dir(path):
    """The names in a folder, sorted."""
    return sorted(blobfile.listdir(path) if is_url(path) else os.listdir(path))


@contextmanager
def disk_errors(path, kept):
    """Report a failed write, such as to a full disk, in one line.

    :param path: the file or folder that is written.
    :param kept: what is safe nevertheless, for the message.
    :raises RunStopped: instead of an OSError, or of torch.save's RuntimeError that hides one.
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
    """Yield a binary file that becomes `path` when the block ends without an exception, and vanishes otherwise.

    A local file is written beside its destination under a temporary name, flushed to the disk and renamed. At a blob
    URL an object appears once its upload has ended.

    :param sync: wait until the content is on the disk, so that the file is complete even after a power cut.
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
        with suppress(FileNotFoundError):  # after os.replace it is gone
            os.remove(temporary)
