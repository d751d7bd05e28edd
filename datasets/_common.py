"""What the scripts of this folder share: errors in one line, files that are whole or not there, and tar archives."""

import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import zlib
from contextlib import contextmanager

from guided_diffusion.errors import InputError, end_quietly

DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def run(main):
    """Call a script's main. What a user can put right ends in one line and a status that is not zero."""
    try:
        main()
    except InputError as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        if e.filename is None:
            raise
        sys.exit(f"error: {e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        end_quietly()
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be made a folder ({e.strerror}): choose another one") from None


def write_file(path, data):
    """Write bytes under a temporary name, and give them theirs when they are whole.

    files.write_atomically also waits until the disk has them, which a power cut makes necessary, and neither a kill nor
    a full disk. For millions of small files that is hours. What a power cut leaves is, on the usual file systems, empty
    files: a restart tells them from whole ones by `size_of`.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if not isinstance(e, OSError):
            raise
        raise InputError(
            f"{path}: cannot be written ({e.strerror}): make room, or choose another folder, and run this again"
        ) from None


def write_png(path, image):
    """Write a PIL image."""
    data = io.BytesIO()
    image.save(data, "png")
    write_file(path, data.getbuffer())


def size_of(path):
    """A file's size in bytes; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def count_files(folder, pattern):
    """How many files whose names match a regular expression have anything in them.

    Removes what killed runs left of such files under temporary names.
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
    """Refuse a folder that holds more or fewer images than were taken from `source`."""
    count = count_files(folder, pattern)
    if count != expected:
        raise InputError(
            f"{folder}: holds {count:,} images, but {source} {expected:,}: give an empty folder, or remove what is "
            f"not of {source} and run this again"
        )


@contextmanager
def open_tar(path, expected):
    """Open a tar archive, and name it in what goes wrong with it.

    :param expected: the name of the archive that the script is for.
    """
    tar = None
    try:
        with tarfile.open(path) as tar:
            yield tar
    except DAMAGE as e:
        if tar is None:
            raise InputError(f"{path}: not a tar archive, or damaged: give {expected}") from None
        raise InputError(f"{path}: cut short or damaged ({reason(e)}): get it again, and run this again") from None
    except OSError as e:
        if tar is None:
            raise InputError(f"{path}: cannot be opened ({reason(e)}): give {expected}") from None
        if e.filename is not None:  # of another file
            raise
        raise InputError(f"{path}: cannot be read ({reason(e)})") from None


def reason(error):
    """What an exception says, in one line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def files_in(tar):
    """The regular files of an open tar archive, as pairs of their name without folders and their TarInfo.

    Without folders, no name can lead out of the folder that a file is written to.
    """
    for member in tar:
        if member.isreg():
            yield os.path.basename(member.name), member
    # tarfile takes a header that it cannot read for the archive's end, which is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"bad header at byte {tar.offset:,}")
