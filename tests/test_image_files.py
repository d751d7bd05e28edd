"""Decoding image files: colour modes, 16 bits, animations, EXIF orientation, damaged files."""

import os

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageDataset

# Colours

COLOURS = np.array([[[200, 30, 60], [10, 220, 90]], [[0, 0, 255], [128, 128, 128]]], np.uint8)
LUMA = (COLOURS @ np.array([0.299, 0.587, 0.114]))[..., None]  # ITU-R 601
ENLARGED = Image.fromarray(COLOURS).resize((8, 8), Image.NEAREST)


def pixels_of(path, **options):
    """The pixels that ImageDataset reads from an 8x8 image file: uint8 [8, 8, C]."""
    array, _ = ImageDataset(8, [str(path)], random_flip=False, **options)[0]
    assert array.dtype == np.float32
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def difference(pixels, expected):
    """The largest difference between an 8x8 image and a 2x2 image enlarged to 8x8."""
    assert pixels.shape == (8, 8, expected.shape[2])
    return np.abs(pixels[::4, ::4].astype(float) - expected).max()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_all_modes_become_rgb_or_grey(mode, tmp_path):
    image = ENLARGED.quantize(16) if mode == "P" else ENLARGED.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(77)
    image.save(tmp_path / "image.png")
    colour, grey = pixels_of(tmp_path / "image.png"), pixels_of(tmp_path / "image.png", channels=1)
    if mode in ("RGB", "RGBA", "P"):
        assert difference(colour, COLOURS) <= (4 if mode == "P" else 0)
    else:
        assert (colour == grey).all()  # the RGB channels are equal
    if mode != "1":
        assert difference(grey, LUMA) <= (4 if mode == "P" else 1)


def test_transparency_is_ignored(tmp_path):
    palette = ENLARGED.quantize(4)
    palette.save(tmp_path / "alphas.png", transparency=bytes([0, 128, 255, 7]))
    palette.save(tmp_path / "one.png", transparency=2)
    palette.save(tmp_path / "one.gif", transparency=1)
    ENLARGED.save(tmp_path / "colour.png", transparency=(200, 30, 60))
    for path in tmp_path.iterdir():
        assert difference(pixels_of(path), COLOURS) <= 4, path


def test_cmyk_becomes_rgb(tmp_path):
    # Cyan ink absorbs red, magenta ink absorbs green, yellow ink absorbs blue, and black ink absorbs all three.
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    pixels = inks.repeat(8, axis=0).repeat(8, axis=1)
    Image.frombytes("CMYK", (16, 16), pixels.tobytes()).save(tmp_path / "inks.jpg", quality=100)
    array, _ = ImageDataset(16, [str(tmp_path / "inks.jpg")], random_flip=False)[0]
    got = (array.transpose(1, 2, 0)[4::8, 4::8] + 1) * 127.5
    assert np.abs(got - [[[255, 255, 255], [0, 255, 255]], [[255, 0, 255], [0, 0, 0]]]).max() < 6


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    first, *others = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (200, 90, 10)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, lossless=True)
    for path in tmp_path.iterdir():
        assert (pixels_of(path) == 200).all()


def test_16_bit_pixels_keep_their_upper_8_bits(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for channels in (1, 3):
        assert (pixels_of(tmp_path / "grey.png", channels=channels) == (grey // 256)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_float_and_32_bit_pixels_are_refused(dtype, tmp_path):
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(tmp_path / "x.tif")
    os.rename(tmp_path / "x.tif", tmp_path / "x.png")  # the format is detected from the content, not from the name
    with pytest.raises(InputError, match=r"x.png: cannot read .* mode [IF] .*8 bits"):
        pixels_of(tmp_path / "x.png")


# Orientation

UPRIGHT = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
# {EXIF orientation: stored pixels of UPRIGHT}. Each comment names the sides of the upright image that the stored first
# row and first column show.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.swapaxes(0, 1),  # left, top
    6: UPRIGHT[:, ::-1].swapaxes(0, 1),  # right, top
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: UPRIGHT[::-1].swapaxes(0, 1),  # left, bottom
}
FORMATS = {"x.png": {}, "x.webp": {"lossless": True}, "x.jpg": {"quality": 100, "subsampling": 0}}


@pytest.mark.parametrize("orientation", [*STORED, 0, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_images_are_turned_upright(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED.get(orientation, UPRIGHT))
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **FORMATS[name])
    difference = np.abs(pixels_of(tmp_path / name).astype(int) - UPRIGHT)
    assert difference.max() <= (12 if name == "x.jpg" else 0)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0no TIFF header at all",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",  # the directory's offset is beyond the end of the data
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\x26\0\0\0",  # the orientation is a string of 255 bytes
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01",  # truncated
    ],
)
def test_damaged_exif_is_ignored(exif, tmp_path, recwarn):
    for name, options in FORMATS.items():
        Image.fromarray(STORED[6].copy()).save(tmp_path / name, exif=exif, **options)
        assert np.abs(pixels_of(tmp_path / name).astype(int) - STORED[6]).max() <= 12
    assert not recwarn.list


# Damaged and missing files


NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (24, 32, 3), dtype=np.uint8))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
KINDS = {
    "plain.jpg": (NOISE, {}),
    "progressive.jpg": (NOISE, dict(progressive=True)),
    "rotated.jpg": (NOISE, dict(exif=ROTATED)),
    "plain.png": (NOISE, {}),
    "palette.png": (NOISE.quantize(16), {}),
    "rotated.png": (NOISE, dict(exif=ROTATED)),
    "plain.gif": (NOISE.quantize(200), {}),
    "lossless.webp": (NOISE, dict(lossless=True)),
    "lossy.webp": (NOISE, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_image_is_refused_unless_only_its_trailer_is_missing(name, tmp_path):
    path, (image, options) = tmp_path / name, KINDS[name]
    image.save(path, **options)
    whole, refused = path.read_bytes(), 0
    expected = ImageDataset(16, [str(path)], random_flip=False)[0][0]
    for cut in {*range(0, len(whole), len(whole) // 25), *range(len(whole) - 20, len(whole))}:
        path.write_bytes(whole[:cut])
        try:
            pixels = ImageDataset(16, [str(path)], random_flip=False)[0][0]
            assert (pixels == expected).all(), cut  # a partly decoded image is never returned
        except InputError as e:
            assert str(e).startswith(f"{path}: cannot read this image (")
            refused += 1
    assert refused >= 25


def test_missing_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.png: cannot read this image \(No such file or directory\)$"):
        ImageDataset(8, [str(tmp_path / "gone.png")])[0]
