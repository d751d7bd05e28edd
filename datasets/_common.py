"""Shared by the scripts of this folder: errors, complete files, held-out images, and tar archives."""

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


def check_count(folder, pattern, expected, source):
    """Refuse a folder that holds more or fewer images than `source`. Removes the temporary files of killed runs.

    :param pattern: a regular expression that the images' names match.
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
            f"other files and run this again"
        )


def split_parser(description, size):
    """Return a parser with the flags that write_split reads.

    :param size: the default of --size.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", help="the folder to write to")
    parser.add_argument("--held_out_dir", default="", help="another folder for a fifth of the images, to validate on")
    parser.add_argument("--size", type=int, default=size, help=f"the images' side in pixels (default: {size})")
    return parser


def write_split(args, images, pattern):
    """Write images to --out_dir. With --held_out_dir, every fifth group goes there instead.

    :param images: yields (file name, number of the group, PIL image).
    :param pattern: a regular expression that all these file names match.
    """
    out_dir, held_out_dir = (os.path.join(os.path.realpath(d), "") for d in (args.out_dir, args.held_out_dir))
    if args.held_out_dir and held_out_dir.startswith(out_dir):  # training also searches subfolders
        raise InputError(f"--held_out_dir {args.held_out_dir}: is {args.out_dir}, or inside it: give another folder")
    counts = {folder: 0 for folder in (args.out_dir, args.held_out_dir) if folder}
    for folder in counts:
        os.makedirs(folder, exist_ok=True)
    for name, group, image in images:
        folder = args.held_out_dir if args.held_out_dir and group % 5 == 0 else args.out_dir
        write_png(os.path.join(folder, name), image)
        counts[folder] += 1
    for folder, count in counts.items():
        # Images of an earlier run with another --held_out_dir would be both trained on and validated on.
        check_count(folder, pattern, count, "this data set's part for it")
        print(f"{folder}: {count:,} images of {args.size}x{args.size} pixels")


@contextmanager
def open_tar(path, expected):
    """Open a tar archive. Errors in reading it become InputErrors that name it.

    :param expected: the name of the archive that the script needs.
    """
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (*DAMAGE, OSError) as e:
        if getattr(e, "filename", None) not in (None, path):  # the error of another file
            raise
        raise InputError(f"{path}: not a tar archive, or truncated ({reason(e)}): give {expected}, complete") from None


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
