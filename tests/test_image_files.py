"""What becomes of an image file: colour modes, 16 bits, animations, EXIF's orientation, and files that are damaged."""

import io
import itertools
import os

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageDataset, load_data

# Colours

COLOURS = np.array([[[200, 30, 60], [10, 220, 90]], [[0, 0, 255], [128, 128, 128]]], np.uint8)


def saved_as(mode, path):
    """Save COLOURS, enlarged to 8x8, in another mode."""
    image = Image.fromarray(COLOURS).resize((8, 8), Image.NEAREST)
    if mode == "RGBA":
        image = image.convert("RGBA")
        image.putalpha(77)
    elif mode == "P":
        image = image.quantize(16)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    image.save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1"])
def test_other_modes_become_rgb(mode, tmp_path):
    saved_as(mode, tmp_path / "image.png")
    array, _ = ImageDataset(8, [str(tmp_path / "image.png")], random_flip=False)[0]
    assert array.shape == (3, 8, 8) and array.dtype == np.float32
    got = np.rint((array + 1) * 127.5).transpose(1, 2, 0)
    if mode in ("RGB", "RGBA", "P"):
        assert np.abs(got[::4, ::4] - COLOURS).max() <= (4 if mode == "P" else 0)
    else:
        assert (got == got[..., :1]).all()  # grey has equal channels
    if mode == "L":
        luma = COLOURS @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
        assert np.abs(got[::4, ::4, 0] - luma).max() <= 1


def colours_of(path, **options):
    """The uint8 pixels [8, 8, C] that a dataset makes of a file of 8x8."""
    array, _ = ImageDataset(8, [str(path)], random_flip=False, **options)[0]
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def test_transparent_pixels_show_the_colour_below(tmp_path):
    big = Image.fromarray(COLOURS).resize((8, 8), Image.NEAREST)
    palette = big.quantize(4)
    palette.save(tmp_path / "alphas.png", transparency=bytes([0, 128, 255, 7]))
    palette.save(tmp_path / "one.png", transparency=2)
    palette.save(tmp_path / "one.gif", transparency=1)
    big.save(tmp_path / "colour.png", transparency=(200, 30, 60))
    for path in tmp_path.iterdir():
        assert np.abs(colours_of(path)[::4, ::4].astype(int) - COLOURS).max() <= 4, path
    grey = big.convert("LA")
    grey.putalpha(9)
    grey.save(tmp_path / "grey.png")
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    for channels in (1, 3):
        assert np.abs(colours_of(tmp_path / "grey.png", channels=channels)[::4, ::4] - luma[..., None]).max() <= 1


def test_cmyk_becomes_rgb(tmp_path):
    # Cyan takes red away, magenta green, yellow blue; black takes all.
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    pixels = inks.repeat(8, axis=0).repeat(8, axis=1)
    Image.frombytes("CMYK", (16, 16), pixels.tobytes()).save(tmp_path / "inks.jpg", quality=100)
    array, _ = ImageDataset(16, [str(tmp_path / "inks.jpg")], random_flip=False)[0]
    got = (array.transpose(1, 2, 0)[4::8, 4::8] + 1) * 127.5
    assert np.abs(got - [[[255, 255, 255], [0, 255, 255]], [[255, 0, 255], [0, 0, 0]]]).max() < 6


def test_the_first_picture_of_an_animation_counts(tmp_path):
    first, *others = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (200, 90, 10)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, lossless=True)
    for path in tmp_path.iterdir():
        assert (colours_of(path) == 200).all()


def test_sixteen_bits_lose_the_lower_eight(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for channels in (1, 3):
        assert (colours_of(tmp_path / "grey.png", channels=channels) == (grey // 256)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(dtype, tmp_path):
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(tmp_path / "x.tif")
    os.rename(tmp_path / "x.tif", tmp_path / "x.png")  # files are told by what they hold
    with pytest.raises(InputError, match=r"x.png: cannot read .* mode [IF], .*8 bits"):
        colours_of(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_one_channel_is_luminance(mode, tmp_path):
    saved_as(mode, tmp_path / "image.png")
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    grey = colours_of(tmp_path / "image.png", channels=1)
    assert grey.shape == (8, 8, 1) and np.abs(grey[::4, ::4, 0] - luma).max() <= 1


# Orientation

UPRIGHT = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
# What is stored, by the standard's table of which sides the first row and the first column show.
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


def save_turned(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED.get(orientation, UPRIGHT))).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [*STORED, 0, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_images_are_turned_upright(name, orientation, tmp_path):
    save_turned(tmp_path / name, orientation, **FORMATS[name])
    difference = np.abs(colours_of(tmp_path / name).astype(int) - UPRIGHT)
    assert difference.max() <= (12 if name == "x.jpg" else 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_turned_images_are_counted(num_workers, tmp_path):
    for i, orientation in enumerate([1, 6, 3, 1]):
        save_turned(tmp_path / f"{i}.png", orientation)
    Image.fromarray(UPRIGHT).save(tmp_path / "4.png")
    data = load_data(data_dir=str(tmp_path), batch_size=5, image_size=8, random_flip=False, num_workers=num_workers)
    assert data.counts() == {}
    images = [
        np.rint((x.numpy().transpose(1, 2, 0) + 1) * 127.5) for batch, _ in itertools.islice(data, 2) for x in batch
    ]
    assert len(images) == 10 and all((image == UPRIGHT).all() for image in images)
    assert data.counts() == {"turned_images": 4}
    data.close()


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0no TIFF header at all",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",  # a directory beyond the end
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\x26\0\0\0",  # an orientation of 255 letters
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01",  # cut off
    ],
)
def test_damaged_exif_is_passed_over(exif, tmp_path, recwarn):
    for name, options in FORMATS.items():
        Image.fromarray(STORED[6].copy()).save(tmp_path / name, exif=exif, **options)
        assert np.abs(colours_of(tmp_path / name).astype(int) - STORED[6]).max() <= 12
    assert not recwarn.list


# Damage


def one_of_each_format():
    """The bytes of one picture in all formats, by file name."""
    noise = np.random.default_rng(2).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "plain.jpg": (image, {}),
        "progressive.jpg": (image, dict(progressive=True)),
        "turned.jpg": (image, dict(exif=exif)),
        "plain.png": (image, {}),
        "palette.png": (image.quantize(16), {}),
        "turned.png": (image, dict(exif=exif)),
        "plain.gif": (image.quantize(200), {}),
        "lossless.webp": (image, dict(lossless=True)),
        "lossy.webp": (image, {}),
    }
    files = {name: io.BytesIO() for name in kinds}
    for name, (picture, options) in kinds.items():
        picture.save(files[name], format=name.split(".")[1].replace("jpg", "jpeg"), **options)
    return {name: file.getvalue() for name, file in files.items()}


@pytest.mark.parametrize("name", one_of_each_format())
def test_a_truncated_image_is_refused_unless_only_its_trailer_is_missing(name, tmp_path):
    path, whole = tmp_path / name, one_of_each_format()[name]

    def crop(data):
        path.write_bytes(data)
        return ImageDataset(16, [str(path)], random_flip=False)[0][0]

    expected, refused = crop(whole), 0
    cuts = {*range(0, len(whole), len(whole) // 25), *range(len(whole) - 20, len(whole))}
    for cut in cuts:
        try:
            assert (crop(whole[:cut]) == expected).all(), cut  # never a part of the picture
        except InputError as e:
            assert str(e).startswith(f"{path}: cannot read this image (")
            refused += 1
    assert refused >= 25


def test_missing_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.png: cannot read this image \(No such file or directory\)$"):
        ImageDataset(8, [str(tmp_path / "gone.png")])[0]
