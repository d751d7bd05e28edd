"""Write scikit-learn's 1,797 handwritten digits as PNG files named LABEL_INDEX.png, for training."""

import numpy as np
from _common import split_parser, write_split
from PIL import Image

from guided_diffusion.errors import InputError, check_at_least, run


def main():
    args = create_argparser().parse_args()
    check_at_least(1, size=args.size)
    digits = enumerate(zip(*load_digit_images(args.size)))
    images = ((f"{label}_{i:04d}.png", i, Image.fromarray(image)) for i, (image, label) in digits)
    write_split(args, images, r"\d_\d{4}\.png")


def load_digit_images(size):
    """Return images of digits, white on black, uint8 [1797, size, size], and their labels, int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits are part of scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # from 8x8 pixels with grey levels 0 to 16
    resized = [np.asarray(Image.fromarray(g).resize((size, size), Image.BICUBIC)) for g in grey]
    return np.stack(resized), digits.target


def create_argparser():
    return split_parser(__doc__, size=16)


if __name__ == "__main__":
    run(main)
