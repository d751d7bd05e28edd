"""From a folder of images to batches."""

import itertools
import multiprocessing
import os
import random
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageDataset, center_crop_arr, load_data, random_crop_arr


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


def plain_crop(image, size, shorter, corner):
    """A crop by Pillow's plain operations: halves by the box filter, then bicubic, then the square at a corner."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = shorter / min(image.size)
    arr = np.array(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    y, x = corner(arr.shape[0] - size), corner(arr.shape[1] - size)
    return arr[y : y + size, x : x + size]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("width, height", [(64, 64), (65, 130), (131, 66), (133, 67), (200, 150), (63, 515), (40, 16)])
def test_crops_are_plain_resizing_to_the_pixel(mode, width, height):
    # Noise with many extremes: roundings differ at once where the arithmetic does.
    noise = np.random.default_rng(0).choice([0, 1, 2, 127, 128, 254, 255], (height, width, 4)).astype(np.uint8)
    image = Image.fromarray(noise).convert("RGB").quantize(64) if mode == "P" else Image.fromarray(noise).convert(mode)
    assert (center_crop_arr(image, 16) == plain_crop(image, 16, 16, lambda extra: extra // 2)).all()
    for seed in range(5):
        rng, same = random.Random(seed), random.Random(seed)
        expected = plain_crop(image, 16, same.randrange(16, 21), lambda extra: same.randrange(extra + 1))
        assert (random_crop_arr(image, 16, rng=rng) == expected).all()


# Unreadable images


def damaged_copy(folder, numbers):
    """Spoil some images of write_numbered, each in another way."""
    for i, n in enumerate(numbers):
        path = next(folder.glob(f"*_{n:03d}.png"))
        path.write_bytes([path.read_bytes()[:40], b"", b"no image"][i % 3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_can_be_replaced_by_the_next(num_workers, tmp_path, monkeypatch):
    for name in ("whole", "spoilt"):
        (tmp_path / name).mkdir()
        write_numbered(tmp_path / name, 12, label=lambda i: f"c{i // 4}")
    damaged_copy(tmp_path / "spoilt", [2, 3, 11])
    stand_in = {2: 4, 3: 4, 11: 0}
    warnings = []
    monkeypatch.setattr(logger, "warn", lambda text: warnings.append(text))
    options = dict(class_cond=True, seed=5, num_workers=num_workers)
    whole = take(load(tmp_path / "whole", 4, **options), 6)
    data = load(tmp_path / "spoilt", 4, **options, skip_bad_images=True)
    for (images, _), (spoilt, cond) in zip(whole, take(data, 6)):
        expected = [stand_in.get(n, n) for n in numbers(images)]
        assert numbers(spoilt) == expected
        assert cond["y"].tolist() == [n // 4 for n in expected]
    # Two epochs: 2 leads over 3, too, which counts again.
    assert data.counts() == {"skipped_images": 2 * (2 + 1 + 1)}
    assert len(warnings) == 3 and all("cannot read this image" in text for text in warnings)
    assert all(sum(f"_{n:03d}.png" in text for text in warnings) == 1 for n in (2, 3, 11))
    data.close()


def test_what_replaces_a_bad_image_does_not_depend_on_ranks(tmp_path, monkeypatch):
    write_numbered(tmp_path, 12)
    damaged_copy(tmp_path, [0, 5, 6])
    monkeypatch.setattr(logger, "warn", lambda text: None)
    options = dict(seed=1, skip_bad_images=True)
    one = [n for images, _ in take(load(tmp_path, 6, **options), 2) for n in numbers(images)]
    two = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        two.append([n for images, _ in take(load(tmp_path, 3, **options), 2) for n in numbers(images)])
    assert [n for pair in zip(*two) for n in pair] == one


@pytest.mark.parametrize("skip", [False, True])
def test_if_no_image_can_be_read_the_run_ends(skip, tmp_path):
    write_numbered(tmp_path, 4)
    damaged_copy(tmp_path, range(4))
    message = error_of(load(tmp_path, 2, deterministic=True, skip_bad_images=skip))
    assert message.startswith(f"{tmp_path / 'x_000.png'}: cannot read this image (")
    assert message.endswith("nor can any other" if skip else "training has --skip_bad_images True")


# Workers


def test_workers_deliver_what_one_process_does(tmp_path):
    write_numbered(tmp_path, 8, label=lambda i: i % 3)
    here, there = (take(load(tmp_path, 4, class_cond=True, deterministic=True, num_workers=n), 4) for n in (0, 2))
    for (x, cond), (other_x, other_cond) in zip(here, there):
        assert (x == other_x).all() and (cond["y"] == other_cond["y"]).all()


def test_workers_end_with_their_stream(tmp_path):
    write_numbered(tmp_path, 8)
    before = len(multiprocessing.active_children())
    data = load(tmp_path, 4, num_workers=2)
    next(data)
    assert len(multiprocessing.active_children()) == before + 2
    start = time.monotonic()
    del data  # without waiting for the garbage collector, or for workers that it has cut off
    assert len(multiprocessing.active_children()) == before
    assert time.monotonic() - start < 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_too_many_workers_are_a_mistake_and_those_that_started_end(tmp_path, monkeypatch):
    write_numbered(tmp_path, 8)
    process, started = multiprocessing.process.BaseProcess, []
    start = process.start

    def start_two(self):
        if len(started) == 2:
            raise OSError(24, "Too many open files")
        start(self)
        started.append(self)

    monkeypatch.setattr(process, "start", start_two)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to have it back afterwards
    with pytest.raises(InputError, match=r"--num_workers 3: .*Too many open files"):
        next(load(tmp_path, 4, num_workers=3))
    for worker in started:
        worker.join(timeout=10)
    assert len(started) == 2 and not any(worker.is_alive() for worker in started)


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
