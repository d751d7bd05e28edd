"""guidance_sweep.py: the same samples as classifier_sample.py, the metrics of evaluations/, and no repeated work."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch as th
from helpers import fill_by_name, refused
from known_features import BAD, KnownNetwork, truth
from launch import flags, run_ranks, script
from PIL import Image
from sampling import CLASSIFIER, MODEL, new_network, prefixed, read_npz, run_here, save_network

from evaluations import evaluator
from evaluations.classifier_features import ClassifierFeatures
from evaluations.metrics import frechet_distance, precision_recall
from guided_diffusion.sample_job import BatchSampler
from guided_diffusion.script_util import classifier_defaults, create_classifier

pytestmark = pytest.mark.usefixtures("cpu")

RNG = np.random.default_rng(0)
SAMPLING = dict(num_samples=8, batch_size=4, timestep_respacing=3)
CLEAN = dict(CLASSIFIER, classifier_pool="adaptive")  # the classifier that provides the features


@pytest.fixture(scope="module")
def stage(tmp_path_factory, networks):
    """Write the networks and the reference batch of a sweep with classifier features. Returns the sweep's flags."""
    folder = tmp_path_factory.mktemp("sweep")
    images = RNG.integers(0, BAD, (7, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", images)
    save_network(str(folder / "clean" / "model9.pt"), CLEAN, seed=2)
    shared = {name: value for name, value in networks.items() if name != "classifier_scale"}
    return dict(
        **shared, **SAMPLING, **prefixed("feature_", CLEAN), ref_batch=str(folder / "reference.npz"), scales="0,2,30",
        features="classifier", feature_path=str(folder / "clean" / "model9.pt"), eval_batch_size=3,
    )  # fmt: skip


def read_table(folder):
    with open(folder / "sweep.csv", newline="") as f:
        header, *rows = csv.reader(f)
    return header, [list(map(float, row)) for row in rows]


def sweep(monkeypatch, folder, **options):
    """Run a sweep in the test process. Returns the column names and the rows of numbers of sweep.csv."""
    run_here(monkeypatch, "guidance_sweep", **options, log_dir=folder)
    return read_table(folder)


@pytest.fixture(scope="module")
def done(stage, tmp_path_factory):
    """Run one sweep for all tests of this file. Returns its folder, and the column names and rows of sweep.csv."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        return folder, *sweep(patch, folder, **stage)


def content(folder):
    """Map the path of each samples_*.npz file to its inode and mtime, which change if the file is rewritten."""
    paths = sorted(path for path in folder.rglob("samples_*.npz"))
    return {path.relative_to(folder): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def asked(monkeypatch):
    """Return a list that records the index of every sample that is made."""
    made, steps = [], BatchSampler.steps
    monkeypatch.setattr(BatchSampler, "steps", lambda self, indices: made.extend(indices) or steps(self, indices))
    return made


# Samples

OPTIONS = [
    dict(use_ddim=True, classes="balanced", guidance_interval="0.3,1"),
    dict(classes="3,1", seed=5, clip_denoised=False, batch_size=3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_are_the_same_as_from_classifier_sample(options, stage, networks, monkeypatch, tmp_path):
    sweep(monkeypatch, tmp_path / "sweep", **{**stage, "scales": "0,2.5,30", **options})
    found = set()
    for scale in ("0", "2.5", "30"):
        alone = {**networks, **SAMPLING, **options, "classifier_scale": float(scale)}
        run_here(monkeypatch, "classifier_sample", **alone, log_dir=tmp_path / scale)
        folder = tmp_path / "sweep" / f"scale-{scale}"
        for name in ("samples_8x8x8x3.npz", "samples_8x8x8x3.png"):
            assert (folder / name).read_bytes() == (tmp_path / scale / name).read_bytes(), (scale, name)
        jobs = [json.loads((path / "samples_8x8x8x3.json").read_text()) for path in (folder, tmp_path / scale)]
        assert jobs[0] == jobs[1]  # so either script can resume the samples of the other
        found.add(read_npz(folder)["arr_0"].tobytes())
    assert len(found) == 3


def test_finished_scales_are_not_sampled_again(stage, done, asked, monkeypatch, tmp_path):
    folder, header, rows = done
    shutil.copytree(folder, tmp_path / "copy")
    before = content(tmp_path / "copy")
    assert len(before) == 3
    assert sweep(monkeypatch, tmp_path / "copy", **stage) == (header, rows) and asked == []
    assert content(tmp_path / "copy") == before

    names, more = sweep(monkeypatch, tmp_path / "copy", **{**stage, "scales": "30,7,0,2,7"})
    assert names == header and [row[0] for row in more] == [0, 2, 7, 30]
    assert [row for row in more if row[0] != 7] == rows
    assert asked == list(range(8))
    after = content(tmp_path / "copy")
    assert len(after) == 4 and before.items() <= after.items()


def test_samples_of_another_job_are_not_overwritten(stage, done, monkeypatch, tmp_path):
    shutil.copytree(done[0], tmp_path / "copy")
    before = content(tmp_path / "copy")
    refused(lambda: sweep(monkeypatch, tmp_path / "copy", **{**stage, "seed": 7}), "scale-0", "seed")
    assert content(tmp_path / "copy") == before


def test_sweep_over_the_scale_of_a_guide_model(stage, monkeypatch, tmp_path):
    guide = save_network(str(tmp_path / "guide/model.pt"), MODEL, seed=3, config={})
    options = dict(stage, guide_model_path=guide, guide_scales="3,1", sampler="unipc")
    header, rows = sweep(monkeypatch, tmp_path / "both", **options, classifier_scale=2.0)
    assert header[0] == "guide_scale" and [row[0] for row in rows] == [1, 3]
    alone = {name: value for name, value in options.items() if name not in ("classifier_path", *CLASSIFIER)}
    alone.update(image_size=8, num_classes=4)
    sweep(monkeypatch, tmp_path / "alone", **alone)
    found = {(name, scale): read_npz(tmp_path / name / f"guide-scale-{scale}")["arr_0"].tobytes()
             for name in ("both", "alone") for scale in (1, 3)}  # fmt: skip
    assert len(set(found.values())) == 4
    image = dict(sampler="unipc", **SAMPLING, **MODEL, model_path=stage["model_path"])
    run_here(monkeypatch, "image_sample", **image, log_dir=tmp_path / "unguided")
    assert read_npz(tmp_path / "unguided")["arr_0"].tobytes() == found["alone", 1]
    refused(lambda: sweep(monkeypatch, tmp_path / "bad", **{**options, "guide_model_path": ""}), "--guide_scales 3,1")
    refused(lambda: sweep(monkeypatch, tmp_path / "bad", **{**stage, "classifier_path": ""}), "--classifier_path")


# Metrics


def test_the_table_names_the_feature_classifier(done):
    _, header, rows = done
    names = ("FID", "Inception Score", "Precision", "Recall")
    assert header == ["classifier_scale", *(f"{name} in features of clean/model9.pt" for name in names)]
    assert [row[0] for row in rows] == [0, 2, 30]


def penultimate(images):
    """Return the inputs of the clean classifier's last layer, and its logits, for uint8 images [N, H, W, C]."""
    network = new_network(CLEAN, seed=2)
    x = th.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = []
    network.out[2].register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    with th.no_grad():
        logits = network(x, th.zeros(len(x)))
    return seen[0].double().numpy(), logits.double()


def test_metrics_are_computed_from_the_classifier_features(stage, done):
    folder, _, rows = done
    with np.load(stage["ref_batch"]) as arrays:
        reference, _ = penultimate(arrays["arr_0"])
    figures = []
    for scale, *figure in rows:
        samples, logits = penultimate(read_npz(folder / f"scale-{scale:g}")["arr_0"])
        p = logits.softmax(dim=1)
        score = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
        moments = [value for x in (samples, reference) for value in (x.mean(axis=0), np.cov(x, rowvar=False))]
        want = [frechet_distance(*moments), float(score), *precision_recall(reference, samples)]
        assert figure == pytest.approx(want, rel=1e-5)
        figures.append(tuple(figure))
    assert len(set(figures)) == 3 and figures[0][0] > 0 and figures[0][1] > 1


@pytest.mark.parametrize("channels", [3, 1])
def test_metrics_with_inception_features(channels, stage, monkeypatch, tmp_path, capsys):
    """The metrics match evaluator.py, and grey samples are evaluated as three equal channels."""
    monkeypatch.setattr(evaluator, "load_inception", lambda *args: (KnownNetwork(), ""))
    options = {k: v for k, v in stage.items() if not k.startswith("feature")}
    if channels == 1:
        grey = dict(in_channels=1)
        options.update(grey, model_path=save_network(str(tmp_path / "m.pt"), {**MODEL, **grey}))
        options["classifier_path"] = save_network(str(tmp_path / "c.pt"), {**CLASSIFIER, **grey})
    header, rows = sweep(monkeypatch, tmp_path, **{**options, "scales": "0,30"})
    assert header == ["classifier_scale", "FID", "Inception Score", "Precision", "Recall"]
    with np.load(stage["ref_batch"]) as arrays:
        reference = arrays["arr_0"]
    assert len(rows) == 2
    for scale, *figure in rows:
        samples = read_npz(tmp_path / f"scale-{scale:g}")["arr_0"]
        assert samples.shape == (8, 8, 8, channels)
        want = truth(reference, samples.repeat(3 // channels, axis=3))
        precision_and_recall = [want["precision"], want["recall"]]
        assert figure[1:] == pytest.approx([want["is"], *precision_and_recall], rel=1e-6)
        assert channels == 1 or figure[0] == pytest.approx(want["fid"], rel=1e-6)  # for grey pixels, numpy's FID is NaN
    assert ("evaluated as three equal channels" in capsys.readouterr().err) == (channels == 1)


def test_inception_statistics_in_the_reference_are_ignored_for_classifier_features(stage, done, monkeypatch, tmp_path):
    """Statistics in the reference file are of Inception features, so classifier features must not use them."""
    shutil.copytree(done[0], tmp_path / "copy")
    with np.load(stage["ref_batch"]) as arrays:
        dim = penultimate(arrays["arr_0"])[0].shape[1]
        strange = dict(mu=np.full(dim, 9.0), sigma=np.eye(dim), mu_s=np.zeros(3), sigma_s=np.eye(3))
        np.savez(tmp_path / "statistics.npz", arrays["arr_0"], **strange)
    found = sweep(monkeypatch, tmp_path / "copy", **{**stage, "ref_batch": str(tmp_path / "statistics.npz")})
    assert found == done[1:]


def test_the_plot_is_drawn_only_with_matplotlib(stage, done, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    with Image.open(done[0] / "sweep.png") as image:
        image.load()
        assert image.size[0] > 1000 and len(np.unique(np.asarray(image))) > 50
    shutil.copytree(done[0], tmp_path / "copy", ignore=shutil.ignore_patterns("sweep.*"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert sweep(monkeypatch, tmp_path / "copy", **stage) == done[1:]
    assert not (tmp_path / "copy" / "sweep.png").exists()


# Ranks


def check_same(folder, done):
    """Check that samples are bit-identical and that metrics agree up to the order of floating-point sums."""
    whole, header, rows = done
    for scale in (0, 2, 30):
        name = f"scale-{scale}/samples_8x8x8x3.npz"
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert read_table(folder) == (header, [pytest.approx(row, rel=1e-9) for row in rows])


def test_a_killed_sweep_resumes_on_a_different_number_of_ranks(stage, done, tmp_path):
    pytest.importorskip("matplotlib")
    argv = [script("guidance_sweep"), *flags(**stage, log_dir=tmp_path / "run")]
    outcome, killed = run_ranks(2, argv, kill_at=(tmp_path / "run" / "scale-2" / "shards" / "job.json", 1, 0))
    assert killed and outcome.returncode != 0
    before = content(tmp_path / "run")
    assert [str(path) for path in before] == ["scale-0/samples_8x8x8x3.npz"]
    outcome, _ = run_ranks(3, argv)
    outcome.check()
    assert before.items() <= content(tmp_path / "run").items()
    check_same(tmp_path / "run", done)
    assert os.path.getsize(tmp_path / "run" / "sweep.png") > 10_000
    assert outcome.output.count("compare them only with each other") == 1


# Invalid input is refused before any sample is made


INCEPTION = dict(features="inception", feature_path="")
BAD_FLAGS = {
    "no scales": (dict(scales=""), ["--scales", "give numbers from 0 up"]),
    "a scale below 0": (dict(scales="1,-2"), ["--scales 1,-2", "give numbers from 0 up"]),
    "a scale that is not a number": (dict(scales="1,nan"), ["--scales '1,nan'"]),
    "no feature classifier": (dict(feature_path=""), ["--features classifier and --feature_path"]),
    "an unused feature classifier": (dict(features="inception"), ["--features classifier and --feature_path"]),
    "unknown features": (dict(features="clip"), ["--features", "'clip'", "inception, classifier"]),
    "a missing feature classifier": (dict(feature_path="gone.pt"), ["gone.pt: no such file"]),
    "a feature classifier of another width": (dict(feature_classifier_width=128), ["model9.pt"]),
    "features for another image size": (dict(feature_image_size=16), ["--feature_image_size 16", "--image_size 8"]),
    "features for another channel count": (dict(feature_in_channels=1), ["--feature_in_channels 1", "--in_channels 3"]),
    "no reference": (dict(ref_batch=""), ["--ref_batch is missing"]),
    "a missing reference": (dict(ref_batch="{stage}/gone.npz"), ["gone.npz: no such file"]),
    "a reference with alpha": (dict(ref_batch="{stage}/alpha.npz"), ["alpha.npz", "5x8x8x4", "width x 3 is expected"]),
    "a small reference": (dict(ref_batch="{stage}/three.npz"), ["three.npz", "3 images", "at least 4"]),
    "a reference of another size": (dict(ref_batch="{stage}/larger.npz"), ["larger.npz", "16x16", "8x8"]),
    "few samples": (dict(num_samples=3), ["--num_samples 3: must be at least 4"]),
    "an evaluation batch size of 0": (dict(eval_batch_size=0), ["--eval_batch_size 0"]),
    "unknown precision": (dict(eval_dtype="fp8"), ["--eval_dtype", "'fp8'", "fp32, bf16"]),
    "a missing Inception file": (dict(INCEPTION, inception_path="gone.pb"), ["--inception_path gone.pb: no such file"]),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("references"), np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(folder / "three.npz", images[:3])
    np.savez(folder / "alpha.npz", images[..., [0, 1, 2, 0]])
    np.savez(folder / "larger.npz", np.zeros((5, 16, 16, 3), np.uint8))
    return folder


def bad_flags(case, stage, references):
    changed = {k: v.format(stage=references) if isinstance(v, str) else v for k, v in BAD_FLAGS[case][0].items()}
    return {**stage, **changed}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_invalid_flags_are_refused(case, stage, references, asked, monkeypatch, tmp_path):
    refused(lambda: sweep(monkeypatch, tmp_path, **bad_flags(case, stage, references)), *BAD_FLAGS[case][1])
    assert not asked and not list(tmp_path.glob("scale-*")) and not list(tmp_path.glob("sweep.*"))


def test_non_finite_features_are_refused(stage, monkeypatch, tmp_path):
    broken = th.load(stage["feature_path"])
    broken["out.0.bias"][0] = float("nan")
    th.save(broken, tmp_path / "broken.pt")
    options = {**stage, "feature_path": str(tmp_path / "broken.pt")}
    refused(lambda: sweep(monkeypatch, tmp_path / "run", **options), "reference.npz: images 0 to 2", "not finite")


# Features from a classifier instead of Inception


@pytest.mark.parametrize("pool, channels", [("adaptive", 1), ("attention", 3), ("spatial", 3), ("spatial_v2", 3)])
def test_feature_network_returns_the_logits_of_the_classifier(pool, channels):
    options = dict(in_channels=channels, classifier_pool=pool, classifier_attention_resolutions="4,8")
    classifier = fill_by_name(create_classifier(**{**classifier_defaults(), **CLEAN, **options}))
    images = th.from_numpy(RNG.integers(0, 256, (5, 8, 8, channels), dtype=np.uint8))
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with th.no_grad():
        want = classifier(x, th.zeros(5, dtype=th.long))
    network = ClassifierFeatures(classifier)
    for count in (5, 1):
        pool_features, spatial = network(images[:count])
        assert pool_features.shape == (count, network.pool_dim) and pool_features.dtype == th.float32
        assert spatial.shape == (count, 0) == (count, network.spatial_dim)
        th.testing.assert_close(network.logits(pool_features), want[:count], rtol=1e-5, atol=1e-5)
    assert float(want.std()) > 0.01
