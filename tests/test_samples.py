"""Samples: their noise and labels from seed and index, pixels, grids and files."""

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.errors import InputError
from guided_diffusion.random_util import SampleNoise, random_labels, seed_everything
from guided_diffusion.sample_util import choose_labels, save_grid, to_uint8

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Noise, labels and seeds


def test_noise_depends_on_seed_and_index_alone():
    together = SampleNoise(7, [3, 4, 5])
    first, second = together.randn(2, 3), together.randn_like(th.zeros(3, 4))
    assert first.shape == (3, 2, 3) and second.shape == (3, 4)
    alone = SampleNoise(7, [4])
    assert (alone.randn(2, 3)[0] == first[1]).all() and (alone.randn_like(th.zeros(1, 4))[0] == second[1]).all()
    swapped = SampleNoise(7, [5, 3]).randn(2, 3)
    assert (swapped[0] == first[2]).all() and (swapped[1] == first[0]).all()
    for other in (SampleNoise(8, [4]), SampleNoise(7, [1000])):
        assert (other.randn(2, 3) != first[1]).all()
    # torch's own generator has no part in it
    th.manual_seed(0)
    assert (SampleNoise(7, [3]).randn(2, 3)[0] == first[0]).all()


def test_noise_is_standard_normal_and_independent_between_samples():
    x = SampleNoise(0, range(200)).randn(500)
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02
    correlation = np.corrcoef(x.numpy())[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 0.3  # 6.7 standard deviations
    assert (SampleNoise(0, range(3)).randn_like(th.zeros(3, 2, dtype=th.float64))).dtype == th.float64
    # (seed, index) is no sum: sample 1 of seed 0 is not sample 0 of seed 1.
    assert (SampleNoise(0, [1]).randn(4) != SampleNoise(1, [0]).randn(4)).all()


def test_labels_depend_on_seed_and_index_alone():
    labels = random_labels(5, range(3000), 10)
    assert labels.dtype == th.int64 and (random_labels(5, [7, 11], 10) == labels[[7, 11]]).all()
    counts = np.bincount(labels.numpy(), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 300).max() < 100  # 6 standard deviations
    assert (random_labels(6, range(3000), 10) != labels).float().mean() > 0.8


def test_choose_labels():
    assert (choose_labels("", 50, 10, seed=3) == random_labels(3, range(50), 10)).all()
    assert choose_labels("balanced", 7, 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert choose_labels("207,360", 5, 1000, seed=0).tolist() == [207, 360, 207, 360, 207]
    assert choose_labels("4", 2, 5, seed=0).tolist() == [4, 4]
    assert all(choose_labels(c, 3, 10, seed=0).dtype == th.int64 for c in ("", "balanced", "1,2"))
    for classes in ("5", "0,7", "-1"):
        with pytest.raises(InputError, match=r"0\.\.4"):
            choose_labels(classes, 3, 5, seed=0)


@pytest.mark.parametrize("classes", [" ", ",", "1,", "1.5", "all"])
def test_classes_that_do_not_parse(classes):
    with pytest.raises(InputError, match="--classes"):
        choose_labels(classes, 3, 5, seed=0)


def test_seeding_differs_between_ranks_and_repeats(monkeypatch):
    def draw(seed, rank):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        seed_everything(seed)
        return th.rand(1).item(), np.random.rand()

    assert draw(1, 0) == draw(1, 0)
    values = [draw(1, 0), draw(1, 1), draw(2, 0)]
    assert len({v[0] for v in values}) == len({v[1] for v in values}) == 3
    th.manual_seed(0)
    expected = th.rand(1).item()
    th.manual_seed(0)
    seed_everything(-1)  # a negative seed leaves the generators alone
    assert th.rand(1).item() == expected


# Pixels, grids and files


def test_to_uint8():
    x = th.tensor([-1.0, 1.0, 0.0, -3.0, 2.0, 0.5]).reshape(2, 1, 1, 3)
    out = to_uint8(x)
    assert out.shape == (2, 1, 3, 1) and out.dtype == th.uint8
    assert out.flatten().tolist() == [0, 255, 127, 0, 255, 191]
    # channels last
    x = th.stack([th.full((2, 2), v) for v in (-1.0, 0.0, 1.0)])[None]
    assert to_uint8(x)[0, 1, 1].tolist() == [0, 127, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(bad):
    x = th.zeros(4, 3, 2, 2)
    x[2, 1, 0, 1] = bad
    with pytest.raises(InputError, match="sample 102 is not finite"):
        to_uint8(x, start=100)


def read_grid(path, size=64):
    """The top left pixel of every cell of a grid of images of a size: [rows, columns, C]."""
    with Image.open(path) as picture:
        arr = np.asarray(picture)
    arr = arr if arr.ndim == 3 else arr[..., None]
    return arr[:: size + 1, :: size + 1], arr.shape


def test_grid_puts_a_class_in_each_row(tmp_path):
    labels = np.array([7, 3, 7, 3, 3])
    images = np.stack([np.full((64, 64, 3), 10 * i, np.uint8) for i in range(5)])
    save_grid(str(tmp_path / "grid.png"), images, labels)
    cells, shape = read_grid(tmp_path / "grid.png")
    assert shape == (2 * 64 + 1, 3 * 64 + 2, 3)
    assert cells[..., 0].tolist() == [[10, 30, 40], [0, 20, 255]]  # class 3, class 7 and a blank


def test_grid_without_labels_is_a_square_in_order(tmp_path):
    images = np.stack([np.full((64, 64, 1), 10 * i, np.uint8) for i in range(7)])
    save_grid(str(tmp_path / "grid.png"), images)
    cells, _ = read_grid(tmp_path / "grid.png")
    assert cells[..., 0].tolist() == [[0, 10, 20], [30, 40, 50], [60, 255, 255]]


def test_grid_of_many_shows_the_first(tmp_path):
    images = np.arange(300, dtype=np.uint16)[:, None, None, None].repeat(64, 1).repeat(64, 2) // 2
    save_grid(str(tmp_path / "grid.png"), images.astype(np.uint8))
    cells, _ = read_grid(tmp_path / "grid.png")
    assert cells.shape[:2] == (16, 16) and cells[..., 0].flatten().tolist() == [i // 2 for i in range(256)]


def test_small_images_are_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    save_grid(str(tmp_path / "grid.png"), images)
    with Image.open(tmp_path / "grid.png") as picture:
        arr = np.asarray(picture)
    assert arr.shape == (4 * 33, 4 * 33, 3)
    assert (arr[:64, :64] == images[0].repeat(4, 0).repeat(4, 1)).all()
