"""Write the images of an LSUN lmdb as square PNG files OUT_DIR/bedroom_0000000.png and so on, for training.

Each image is shrunk with a box filter until its shorter side is --image_size, and then cropped at the centre. The
number in a file name is the index of the entry in the database. If the script was interrupted, run the same command
again to write the missing images.
"""

import argparse
import io
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from _common import check_count, size_of, write_png
from PIL import Image
from tqdm import tqdm

from guided_diffusion.errors import InputError, check_at_least, run
from guided_diffusion.flags import str2bool

CHUNK = 1024  # entries submitted to the thread pool at once


def main():
    args = create_argparser().parse_args()
    check_at_least(1, image_size=args.image_size, num_workers=args.num_workers)
    if not re.fullmatch(r"[A-Za-z0-9.-]+", args.prefix):
        raise InputError(f"--prefix {args.prefix!r}: use only letters, digits, dots and hyphens in this class name")
    pattern = re.escape(args.prefix) + r"_\d{7,}\.png"
    with open_lmdb(args.lmdb_path) as env:
        os.makedirs(args.out_dir, exist_ok=True)
        check_image_size(args.out_dir, pattern, args.image_size)
        total = env.stat()["entries"]
        outcomes = convert(env, args)
    bad = outcomes["bad"]
    if bad and not args.skip_bad_images:
        raise InputError(
            f"{args.lmdb_path}: {bad:,} of {total:,} entries cannot be decoded (listed above); all others are written: "
            f"get the database again, or leave bad entries out with --skip_bad_images True"
        )
    check_count(args.out_dir, pattern, total - bad, args.lmdb_path)
    left_out = f", {bad:,} bad ones left out" if bad else ""
    print(
        f"{args.out_dir}: {total - bad:,} images of {args.image_size}x{args.image_size} pixels, complete{left_out}; "
        f"{outcomes['written']:,} written now"
    )


def open_lmdb(path):
    """Open an lmdb for reading. A truncated data.mdb raises an error: reading past its end kills the process."""
    try:
        import lmdb
    except ImportError:
        raise InputError("reading an lmdb needs the package lmdb: pip install lmdb") from None
    data = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    try:
        env = lmdb.open(data, subdir=False, readonly=True, lock=False)
    except lmdb.Error as e:
        raise InputError(f"not an lmdb ({e}): give a folder from LSUN's zip, such as bedroom_train_lmdb") from None
    if os.path.getsize(data) < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
        raise InputError(f"{data}: truncated: unpack or download the database again")
    return env


def check_image_size(folder, pattern, image_size):
    """Raise an error if the folder holds images of another size."""
    made = next((e.path for e in os.scandir(folder) if re.fullmatch(pattern, e.name) and e.stat().st_size), None)
    if made and Image.open(made).size != (image_size, image_size):
        raise InputError(f"{made}: not of --image-size {image_size}: choose another folder or size")


def convert(env, args):
    """Write the missing images. Return a Counter of "kept", "written" and "bad" images."""

    def make(entry):
        index, key = entry
        path = os.path.join(args.out_dir, f"{args.prefix}_{index:07d}.png")
        if size_of(path):
            return "kept"
        with env.begin() as transaction:
            data = transaction.get(key)
        try:
            with Image.open(io.BytesIO(data)) as encoded:
                image = encoded.convert("RGB")
        except Exception as e:  # the type of the exception depends on the image format
            tqdm.write(f"not an image, or damaged: the entry with the key {key!r} ({e})", file=sys.stderr)
            return "bad"
        write_png(path, shrink_and_crop(image, args.image_size))
        return "written"

    outcomes = Counter()
    with (
        tqdm(total=env.stat()["entries"], unit=" images") as bar,
        ThreadPoolExecutor(args.num_workers) as pool,  # Pillow releases the GIL while it decodes and resizes
        env.begin() as transaction,
    ):
        entries = enumerate(transaction.cursor().iternext(values=False))
        while chunk := list(islice(entries, CHUNK)):
            for outcome in pool.map(make, chunk):
                outcomes[outcome] += 1
                bar.update()
    return outcomes


def shrink_and_crop(image, image_size):
    """Shrink an image with a box filter until its shorter side is image_size, and crop the centre."""
    scale = image_size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], resample=Image.BOX)
    left, top = ((side - image_size) // 2 for side in image.size)
    return image.crop((left, top, left + image_size, top + image_size))


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lmdb_path", help="an LSUN database: a folder with a data.mdb, such as bedroom_train_lmdb")
    parser.add_argument("out_dir", help="the output folder")
    parser.add_argument("--image-size", "--image_size", type=int, default=256, help="side in pixels (default: 256)")
    parser.add_argument("--prefix", default="bedroom", help="prefix of file names, the class (default: bedroom)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="threads (default: one per CPU core)")
    parser.add_argument(
        "--skip_bad_images",
        type=str2bool,
        default=False,
        metavar="BOOL",
        help="skip entries that cannot be decoded; False: fail after all other entries are written",
    )
    return parser


if __name__ == "__main__":
    run(main)
