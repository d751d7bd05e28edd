"""The sampling scripts' flags --sampler, --threshold and --sample_size, and guidance by a second model."""

import json

import numpy as np
import pytest
import torch as th
from helpers import refused
from launch import flags, run_ranks, script
from sampling import CLASSIFIER, MODEL, UPSAMPLER, check_alike, new_network, read_npz, run_here, save_network

from guided_diffusion.guidance import guide_by_model
from guided_diffusion.random_util import SampleNoise
from guided_diffusion.solvers import SAMPLERS
from guided_diffusion.unet import UNetModel

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def sample(monkeypatch, folder, name="classifier_sample", **options):
    run_here(monkeypatch, name, **{"num_samples": 5, "batch_size": 5, **options}, log_dir=folder)
    return read_npz(folder)["arr_0"]


# Samplers


def test_samples_of_every_sampler_do_not_depend_on_the_batch_size(networks, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=4, classifier_scale=2.0)
    found = {}
    for name in SAMPLERS:
        whole = sample(monkeypatch, tmp_path / name, **options, sampler=name)
        check_alike(whole, sample(monkeypatch, tmp_path / f"{name}_2", **options, sampler=name, batch_size=2))
        found[name] = whole.tobytes()
    assert len(set(found.values())) == len(SAMPLERS)
    assert sample(monkeypatch, tmp_path / "default", **options).tobytes() == found["ddpm"]
    assert sample(monkeypatch, tmp_path / "use_ddim", **options, use_ddim=True).tobytes() == found["ddim"]
    dynamic = sample(monkeypatch, tmp_path / "dynamic", **options, sampler="unipc", threshold="dynamic")
    assert dynamic.tobytes() != found["unipc"]


def test_samples_do_not_depend_on_the_number_of_ranks(networks, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=4, classifier_scale=2.0, sampler="dpmpp_2m_sde", num_samples=5)
    alone = sample(monkeypatch, tmp_path / "alone", **options)
    argv = [script("classifier_sample"), *flags(**options, batch_size=2), "--log_dir", tmp_path / "ranks"]
    run_ranks(3, argv)[0].check()
    check_alike(alone, read_npz(tmp_path / "ranks")["arr_0"])


BAD_SAMPLERS = [
    (dict(sampler="fast"), ["--sampler", "'fast'", *SAMPLERS]),
    (dict(sampler="unipc", use_ddim=True), ["--use_ddim True", "--sampler unipc"]),
    (dict(threshold="dynamic"), ["--threshold dynamic", "--sampler"]),
    (dict(sampler="unipc", threshold="2"), ["--threshold 2", "dynamic"]),
    (dict(sampler="unipc", timestep_respacing=1), ["--timestep_respacing", "unipc", "2"]),
    (dict(sampler="plms", timestep_respacing=1), ["PLMS", "2"]),
    (dict(timestep_respacing="quad"), ["--timestep_respacing", "'quad'", "quad25"]),
    (dict(timestep_respacing="quad1001"), ["--timestep_respacing quad1001", "1000"]),
]


@pytest.mark.parametrize("options, words", BAD_SAMPLERS, ids=str)
def test_bad_samplers_are_refused(options, words, networks, monkeypatch, tmp_path):
    refused(lambda: sample(monkeypatch, tmp_path, **{**networks, "timestep_respacing": 4, **options}), *words)


# Sample sizes


def test_sample_sizes_may_differ_from_the_training_size_and_be_rectangular(monkeypatch, tmp_path):
    network = dict(MODEL, channel_mult="1,2")
    path = save_network(str(tmp_path / "model.pt"), network, config={})
    options = dict(model_path=path, timestep_respacing=3)
    images = sample(monkeypatch, tmp_path / "wide", "image_sample", **options, sample_size="6,10")
    assert images.shape == (5, 6, 10, 3) and images.std() > 5
    assert sample(monkeypatch, tmp_path / "large", "image_sample", **options, sample_size="12").shape == (5, 12, 12, 3)
    trained = sample(monkeypatch, tmp_path / "trained", "image_sample", **options)
    assert (sample(monkeypatch, tmp_path / "same", "image_sample", **options, sample_size="8") == trained).all()
    for size, word in [("7", "2"), ("8,7", "2"), ("0", "height,width"), ("8,8,8", "height,width"), ("big", "")]:
        refused(
            lambda s=size: sample(monkeypatch, tmp_path / "bad", "image_sample", **options, sample_size=s),
            "--sample_size",
            word,
        )


def test_sample_sizes_with_a_classifier_and_an_upsampler(networks, monkeypatch, tmp_path):
    options = dict(networks, timestep_respacing=3, sample_size="8,12")
    refused(
        lambda: sample(monkeypatch, tmp_path / "bad", **options), "--sample_size 8,12", "--classifier_pool attention"
    )
    pool = dict(CLASSIFIER, classifier_pool="adaptive")
    options |= dict(
        classifier_pool="adaptive", classifier_path=save_network(str(tmp_path / "pool.pt"), pool),
        upsampler_path=save_network(str(tmp_path / "up/model.pt"), UPSAMPLER), upsampler_timestep_respacing=3,
        upsampler_sampler="unipc", **{f"upsampler_{name}": value for name, value in UPSAMPLER.items()},
    )  # fmt: skip
    run_here(monkeypatch, "pipeline_sample", **options, num_samples=5, batch_size=5, log_dir=tmp_path / "pipeline")
    small, large = read_npz(tmp_path / "pipeline/base")["arr_0"], read_npz(tmp_path / "pipeline")["arr_0"]
    assert small.shape == (5, 8, 12, 3) and large.shape == (5, 16, 24, 3)
    alone = dict(model_path=options["upsampler_path"], **UPSAMPLER, sampler="unipc", timestep_respacing=3)
    base = next((tmp_path / "pipeline/base").glob("*.npz"))
    again = sample(monkeypatch, tmp_path / "alone", "super_res_sample", **alone, base_samples=base, sample_size="16,24")
    check_alike(large, again)
    refused(lambda: sample(monkeypatch, tmp_path / "bad", "super_res_sample", **alone, base_samples=base), "Nx8x8x3")


# Guidance by a second model


def test_guide_by_model_extrapolates_from_the_guide_to_the_model():
    x, t = th.ones(2, 3, 4, 4), th.tensor([500, 500])
    model = lambda x, t, y: th.cat([2 * x, 7 * x], dim=1)  # noqa: E731
    guide = lambda x, t, y: 5 * x  # noqa: E731
    guided = guide_by_model(model, guide, 3)(x, t, y=0)
    assert (guided[:, :3] == 5 + 3 * (2 - 5)).all() and (guided[:, 3:] == 7).all()
    assert guide_by_model(model, guide, 1) is model
    outside = guide_by_model(model, guide, 3, (0.6, 1, 1000))
    assert (outside(x, t, y=0) == model(x, t, 0)).all()


@pytest.fixture
def guided(tmp_path):
    """Flags of a model and of a smaller guide model, which has no class labels and no learned variance."""
    guide = {**MODEL, "class_cond": False, "learn_sigma": False, "num_heads": 1}
    return dict(
        model_path=save_network(str(tmp_path / "model/model.pt"), MODEL, config={}),
        guide_model_path=save_network(str(tmp_path / "guide/model.pt"), guide, seed=5, config={}),
        timestep_respacing=4, classes="1,3",
    )  # fmt: skip


def count_evaluations(monkeypatch):
    calls, forward = [], UNetModel.forward
    monkeypatch.setattr(UNetModel, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    return calls


def test_samples_follow_the_formula_of_guidance_by_a_second_model(guided, monkeypatch, tmp_path):
    calls = count_evaluations(monkeypatch)
    found = {
        scale: sample(monkeypatch, tmp_path / str(scale), "image_sample", **guided, guide_scale=scale)
        for scale in (1.0, 2.5)
    }
    assert len(calls) == 4 + 8  # 4 steps each: guide_scale=1 evaluates the model only
    unguided = {name: value for name, value in guided.items() if name != "guide_model_path"}
    assert (sample(monkeypatch, tmp_path / "unguided", "image_sample", **unguided) == found[1.0]).all()
    model = new_network(MODEL)
    guide = new_network({**MODEL, "class_cond": False, "learn_sigma": False, "num_heads": 1}, seed=5)
    from guided_diffusion.script_util import create_gaussian_diffusion

    diffusion = create_gaussian_diffusion(learn_sigma=True, predict_xstart=True, timestep_respacing="4")

    def by_hand(x, t, y):
        output, g = model(x, t, y), guide(x, t)
        return th.cat([g + 2.5 * (output[:, :3] - g), output[:, 3:]], dim=1)

    noise = SampleNoise(0, range(5))
    want = diffusion.p_sample_loop(
        by_hand, (5, 3, 8, 8), noise=noise.randn(3, 8, 8), randn_like=noise.randn_like,
        model_kwargs={"y": th.tensor([1, 3, 1, 3, 1])},
    )  # fmt: skip
    want = ((want + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).floor().numpy()
    assert np.abs(found[2.5] - want).max() <= 1 and (found[2.5] != found[1.0]).mean() > 0.1


def test_a_guide_model_combines_with_a_classifier_a_sampler_and_an_interval(guided, networks, monkeypatch, tmp_path):
    both = {**networks, **guided, "guide_scale": 2.0, "classifier_scale": 2.0, "sampler": "dpmpp_2m"}
    calls = count_evaluations(monkeypatch)
    images = sample(monkeypatch, tmp_path / "both", **both)
    assert len(calls) == 8
    assert (images != sample(monkeypatch, tmp_path / "no guide", **{**both, "guide_scale": 1.0})).any()
    assert (images != sample(monkeypatch, tmp_path / "no classifier", **{**both, "classifier_scale": 0})).any()
    calls.clear()
    sample(monkeypatch, tmp_path / "interval", **both, guidance_interval="0,0.5")
    assert len(calls) == 4 + 2


BAD_GUIDES = [
    (dict(predict_xstart=False), ["predict_xstart is False", "True"]),
    (dict(noise_schedule="cosine"), ["noise_schedule is cosine", "linear"]),
    (dict(diffusion_steps=500), ["diffusion_steps is 500", "1000"]),
    (dict(image_size=16), ["image_size is 16", "8"]),
    (dict(in_channels=1), ["in_channels is 1", "3"]),
    (dict(class_cond=True, num_classes=9), ["num_classes is 9", "4"]),
]


@pytest.mark.parametrize("changes, words", BAD_GUIDES, ids=str)
def test_incompatible_guide_models_are_refused(changes, words, guided, monkeypatch, tmp_path):
    path = guided["guide_model_path"].replace("model.pt", "config.json")
    with open(path, "w") as f:
        json.dump({"flags": {**MODEL, "class_cond": False, **changes}}, f)
    options = {**guided, "guide_scale": 2.0}
    refused(
        lambda: sample(monkeypatch, tmp_path / "out", "image_sample", **options),
        f"--guide_model_path {guided['guide_model_path']}", *words,
    )  # fmt: skip


def test_missing_or_unknown_guide_models_are_refused(guided, monkeypatch, tmp_path):
    def run(**options):
        sample(monkeypatch, tmp_path / "out", "image_sample", **{**guided, **options})

    refused(lambda: run(guide_model_path="", guide_scale=2.0), "--guide_scale 2.0", "--guide_model_path")
    refused(
        lambda: run(guide_model_path="nowhere.pt", guide_scale=2.0), "--guide_model_path nowhere.pt", "no such file"
    )
    refused(lambda: run(guide_scale="nan"), "--guide_scale nan", "finite")
    refused(lambda: run(guide_preset="64x64"), "--guide_preset", "64x64")
    refused(lambda: run(guide_model_path="", guide_preset="256x256_diffusion_uncond"), "256x256_diffusion_uncond.pt")
    bare = save_network(str(tmp_path / "bare/model.pt"), MODEL)
    refused(lambda: run(guide_model_path=bare, guide_scale=2.0), "--guide_model_path", "config.json", "--guide_preset")
