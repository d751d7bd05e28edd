"""Write the images of an LSUN lmdb as square PNGs to train on: OUT_DIR/bedroom_0000000.png and so on.

Each is shrunk with a box filter until its shorter side is the image size, and cropped at the centre. The number is the
entry's place in the database. Run the same command again after a kill: it makes the missing images.
"""

import argparse
import io
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from _common import count_files, run, size_of, write_png
from PIL import Image
from tqdm import tqdm

from guided_diffusion.errors import InputError, check_at_least
from guided_diffusion.flags import str2bool

CHUNK = 32  # entries for each worker that are in memory at a time


def main():
    args = create_argparser().parse_args()
    check_flags(args)
    with open_lmdb(args.lmdb_path) as env:
        os.makedirs(args.out_dir, exist_ok=True)
        check_image_size(args)
        total = env.stat()["entries"]
        new, bad = convert(env, args)
    check_complete(args, total, bad)
    left_out = f", {len(bad):,} bad ones left out" if bad else ""
    print(
        f"{args.out_dir}: {total - len(bad):,} images of {args.image_size}x{args.image_size} pixels, complete"
        f"{left_out}; {new:,} written now"
    )


def check_flags(args):
    check_at_least(1, image_size=args.image_size, num_workers=args.num_workers)
    if not re.fullmatch(r"[A-Za-z0-9.-]+", args.prefix):
        raise InputError(f"--prefix {args.prefix!r}: the class in file names: use letters, digits, dots and hyphens")


def open_lmdb(path):
    """Open a database for reading. Refuses a truncated one."""
    try:
        import lmdb
    except ImportError:
        raise InputError("reading an lmdb needs a package: pip install lmdb") from None
    data = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    if not os.path.exists(data):
        raise InputError(f"{data}: no such file: give the folder that LSUN's zip holds, such as bedroom_train_lmdb")
    try:
        env = lmdb.open(data, subdir=False, readonly=True, lock=False)
    except lmdb.Error as e:
        raise InputError(f"{data}: not an lmdb ({e}): give the folder that LSUN's zip holds") from None
    pages = env.info()["last_pgno"] + 1
    # A complete file may lack unused pages at its end. That is rare enough to read it all to find out.
    if os.path.getsize(data) < pages * env.stat()["psize"] and not is_readable(data):
        raise InputError(f"{data}: truncated or damaged: unpack it again, or get it again")
    if not env.stat()["entries"]:
        raise InputError(f"{data}: an lmdb without entries: give the folder that LSUN's zip holds")
    return env


def is_readable(path):
    """Return whether all entries can be read. A child process tries, because reading past the file's end kills it."""
    import lmdb

    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # no handler that prints a traceback
        try:
            with lmdb.open(path, subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
                for _ in transaction.cursor():
                    pass
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def check_image_size(args):
    """Refuse a folder with images of this prefix in another size."""
    with os.scandir(args.out_dir) as entries:
        made = next((e.path for e in entries if re.fullmatch(name_pattern(args), e.name) and e.stat().st_size), None)
    if made is None:
        return
    try:
        with Image.open(made) as image:
            size = image.size
    except OSError:
        raise InputError(f"{made}: not an image: remove it, and run this again") from None
    if size != (args.image_size, args.image_size):
        raise InputError(
            f"{made}: has {size[0]}x{size[1]} pixels, which is not --image-size {args.image_size}: choose another "
            f"folder, or this size"
        )


def convert(env, args):
    """Make the missing images. Returns how many were written, and the keys of entries that cannot be decoded."""
    new, bad = 0, []
    with (
        tqdm(total=env.stat()["entries"], unit=" images") as bar,
        ThreadPoolExecutor(args.num_workers) as pool,  # Pillow releases the GIL
    ):
        missing = missing_entries(env, args, bar)
        while chunk := list(islice(missing, CHUNK * args.num_workers)):
            decoded = pool.map(lambda entry: make_image(*entry[1:], args.image_size), chunk)
            for (key, _, _), fine in zip(chunk, decoded):
                if fine:
                    new += 1
                else:
                    bad.append(key)
                    tqdm.write(f"not an image, or damaged: the entry with the key {readable(key)}", file=sys.stderr)
                bar.update()
    return new, bad


def missing_entries(env, args, bar):
    """Yield (key, value, path) of each entry whose image is missing; the bar advances by the other entries."""
    with env.begin() as transaction, transaction.cursor() as cursor:
        for index, key in enumerate(cursor.iternext(values=False)):  # reads values only where needed
            path = os.path.join(args.out_dir, f"{args.prefix}_{index:07d}.png")
            if size_of(path):
                bar.update()
            else:
                yield key, cursor.value(), path


def make_image(data, path, image_size):
    """Decode an image, make it a square and write it. Returns whether it could be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as encoded:
            image = encoded.convert("RGB")
    except Exception:  # the type depends on the damaged image's format
        return False
    write_png(path, shrink_and_crop(image, image_size))
    return True


def shrink_and_crop(image, image_size):
    """Shrink an image with a box filter until its shorter side is image_size, and crop its centre."""
    scale = image_size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], resample=Image.BOX)
    left, top = ((side - image_size) // 2 for side in image.size)
    return image.crop((left, top, left + image_size, top + image_size))


def check_complete(args, total, bad):
    if bad and not args.skip_bad_images:
        raise InputError(
            f"{args.lmdb_path}: {len(bad):,} of {total:,} entries cannot be decoded, first {readable(bad[0])}; all "
            f"others are written: get it again, or leave these out with --skip_bad_images True"
        )
    count = count_files(args.out_dir, name_pattern(args))
    if count != total - len(bad):
        raise InputError(
            f"{args.out_dir}: holds {count:,} images {args.prefix}_*.png, but {args.lmdb_path} {total - len(bad):,}: "
            f"some may be from another database: choose another folder or --prefix"
        )


def name_pattern(args):
    return re.escape(args.prefix) + r"_\d{7,}\.png"


def readable(key):
    return key.decode("ascii", errors="backslashreplace")


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lmdb_path", help="an LSUN database: a folder with a data.mdb, such as bedroom_train_lmdb")
    parser.add_argument("out_dir", help="the folder to write to")
    parser.add_argument("--image-size", "--image_size", type=int, default=256, help="the images' side (default: 256)")
    parser.add_argument("--prefix", default="bedroom", help="what file names begin with (default: bedroom)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="threads (default: one a CPU core)")
    parser.add_argument(
        "--skip_bad_images",
        type=str2bool,
        default=False,
        metavar="BOOL",
        help="True leaves out what cannot be decoded; otherwise that ends in an error when all others are written",
    )
    return parser


if __name__ == "__main__":
    run(main)
