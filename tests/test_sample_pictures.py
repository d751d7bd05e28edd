"""What a sampling job shows and is told: labels by number, name and file, pictures, single files, progress."""

import math
import os
import re
from itertools import groupby

import numpy as np
import pytest
import torch as th
from helpers import as_rank, refused
from PIL import Image
from sampling import (
    MODEL,
    KnownSampler,
    known_job,
    picture,
    pictures,
    read_npz,
    run_here,
    save_network,
)

from guided_diffusion import sample_util
from guided_diffusion.sample_util import choose_labels

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Labels


def test_labels_are_uniform_by_default():
    labels = choose_labels("", 8000, 8, seed=0)
    counts = th.bincount(labels, minlength=8)
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 7 + 5 * math.sqrt(2 * 7)  # 7 degrees of freedom, variance 14


def test_balanced_labels_have_as_many_of_each_class():
    for num_samples in (40, 43, 3):
        counts = th.bincount(choose_labels("balanced", num_samples, 4, seed=0), minlength=4)
        assert counts.sum() == num_samples and counts.max() - counts.min() == (num_samples % 4 > 0)


IMAGENET = ["n01440764,tench,Tinca tinca", "n01443537,goldfish", "2", "n01484850,great white shark"]


@pytest.mark.parametrize(
    "classes, labels",
    [
        ("goldfish", [1]),
        ("tench, 3", [0, 3]),
        ("N01484850", [3]),
        ("Great White Shark,tinca tinca", [3, 0]),
        ("2", [2]),
    ],
)
def test_classes_by_name(classes, labels):
    assert choose_labels(classes, 4, 4, 0, IMAGENET).tolist() == (labels * 4)[:4]


def test_classes_that_are_not_there():
    refused(lambda: choose_labels("goldfish,whale", 4, 4, 0, IMAGENET), "--classes", "'whale'", "tench")
    refused(lambda: choose_labels("goldfish", 4, 4, 0), "--classes goldfish", "not known")
    refused(lambda: choose_labels("1,4", 4, 4, 0, IMAGENET), "class 4", "0..3")
    refused(lambda: choose_labels("1", 4, None, 0), "not class-conditional")


def test_classes_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("3\n0\n\n1\n")
    np.save(tmp_path / "b.npy", np.array([[3], [0], [1]], np.uint8))
    for name in ("a.txt", "b.npy"):
        assert choose_labels(str(tmp_path / name), 5, 4, 0).tolist() == [3, 0, 1, 3, 0]
    np.save(tmp_path / "floats.npy", np.array([0.5, 1.0]))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    for name, content in {"words.txt": b"1\ntwo\n", "none.txt": b"", "none.npy": b"", "bytes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("floats.npy", "objects.npy", "words.txt", "none.txt", "none.npy", "bytes.txt"):
        path = str(tmp_path / name)
        refused(lambda p=path: choose_labels(p, 5, 4, 0), f"--classes {path}", "class numbers")
    refused(lambda: choose_labels(str(tmp_path / "gone.txt"), 5, 4, 0), "gone.txt", "cannot be read")


def test_names_come_from_a_table_or_from_the_config_beside_the_checkpoint(networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 4, "batch_size": 4, "timestep_respacing": 1, "classifier_scale": 0}
    (tmp_path / "table.csv").write_text("label,wnid,name\n0,n1,ant\n1,n2,bee\n2,n3,cow\n3,n4,dog\n")
    run_here(monkeypatch, "classifier_sample", **options, classes="dog,n2", class_table=tmp_path / "table.csv",
             log_dir=tmp_path / "a")  # fmt: skip
    assert read_npz(tmp_path / "a")["arr_1"].tolist() == [3, 1, 3, 1]
    options["model_path"] = save_network(str(tmp_path / "described/model.pt"), MODEL, config={"classes": list("wxyz")})
    run_here(monkeypatch, "classifier_sample", **options, classes="z,w", log_dir=tmp_path / "b")
    assert read_npz(tmp_path / "b")["arr_1"].tolist() == [3, 0, 3, 0]


# Pictures


def cells_of(path, size, factor):
    """The images of a grid with 1-pixel gaps, enlarged by a factor: [rows, columns, size, size, C]."""
    with Image.open(path) as opened:
        grid = np.asarray(opened)[::factor, ::factor]
    rows, columns = ((length + 1) // (size + 1) for length in grid.shape[:2])
    cells = [[grid[r * (size + 1) :, c * (size + 1) :][:size, :size] for c in range(columns)] for r in range(rows)]
    return np.array(cells)


def test_the_picture_shows_the_first_64(tmp_path):
    known_job(tmp_path, 70, 32, KnownSampler(shape=(3, 4, 4)))
    cells = cells_of(tmp_path / "samples_70x4x4x3.png", 4, 16)
    assert cells.shape == (8, 8, 4, 4, 3)
    assert (cells.reshape(64, 4, 4, 3) == pictures(range(64), (4, 4, 3))).all()


def test_classes_asked_for_have_a_row_each(tmp_path):
    labels = th.tensor([7, 3, 5])[th.arange(100) % 3]
    known_job(tmp_path, 100, 32, KnownSampler(shape=(3, 4, 4)), labels=labels, rows_by_class=True)
    cells = cells_of(tmp_path / "samples_100x4x4x3.png", 4, 16)
    assert cells.shape[:2] == (3, 10)
    for row, label in zip(cells, (3, 5, 7)):
        mine = [i for i in range(100) if labels[i] == label][:10]
        assert (row == pictures(mine, (4, 4, 3))).all()


@pytest.mark.parametrize("classes, rows", [("", [[0, 1], [2, 3]]), ("2,1", [[1, 3], [0, 2]]), ("3", [[0, 1], [2, 3]])])
def test_scripts_draw_rows_where_classes_are_asked_for(classes, rows, networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 4, "batch_size": 4, "timestep_respacing": 1, "classifier_scale": 0}
    run_here(monkeypatch, "classifier_sample", **options, classes=classes, log_dir=tmp_path)
    cells = cells_of(tmp_path / "samples_4x8x8x3.png", 8, 8)
    assert (cells == read_npz(tmp_path)["arr_0"][np.array(rows)]).all()


@pytest.mark.parametrize("labels", [None, th.arange(10) % 3])
def test_every_image_as_a_file_of_its_own(labels, tmp_path):
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
    known_job(tmp_path / "a", 10, 4, labels=labels, save_images=folder)  # of a job that was complete
    check()
    for name in names:
        os.remove(os.path.join(folder, name))
    with pytest.raises(Exception, match="sample 9"):  # half without the flag, half with it
        known_job(tmp_path / "b", 10, 4, KnownSampler(fail_at=9), labels=labels)
    known_job(tmp_path / "b", 10, 4, labels=labels, save_images=folder)
    check()


def test_ranks_share_the_files_that_are_there_already(monkeypatch, tmp_path):
    known_job(tmp_path, 150, 16)  # its .npz is read 64 at a time
    written = []
    monkeypatch.setattr(sample_util.dist_util, "barrier", lambda: None)
    for rank in range(2):
        with monkeypatch.context() as patch:
            as_rank(patch, rank, 2)
            store = sample_util.SampleStore(str(tmp_path), (150, 2, 3, 3), {"seed": 0})
            sample_util.save_each(str(tmp_path / str(rank)), store)
        written.append(sorted(os.listdir(tmp_path / str(rank))))
    assert written[0] == [f"{i:06d}.png" for i in [*range(64), *range(128, 150)]]
    assert written[1] == [f"{i:06d}.png" for i in range(64, 128)]


class Brightening(KnownSampler):
    """Its prediction of sample i is, after step s of 12, all of grey level 20 s + i."""

    num_steps = 12

    def steps(self, indices):
        for step in range(1, 13):
            levels = th.tensor([(20 * step + i + 0.5) / 127.5 - 1 for i in indices])
            x = levels.reshape(-1, 1, 1, 1).expand(-1, *self.shape)
            yield {"sample": x if step == 12 else th.zeros_like(x), "pred_xstart": x}


def test_the_progress_grid_shows_predictions_along_the_steps(tmp_path):
    known_job(tmp_path, 12, 10, Brightening((3, 4, 4)), progress_grid=True)
    cells = cells_of(tmp_path / "samples_12x4x4x3_progress.png", 4, 16)
    assert cells.shape[:2] == (8, 10)  # the first eight samples; ten of the twelve steps, the first and last among them
    levels = cells[:, :, 0, 0, 0].astype(int)
    assert (cells == levels[..., None, None, None]).all()
    steps = (levels[0]) // 20
    assert steps[0] == 1 and steps[-1] == 12 and (np.diff(steps) >= 1).all()
    assert (levels == 20 * steps + np.arange(8)[:, None]).all()


# Progress


def progress_lines(capsys):
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()


def test_progress_says_samples_pace_time_left_and_steps(tmp_path, capsys, monkeypatch):
    from tqdm import tqdm

    with monkeypatch.context() as patch:
        patch.setattr(sample_util, "progress_bar", lambda **options: tqdm(mininterval=0, miniters=0, **options))
        known_job(tmp_path / "a", 10, 4)
    lines = progress_lines(capsys)
    pattern = r"sampling: +(\d+)%\|.*\| (\d+)/10 \[\d\d:\d\d<(\d\d:\d\d|\?), .*(sample/s|s/sample)(, step (\d)/3)?\] *$"
    shown = [re.search(pattern, line) for line in lines]
    assert all(shown) and [int(match[2]) for match in shown] == sorted(int(match[2]) for match in shown)
    assert {0, 4, 8, 10} <= {int(match[2]) for match in shown}
    assert [step for step, _ in groupby(match[6] for match in shown if match[6])] == list("123") * 3
    with pytest.raises(Exception, match="sample 9"):
        known_job(tmp_path / "b", 10, 4, KnownSampler(fail_at=9))
    progress_lines(capsys)
    known_job(tmp_path / "b", 10, 4)
    assert "| 8/10 [" in progress_lines(capsys)[0]  # it goes on counting


def test_progress_is_said_now_and_then_and_by_one_rank(tmp_path, capsys, monkeypatch):
    known_job(tmp_path, 200, 1)
    assert 2 <= len(progress_lines(capsys)) < 20
    monkeypatch.setattr("guided_diffusion.logger.get_rank_without_mpi_import", lambda: 1)
    with sample_util._progress(10, 0) as bar:
        sample_util._advance(bar, 5, "1/3")
    assert not capsys.readouterr().err


def test_steps_count_as_parts_of_samples(tmp_path):
    class Bar:
        total, n, said = 10, 0, []

        def set_postfix_str(self, text, refresh):
            self.said.append(text)

        def update(self, share):
            self.n += share

    bar = Bar()
    sampler = KnownSampler()
    sample_util._make(sampler, range(0, 6), None, lambda step: sample_util._advance(bar, 6 / 3, step))
    assert bar.said == ["step 1/3", "step 2/3", "step 3/3"] and bar.n == 6
