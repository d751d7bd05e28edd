"""Loading batches from a folder of images: sharding, crops, flips, damaged images and worker processes."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch as th
from helpers import as_rank
from launch import run_ranks
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageDataset, center_crop_arr, load_data, random_crop_arr


def write_numbered(folder, count, size=8, label=lambda i: "x"):
    """Write `count` uniformly grey images. Image i has the grey value 10 * i."""
    for i in range(count):
        image = Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8))
        image.save(os.path.join(folder, f"{label(i)}_{i:03d}.png"))


def numbers(batch):
    """The indices of a batch's images, recovered from the grey values that write_numbered gave them."""
    return [round(float((image.mean() + 1) * 127.5 / 10)) for image in batch]


def load(folder, batch_size, **options):
    defaults = dict(data_dir=str(folder), batch_size=batch_size, image_size=8, num_workers=0, seed=0)
    return load_data(**{**defaults, **options})


def take(data, count):
    return list(itertools.islice(data, count))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_shards_cover_the_dataset_evenly(num_ranks):
    paths, classes = [f"{i}_x.png" for i in range(13)], list(range(13))
    shards = [ImageDataset(8, paths, classes=classes, shard=r, num_shards=num_ranks) for r in range(num_ranks)]
    assert sorted(path for s in shards for path in s.local_images) == sorted(paths)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for s in shards:  # a shard keeps the labels of its images
        assert s.local_images == [f"{i}_x.png" for i in s.local_classes]


@pytest.mark.parametrize("images, ranks, batch_size, fine", [(6, 2, 3, True), (6, 2, 4, False), (5, 2, 3, False)])
def test_too_few_images_for_a_batch_are_refused_on_every_rank(images, ranks, batch_size, fine, tmp_path, monkeypatch):
    write_numbered(tmp_path, images)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        if fine:
            load(tmp_path, batch_size)
        else:
            with pytest.raises(InputError, match=f"--batch_size {batch_size}: .*has {images}"):
                load(tmp_path, batch_size)


def test_batches_are_float32_in_minus_one_to_one(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 3], image[4, 5, 0] = 255, 51
    Image.fromarray(image).save(tmp_path / "cat_0.png")
    x, cond = next(load(tmp_path, 1, class_cond=True, random_flip=False))
    assert x.shape == (1, 3, 8, 8) and x.dtype == th.float32
    assert cond["y"].tolist() == [0] and cond["y"].dtype == th.int64
    assert th.allclose(x[0], th.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, atol=1e-6)


# Flips and crops


def gradient_image(width, height):
    """An image whose red channel increases to the right and whose green channel increases downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def test_deterministic_loading_repeats_the_same_batches(tmp_path):
    for i in range(6):
        gradient_image(20 + i, 16).save(tmp_path / f"{i}.png")
    # deterministic=True overrides random_crop and random_flip.
    data = load(tmp_path, 3, deterministic=True, random_crop=True, random_flip=True, seed=None)
    (first, cond), (second, _), (third, _), (fourth, _) = take(data, 4)
    assert cond == {}  # without class_cond, file names need no label
    assert (first == third).all() and (second == fourth).all()
    for i, x in enumerate(th.cat([first, second])):
        with Image.open(tmp_path / f"{i}.png") as image:
            expected = center_crop_arr(image, 8).astype(np.float32) / 127.5 - 1
        assert np.abs(x.numpy().transpose(1, 2, 0) - expected).max() < 1e-6


def test_flips_mirror_half_of_the_images(tmp_path):
    gradient_image(8, 8).save(tmp_path / "a_0.png")
    dataset = ImageDataset(8, [str(tmp_path / "a_0.png")] * 200, random_flip=True)
    plain = ImageDataset(8, [str(tmp_path / "a_0.png")], random_flip=False)[0][0]
    kinds = Counter()
    for x, _ in (dataset[i] for i in range(200)):
        kinds["plain" if (x == plain).all() else "mirrored" if (x == plain[:, :, ::-1]).all() else "other"] += 1
    # Of 200 images, 100 are expected to be mirrored; a deviation of 40 is 5.6 standard deviations.
    assert kinds["other"] == 0 and 60 <= kinds["mirrored"] <= 140


def plain_crop(image, size, shorter, corner):
    """Crop with Pillow only: halve with a box filter, resize with a bicubic filter, then cut the square at `corner`."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = shorter / min(image.size)
    arr = np.array(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    y, x = corner(arr.shape[0] - size), corner(arr.shape[1] - size)
    return arr[y : y + size, x : x + size]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("width, height", [(64, 64), (65, 130), (131, 66), (133, 67), (200, 150), (63, 515), (40, 16)])
def test_crops_equal_plain_pillow_resizing_in_every_pixel(mode, width, height):
    # Noise with many extreme values makes differences in rounding visible.
    noise = np.random.default_rng(0).choice([0, 1, 2, 127, 128, 254, 255], (height, width, 4)).astype(np.uint8)
    image = Image.fromarray(noise).convert("RGB").quantize(64) if mode == "P" else Image.fromarray(noise).convert(mode)
    assert (center_crop_arr(image, 16) == plain_crop(image, 16, 16, lambda extra: extra // 2)).all()
    for seed in range(5):
        rng, same = random.Random(seed), random.Random(seed)
        expected = plain_crop(image, 16, same.randrange(16, 21), lambda extra: same.randrange(extra + 1))
        assert (random_crop_arr(image, 16, rng=rng) == expected).all()
    assert len({random_crop_arr(image, 16).tobytes() for _ in range(20)}) > 3


# Unreadable images


def damage(folder, numbers):
    """Damage the images with the given indices by truncating, emptying or overwriting their files."""
    for i, n in enumerate(numbers):
        path = next(folder.glob(f"*_{n:03d}.png"))
        path.write_bytes([path.read_bytes()[:40], b"", b"no image"][i % 3])


@pytest.mark.parametrize("num_workers, ranks", [(0, 1), (2, 1), (0, 2)])
def test_bad_images_are_replaced_by_the_next_and_counted(num_workers, ranks, tmp_path, monkeypatch):
    write_numbered(tmp_path, 12, label=lambda i: f"c{i // 4}")
    options = dict(class_cond=True, seed=5)
    intact = [n for images, _ in take(load(tmp_path, 4, **options), 6) for n in numbers(images)]
    damage(tmp_path, [2, 3, 11])
    replacement = {2: 4, 3: 4, 11: 0}
    warnings, got, skipped = [], [], 0
    monkeypatch.setattr(logger, "warn", warnings.append)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        data = load(tmp_path, 4 // ranks, **options, num_workers=num_workers, skip_bad_images=True)
        batches = take(data, 6)
        got.append([n for images, _ in batches for n in numbers(images)])
        assert [y for _, cond in batches for y in cond["y"].tolist()] == [n // 4 for n in got[-1]]
        skipped += data.counts()["skipped_images"]
    assert [n for of_ranks in zip(*got) for n in of_ranks] == [replacement.get(n, n) for n in intact]
    assert skipped == 2 * (2 + 1 + 1)  # 2 epochs; in the place of image 2, the damaged image 3 is tried too
    assert {n for n in (2, 3, 11) for text in warnings if f"_{n:03d}.png: cannot read" in text} == {2, 3, 11}
    assert len(warnings) <= 3 * ranks


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_for_a_damaged_image_names_its_file(num_workers, skip, tmp_path):
    write_numbered(tmp_path, 4)
    damage(tmp_path, range(4) if skip else [2, 3])
    data = load(tmp_path, 2, deterministic=True, skip_bad_images=skip, num_workers=num_workers)
    if not skip:
        assert numbers(next(data)[0]) == [0, 1]  # the error is raised only for the batch with the damaged image
    with pytest.raises(InputError) as caught:
        next(data)
    path, advice = ("x_000.png", "nor can any other") if skip else ("x_002.png", "training has --skip_bad_images True")
    assert re.fullmatch(rf"{tmp_path}/{path}: cannot read this image \(.*\): .*{advice}", str(caught.value))


# Worker processes


def test_workers_end_when_the_data_stream_is_deleted(tmp_path):
    write_numbered(tmp_path, 8)
    data, before = load(tmp_path, 4, num_workers=2), len(multiprocessing.active_children())
    assert numbers(next(data)[0]) == numbers(next(load(tmp_path, 4))[0])
    assert len(multiprocessing.active_children()) == before + 2
    start = time.monotonic()
    del data  # workers must end without garbage collection
    assert len(multiprocessing.active_children()) == before and time.monotonic() - start < 4


ENDS = {
    "a worker is killed": "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL); take(1000)",
    "Ctrl-C": "os.killpg(0, signal.SIGINT); take(1000)",
    "SIGTERM to all": "signal.signal(signal.SIGTERM, lambda *args: None); os.killpg(0, signal.SIGTERM); take(20)",
    "normal exit": "",
}
SCRIPT = """
import multiprocessing, os, signal, sys
from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT by default
dist_util.setup_dist()
data = load_data(data_dir=sys.argv[1], batch_size=4, image_size=8, num_workers=2)
take = lambda count: [next(data) for _ in range(count)]
take(3)
"""


def test_processes_with_workers_end_quickly_without_tracebacks(tmp_path):
    (tmp_path / "data").mkdir()
    write_numbered(tmp_path / "data", 8)
    for name, end in ENDS.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT + end)
    jobs = {name: [str(tmp_path / f"{name}.py"), str(tmp_path / "data")] for name in ENDS}
    done = {name: run_ranks(None, argv)[0] for name, argv in jobs.items()}
    for name in ("SIGTERM to all", "normal exit"):
        assert (done[name].returncode, done[name].output) == (0, ""), name
    assert done["Ctrl-C"].returncode in (130, -signal.SIGINT) and done["Ctrl-C"].output == "interrupted\n"
    killed = done["a worker is killed"]
    assert killed.returncode == 1 and killed.output.count("\n") == 1, killed.output
    assert killed.output.startswith("error: ") and "--num_workers" in killed.output
    assert all(outcome.seconds < 10 for outcome in done.values())
