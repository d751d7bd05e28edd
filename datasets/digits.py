"""Write scikit-learn's handwritten digits as images to train on: 1,797 scans, named LABEL_INDEX.png."""

import argparse
import os

import numpy as np
from _common import check_count, run, write_png
from PIL import Image

from guided_diffusion.errors import InputError, check_at_least

HELD_OUT_EVERY = 5
OWN_NAMES = r"\d_\d{4}\.png"


def main():
    args = create_argparser().parse_args()
    check_at_least(1, size=args.size)
    out_dir, held_out_dir = (os.path.join(os.path.realpath(d), "") for d in (args.out_dir, args.held_out_dir))
    if args.held_out_dir and held_out_dir.startswith(out_dir):  # training also searches subfolders
        raise InputError(f"--held_out_dir {args.held_out_dir}: is {args.out_dir}, or inside it: give another folder")
    images, labels = load_digit_images(args.size)
    numbers = {args.out_dir: range(len(images))}
    if args.held_out_dir:
        numbers[args.held_out_dir] = numbers[args.out_dir][::HELD_OUT_EVERY]
        numbers[args.out_dir] = sorted(set(numbers[args.out_dir]) - set(numbers[args.held_out_dir]))
    for folder, members in numbers.items():
        os.makedirs(folder, exist_ok=True)
        for i in members:
            write_png(os.path.join(folder, f"{labels[i]}_{i:04d}.png"), Image.fromarray(images[i]))
        # Digits of an earlier run with another --held_out_dir would be both trained on and validated on.
        check_count(folder, OWN_NAMES, len(members), "the digits for it")
        print(f"wrote {len(members)} digits of {args.size}x{args.size} pixels to {folder}")


def load_digit_images(size):
    """Return the digits, white on black, uint8 [1797, size, size], and their labels int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, with 17 grey levels
    resized = [np.asarray(Image.fromarray(g).resize((size, size), Image.BICUBIC)) for g in grey]
    return np.stack(resized), digits.target


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", help="the folder to write to")
    parser.add_argument(
        "--held_out_dir", default="", help=f"another folder for every {HELD_OUT_EVERY}th digit, to validate on"
    )
    parser.add_argument("--size", type=int, default=16, help="the images' side in pixels (default: 16)")
    return parser


if __name__ == "__main__":
    run(main)
