"""Classifier guidance in the scripts: when the classifier runs, its precision, and the sample distribution."""

import math
from functools import partial

import numpy as np
import pytest
import torch as th
from helpers import FIXED_LARGE, Tables, assert_moments, exact_model, process, quick_half_convolutions, refused
from sampling import read_npz, run_here, save_network
from test_analytic_truth import MIXTURE

from guided_diffusion.guidance import classifier_cond_fn
from guided_diffusion.respace import space_timesteps
from guided_diffusion.sample_job import BatchSampler
from guided_diffusion.sampler_flags import guide
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.solvers import SAMPLERS
from guided_diffusion.unet import EncoderUNetModel

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


@pytest.fixture
def seen(monkeypatch):
    """Return a list that records the timestep of each classifier call, one call per batch and step."""
    times, forward = [], EncoderUNetModel.forward

    def recording(self, x, timesteps):
        assert len(set(timesteps.tolist())) == 1
        times.append(float(timesteps[0]))
        return forward(self, x, timesteps)

    monkeypatch.setattr(EncoderUNetModel, "forward", recording)
    return times


def sample(monkeypatch, folder, script="classifier_sample", **options):
    run_here(monkeypatch, script, **{"num_samples": 4, "batch_size": 4, **options}, log_dir=folder)
    return read_npz(folder)


@pytest.mark.parametrize("use_ddim", [False, True])
def test_classifier_runs_at_every_step_unless_the_scale_is_0(use_ddim, networks, seen, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=5, use_ddim=use_ddim, classes="balanced")
    guided = sample(monkeypatch, tmp_path / "guided", **options)
    assert seen == sorted(space_timesteps(1000, "5"), reverse=True)
    del seen[:]
    none = sample(monkeypatch, tmp_path / "none", **{**options, "classifier_scale": 0})
    assert seen == []
    alone = {k: v for k, v in options.items() if not k.startswith("classifier")}
    unguided = sample(monkeypatch, tmp_path / "unguided", "image_sample", **alone)
    assert (none["arr_0"] == unguided["arr_0"]).all() and (guided["arr_0"] != unguided["arr_0"]).mean() > 0.1
    assert all(arrays["arr_1"].tolist() == [0, 1, 2, 3] for arrays in (guided, none, unguided))


@pytest.mark.parametrize("use_ddim", [False, True])
def test_guidance_can_be_limited_to_an_interval(use_ddim, networks, seen, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=10, use_ddim=use_ddim)
    steps = sorted(space_timesteps(1000, "10"), reverse=True)  # 999, 888, ... 0
    images = {}
    for interval in ("", "0,1", "0.2,0.8", "0.95,0.96"):
        del seen[:]
        run = dict(options, guidance_interval=interval)
        images[interval] = sample(monkeypatch, tmp_path / f"i{interval}", **run)["arr_0"]
        a, b = map(float, interval.split(",")) if interval else (0, 1)
        assert seen == [t for t in steps if a <= t / 1000 <= b], interval
    assert (images["0,1"] == images[""]).all()
    unguided = sample(monkeypatch, tmp_path / "none", **{**options, "classifier_scale": 0})["arr_0"]
    assert np.abs(images["0.95,0.96"].astype(int) - unguided).max() <= 1  # no step in 0.95..0.96
    assert (images["0.2,0.8"] != images[""]).any() and (images["0.2,0.8"] != unguided).any()


def test_guidance_interval_is_a_fraction_of_the_process():
    """The interval is a fraction of the process even if timesteps are rescaled or their number is not 1000."""
    for steps, rescaled in [(500, False), (500, True), (4000, True)]:
        diffusion = create_gaussian_diffusion(steps=steps, timestep_respacing="8", rescale_timesteps=rescaled)
        shown = []

        def classifier(x, t):
            shown.append(float(t[0]))
            return x.flatten(1)[:, :2]

        cond_fn = guide(classifier, diffusion, 1.0, "0.3,0.6")
        for t in range(8):
            cond_fn(th.zeros(2, 3, 1, 1), diffusion.model_timesteps(th.full((2,), t)), y=th.tensor([0, 1]))
        share = [t / steps for t in sorted(space_timesteps(steps, "8"))]
        want = [s for s in share if 0.3 <= s <= 0.6]
        assert 0 < len(want) < 8 and shown == pytest.approx([s * (1000 if rescaled else steps) for s in want])


def test_invalid_intervals_and_scales_are_refused():
    diffusion = create_gaussian_diffusion(timestep_respacing="5")
    for interval in ("0.2", "0.8,0.2", "-0.1,0.5", "0.5,1.5", "a,b", "0,0.2,0.4", ","):
        for scale in (1.0, 0.0):
            refused(lambda s=scale, i=interval: guide(lambda x, t: x, diffusion, s, i), "--guidance_interval")
    for scale in (math.nan, math.inf, 1e45):
        refused(lambda s=scale: guide(lambda x, t: x, diffusion, s), f"--classifier_scale {scale}")


def test_a_classifier_trained_on_clean_images_gives_a_warning(networks, monkeypatch, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(open(networks["classifier_path"], "rb").read())
    (tmp_path / "config.json").write_text('{"flags": {"noised": false}}')
    options = dict(networks, classifier_path=path, num_samples=2, timestep_respacing=2, log_dir=tmp_path / "out")
    run_here(monkeypatch, "classifier_sample", **options)
    assert f"{path} was trained on clean images" in (tmp_path / "out" / "log.txt").read_text()


# {class_cond: pairs of the precisions of the diffusion model and of the classifier}
HALVES = {
    True: [(None, None), ("fp16", None), (None, "fp16"), ("bf16", "bf16")],
    False: [(None, None), ("bf16", None), (None, "bf16"), ("fp16", "fp16")],
}


@pytest.mark.parametrize("use_ddim, class_cond", [(False, True), (True, False)])
def test_either_network_in_half_precision(use_ddim, class_cond, networks, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=4, use_ddim=use_ddim, classes="3,0", classifier_scale=100.0)
    if not class_cond:
        model = {k: v for k, v in networks.items() if "classifier" not in k and not k.endswith("path")}
        options.update(
            class_cond=False, model_path=save_network(str(tmp_path / "model.pt"), {**model, "class_cond": False})
        )
    unguided = sample(monkeypatch, tmp_path / "unguided", **{**options, "classifier_scale": 0})["arr_0"].astype(int)
    found = {}
    with quick_half_convolutions(monkeypatch):
        for halves in HALVES[class_cond]:
            chosen = {f"{p}use_{h}": True for p, h in zip(("", "classifier_"), halves) if h}
            arrays = sample(monkeypatch, tmp_path / str(halves), **options, **chosen)
            assert arrays["arr_1"].tolist() == [3, 0, 3, 0]
            found[halves] = arrays["arr_0"].astype(int)
    full = found[None, None]
    guidance = np.abs(full - unguided).mean()
    assert guidance > 1
    for halves, images in found.items():
        rounding = np.abs(images - full).mean()
        most = 0.2 if "bf16" in halves else 0.05  # relative to the effect of guidance; bf16 is less precise than fp16
        assert rounding == 0 if halves == (None, None) else 0 < rounding < most * guidance, halves


# The distribution of samples


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sample_is_guided_towards_its_own_label(name):
    """At scale 1, with the exact model and classifier of a mixture, samples have the moments of their component."""
    labels, diffusion = (th.arange(600) % 3 == 0).long(), process(100, var=FIXED_LARGE)
    exact = exact_model(MIXTURE, diffusion)
    cond_fn = classifier_cond_fn(lambda x, t: MIXTURE.log_joint(x, Tables(diffusion.betas, t, x)))
    sample = partial(SAMPLERS[name], clip_denoised=False)
    sampler = BatchSampler(diffusion, lambda x, t, y: exact(x, t), (1, 1, 1), 0, labels, cond_fn, sample)
    batches = [list(sampler.steps(range(i, i + 200)))[-1]["sample"] for i in range(0, 600, 200)]
    samples = th.cat(batches).flatten()
    assert ((samples > 0) == (labels == 1)).all()
    for label, (mean, std) in enumerate(zip(MIXTURE.means, MIXTURE.stds)):
        # test_analytic_truth.py allows the same biases for 100 sampling steps.
        assert_moments(samples[labels == label], float(mean), float(std) ** 2, bias=5 / 100, relative_bias=20 / 100)
