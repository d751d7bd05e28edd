"""Measure how many samples show the requested digit, according to a classifier trained on real digits.

The judge is a support vector classifier from scikit-learn, trained on the 1,797 real digits at 8x8 pixels. The judge is
independent of the diffusion model and of the classifier that guides sampling.
"""

import argparse

import numpy as np
from digits import load_digit_images

from guided_diffusion.errors import InputError, run
from guided_diffusion.npz_arrays import DAMAGED, NpzArray


def main():
    args = create_argparser().parse_args()
    for path in args.samples:
        images, labels = read_samples(path)
        judge = train_judge(images.shape[1])
        print(f"{agreement(judge, images, labels):6.1%} of {len(images)} samples are the digit asked for: {path}")


def read_samples(path):
    """Read images, uint8 [N, H, W, C], and integer labels [N] from an .npz file of samples."""
    try:
        images, labels = (NpzArray(path, name)[:] for name in ("arr_0", "arr_1"))
    except FileNotFoundError:
        raise
    except DAMAGED as e:
        raise InputError(f"{path}: not an .npz with arr_0 and arr_1, the samples and their labels ({e})") from None
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    if not square or not images.size or images.shape[1] % 8 or labels.shape != images.shape[:1]:
        raise InputError(
            f"{path}: has images {images.shape} and labels {labels.shape}: give square images with sides that "
            f"are multiples of 8 pixels, and one label per image"
        )
    return images, labels


def train_judge(size):
    """Train the judge on the real digits, enlarged to `size` pixels and then reduced to 8x8 like samples."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise InputError("judging digits needs scikit-learn: pip install scikit-learn") from None
    images, labels = load_digit_images(size)
    return SVC(gamma=0.001).fit(features(images[..., None]), labels)


def features(images):
    """Reduce uint8 images [N, S, S, C], with S a multiple of 8, to 8x8 grey values between 0 and 16: [N, 64]."""
    n, size = images.shape[:2]
    grey = images.mean(axis=3).reshape(n, 8, size // 8, 8, size // 8).mean(axis=(2, 4))
    return grey.reshape(n, 64) * (16 / 255)


def agreement(judge, images, labels):
    """Return the fraction of samples for which the judge predicts the sample's label."""
    return float(np.mean(judge.predict(features(images)) == labels))


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", nargs="+", help=".npz files of samples with labels")
    return parser


if __name__ == "__main__":
    run(main)
