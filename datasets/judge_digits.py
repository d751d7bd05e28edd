"""Say how many samples are the digit that was asked for, by a judge that knows only the real digits.

The judge is scikit-learn's support vector classifier, trained on the 1,797 real digits at 8x8 pixels. It has never seen
a diffusion model, nor the classifier that guides one.
"""

import argparse
import zipfile
import zlib

import numpy as np
from _common import run
from digits import load_digit_images

from guided_diffusion.errors import InputError


def main():
    args = create_argparser().parse_args()
    for path in args.samples:
        images, labels = read_samples(path)
        judge = train_judge(images.shape[1])
        print(f"{agreement(judge, images, labels):6.1%} of {len(images)} samples are the digit asked for: {path}")


def read_samples(path):
    """The images uint8 [N, H, W, C] and labels [N], whole numbers, of an .npz of samples."""
    try:
        with np.load(path) as samples:
            images, labels = samples["arr_0"], samples["arr_1"]
    except KeyError as e:
        raise InputError(f"{path}: has no {e}: give samples of digits with their labels, arr_0 and arr_1") from None
    except (ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):  # TypeError: an .npy
        raise InputError(f"{path}: not an .npz, or damaged: give samples of digits with their labels") from None
    if not images.size or images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{path}: has images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}: give at least "
            f"one image, of uint8, and labels that are whole numbers"
        )
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    if not square or images.shape[1] % 8 or labels.shape != images.shape[:1]:
        raise InputError(
            f"{path}: has images {images.shape} and labels {labels.shape}: give square images, their sides a multiple "
            f"of 8 pixels, and a label for each"
        )
    return images, labels


def train_judge(size):
    """A classifier of 8x8 digits, trained on the real ones after they went through images of `size` pixels."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise InputError("the judge is scikit-learn's: pip install scikit-learn") from None
    images, labels = load_digit_images(size)
    return SVC(gamma=0.001).fit(features(images[..., None]), labels)


def features(images):
    """Images uint8 [N, S, S, C], S a multiple of 8, as grey 8x8 pixels from 0 to 16: [N, 64]."""
    n, size = images.shape[:2]
    grey = images.mean(axis=3).reshape(n, 8, size // 8, 8, size // 8).mean(axis=(2, 4))
    return grey.reshape(n, 64) * (16 / 255)


def agreement(judge, images, labels):
    """The share of samples that the judge takes for what their labels say."""
    return float(np.mean(judge.predict(features(images)) == labels))


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", nargs="+", help=".npz files of samples with labels")
    return parser


if __name__ == "__main__":
    run(main)
