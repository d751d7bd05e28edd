"""Flags that the sampling scripts take from --preset or from the config.json next to a checkpoint."""

from functools import partial

import numpy as np
import pytest
from helpers import load_json, refused
from sampling import CLASSIFIER, MODEL, UPSAMPLER, prefixed, read_npz, run_here, save_network, settled_flags

from guided_diffusion import logger, presets, sampling_networks
from guided_diffusion.presets import MODELS, Preset

pytestmark = pytest.mark.usefixtures("quiet", "cpu")

RELEASED = load_json("released_models.json.gz")
DEFAULTS = {n.kind: n.flags for n in vars(sampling_networks).values() if isinstance(n, sampling_networks.Network)}
SCRIPTS = {"diffusion": "image_sample", "classifier": "classifier_sample", "upsampler": "super_res_sample"}
# Flags in the published commands that do not change which function a network computes
SHAPELESS = {"use_fp16", "dropout", "use_checkpoint", "timestep_respacing", "classifier_use_fp16"}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with an empty file for each released model. The tests determine flags without reading checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    for name in RELEASED:
        (folder / f"{name}.pt").write_bytes(b"")
    return str(folder)


@pytest.fixture
def settle(monkeypatch, models_dir):
    """A function that returns all flags of a script after presets and config.json files have been applied."""

    monkeypatch.setattr(logger, "configure", lambda **kwargs: None)
    return partial(settled_flags, monkeypatch, sampling_networks, "set_up_sampling", models_dir=models_dir)


def released_flags(name):
    """The published flags of a released network, without flags that do not change which function it computes."""
    kind = RELEASED[name]["kind"]
    made = {**DEFAULTS[kind], **RELEASED[name]["flags"]}
    if kind == "classifier":
        made.pop("learn_sigma", None)  # learn_sigma is a flag of the diffusion model
    if name == "64x64_classifier":  # trained with the noise schedule of the 64x64 model
        made["noise_schedule"] = "cosine"
    return {k: v for k, v in made.items() if k not in SHAPELESS}


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_for_one_network_gives_its_flags_and_file(name, settle, models_dir):
    kind = RELEASED[name]["kind"]
    extra = dict(model_path=f"{models_dir}/64x64_diffusion.pt") if kind == "classifier" else {}
    args = settle(SCRIPTS[kind], preset=name, **extra)
    want = {k: v for k, v in released_flags(name).items() if k in args}
    assert {k: args[k] for k in want} == want
    assert args["classifier_path" if kind == "classifier" else "model_path"] == f"{models_dir}/{name}.pt"


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_for_a_model_gives_all_its_networks(name, settle, models_dir):
    parts = MODELS[name]
    args = settle("pipeline_sample" if len(parts) == 3 else "classifier_sample", preset=name)
    for part, prefix, path in zip(parts, ("", "", "upsampler_"), ("model_path", "classifier_path", "upsampler_path")):
        want = {k: v for k, v in prefixed(prefix, released_flags(part)).items() if k in args}
        assert {k: args[k] for k in want} == want and args[path] == f"{models_dir}/{part}.pt"
    if len(parts) == 3:
        assert args["upsampler_small_size"] == args["image_size"]


# Guidance scales from the tables of the ADM paper: (for 250 steps, for 25 DDIM steps)
RECOMMENDED = {"imagenet128": (0.5, 1.25), "imagenet256": (1, 2.5), "imagenet512": (4, 9)}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_default_sampling_flags_follow_the_paper(name, settle):
    def found(**options):
        args = settle("classifier_sample", preset=name, **options)
        return args["timestep_respacing"], args["classifier_scale"]

    slow, fast = RECOMMENDED[name]
    assert found() == ("250", slow) and found(use_ddim=True) == ("ddim25", fast)
    assert found(use_ddim=True, classifier_scale=7, timestep_respacing="ddim50") == ("ddim50", 7)
    assert found(sampler="ddim") == ("ddim25", fast)
    for sampler in ("dpmpp_2m", "unipc"):  # UniPC's authors use scale 2 for this model
        assert found(sampler=sampler) == ("15", 2.0 if name == "imagenet256" else fast)
    assert settle("image_nll", preset=name)["timestep_respacing"] == ""  # the variational bound needs all timesteps
    assert settle("classifier_sample", preset="imagenet256_uncond")["classifier_scale"] == 10  # ADM paper, table 4


def test_half_precision_is_the_default_on_gpus_only(settle):
    def half(preset="imagenet256", **options):
        return settle("classifier_sample", preset=preset, **options)["use_fp16"]

    assert not half() and half(cuda=True) and half(use_fp16=True) and not half(cuda=True, use_fp16=False)
    assert not half("imagenet512", cuda=True)  # the 512x512 model was released in float32


# Contradictory flags


@pytest.mark.parametrize(
    "preset, name, value, its",
    [
        ("imagenet128", "num_heads", 8, 4),
        ("imagenet64", "use_new_attention_order", False, True),
        ("imagenet256", "noise_schedule", "cosine", "linear"),
        ("imagenet256", "classifier_attention_resolutions", "32,16", "32,16,8"),
        ("imagenet64", "classifier_depth", 2, 4),
    ],
)
def test_a_flag_that_contradicts_a_preset_is_refused(preset, name, value, its, settle):
    refused(
        lambda: settle("classifier_sample", preset=preset, **{name: value}),
        f"--{name} {value} on the command line", f"--preset {preset}", f"{name} {its}",
    )  # fmt: skip
    assert settle("classifier_sample", preset=preset, **{name: its})[name] == its
    settle("classifier_sample", preset=preset, attention_resolutions="32, 16, 8")  # spaces in a list make no difference


def test_upsampler_flags_in_a_pipeline_have_a_prefix(settle):
    refused(
        lambda: settle("pipeline_sample", preset="imagenet64_256", upsampler_num_heads=1),
        "--upsampler_num_heads 1", "--preset imagenet64_256", "upsampler_num_heads 4",
    )  # fmt: skip
    args = settle("pipeline_sample", preset="imagenet64_256", upsampler_timestep_respacing="27")
    assert (args["timestep_respacing"], args["upsampler_timestep_respacing"]) == ("250", "27")


def test_flags_presets_and_configs_that_contradict_a_config_are_refused(settle, tmp_path):
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


def test_flags_that_do_not_change_the_network_may_differ_from_the_config(settle, tmp_path):
    trained = {**MODEL, "dropout": 0.3, "use_fp16": True, "use_checkpoint": True, "timestep_respacing": ""}
    path = save_network(str(tmp_path / "model.pt"), MODEL, config={"flags": trained})
    args = settle("image_sample", model_path=path, use_bf16=True, timestep_respacing=10, dropout=0.0)
    assert {k: args[k] for k in MODEL} == MODEL
    assert not args["use_fp16"] and args["use_bf16"] and args["timestep_respacing"] == "10"


# Flags that cannot be inferred from the shapes of weights: num_heads and use_new_attention_order


def sample(monkeypatch, folder, **options):
    run_here(monkeypatch, "image_sample", num_samples=3, batch_size=3, timestep_respacing=2, log_dir=folder, **options)
    return read_npz(folder)["arr_0"]


def test_num_heads_is_taken_from_the_config_or_the_preset(monkeypatch, tmp_path):
    network = {**MODEL, "num_channels": 64, "num_heads": 4, "use_new_attention_order": True}
    path = save_network(str(tmp_path / "tiny.pt"), network)
    right = sample(monkeypatch, tmp_path / "right", model_path=path, **network)
    for name, value in (("num_heads", 1), ("use_new_attention_order", False)):
        wrong = sample(monkeypatch, tmp_path / name, model_path=path, **{**network, name: value})
        assert (wrong != right).mean() > 0.1

    described = save_network(str(tmp_path / "described/model.pt"), network, config={"kind": "diffusion"})
    assert (sample(monkeypatch, tmp_path / "1", model_path=described) == right).all()
    known = Preset("diffusion", "tiny.pt", network, sampling={"timestep_respacing": "250"})
    monkeypatch.setitem(presets.PRESETS, "tiny", known)
    assert (sample(monkeypatch, tmp_path / "2", preset="tiny", models_dir=tmp_path) == right).all()


def test_the_config_of_an_upsampler_is_read(monkeypatch, tmp_path):
    network = {**UPSAMPLER, "num_heads": 4}
    np.savez(tmp_path / "base.npz", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))
    options = dict(base_samples=tmp_path / "base.npz", num_samples=2, timestep_respacing=2)
    plain, described = (save_network(str(tmp_path / name / "model.pt"), network, config=config)
                        for name, config in (("a", None), ("b", {})))  # fmt: skip
    run_here(monkeypatch, "super_res_sample", model_path=plain, log_dir=tmp_path / "1", **options, **network)
    run_here(monkeypatch, "super_res_sample", model_path=described, log_dir=tmp_path / "2", **options)
    assert (read_npz(tmp_path / "1")["arr_0"] == read_npz(tmp_path / "2")["arr_0"]).all()
