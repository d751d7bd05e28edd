"""Functions that the scripts in datasets/ share: errors, complete files, held-out images, and tar archives."""

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
    """Write bytes to a file, whole or not at all.

    The function does not wait for the disk, which would take hours for millions of small files. After a power cut,
    files may be empty. A restarted script recognises empty files by `size_of`.
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
    """Raise InputError if a folder holds more or fewer images than `source`. Remove the temporary files of killed runs.

    :param pattern: a regular expression that matches the names of the images.
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
    parser.add_argument("out_dir", help="the output folder")
    parser.add_argument("--held_out_dir", default="", help="output folder for a fifth of the images (held out)")
    parser.add_argument("--size", type=int, default=size, help=f"the images' side in pixels (default: {size})")
    return parser


def write_split(args, images, pattern):
    """Write images to --out_dir. With --held_out_dir, write every fifth group of images there instead.

    :param images: yields (file name, number of the group, PIL image).
    :param pattern: a regular expression that matches all file names.
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
        # After an earlier run with another --held_out_dir, some images would be used for both training and validation.
        check_count(folder, pattern, count, "this data set's part for it")
        print(f"{folder}: {count:,} images of {args.size}x{args.size} pixels")


@contextmanager
def open_tar(path, expected):
    """Open a tar archive in a `with` block. Reading errors become InputErrors that name the archive.

    :param expected: the name of the archive that the script needs.
    """
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (*DAMAGE, OSError) as e:
        if getattr(e, "filename", None) not in (None, path):  # an error of another file
            raise
        raise InputError(f"{path}: not a tar archive, or truncated ({reason(e)}): give a whole {expected}") from None


def files_in(tar):
    """Yield (name without folders, TarInfo) for each regular file in an open tar archive.

    A name without folders cannot lead to a file outside the output folder.
    """
    for member in tar:
        if member.isreg():
            yield os.path.basename(member.name), member
    # tarfile treats an unreadable header as the end of the archive. A complete archive ends with a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"bad header at byte {tar.offset:,}")
