"""Samples: noise and labels that depend on seed and index, --classes, and the conversion to uint8."""

import numpy as np
import pytest
import torch as th
from helpers import refused
from sampling import MODEL, read_npz, run_here, save_network

from guided_diffusion import dist_util
from guided_diffusion.class_labels import choose_labels, read_class_table
from guided_diffusion.pictures import to_uint8
from guided_diffusion.random_util import SampleNoise, random_labels, seed_everything

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Noise and seeds


def test_noise_depends_only_on_seed_and_index():
    together = SampleNoise(7, [3, 4, 5])
    first, second = together.randn(2, 3), together.randn_like(th.zeros(3, 4))
    assert first.shape == (3, 2, 3) and second.shape == (3, 4)
    th.manual_seed(0)  # torch's global generator has no effect
    alone = SampleNoise(7, [4])
    assert (alone.randn(2, 3)[0] == first[1]).all() and (alone.randn_like(th.zeros(1, 4))[0] == second[1]).all()
    swapped = SampleNoise(7, [5, 3]).randn(2, 3)
    assert (swapped[0] == first[2]).all() and (swapped[1] == first[0]).all()
    for other in (SampleNoise(8, [4]), SampleNoise(7, [1000]), SampleNoise(8, [3]), SampleNoise(7, [4], stream=1)):
        assert (other.randn(2, 3) != first[1]).all()


def test_noise_is_standard_normal_and_independent_between_samples():
    x = SampleNoise(0, range(200)).randn(500)
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02
    correlation = np.corrcoef(x.numpy())[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 0.3  # 6.7 standard deviations
    assert SampleNoise(0, range(3)).randn_like(th.zeros(3, 2, dtype=th.float64)).dtype == th.float64


def test_seeding_is_repeatable_and_differs_between_ranks(monkeypatch):
    def draw(seed, rank):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        seed_everything(seed)
        return th.rand(1).item(), np.random.rand()

    assert draw(1, 0) == draw(1, 0)
    values = [draw(1, 0), draw(1, 1), draw(2, 0)]
    assert len({v[0] for v in values}) == len({v[1] for v in values}) == 3


# Labels

IMAGENET = ["n01440764,tench,Tinca tinca", "n01443537,goldfish", "2", "n01484850,great white shark"]


def test_random_labels_are_uniform_and_depend_on_seed_and_index():
    labels = choose_labels("", 3000, 10, seed=5)
    assert labels.dtype == th.int64 and (random_labels(5, [7, 11], 10) == labels[[7, 11]]).all()
    counts = np.bincount(labels.numpy(), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 300).max() < 100  # 6 standard deviations
    assert (random_labels(6, range(3000), 10) != labels).float().mean() > 0.8


@pytest.mark.parametrize(
    "classes, labels",
    [
        ("balanced", [0, 1, 2, 3, 0]),
        ("3,1", [3, 1, 3, 1, 3]),
        ("goldfish", [1] * 5),
        ("tench, 3", [0, 3, 0, 3, 0]),
        ("N01484850", [3] * 5),
        ("Great White Shark,tinca tinca", [3, 0, 3, 0, 3]),
        ("2", [2] * 5),
    ],
)
def test_classes_flag_cycles_through_numbers_and_names(classes, labels):
    found = choose_labels(classes, 5, 4, 0, IMAGENET)
    assert found.tolist() == labels and found.dtype == th.int64


def test_unknown_classes_are_refused_by_name():
    refused(lambda: choose_labels("goldfish,whale", 4, 4, 0, IMAGENET), "--classes", "'whale'", "tench")
    refused(lambda: choose_labels("goldfish", 4, 4, 0), "--classes goldfish", "class names need", "--class_table")
    refused(lambda: choose_labels("1", 4, None, 0), "not class-conditional")
    for classes in ("4", "0,7", "-1"):
        refused(lambda c=classes: choose_labels(c, 4, 4, 0, IMAGENET), f"--classes {classes}", "0..3")
    for classes in (" ", ",", "1,", "1.5", "all", "--1", "-"):
        refused(lambda c=classes: choose_labels(c, 4, 4, 0), f"--classes {classes}")


def test_classes_are_read_from_files(tmp_path):
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
    refused(lambda: choose_labels(str(tmp_path / "gone.txt"), 5, 4, 0), "gone.txt", "No such file")


def test_class_tables_are_read_or_refused(tmp_path):
    path = str(tmp_path / "table.csv")
    for content in ("label,wnid\n0,n1\n", "label,name\n1,ant\n", "label,name\nx,ant\n"):
        (tmp_path / "table.csv").write_text(content)
        refused(lambda: read_class_table(path), f"--class_table {path}", "label", "name")
    (tmp_path / "table.csv").write_text("label,name\n1,bee\n0,ant\n")
    assert read_class_table(path) == ["ant", "bee"]
    refused(lambda: read_class_table(f"{path}.gone"), "--class_table", "No such file")


def test_class_names_come_from_a_table_or_from_config_json(networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 4, "batch_size": 4, "timestep_respacing": 1, "classifier_scale": 0}
    (tmp_path / "table.csv").write_text("label,wnid,name\n0,n1,ant\n1,n2,bee\n2,n3,cow\n3,n4,dog\n")
    run_here(monkeypatch, "classifier_sample", **options, classes="dog,n2", class_table=tmp_path / "table.csv",
             log_dir=tmp_path / "a")  # fmt: skip
    assert read_npz(tmp_path / "a")["arr_1"].tolist() == [3, 1, 3, 1]
    options["model_path"] = save_network(str(tmp_path / "described/model.pt"), MODEL, config={"classes": list("wxyz")})
    run_here(monkeypatch, "classifier_sample", **options, classes="z,w", log_dir=tmp_path / "b")
    assert read_npz(tmp_path / "b")["arr_1"].tolist() == [3, 0, 3, 0]


# Conversion to uint8


def test_to_uint8_clips_and_refuses_non_finite_values():
    x = th.tensor([-1.0, 1.0, 0.0, -3.0, 2.0, 0.5]).reshape(2, 1, 1, 3)
    out = to_uint8(x)
    assert out.shape == (2, 1, 3, 1) and out.dtype == th.uint8
    assert out.flatten().tolist() == [0, 255, 127, 0, 255, 191]
    for bad in (float("nan"), float("inf")):
        x[1, 0, 0, 2] = bad
        refused(lambda: to_uint8(x, start=100), "sample 101 is not finite")
