"""Shared by the scripts of this folder: errors, complete files, and tar archives."""

import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import zlib
from contextlib import contextmanager

from guided_diffusion.errors import InputError, describe_failure, reason
from guided_diffusion.files import disk_errors, write_atomically

DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def run(main):
    """Call a script's main. Errors that users can fix end in one line and a non-zero status."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        message, status = describe_failure(e)
        print(message, file=sys.stderr)
        sys.exit(status)


def write_file(path, data):
    """Write bytes to a file that is complete or absent.

    It does not wait for the disk, which for millions of small files would take hours. After a power cut files may be
    empty. A restart recognises them by `size_of`.
    """
    with disk_errors(path, "then run this again"), write_atomically(path, sync=False) as f:
        f.write(data)


def write_png(path, image):
    """Write a PIL image."""
    data = io.BytesIO()
    image.save(data, "png")
    write_file(path, data.getbuffer())


def size_of(path):
    """Return a file's size in bytes, or 0 if there is no such file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def count_files(folder, pattern):
    """Count the non-empty files whose names match a regular expression.

    Removes the temporary files of killed runs.
    """
    count = 0
    leftover = re.compile(rf"(?:{pattern})\.\d+\.tmp")
    with os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(pattern, entry.name):
                count += entry.stat().st_size > 0
            elif leftover.fullmatch(entry.name):
                os.remove(entry.path)
    return count


def check_count(folder, pattern, expected, source):
    """Refuse a folder that holds more or fewer images than `source`."""
    count = count_files(folder, pattern)
    if count != expected:
        raise InputError(
            f"{folder}: holds {count:,} images, but {source} {expected:,}: give an empty folder, or remove the files "
            f"that are not from {source} and run this again"
        )


@contextmanager
def open_tar(path, expected):
    """Open a tar archive. Errors in reading it become InputErrors that name it.

    :param expected: the name of the archive that the script needs.
    """
    tar = None
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (*DAMAGE, OSError) as e:
        if tar is None:
            what = reason(e) if isinstance(e, OSError) else "not a tar archive, or damaged"
            raise InputError(f"{path}: cannot be opened ({what}): give {expected}") from None
        if getattr(e, "filename", None) is not None:  # the error of another file
            raise
        raise InputError(f"{path}: truncated or damaged ({reason(e)}): get it again, and run this again") from None


def files_in(tar):
    """Yield the regular files of an open tar archive: (name without folders, TarInfo).

    Without folders, no name can lead out of the destination folder.
    """
    for member in tar:
        if member.isreg():
            yield os.path.basename(member.name), member
    # tarfile treats an unreadable header as the end of the archive, which should be a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"bad header at byte {tar.offset:,}")
