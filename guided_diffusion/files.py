"""Files on local disks and at blob URLs (gs://, az://, https://) alike; and writing them whole or not at all.

blobfile is imported only for URLs, so that local work needs nothing of it.
"""

import io
import os
from contextlib import contextmanager

from .errors import RunStopped


def is_url(path):
    """Whether `path` is a blob URL rather than a local path."""
    return "://" in str(path)


def _blobfile():
    import blobfile

    return blobfile


def open_file(path, mode="rb"):
    """Open for reading."""
    return _blobfile().BlobFile(path, mode) if is_url(path) else open(path, mode)


def exists(path):
    return _blobfile().exists(path) if is_url(path) else os.path.exists(path)


def is_dir(path):
    return _blobfile().isdir(path) if is_url(path) else os.path.isdir(path)


def list_dir(path):
    """The names in a folder, sorted."""
    return sorted(_blobfile().listdir(path) if is_url(path) else os.listdir(path))


def scan_dir(path):
    """The entries of a folder, sorted: pairs of a name and whether it may be a folder.

    A local link always may be one, so that listing a folder of links to files does not follow each of them.
    """
    if is_url(path):
        return sorted((entry.name, entry.is_dir) for entry in _blobfile().scandir(path))
    with os.scandir(path) as entries:
        return sorted((entry.name, entry.is_symlink() or entry.is_dir()) for entry in entries)


def read_errors(path):
    """The exceptions by which reading at `path` fails."""
    return (OSError, _blobfile().Error) if is_url(path) else (OSError,)


def join(path, name):
    return _blobfile().join(path, name) if is_url(path) else os.path.join(path, name)


def dirname(path):
    return _blobfile().dirname(path) if is_url(path) else os.path.dirname(path)


def make_dirs(path):
    if is_url(path):
        _blobfile().makedirs(path)
    else:
        os.makedirs(path, exist_ok=True)


def remove(path):
    if is_url(path):
        _blobfile().remove(path)
    else:
        os.remove(path)


def remove_dir(path):
    """Remove an empty folder. At a blob URL folders go by themselves."""
    if not is_url(path):
        os.rmdir(path)


@contextmanager
def disk_errors(path, kept):
    """Make of a write that the system refuses a message of one line.

    :param path: what is written.
    :param kept: what is safe nevertheless, for the message.
    :raises RunStopped: instead of an OSError, or of the error of torch's that hides one.
    """
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise RunStopped(f"{path}: cannot be written ({cause.strerror or cause}): make room; {kept}") from None


@contextmanager
def write_atomically(path, sync=True):
    """Yield a binary file that becomes `path` when the block ends without an exception, and vanishes otherwise.

    A local file is written beside its destination under a temporary name, flushed to the disk and renamed. At a blob
    URL an object appears once its upload has ended.

    :param sync: wait until the disk has it: what survives a power cut is whole then, at the price of some time.
    """
    if is_url(path):
        buffer = io.BytesIO()
        yield buffer
        with _blobfile().BlobFile(path, "wb") as f:
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
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    if sync:
        _sync_dir(os.path.dirname(path) or ".")


def _sync_dir(path):
    """Make a rename in this folder survive a power cut. Not every system can."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
