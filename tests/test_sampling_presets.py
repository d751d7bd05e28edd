"""Models by name, and by the record beside their checkpoint: what sampling takes from both, and refuses."""

import runpy
import sys

import numpy as np
import pytest
import torch as th
from helpers import load_json, refused
from launch import flags, script
from sampling import CLASSIFIER, MODEL, UPSAMPLER, prefixed, read_npz, run_here, save_network

from guided_diffusion import dist_util, logger, presets
from guided_diffusion.presets import MODELS, Preset
from guided_diffusion.sampling_setup import CLASSIFIER as CLASSIFIER_NETWORK
from guided_diffusion.sampling_setup import DIFFUSION, PIPELINE_UPSAMPLER, set_up_sampling
from guided_diffusion.sampling_setup import UPSAMPLER as UPSAMPLER_NETWORK
from guided_diffusion.script_util import (
    classifier_and_diffusion_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)

pytestmark = pytest.mark.usefixtures("quiet", "cpu")

RELEASED = load_json("released_models.json.gz")
DEFAULTS = {
    "diffusion": model_and_diffusion_defaults(),
    "classifier": classifier_and_diffusion_defaults(),
    "upsampler": sr_model_and_diffusion_defaults(),
}
NETWORKS = {
    "image_sample": (DIFFUSION,),
    "classifier_sample": (DIFFUSION, CLASSIFIER_NETWORK),
    "super_res_sample": (UPSAMPLER_NETWORK,),
    "pipeline_sample": (DIFFUSION, CLASSIFIER_NETWORK, PIPELINE_UPSAMPLER),
    "image_nll": (DIFFUSION,),
}
BY_KIND = {"diffusion": "image_sample", "classifier": "classifier_sample", "upsampler": "super_res_sample"}
PARSERS = {name: runpy.run_path(script(name))["create_argparser"] for name in NETWORKS}
# What makes a function of the weights: not how precisely it is computed, nor how it was trained
SHAPELESS = {"use_fp16", "dropout", "use_checkpoint", "timestep_respacing", "classifier_use_fp16"}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with all released files, which hold nothing: they are not read before the flags are settled."""
    folder = tmp_path_factory.mktemp("models")
    for name in RELEASED:
        (folder / f"{name}.pt").write_bytes(b"")
    return str(folder)


@pytest.fixture
def settle(monkeypatch, models_dir):
    """A script's flags as they come out of a command line with --models_dir."""

    def settled(name, cuda=False, **values):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script(name), *flags(**{"models_dir": models_dir, **values})])
            patch.setattr(dist_util, "setup_dist", lambda: None)
            patch.setattr(th.cuda, "is_available", lambda: cuda)
            patch.setattr(logger, "configure", lambda **kwargs: None)
            return vars(set_up_sampling(PARSERS[name](), *NETWORKS[name]))

    return settled


def released_flags(name):
    """What a released network was made with, by the flags published with it, where they decide on its function."""
    kind = RELEASED[name]["kind"]
    made = {**DEFAULTS[kind], **RELEASED[name]["flags"]}
    if name == "64x64_classifier":  # trained on the noise of the 64x64 model
        made["noise_schedule"] = "cosine"
    return {k: v for k, v in made.items() if k not in SHAPELESS}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_name_is_its_flags_and_its_file(name, settle, models_dir):
    kind = RELEASED[name]["kind"]
    extra = dict(model_path=f"{models_dir}/64x64_diffusion.pt") if kind == "classifier" else {}
    args = settle(BY_KIND[kind], preset=name, **extra)
    want = {k: v for k, v in released_flags(name).items() if k in args}
    assert {k: args[k] for k in want} == want
    assert args["classifier_path" if kind == "classifier" else "model_path"] == f"{models_dir}/{name}.pt"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_name_is_all_that_goes_together(name, settle, models_dir):
    parts = MODELS[name]
    args = settle("pipeline_sample" if len(parts) == 3 else "classifier_sample", preset=name)
    prefixes = {"upsampler": "upsampler_"}
    for part in parts:
        prefix = prefixes.get(RELEASED[part]["kind"], "")
        want = {k: v for k, v in prefixed(prefix, released_flags(part)).items() if k in args}
        if not prefix:  # the classifier's process is the diffusion model's; its variance it does not see
            want = {k: v for k, v in want.items() if RELEASED[part]["kind"] == "diffusion" or k != "learn_sigma"}
        assert {k: args[k] for k in want} == want
    assert args["model_path"] == f"{models_dir}/{parts[0]}.pt"
    assert args["classifier_path"] == f"{models_dir}/{parts[1]}.pt"
    if len(parts) == 3:
        assert args["upsampler_path"] == f"{models_dir}/{parts[2]}.pt"
        assert args["upsampler_small_size"] == args["image_size"]


# The scales of the paper's tables for guided sampling, by 250 steps and by 25 of DDIM
RECOMMENDED = {"imagenet128": (0.5, 1.25), "imagenet256": (1.0, 2.5), "imagenet512": (4.0, 9.0)}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_sampling_follows_the_paper_where_nothing_else_is_said(name, settle):
    slow, fast = RECOMMENDED[name]
    args = settle("classifier_sample", preset=name)
    assert (args["timestep_respacing"], args["classifier_scale"], args["use_ddim"]) == ("250", slow, False)
    args = settle("classifier_sample", preset=name, use_ddim=True)
    assert (args["timestep_respacing"], args["classifier_scale"], args["use_ddim"]) == ("ddim25", fast, True)
    args = settle("classifier_sample", preset=name, use_ddim=True, classifier_scale=7, timestep_respacing="ddim50")
    assert (args["timestep_respacing"], args["classifier_scale"]) == ("ddim50", 7.0)
    assert settle("image_nll", preset=name)["timestep_respacing"] == ""  # a bound on all timesteps


def test_a_model_without_labels_is_guided_ten_times_as_much(settle):
    # ADM, table 4: at scale 1 guidance only harms it.
    assert settle("classifier_sample", preset="imagenet256_uncond")["classifier_scale"] == 10
    assert settle("classifier_sample", preset="imagenet256_uncond", use_ddim=True)["classifier_scale"] == 10
    assert settle("classifier_sample", preset="imagenet256")["classifier_scale"] == 1


def test_half_precision_is_for_gpus_unless_asked_for(settle):
    assert not settle("classifier_sample", preset="imagenet256")["use_fp16"]
    assert settle("classifier_sample", preset="imagenet256", cuda=True)["use_fp16"]
    assert not settle("classifier_sample", preset="imagenet256", cuda=True, use_fp16=False)["use_fp16"]
    assert not settle("classifier_sample", preset="imagenet512", cuda=True)["use_fp16"]  # released in float32
    assert settle("classifier_sample", preset="imagenet256", classifier_use_fp16=True)["classifier_use_fp16"]


# Contradictions


@pytest.mark.parametrize(
    "preset, name, value, its",
    [
        ("imagenet128", "num_heads", 8, 4),
        ("imagenet128", "num_head_channels", 64, -1),
        ("imagenet64", "use_new_attention_order", False, True),
        ("imagenet256", "use_new_attention_order", True, False),
        ("imagenet256", "noise_schedule", "cosine", "linear"),
        ("imagenet256", "class_cond", False, True),
        ("imagenet256", "classifier_attention_resolutions", "32,16", "32,16,8"),
        ("imagenet64", "classifier_depth", 2, 4),
    ],
)
def test_a_flag_that_contradicts_a_preset_is_refused(preset, name, value, its, settle):
    refused(
        lambda: settle("classifier_sample", preset=preset, **{name: value}),
        f"--{name} {value} on the command line", f"--preset {preset}", f"{name} {its}",
    )  # fmt: skip
    assert settle("classifier_sample", preset=preset, **{name: its})[name] == its  # the same said twice


def test_lists_may_have_spaces(settle):
    settle("classifier_sample", preset="imagenet256", attention_resolutions="32, 16, 8")


def test_the_upsampler_s_flags_in_a_pipeline_have_a_prefix(settle):
    refused(
        lambda: settle("pipeline_sample", preset="imagenet64_256", upsampler_num_heads=1),
        "--upsampler_num_heads 1", "--preset imagenet64_256", "upsampler_num_heads 4",
    )  # fmt: skip
    args = settle("pipeline_sample", preset="imagenet64_256", upsampler_timestep_respacing="27")
    assert (args["timestep_respacing"], args["upsampler_timestep_respacing"]) == ("250", "27")


def test_a_file_that_is_not_there_is_named(settle, tmp_path):
    refused(lambda: settle("image_sample", preset="lsun_cat", models_dir=tmp_path), tmp_path / "lsun_cat.pt",
            "--models_dir", "--model_path")  # fmt: skip
    refused(lambda: settle("image_sample", preset="imagenet255"), "'imagenet255'", "imagenet256", "lsun_cat")
    refused(lambda: settle("super_res_sample", preset="imagenet256"), "--preset imagenet256", "upsampler")


def test_a_config_contradicts_flags_presets_and_other_configs(settle, tmp_path):
    first = save_network(str(tmp_path / "a/model.pt"), MODEL, config={})
    other = {**CLASSIFIER, "noise_schedule": "cosine"}
    second = save_network(str(tmp_path / "b/model.pt"), CLASSIFIER, config={"flags": other})
    refused(
        lambda: settle("image_sample", model_path=first, num_heads=4),
        "--num_heads 4 on the command line", tmp_path / "a/config.json", "num_heads 2",
    )  # fmt: skip
    refused(
        lambda: settle("image_sample", model_path=first, preset="imagenet64"),
        "--preset imagenet64", tmp_path / "a/config.json",
    )  # fmt: skip
    linear = save_network(str(tmp_path / "c/model.pt"), {**MODEL, "noise_schedule": "linear"}, config={})
    refused(
        lambda: settle("classifier_sample", model_path=linear, classifier_path=second),
        "noise_schedule", tmp_path / "c/config.json", tmp_path / "b/config.json",
    )  # fmt: skip


def test_what_changes_no_function_contradicts_nothing(settle, tmp_path):
    trained = {**MODEL, "dropout": 0.3, "use_fp16": True, "use_checkpoint": True, "timestep_respacing": ""}
    path = save_network(str(tmp_path / "model.pt"), MODEL, config={"flags": trained})
    args = settle("image_sample", model_path=path, use_bf16=True, timestep_respacing=10, dropout=0.0)
    assert {k: args[k] for k in MODEL} == MODEL
    assert not args["use_fp16"] and args["use_bf16"] and args["timestep_respacing"] == "10"


# What it is all for: heads and their order, which no shape shows


def sample(monkeypatch, folder, **options):
    run_here(monkeypatch, "image_sample", num_samples=3, batch_size=3, timestep_respacing=2, log_dir=folder, **options)
    return read_npz(folder)["arr_0"]


def test_heads_come_with_the_config_or_the_preset(monkeypatch, tmp_path):
    network = {**MODEL, "num_channels": 64, "num_heads": 4, "use_new_attention_order": True}
    path = save_network(str(tmp_path / "tiny.pt"), network)
    right = sample(monkeypatch, tmp_path / "right", model_path=path, **network)
    for name, value in (("num_heads", 1), ("use_new_attention_order", False)):
        wrong = sample(monkeypatch, tmp_path / name, model_path=path, **{**network, name: value})
        assert (wrong != right).mean() > 0.1  # without a complaint: the shapes are the same

    described = save_network(str(tmp_path / "described/model.pt"), network, config={"kind": "diffusion"})
    assert (sample(monkeypatch, tmp_path / "1", model_path=described) == right).all()
    known = Preset("diffusion", "tiny.pt", network, sampling={"timestep_respacing": "250"})
    monkeypatch.setitem(presets.PRESETS, "tiny", known)
    assert (sample(monkeypatch, tmp_path / "2", preset="tiny", models_dir=tmp_path) == right).all()


def test_an_upsampler_s_config_is_read(monkeypatch, tmp_path):
    network = {**UPSAMPLER, "num_heads": 4}
    np.savez(tmp_path / "base.npz", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))
    found = []
    for config in (None, {}):
        folder = tmp_path / str(config)
        path = save_network(str(folder / "model.pt"), network, config=config)
        run_here(monkeypatch, "super_res_sample", model_path=path, base_samples=tmp_path / "base.npz", num_samples=2,
                 timestep_respacing=2, log_dir=folder / "out", **(network if config is None else {}))  # fmt: skip
        found.append(read_npz(folder / "out")["arr_0"])
    assert (found[0] == found[1]).all()
    refused(
        lambda: run_here(monkeypatch, "super_res_sample", model_path=path, num_heads=2, log_dir=tmp_path / "out"),
        "--num_heads 2", tmp_path / "{}/config.json",
    )  # fmt: skip
