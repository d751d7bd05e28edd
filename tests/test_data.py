"""From a folder of images to batches."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import (
    ImageDataset,
    center_crop_arr,
    class_labels,
    class_names,
    load_data,
    random_crop_arr,
)


def write_numbered(folder, count, size=8, label=lambda i: "x"):
    """Images whose grey value says which they are: 10 * i."""
    for i in range(count):
        image = Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8))
        image.save(os.path.join(folder, f"{label(i)}_{i:03d}.png"))


def numbers(batch):
    """Which images of write_numbered a batch holds."""
    return [round(float((image.mean() + 1) * 127.5 / 10)) for image in batch]


def load(folder, batch_size, **options):
    return load_data(**{**dict(data_dir=str(folder), batch_size=batch_size, image_size=8, num_workers=0), **options})


def take(data, count):
    return list(itertools.islice(data, count))


def as_rank(monkeypatch, rank, num_ranks):
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: num_ranks)


# Which files


def test_listing(tmp_path):
    """Nested folders are searched, upper-case extensions count, other files do not."""
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.b").mkdir()  # a folder with a dot is a folder
    expected = {"z_0.png": 0, "b/y_1.JPG": 1, "b/deep/x_2.Jpeg": 2, "a.b/w_3.GIF": 3, "v_4.webp": 4}
    for name, i in expected.items():
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / name)
    for name in ("notes.txt", "png", "image.png.bak", "b/list.csv"):
        (tmp_path / name).write_text("no image")
    images, cond = next(load(tmp_path, 5, class_cond=True, deterministic=True))
    # Labels v, w, x, y, z are numbered 0..4; the grey value tells which image has which.
    shown = {round(float((image.mean() + 1) * 127.5 / 40)): int(y) for image, y in zip(images, cond["y"])}
    assert shown == {4: 0, 3: 1, 2: 2, 1: 3, 0: 4}


def test_order_is_sorted_and_the_same_whatever_the_system_lists_first(tmp_path, monkeypatch):
    write_numbered(tmp_path, 6)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])
    images, _ = next(load(tmp_path, 6, deterministic=True))
    assert numbers(images) == [0, 1, 2, 3, 4, 5]


def test_labels_are_names_up_to_the_underscore_in_sorted_order():
    paths = ["a/dog_1.png", "b/cat_7_x.png", "dog_2.png", "10_0.png", "9_0.png", "c_d/cat_.png"]
    table = class_names("", paths)
    labels = class_labels(paths, table)
    assert table == ["10", "9", "cat", "dog"]
    assert labels == [3, 2, 3, 0, 1, 2]


def test_labels_of_as_many_classes_as_the_model_has_are_fine():
    assert class_labels(["a_0.png", "b_0.png"], ["a", "b"], num_classes=2) == [0, 1]
    with pytest.raises(InputError, match="--num_classes is 1"):
        class_labels(["a_0.png", "b_0.png"], ["a", "b"], num_classes=1)


def test_unlabelled_file_is_named():
    # The folder's underscore is no label.
    with pytest.raises(InputError, match="some_folder/plain.png"):
        class_names("", ["cat_0.png", "some_folder/plain.png"])


def test_held_out_images_are_numbered_as_the_training_images_are():
    # On its own, a folder with the classes 3 and 7 alone would call them 0 and 1.
    assert class_labels(["3_0.png", "7_0.png"], [str(i) for i in range(10)]) == [3, 7]
    with pytest.raises(InputError, match="x_0.png.*class x"):
        class_labels(["3_0.png", "x_0.png"], [str(i) for i in range(10)])


# Which images on which rank


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_ranks_share_all_images(num_ranks):
    paths, classes = [f"{i}_x.png" for i in range(13)], list(range(13))
    shards = [ImageDataset(8, paths, classes=classes, shard=r, num_shards=num_ranks) for r in range(num_ranks)]
    assert sorted(path for s in shards for path in s.local_images) == sorted(paths)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for s in shards:  # labels stay with their images
        assert s.local_images == [f"{i}_x.png" for i in s.local_classes]


def test_an_epoch_shows_every_image_to_one_rank(tmp_path, monkeypatch):
    write_numbered(tmp_path, 12)
    epochs = [[], [], []]
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        data = load(tmp_path, 3, seed=1)
        for epoch in epochs:
            epoch += [n for images, _ in take(data, 2) for n in numbers(images)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


def test_shuffling(tmp_path):
    write_numbered(tmp_path, 20)
    data = load(tmp_path, 20)
    orders = {tuple(numbers(images)) for images, _ in take(data, 4)}
    assert len(orders) == 4 and all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("images, ranks, batch_size, fine", [(6, 2, 3, True), (6, 2, 4, False), (5, 2, 3, False)])
def test_a_share_smaller_than_a_batch_is_refused_on_every_rank(images, ranks, batch_size, fine, tmp_path, monkeypatch):
    # The smallest share decides, on all ranks alike: otherwise some would train and wait for the others.
    write_numbered(tmp_path, images)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        if fine:
            load(tmp_path, batch_size)
        else:
            with pytest.raises(InputError, match=f"--batch_size {batch_size}"):
                load(tmp_path, batch_size)


# What a batch is


def test_batches_are_float_in_minus_one_to_one(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 3], image[4, 5, 0] = 255, 51
    Image.fromarray(image).save(tmp_path / "cat_0.png")
    x, cond = next(load(tmp_path, 1, class_cond=True, random_flip=False))
    assert x.shape == (1, 3, 8, 8) and x.dtype == th.float32
    assert cond["y"].tolist() == [0] and cond["y"].dtype == th.int64
    expected = th.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    assert th.allclose(x[0], expected, atol=1e-6)
    assert (x.min(), x.max()) == (-1, 1)


def test_without_class_cond_there_are_no_labels(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "plain.png")  # and none are needed in names
    _, cond = next(load(tmp_path, 1))
    assert cond == {}


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


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_one_channel_is_luminance(mode, tmp_path):
    saved_as(mode, tmp_path / "image.png")
    x, _ = next(load(tmp_path, 1, random_flip=False, channels=1))
    assert x.shape == (1, 1, 8, 8)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(((x[0, 0] + 1) * 127.5).numpy()[::4, ::4] - luma).max() <= 1


# Order, flips and crops


def gradient_image(width, height):
    """Red grows to the right and green downwards, so that crops and mirrors show."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def test_deterministic_data_repeat_themselves(tmp_path):
    for i in range(6):
        gradient_image(20 + i, 16).save(tmp_path / f"a_{i}.png")
    # Flips and crops are asked for and must not happen.
    data = load(tmp_path, 3, deterministic=True, random_crop=True, random_flip=True)
    first, second, third, fourth = [x for x, _ in take(data, 4)]
    assert (first == third).all() and (second == fourth).all() and not (first == second).all()
    for i, x in enumerate(th.cat([first, second])):
        assert (x[0, :, -1] > x[0, :, 0]).all()  # not mirrored
        with Image.open(tmp_path / f"a_{i}.png") as image:
            expected = center_crop_arr(image, 8).astype(np.float32) / 127.5 - 1
        assert np.abs(x.numpy().transpose(1, 2, 0) - expected).max() < 1e-6


def test_flips_mirror_half_of_the_images(tmp_path):
    gradient_image(8, 8).save(tmp_path / "a_0.png")
    dataset = ImageDataset(8, [str(tmp_path / "a_0.png")] * 200, random_flip=True)
    plain = ImageDataset(8, [str(tmp_path / "a_0.png")], random_flip=False)[0][0]
    kinds = Counter()
    for i in range(200):
        x = dataset[i][0]
        kinds["plain" if (x == plain).all() else "mirrored" if (x == plain[:, :, ::-1]).all() else "else"] += 1
    assert kinds["else"] == 0
    assert 60 <= kinds["mirrored"] <= 140  # 5.6 standard deviations about 100


def full_span(shorter, side):
    """The grey levels between the centres of the first and last of 16 pixels that show `shorter` of a side's pixels."""
    return min(255, 255 / (side - 1) * shorter * 15 / 16)


SIZES = [(16, 16), (40, 16), (16, 40), (17, 33), (100, 64), (64, 1000), (7, 11), (500, 333)]


@pytest.mark.parametrize("width, height", SIZES)
def test_centre_crop(width, height):
    arr = center_crop_arr(gradient_image(width, height), 16)
    assert arr.shape == (16, 16, 3) and arr.dtype == np.uint8
    # The middle of the image is in the middle of the crop, and the shorter side is there as a whole.
    shorter = min(width, height)
    assert np.abs(arr[7:9, 7:9, :2].astype(float).mean((0, 1)) - 127.5).max() < 12
    for axis, side in ((0, width), (1, height)):
        values = arr[..., axis].astype(float).mean(axis)
        assert values[-1] - values[0] == pytest.approx(full_span(shorter, side), abs=8)


@pytest.mark.parametrize("width, height", SIZES)
def test_random_crop(width, height):
    crops = [random_crop_arr(gradient_image(width, height), 16) for _ in range(20)]
    shorter = min(width, height)
    for arr in crops:
        assert arr.shape == (16, 16, 3) and arr.dtype == np.uint8
        for axis, side in ((0, width), (1, height)):
            values = arr[..., axis].astype(float).mean(axis)
            assert -1 <= values.min() and values.max() <= 256
            # A crop holds 0.8 to all of the shorter side.
            span = full_span(shorter, side)
            assert 0.75 * span - 8 <= values[-1] - values[0] <= span + 8
    assert len({arr.tobytes() for arr in crops}) > 3


def test_grey_crops_have_no_channel_axis():
    grey = gradient_image(30, 20).convert("L")
    assert center_crop_arr(grey, 8).shape == random_crop_arr(grey, 8).shape == (8, 8)


def test_strong_reductions_do_not_alias():
    # A fine checkerboard is grey from afar; sampling without a filter would show black and white.
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(center_crop_arr(board, 16).astype(int) - 127.5).max() < 3


# Workers


def test_workers_deliver_what_one_process_does(tmp_path):
    write_numbered(tmp_path, 8, label=lambda i: i % 3)
    here, there = (take(load(tmp_path, 4, class_cond=True, deterministic=True, num_workers=n), 4) for n in (0, 2))
    for (x, cond), (other_x, other_cond) in zip(here, there):
        assert (x == other_x).all() and (cond["y"] == other_cond["y"]).all()


def error_of(data):
    """The message that the next batch ends with."""
    try:
        next(data)
    except InputError as e:
        return str(e.with_traceback(None))  # which would keep the loader's workers waiting
    raise AssertionError("no error")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_named_without_a_traceback(num_workers, tmp_path):
    write_numbered(tmp_path, 3)
    (tmp_path / "x_001.png").write_bytes((tmp_path / "x_001.png").read_bytes()[:40])
    data = load(tmp_path, 3, num_workers=num_workers)
    message = error_of(data)
    assert str(tmp_path / "x_001.png") in message
    assert "\n" not in message and "Traceback" not in message


def test_errors_in_one_batch_only_come_with_that_batch(tmp_path):
    write_numbered(tmp_path, 4)
    (tmp_path / "x_003.png").write_text("no image")
    data = load(tmp_path, 2, deterministic=True)
    assert numbers(next(data)[0]) == [0, 1]
    with pytest.raises(InputError, match="x_003.png"):
        next(data)


def test_data_given_by_other_means_need_no_folder():
    # The dataset takes any paths; only reading opens them.
    missing = ImageDataset(8, ["nowhere/a_0.png"])
    assert len(missing) == 1
    with pytest.raises(InputError, match="nowhere/a_0.png"):
        missing[0]


def test_unknown_number_of_channels():
    with pytest.raises(InputError, match="--in_channels"):
        ImageDataset(8, [], channels=2)
