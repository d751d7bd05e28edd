"""Helpers for the data set scripts: write files atomically, split off held-out images, and read tar archives."""

import argparse
import io
import os
import re
import tarfile
import zlib
from contextlib import contextmanager

from guided_diffusion.errors import InputError, reason
from guided_diffusion.files import disk_errors, write_atomically

DAMAGE = (tarfile.TarError, EOFError, zlib.error)


def write_file(path, data):
    """Write bytes to a file atomically.

    write_file does not call fsync, which would take hours for millions of small files. After a power failure, files may
    therefore be empty. A restart recognises empty files by `size_of`, and writes them again.
    """
    with disk_errors(path, "then run the same command again"), write_atomically(path, sync=False) as f:
        f.write(data)


def write_png(path, image):
    """Write a PIL image as a PNG file."""
    data = io.BytesIO()
    image.save(data, "png")
    write_file(path, data.getbuffer())


def size_of(path):
    """Return a file's size in bytes, or 0 if there is no such file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def check_count(folder, pattern, expected, source):
    """Raise an error if a folder holds more or fewer images than expected. Remove temporary files of killed runs.

    :param pattern: a regular expression that matches the names of the images.
    :param expected: the number of images in `source`.
    :param source: the name of the archive or database, for the error message.
    """
    count = 0
    for entry in os.scandir(folder):
        if re.fullmatch(pattern, entry.name):
            count += entry.stat().st_size > 0
        elif re.fullmatch(rf"(?:{pattern})\.\d+\.tmp", entry.name):
            os.remove(entry.path)
    if count != expected:
        raise InputError(
            f"{folder}: holds {count:,} images, but {source} {expected:,}: give an empty folder, or remove the "
            f"other files and run the same command again"
        )


def split_parser(description, size):
    """Return an argument parser with the flags that write_split reads.

    :param size: the default of --size, in pixels.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", help="the output folder")
    parser.add_argument("--held_out_dir", default="", help="folder to write every fifth image to, for validation")
    parser.add_argument("--size", type=int, default=size, help=f"side of the images in pixels (default: {size})")
    return parser


def write_split(args, images, pattern):
    """Write images to --out_dir. With --held_out_dir, every fifth group of images is written to that folder instead.

    :param images: an iterable of (file name, index of the group, PIL image).
    :param pattern: a regular expression that matches all the file names.
    """
    out_dir, held_out_dir = (os.path.join(os.path.realpath(d), "") for d in (args.out_dir, args.held_out_dir))
    if args.held_out_dir and held_out_dir.startswith(out_dir):  # training searches subfolders, too
        raise InputError(f"--held_out_dir {args.held_out_dir}: is {args.out_dir} or inside it: give another folder")
    counts = {folder: 0 for folder in (args.out_dir, args.held_out_dir) if folder}
    for folder in counts:
        os.makedirs(folder, exist_ok=True)
    for name, group, image in images:
        folder = args.held_out_dir if args.held_out_dir and group % 5 == 0 else args.out_dir
        write_png(os.path.join(folder, name), image)
        counts[folder] += 1
    for folder, count in counts.items():
        # Images left by a run with another --held_out_dir would be in both the training set and the validation set.
        check_count(folder, pattern, count, "the data set's part for this folder")
        print(f"{folder}: {count:,} images of {args.size}x{args.size} pixels")


@contextmanager
def open_tar(path, expected):
    """Open a tar archive. Convert errors in reading the archive to InputErrors with the archive's path.

    :param expected: the name of the archive that the script needs, for the error message.
    """
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (*DAMAGE, OSError) as e:
        if getattr(e, "filename", None) not in (None, path):  # an error about another file
            raise
        raise InputError(f"{path}: not a tar archive, or truncated ({reason(e)}): give a whole {expected}") from None


def files_in(tar):
    """Yield (name without folders, TarInfo) of each regular file in an open tar archive.

    Folders are removed from names so that no file can be written outside the destination folder.
    """
    for member in tar:
        if member.isreg():
            yield os.path.basename(member.name), member
    # tarfile treats an unreadable header as the end of the archive. A complete archive ends with a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"bad header at byte {tar.offset:,}")
