"""Decode an image file and crop it to a square: EXIF orientation, colour modes, centre and random crops."""

import math
import random
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from . import files
from .errors import InputError, reason

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # the mode of a Pillow image by its number of channels


def read_image(path, mode="RGB"):
    """Decode an image file and turn the image upright according to EXIF. Only the first frame of an animation is read.

    :param path: a local path or a blob URL.
    :param mode: the mode of the returned Pillow image, one of MODES.
    :raises InputError: if the file cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            with files.open_file(path) as f, Image.open(f) as image:
                image.load()
                with suppress(Exception):  # the pixels are usable even if the EXIF data are damaged
                    image = ImageOps.exif_transpose(image)
                return _convert(image, mode)
    except Exception as e:  # for damaged files, Pillow raises exceptions of many types
        raise InputError(f"{path}: cannot read this image ({reason(e)})") from None


def _convert(image, mode):
    image.info.pop("transparency", None)  # it changes no pixel, but can make convert() warn or fail
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Keep the upper 8 bits of 16-bit grey images, as Pillow does for 16-bit colours. convert() would clip at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of Pillow's mode {image.mode} is not defined: save it with 8 bits")
    return image if image.mode == mode else image.convert(mode)


def center_crop_arr(pil_image, image_size):
    """Resize an image so that its shorter side is image_size and take the middle: uint8 [image_size, image_size(, C)].

    :param pil_image: a Pillow image. The array of a grey image has no channel axis.
    """
    arr = np.array(_resize_shorter_side(pil_image, image_size))
    y, x = ((side - image_size) // 2 for side in arr.shape[:2])
    return arr[y : y + image_size, x : x + image_size]


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0, rng=random):
    """Resize an image at random and take a random square of it: uint8 [image_size, image_size(, C)].

    :param min_crop_frac: the smallest fraction of the image's shorter side that the square covers.
    :param max_crop_frac: the largest fraction.
    :param rng: the source of random numbers: a random.Random, or the module `random`.
    """
    shorter = rng.randrange(math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac) + 1)
    arr = np.array(_resize_shorter_side(pil_image, shorter))
    y, x = (rng.randrange(side - image_size + 1) for side in arr.shape[:2])
    return arr[y : y + image_size, x : x + image_size]


def _resize_shorter_side(image, size):
    """Resize the shorter side to `size`: halve with a box filter as often as possible, then resize bicubically."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    return image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
