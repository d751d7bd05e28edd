"""image_nll.py: agreement with a known entropy, each image counted once on any number of ranks, files and plot."""

import math
import os
import random
import re

import numpy as np
import pytest
import torch as th
from helpers import LEARNED, GaussianData, exact_model, process, quick_half_convolutions, refused
from launch import flags, run_ranks, script
from PIL import Image
from sampling import MODEL, run_here, save_network
from test_analytic_truth import gaussian_bpd

from guided_diffusion import likelihood_util, sampling_networks
from guided_diffusion.likelihood_util import TERMS, bits_per_dim

pytestmark = pytest.mark.usefixtures("quiet", "cpu")
DATA = GaussianData([0.0, 0.1, -0.1], [0.2, 0.15, 0.25])  # [-1, 1] covers at least 3.5 standard deviations
STEPS = 250


def write_images(folder, count, size=8, data=DATA, seed=0):
    """Write images with pixels drawn independently from `data`, rounded to grey levels. Returns the folder's path."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    mean, std = (v.flatten().numpy() for v in (data.mean, data.variance.sqrt()))
    for i in range(count):
        x = rng.normal(mean, std, (size, size, 3))
        levels = np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{i % 4}_{i:04d}.png")
    return str(folder)


def read_result(folder):
    with np.load(folder / "bpd.npz") as arrays:
        result = dict(arrays)
    log = (folder / "log.txt").read_text()
    said = re.search(r"(\d+) images: ([\d.nan-]+) \+- ([\d.nan]+) bits/dim", log)
    return result, int(said[1]), float(said[2]), float(said[3])


def test_bits_per_dim_matches_the_entropy(monkeypatch, tmp_path):
    """With the exact model of DATA instead of a network, the script reports the entropy of DATA."""
    pytest.importorskip("matplotlib")
    diffusion = process(STEPS, var=LEARNED)
    exact = exact_model(DATA, diffusion)
    monkeypatch.setattr(sampling_networks, "create_model_and_diffusion", lambda **_: (exact, diffusion))
    monkeypatch.setattr(sampling_networks, "prepare_network", lambda model, *_: model)
    data_dir = write_images(tmp_path / "images", 120)
    (tmp_path / "model.pt").write_bytes(b"")
    run_here(monkeypatch, "image_nll", data_dir=data_dir, model_path=tmp_path / "model.pt", image_size=8, num_workers=0,
             batch_size=50, num_samples=1000, clip_denoised=False, log_dir=tmp_path / "out")  # fmt: skip
    result, count, mean, error = read_result(tmp_path / "out")
    assert count == 120 == len(result["total_bpd"])
    assert mean == pytest.approx(result["total_bpd"].mean(), abs=1e-4)
    # The standard error of the mean over 120 independent images
    assert error == pytest.approx(result["total_bpd"].std(ddof=1) / math.sqrt(120), abs=1e-4)
    # -log p of a pixel has a standard deviation of sqrt(1 / 2) nats; the noise of 250 timesteps increases the error.
    assert math.sqrt(0.5) / math.log(2) / math.sqrt(120 * 192) < error < 0.02
    # The systematic error is below 0.005 bits per dimension, as in test_analytic_truth.py.
    assert abs(mean - gaussian_bpd(DATA)) < 4 * error + 0.005

    assert result.keys() == {"total_bpd", "prior_bpd", *TERMS}
    assert all(result[name].shape == (STEPS,) for name in TERMS)
    total = result["vb"].sum() + result["prior_bpd"].mean()
    assert total == pytest.approx(result["total_bpd"].mean(), rel=1e-6)
    for name in TERMS:  # the original codebase writes one file per term
        with np.load(tmp_path / "out" / f"{name}_terms.npz") as arrays:
            assert (arrays["arr_0"] == result[name]).all()
    # Arrays run from the last timestep to the first. x_start is hard to predict at high noise, and eps at low noise.
    assert result["xstart_mse"][0] > 50 * result["xstart_mse"][-1] and result["mse"][-1] > 50 * result["mse"][0]
    with Image.open(tmp_path / "out/terms.png") as plot:
        assert plot.width > 800 and len(np.unique(np.asarray(plot.convert("L")))) > 20  # the plot is not blank


# Each image is counted once, for any number of ranks and any batch size


class Numbered:
    """A data set in which all pixels of image i, and its label, encode the number i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, index, rng):
        return np.full((3, 2, 2), index / 100, np.float32), {"y": np.array(index, np.int64)}


class Tracing:
    """Stands in for a diffusion process: the loss terms of an image are its number and its noise."""

    num_timesteps = 2

    def calc_bpd_loop(self, model, x, clip_denoised, model_kwargs, randn_like):
        number = x[:, 0, 0, 0] * 100
        assert (model_kwargs["y"] == number.round().long()).all()
        noise = randn_like(x).flatten(1)[:, 0]
        terms = th.stack([number, noise], dim=1)
        return {"total_bpd": number, "prior_bpd": noise, **{name: terms for name in TERMS}}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_image_is_counted_once(batch_size):
    one = bits_per_dim(Tracing(), None, Numbered(11), 11)
    result = bits_per_dim(Tracing(), None, Numbered(11), batch_size)
    assert result["total_bpd"] == pytest.approx(np.arange(11), abs=1e-4)  # in image order
    assert (result["prior_bpd"] == one["prior_bpd"]).all()  # the noise of an image does not depend on the batch size
    assert (bits_per_dim(Tracing(), None, Numbered(11), 4, seed=1)["prior_bpd"] != one["prior_bpd"]).all()
    assert result["mse"] == pytest.approx([5, one["prior_bpd"].mean()], abs=1e-5)


def test_the_number_of_images_can_be_limited():
    for count, found in ((7, 7), (99, 11)):
        assert len(bits_per_dim(Tracing(), None, Numbered(11), 2, count=count)["total_bpd"]) == found
    refused(lambda: bits_per_dim(Tracing(), None, Numbered(3), 1, count=0), "--num_samples 0")
    refused(lambda: bits_per_dim(Tracing(), None, Numbered(3), 0), "--batch_size 0")


# The script with a real network


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    stage = tmp_path_factory.mktemp("nll")
    images = write_images(stage / "images", 7)
    path = save_network(str(stage / "model/model.pt"), MODEL, config={"classes": list("0123")})
    return dict(data_dir=images, model_path=path, timestep_respacing=3, num_workers=0)


def test_three_ranks_give_the_same_result_as_one(stage, monkeypatch, tmp_path):
    run_here(monkeypatch, "image_nll", **stage, batch_size=7, log_dir=tmp_path / "1")
    argv = [script("image_nll"), *flags(**stage, batch_size=2, log_dir=tmp_path / "3")]
    assert run_ranks(3, argv)[0].check().output.count("bits/dim") == 1
    (one, *said), (three, *said_by_three) = (read_result(tmp_path / name) for name in "13")
    assert said_by_three == pytest.approx(said, rel=1e-4) and said[0] == 7
    for name in one:
        assert three[name] == pytest.approx(one[name], rel=1e-4)


def test_half_precision_changes_the_result_only_slightly(stage, monkeypatch, tmp_path):
    totals = {}
    with quick_half_convolutions(monkeypatch):
        for half in (False, True):
            options = dict(stage, use_fp16=half, batch_size=7, log_dir=tmp_path / str(half))
            run_here(monkeypatch, "image_nll", **options)
            totals[half] = read_result(tmp_path / str(half))[0]["total_bpd"]
    assert 0 < np.abs(totals[True] / totals[False] - 1).max() < 0.01


def test_images_are_neither_flipped_nor_cropped_at_random(stage, monkeypatch, tmp_path):
    bits = likelihood_util.bits_per_dim

    def checking(diffusion, model, dataset, **options):
        for i, name in enumerate(sorted(os.listdir(stage["data_dir"]))):
            with Image.open(os.path.join(stage["data_dir"], name)) as image:
                want = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
            assert all(np.allclose(dataset.get(i, random.Random(j))[0], want, atol=1e-6) for j in range(3))
        return bits(diffusion, model, dataset, **options)

    monkeypatch.setattr(likelihood_util, "bits_per_dim", checking)
    run_here(monkeypatch, "image_nll", **stage, batch_size=7, log_dir=tmp_path)
    assert read_result(tmp_path)[1] == 7


def test_invalid_flags_are_refused(stage, monkeypatch, tmp_path):
    for changes, words in [
        (dict(data_dir=""), ["--data_dir is missing"]),
        (dict(batch_size=0), ["--batch_size 0"]),
        (dict(num_samples=0), ["--num_samples 0"]),
        (dict(seed=-1), ["--seed -1"]),
        (dict(num_heads=4), ["--num_heads 4", "config.json"]),
        (dict(num_workers=-1), ["--num_workers -1"]),
    ]:
        refused(lambda c=changes: run_here(monkeypatch, "image_nll", **{**stage, **c}, log_dir=tmp_path), *words)
