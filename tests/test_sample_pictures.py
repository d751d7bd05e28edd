"""The image grid, the PNG files and the progress bar of a sampling job."""

import os
import re
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from PIL import Image
from sampling import KnownSampler, known_job, picture, pictures, read_npz, run_here

from guided_diffusion import sample_job

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def cells_of(path, size, factor):
    """Read the images of an enlarged grid with 1-pixel gaps. Returns an array [rows, columns, size, size, C]."""
    with Image.open(path) as opened:
        grid = np.asarray(opened)[::factor, ::factor]
    rows, columns = ((length + 1) // (size + 1) for length in grid.shape[:2])
    cells = [[grid[r * (size + 1) :, c * (size + 1) :][:size, :size] for c in range(columns)] for r in range(rows)]
    return np.array(cells)


def test_the_grid_of_a_new_job_replaces_the_grid_of_a_removed_one(tmp_path):
    grid, npz = tmp_path / "samples_4x4x4x3.png", tmp_path / "samples_4x4x4x3.npz"
    known_job(tmp_path, 4, 4, KnownSampler(shape=(3, 4, 4)))
    drawn = grid.read_bytes()
    Image.new("RGB", (8, 8)).save(grid)  # the grid of a job whose .npz is removed
    npz.unlink()
    known_job(tmp_path, 4, 4, KnownSampler(shape=(3, 4, 4)), job={"seed": 1})
    assert grid.read_bytes() == drawn
    grid.unlink()  # as after a kill between the .npz and the grid
    sampler, _ = known_job(tmp_path, 4, 4, KnownSampler(shape=(3, 4, 4)), job={"seed": 1})
    assert grid.read_bytes() == drawn and not sampler.asked


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_the_first_64_samples(channels, tmp_path):
    known_job(tmp_path, 70, 32, KnownSampler(shape=(channels, 4, 4)))
    cells = cells_of(tmp_path / f"samples_70x4x4x{channels}.png", 4, 16)
    assert cells.shape[:4] == (8, 8, 4, 4)
    assert (cells.reshape(64, 4, 4, channels) == pictures(range(64), (4, 4, channels))).all()


def test_each_chosen_class_has_its_own_row(tmp_path):
    labels = th.tensor([7, 3, 5, 7, 7])[th.arange(40) % 5]
    known_job(tmp_path, 40, 32, KnownSampler(shape=(3, 4, 4)), labels=labels, rows_by_class=True)
    cells = cells_of(tmp_path / "samples_40x4x4x3.png", 4, 16)
    assert cells.shape[:2] == (3, 10)
    for row, label in zip(cells, (3, 5, 7)):
        mine = [i for i in range(40) if labels[i] == label][:10]
        assert (row[: len(mine)] == pictures(mine, (4, 4, 3))).all() and (row[len(mine) :] == 255).all()


@pytest.mark.parametrize("classes, rows", [("", [[0, 1], [2, 3]]), ("2,1", [[1, 3], [0, 2]]), ("3", [[0, 1], [2, 3]])])
def test_scripts_draw_one_row_for_each_class_in_the_classes_flag(classes, rows, networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 4, "batch_size": 4, "timestep_respacing": 1, "classifier_scale": 0}
    run_here(monkeypatch, "classifier_sample", **options, classes=classes, log_dir=tmp_path)
    cells = cells_of(tmp_path / "samples_4x8x8x3.png", 8, 8)
    assert (cells == read_npz(tmp_path)["arr_0"][np.array(rows)]).all()


class Brightening(KnownSampler):
    """A sampler whose pred_xstart for sample i, after step s of 12, has the constant grey level 20 s + i."""

    num_steps = 12

    def steps(self, indices):
        for step in range(1, 13):
            levels = th.tensor([(20 * step + i + 0.5) / 127.5 - 1 for i in indices])
            x = levels.reshape(-1, 1, 1, 1).expand(-1, *self.shape)
            yield {"sample": x if step == 12 else th.zeros_like(x), "pred_xstart": x}


def test_progress_grid_shows_predictions_at_several_steps(tmp_path):
    known_job(tmp_path, 12, 10, Brightening((3, 4, 4)), progress_grid=True)
    cells = cells_of(tmp_path / "samples_12x4x4x3_progress.png", 4, 16)
    assert cells.shape[:2] == (8, 10)  # eight samples, ten of the twelve steps
    levels = cells[:, :, 0, 0, 0].astype(int)
    assert (cells == levels[..., None, None, None]).all()
    steps = levels[0] // 20
    assert steps[0] == 1 and steps[-1] == 12 and (np.diff(steps) >= 1).all()
    assert (levels == 20 * steps + np.arange(8)[:, None]).all()


@pytest.mark.parametrize("labels", [None, th.arange(10) % 3])
def test_save_images_also_writes_samples_of_an_earlier_run(labels, tmp_path):
    folder = str(tmp_path / "each")
    names = [f"{i:06d}.png" if labels is None else f"{i % 3}_{i:06d}.png" for i in range(10)]

    def check():
        assert sorted(os.listdir(folder)) == sorted(names)
        for i, name in enumerate(names):
            with Image.open(os.path.join(folder, name)) as opened:
                assert (np.asarray(opened) == picture(i)).all()

    known_job(tmp_path / "a", 10, 4, labels=labels, save_images=folder)
    check()
    for name in names[::2]:
        os.remove(os.path.join(folder, name))
    known_job(tmp_path / "a", 10, 4, labels=labels, save_images=folder)  # reads the samples from the .npz file
    check()
    for name in names:
        os.remove(os.path.join(folder, name))
    with pytest.raises(Exception, match="sample 9"):
        known_job(tmp_path / "b", 10, 4, KnownSampler(fail_at=9), labels=labels)
    known_job(tmp_path / "b", 10, 4, labels=labels, save_images=folder)  # reads shards and makes the rest
    check()


# Progress


def progress_lines(capsys):
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()


def test_progress_bar_shows_samples_speed_remaining_time_and_steps(tmp_path, capsys, monkeypatch):
    from tqdm import tqdm

    with monkeypatch.context() as patch:
        patch.setattr(sample_job, "progress_bar", lambda **options: tqdm(mininterval=0, miniters=0, **options))
        known_job(tmp_path / "a", 10, 4)
    pattern = r"sampling: +(\d+)%\|.*\| (\d+)/10 \[\d\d:\d\d<(\d\d:\d\d|\?), .*(sample/s|s/sample)(, step (\d)/3)?\] *$"
    shown = [re.search(pattern, line) for line in progress_lines(capsys)]
    assert all(shown) and [int(match[2]) for match in shown] == sorted(int(match[2]) for match in shown)
    assert {0, 4, 8, 10} <= {int(match[2]) for match in shown}
    assert [step for step, _ in groupby(match[6] for match in shown if match[6])] == list("123") * 3
    with pytest.raises(Exception, match="sample 9"):
        known_job(tmp_path / "b", 10, 4, KnownSampler(fail_at=9))
    progress_lines(capsys)
    known_job(tmp_path / "b", 10, 4)
    assert "| 8/10 [" in progress_lines(capsys)[0]  # samples of an earlier run are counted


def test_progress_bar_is_updated_rarely_and_only_on_rank_0(tmp_path, capsys, monkeypatch):
    known_job(tmp_path / "a", 100, 1)
    assert 2 <= len(progress_lines(capsys)) < 20
    monkeypatch.setattr("guided_diffusion.logger.dist_util", SimpleNamespace(get_rank=lambda: 1))
    known_job(tmp_path / "b", 10, 4)
    assert not capsys.readouterr().err
