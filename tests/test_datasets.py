"""Data set scripts: each converts a small archive into a folder of training images."""

import csv
import io
import os
import re
import runpy
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from archives import (
    CIFAR_NAMES,
    DATASETS,
    KIT,
    NAMES,
    VAL_TRUTH,
    call,
    cifar10,
    cifar_pixels,
    command,
    emoji,
    encode,
    imagenet,
    lossless,
    lsun_bedroom,
    noise,
    tar_bytes,
    train_images,
    tree,
    val_images,
    write_lmdb,
)
from launch import ROOT, check_refused, run
from PIL import Image, ImageFont, ImageOps

from guided_diffusion.image_listing import image_classes, list_images, number_classes
from guided_diffusion.presets import get_preset

# ImageNet


def class_names(folder):
    return image_classes(str(folder), list_images(str(folder)))[1]


def labels_of(paths, names):
    return number_classes(paths, image_classes("", paths)[0], names)


def test_training_images_are_copied_unchanged_into_one_folder_per_class(unpacked):
    images = {f"train/{wnid}/{name}": data for wnid, files in train_images().items() for name, data in files.items()}
    written = tree(unpacked["imagenet"])
    assert {name: data for name, data in written.items() if name.endswith(".JPEG")} == images
    assert sorted(set(written) - set(images)) == ["classes.csv"]


def test_class_table_numbers_the_sorted_ids_like_training(unpacked):
    with open(unpacked["imagenet"] / "classes.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows == [{"label": str(i), "wnid": wnid, "name": NAMES[wnid]} for i, wnid in enumerate(sorted(NAMES))]
    assert class_names(unpacked["imagenet"] / "train") == [row["wnid"] for row in rows]


def test_validation_images_are_named_by_their_class_in_the_development_kit(unpacked):
    wnids = {number: wnid for number, wnid, _ in KIT}
    images = zip(VAL_TRUTH, val_images().items())
    expected = {f"val/{wnids[t]}/{wnids[t]}_{name}": data for t, (name, data) in images}
    assert {k: v for k, v in tree(unpacked["imagenet_val"]).items() if k != "classes.csv"} == expected


def test_both_archives_share_a_folder_and_a_class_table(archives, unpacked, tmp_path):
    for name in ("imagenet", "imagenet_val"):
        module, args = command(name, archives, tmp_path)
        call(module, *args).check()
    assert tree(tmp_path) == tree(unpacked["imagenet"]) | tree(unpacked["imagenet_val"])
    trained = class_names(tmp_path / "train")
    held_out = sorted(name for name in tree(tmp_path) if name.startswith("val"))
    assert labels_of(held_out, trained) == [0, 0, 1, 1, 2]  # two images of n01, two of n02, one of n03


def test_archive_names_cannot_write_outside_the_output_folder(archives, tmp_path):
    """Directories in member names, links and unknown files in an archive are ignored."""
    images = train_images()
    wnid = "n01000000"
    honest = dict(images[wnid])
    images[wnid] = {f"../../../{name}": data for name, data in honest.items()}
    images[wnid].update(
        {"/etc/notes.txt": b"text", f"{wnid}_x.JPEG": b"x", "n03000000_5.JPEG": b"y", f"{wnid}_1.sh": b"z"}
    )
    buffer = io.BytesIO(tar_bytes(images[wnid]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo(f"{wnid}_99.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    tars = {f"../{wnid}.tar": buffer.getvalue()}
    tars.update({f"{other}.tar": tar_bytes(images[other]) for other in images if other != wnid})
    (tmp_path / "train.tar").write_bytes(tar_bytes(tars))
    call(imagenet, tmp_path / "train.tar", tmp_path / "a" / "b" / "out", "--names", archives / "names.txt").check()
    out = tmp_path / "a" / "b" / "out"
    assert {path.name: path.read_bytes() for path in (out / "train" / wnid).iterdir()} == honest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "train.tar"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"] and [p.name for p in out.parent.iterdir()] == ["out"]


# LSUN


def make_squares(tmp_path, images, size, *flags):
    """Run lsun_bedroom.py on a database of encoded images. Returns its images, [size, size, 3] each."""
    write_lmdb(tmp_path / "db", {b"%04d" % i: data for i, data in enumerate(images)})
    call(lsun_bedroom, "--image-size", size, *flags, tmp_path / "db", tmp_path / "out").check()
    paths = sorted((tmp_path / "out").iterdir())
    return [np.asarray(Image.open(path)) for path in paths]


def test_images_are_centre_cropped_and_box_filtered(tmp_path):
    """Halving an image averages blocks of 2x2 pixels; doubling it repeats each pixel."""
    means = noise(0, 4, 7, 3).astype(int) // 2 + 40
    offsets = np.array([[-30, 10], [6, 14]])  # the mean is 0, and the mean of each row and column is an integer
    wide = np.kron(means, np.ones((2, 2, 1), int)) + np.tile(offsets, (4, 7))[..., None]
    small = noise(1, 2, 3, 3)
    squares = make_squares(tmp_path, [lossless(wide), lossless(wide.transpose(1, 0, 2)), lossless(small)], 4)
    assert np.array_equal(squares[0], means[:, 1:5])  # of 7 columns, 1 on the left and 2 on the right are cropped
    assert np.array_equal(squares[1], means.transpose(1, 0, 2)[1:5])
    assert np.array_equal(squares[2], np.kron(small, np.ones((2, 2, 1), int))[:, 1:5])


def test_every_image_is_converted_to_rgb(tmp_path):
    grey, colour = noise(0, 4, 4), noise(1, 4, 4, 3)
    opaque = np.concatenate([colour, np.full((4, 4, 1), 255)], axis=2)
    images = [encode(grey, "png"), lossless(opaque), encode(colour, "png")]
    squares = make_squares(tmp_path, images, 4)
    assert np.array_equal(squares[0], np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(squares[1], colour) and np.array_equal(squares[2], colour)


def test_files_are_numbered_in_the_order_of_the_keys(tmp_path):
    greys = {b"b": 20, b"a": 10, b"c": 30, b"Z": 0}  # LMDB sorts keys by their bytes
    write_lmdb(tmp_path / "db", {key: encode(np.full((8, 8, 3), grey), "png") for key, grey in greys.items()})
    data = tmp_path / "db" / "data.mdb"  # the path of the file works as well as that of its folder
    call(lsun_bedroom, "--prefix", "church", "--image_size", 8, data, tmp_path / "out").check()
    found = {path.name: int(np.asarray(Image.open(path)).mean()) for path in (tmp_path / "out").iterdir()}
    assert found == {f"church_{i:07d}.png": 10 * i for i in range(4)}


def test_undecodable_entries_are_named(tmp_path):
    """Undecodable entries are named, other entries are written, and without --skip_bad_images the command fails."""
    whole = lossless(noise(0, 16, 16, 3))
    write_lmdb(tmp_path / "db", {b"k0": whole, b"k1": b"no image", b"k2": whole, b"k\xff3": whole[:200]})
    args = ["--image-size", 16, tmp_path / "db", tmp_path / "out"]
    done = call(lsun_bedroom, *args)
    check_refused(done, ["2 of 4 entries", "--skip_bad_images True"])
    assert "the entry with the key b'k1'" in done.output and r"the entry with the key b'k\xff3'" in done.output
    names = ["bedroom_0000000.png", "bedroom_0000002.png"]
    assert sorted(tree(tmp_path / "out")) == names
    done = call(lsun_bedroom, "--skip_bad_images", True, *args).check()
    assert "2 images of 16x16 pixels, complete, 2 bad ones left out; 0 written now" in done.output
    assert sorted(tree(tmp_path / "out")) == names


# CIFAR-10


def check_cifar(folder):
    expected = {"train": [(b, i) for b in range(5) for i in range(2)], "test": [(5, i) for i in range(2)]}
    for split, origins in expected.items():
        names = [f"{CIFAR_NAMES[(3 * b + i) % 10]}_{n:05d}.png" for n, (b, i) in enumerate(origins)]
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(names)
        for name, (b, i) in zip(names, origins):
            assert np.array_equal(np.asarray(Image.open(folder / split / name)), cifar_pixels(b, i))
    paths = [str(path) for path in (folder / "train").iterdir()]
    assert labels_of(paths, CIFAR_NAMES) == [CIFAR_NAMES.index(Path(path).name.split("_")[0]) for path in paths]


def test_cifar10_from_its_archive(unpacked):
    check_cifar(unpacked["cifar10"])


@pytest.mark.parametrize("given", ["cifar-10-batches-bin", "."])
def test_cifar10_from_the_unpacked_folder(archives, tmp_path, given):
    with tarfile.open(archives / "cifar.tar.gz") as tar:
        tar.extractall(tmp_path)  # trusted archive; older Python versions have no filter argument
    call(cifar10, tmp_path / given, tmp_path / "out").check()
    check_cifar(tmp_path / "out")


# Emoji

EMOJI_TABLE = """
# group: People & Body
1F44B                   ; fully-qualified # waving hand
1F44B 1F3FB             ; fully-qualified # waving hand: light skin tone
1F44B 1F3FF             ; fully-qualified # waving hand: dark skin tone
1F937 200D 2640 FE0F    ; fully-qualified # woman shrugging
1F937 200D 2640         ; minimally-qualified # woman shrugging
# group: Smileys & Emotion
263A FE0F               ; fully-qualified # smiling face
# group: Flags
1F1E7 1F1FB             ; fully-qualified # flag: Bouvet Island
1F1F3 1F1F4             ; fully-qualified # flag: Norway, the same picture as Bouvet Island's
# group: Food & Drink
1F34E                   ; fully-qualified # red apple
E000                    ; fully-qualified # no glyph
1F34E 200D 1F34E        ; fully-qualified # two glyphs
"""


@pytest.fixture
def emoji_table(tmp_path):
    try:
        ImageFont.truetype(emoji.FONT, emoji.FONT_SIZE)
    except OSError:
        pytest.skip("needs the Debian package fonts-noto-color-emoji")
    (tmp_path / "table.txt").write_text(EMOJI_TABLE)
    return tmp_path / "table.txt"


def test_emoji_are_complete_and_centred_and_held_out_ones_are_separate(emoji_table, tmp_path):
    flags = ["--table", emoji_table, "--size", 40, "--held_out_dir", tmp_path / "held_out"]
    call(emoji, tmp_path / "out", *flags).check()
    assert sorted(tree(tmp_path / "held_out")) == [  # one fifth of the emoji, each with all its skin tones
        "food_1f34e.png", "people_1f44b-1f3fb.png", "people_1f44b-1f3ff.png", "people_1f44b.png",
    ]  # fmt: skip
    assert sorted(tree(tmp_path / "out")) == [
        "flags_1f1e7-1f1fb.png", "people_1f937-200d-2640.png", "smileys_263a.png",
    ]  # fmt: skip
    for path in [*(tmp_path / "out").iterdir(), *(tmp_path / "held_out").iterdir()]:
        image = Image.open(path)
        assert image.mode == "RGB" and image.size == (40, 40)
        left, top, right, bottom = ImageOps.invert(image).point(lambda value: value > 20 and 255).getbbox()
        assert abs(left + right - 40) <= 2 and abs(top + bottom - 40) <= 2
        assert max(right - left, bottom - top) >= 30 and min(left, top) >= 0
    red, green, blue = np.asarray(Image.open(tmp_path / "held_out" / "food_1f34e.png"))[10:30, 10:30].mean(axis=(0, 1))
    assert red > 180 and green < 80 and blue < 80
    before = tree(tmp_path)
    call(emoji, tmp_path / "out", *flags).check()
    assert tree(tmp_path) == before


def test_without_raqm_only_single_character_emoji_are_drawn(emoji_table, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFont.core, "HAVE_RAQM", False)
    done = call(emoji, tmp_path / "out", "--table", emoji_table).check()
    assert "raqm" in done.output
    assert sorted(tree(tmp_path / "out")) == ["food_1f34e.png", "people_1f44b.png", "smileys_263a.png"]


@pytest.mark.skipif(not os.path.exists(emoji.TABLE), reason="needs the Debian package unicode-data")
def test_unicode_table_has_nine_classes():
    found = emoji.read_table(emoji.TABLE)
    assert len(found) > 3600
    classes = "activities animals flags food objects people smileys symbols travel".split()
    assert sorted({class_name for class_name, _, _ in found}) == classes


def test_a_missing_font_or_table_names_the_package_to_install(emoji_table, tmp_path):
    gone = tmp_path / "gone"
    check_refused(
        call(emoji, tmp_path, "--table", emoji_table, "--font", gone), [f"--font {gone}", "fonts-noto-color-emoji"]
    )
    check_refused(call(emoji, tmp_path, "--table", gone), [f"--table {gone}", "No such file", "unicode-data"])
    gone.write_text("not Unicode's table")
    check_refused(call(emoji, tmp_path, "--table", gone), [f"--table {gone}", "no emoji"])
    check_refused(call(emoji, tmp_path, "--size", 0), ["--size 0"])


# Commands


def test_commands_run_without_importing_torch(archives, unpacked, tmp_path):
    """The data set scripts do not import torch, which takes seconds, neither on success nor on an input error."""
    module, args = command("imagenet", archives, tmp_path / "imagenet")
    done = run([module.__file__, *args]).check()
    assert done.output.splitlines()[-1] == (
        f"{tmp_path}/imagenet/train: 12 images in 3 classes, complete; 12 written now"
    )
    assert tree(tmp_path / "imagenet") == tree(unpacked["imagenet"])
    check_refused(run([cifar10.__file__, str(tmp_path / "gone"), str(tmp_path)]), ["gone", "cifar-10-binary.tar.gz"])
    everything = "import sys; sys.path.insert(0, sys.argv[1]); import imagenet, lsun_bedroom, cifar10; "
    run(["-c", everything + "sys.exit('torch' in sys.modules)", DATASETS]).check()


def readme_commands():
    """Return the commands in the code blocks of the README: {script: [(number of ranks, arguments), ...]}."""
    text = (Path(DATASETS) / "README.md").read_text().replace("\\\n", " ")
    found = {}
    for line in re.findall(
        r"^(?:mpiexec|python) .*$", "\n".join(re.findall(r"^```\n(.*?)^```", text, re.S | re.M)), re.M
    ):
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks = int(words[2]) if words[0] == "mpiexec" else 1
        found.setdefault(words[at], []).append((ranks, words[at + 1 :]))
    return found


def test_readme_commands_parse_and_match_the_released_models():
    parsed = {}
    for script, commands in readme_commands().items():
        parser = runpy.run_path(os.path.join(ROOT, script), run_name="readme")["create_argparser"]()
        parsed[script] = [(ranks, parser.parse_args(args)) for ranks, args in commands]
    assert {os.path.basename(script): len(commands) for script, commands in parsed.items()} == {
        "imagenet.py": 2, "lsun_bedroom.py": 1, "cifar10.py": 1, "digits.py": 1, "emoji.py": 1, "image_train.py": 4,
        "classifier_train.py": 1,
    }  # fmt: skip
    models, classifiers = parsed["scripts/image_train.py"], parsed["scripts/classifier_train.py"]
    for (ranks, args), name in zip(
        [*models[:2], *classifiers], ["64x64_diffusion", "lsun_bedroom", "64x64_classifier"]
    ):
        preset = get_preset(name)
        expected = {**preset.all_flags(), **preset.training}
        assert ranks * args.batch_size == expected.pop("global_batch")
        expected.pop("classifier_use_fp16", None)
        assert {flag: getattr(args, flag) for flag in expected} == expected
