"""Training with --preset: the released network, the recipe of the paper, and the global batch split over ranks."""

import json

import numpy as np
import pytest
from helpers import refused
from launch import check_refused, flags, run_ranks, script
from PIL import Image
from sampling import run_here, settled_flags

from guided_diffusion import training_job

pytestmark = pytest.mark.usefixtures("quiet", "cpu")

RECIPES = [  # from the hyperparameter tables in the paper's appendix
    ("image_train", "64x64_diffusion", dict(
        batch_size=2048, lr=3e-4, weight_decay=0, total_steps=540_000, ema_rate="0.9999", dropout=0.1, image_size=64,
        noise_schedule="cosine", use_new_attention_order=True, num_channels=192, num_res_blocks=3)),
    ("image_train", "imagenet128", dict(batch_size=256, lr=1e-4, total_steps=4_360_000, dropout=0, num_heads=4)),
    ("image_train", "lsun_cat", dict(batch_size=256, total_steps=200_000, dropout=0.1, class_cond=False)),
    ("super_res_train", "64_256_upsampler", dict(
        batch_size=256, lr=1e-4, total_steps=500_000, ema_rate="0.9999", small_size=64, large_size=256, num_heads=4)),
    ("classifier_train", "imagenet64", dict(
        batch_size=1024, lr=6e-4, weight_decay=0.2, iterations=300_000, anneal_lr=True, noise_schedule="cosine",
        classifier_depth=4, image_size=64, random_crop=True)),
    ("classifier_train", "256x256_classifier", dict(
        batch_size=256, lr=3e-4, weight_decay=0.05, iterations=500_000, noise_schedule="linear", image_size=256)),
]  # fmt: skip


@pytest.fixture
def settle(monkeypatch, tmp_path):
    """Return a function that runs a training script until its flags are complete: (flags by name, text of log.txt)."""

    def settled(name, **values):
        values["log_dir"] = tmp_path / "log"
        args = settled_flags(monkeypatch, training_job, "set_up_training", name, **values)
        return args, (tmp_path / "log" / "log.txt").read_text()

    return settled


@pytest.mark.parametrize("name, preset, recipe", RECIPES)
def test_a_preset_sets_the_network_and_the_recipe_of_the_paper(name, preset, recipe, settle):
    args, _ = settle(name, preset=preset)
    assert {flag: args[flag] for flag in recipe} == recipe
    assert args["schedule_sampler"] == "uniform" and args["microbatch"] == -1


def test_command_line_flags_override_the_preset_and_are_logged(settle):
    args, log = settle("image_train", preset="imagenet64", lr=1e-5, num_channels=64, batch_size=7, microbatch=2)
    assert (args["lr"], args["num_channels"], args["batch_size"], args["microbatch"]) == (1e-5, 64, 7, 2)
    assert args["dropout"] == 0.1
    of_preset, by_hand = (next(line for line in log.splitlines() if words in line) for words in (" sets ", "by hand"))
    for flag in ("--lr 1e-05", "--num_channels 64", "--batch_size 7", "--microbatch 2"):
        assert flag in by_hand and flag.split()[0] not in of_preset
    assert "--dropout 0.1" in of_preset and "--dropout" not in by_hand


def test_half_precision_is_used_by_default_only_on_gpus(settle):
    def half(**options):
        return settle("image_train", preset="imagenet256", **options)[0]["use_fp16"]

    assert not half() and half(cuda=True) and half(use_fp16=True) and not half(cuda=True, use_fp16=False)


def test_a_preset_of_another_kind_is_refused(monkeypatch, tmp_path):
    for name, preset in (("super_res_train", "lsun_cat"), ("classifier_train", "64x64_diffusion")):
        refused(lambda: run_here(monkeypatch, name, preset=preset, log_dir=tmp_path), f"--preset {preset}", "trains")


# Training on several ranks with a small preset

WITH_TINY = """
import runpy, sys
from guided_diffusion import presets
from sampling import MODEL
training = dict(lr=1e-4, ema_rate="0.5", global_batch=12, total_steps=2)
presets.PRESETS["tiny"] = presets.Preset("diffusion", "tiny.pt", {**MODEL, "dropout": 0.1}, training=training)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i % 4}_{i}.png")
    return folder


def train(ranks, photos, folder, **options):
    options = dict(preset="tiny", data_dir=photos, log_dir=folder, num_workers=0, resume_checkpoint="auto", **options)
    argv = [script("image_train"), *flags(**options)]
    return run_ranks(ranks, argv, code=WITH_TINY, quick_end=True)[0]


def recorded(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["global_batch"], config["flags"]["batch_size"], config["flags"]["dropout"]


def test_global_batch_is_split_over_ranks_and_a_run_resumes(photos, tmp_path):
    train(2, photos, tmp_path).check()
    assert recorded(tmp_path) == (12, 6, 0.1) and (tmp_path / "ema_0.5_000002.pt").exists()
    train(3, photos, tmp_path, total_steps=4).check()
    assert recorded(tmp_path) == (12, 4, 0.1) and (tmp_path / "ema_0.5_000004.pt").exists()

    outcome = train(None, photos, tmp_path, total_steps=5, num_channels=64)
    check_refused(outcome, ["--num_channels 64 on the command line contradicts"])


def test_a_run_that_overrides_preset_flags_resumes_only_with_the_same_flags(photos, tmp_path):
    train(None, photos, tmp_path, num_channels=64).check()
    outcome = train(None, photos, tmp_path, total_steps=3)
    check_refused(outcome, ["--num_channels 32 in --preset tiny contradicts"])
    train(None, photos, tmp_path, total_steps=3, num_channels=64).check()


def test_a_number_of_ranks_that_does_not_divide_the_global_batch_is_refused(photos, tmp_path):
    outcome = train(5, photos, tmp_path)
    words = ["--preset tiny", "5 ranks", "global batch of 12", "another number of ranks", "--batch_size"]
    check_refused(outcome, words, last=False)
    train(5, photos, tmp_path, batch_size=1).check()
    assert recorded(tmp_path)[:2] == (5, 1)
