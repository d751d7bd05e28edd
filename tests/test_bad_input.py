"""User errors end in one line that names the flag or file, without a traceback, and only once for all ranks."""

import os
import pickle

import numpy as np
import pytest
import torch as th
from launch import TINY, TINY_CLASSIFIER, check_refused, flags, run, run_forked, script
from PIL import Image
from sampling import new_network, save_network

TRAIN = dict(batch_size=2, num_workers=0, total_steps=2)
CONDITIONAL = dict(TINY, class_cond=True, num_classes=4)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def write_images(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(folder / name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Create a folder with valid and broken data sets and checkpoints."""
    stage = tmp_path_factory.mktemp("stage")
    write_images(stage / "good", [f"{i % 4}_{i}.png" for i in range(8)])
    (stage / "empty").mkdir()
    (stage / "no_images").mkdir()
    (stage / "no_images" / "notes.txt").write_text("no image")
    write_images(stage / "broken", ["0_0.png", "0_1.png"])
    (stage / "broken" / "0_1.png").write_text("no image")

    for name, network in {"model": TINY, "conditional": CONDITIONAL, "classifier": TINY_CLASSIFIER}.items():
        save_network(f"{stage}/{name}.pt", network)
    (stage / "half.pt").write_bytes((stage / "model.pt").read_bytes()[:5000])
    with open(stage / "pickle.pt", "wb") as f:
        pickle.dump(Payload(str(stage / "ran")), f)
    th.save({"weights": Payload(str(stage / "ran"))}, stage / "zipped_pickle.pt")

    for folder, config in ("described", {"kind": "diffusion"}), ("foreign_opt", None), ("foreign_ema", None):
        save_network(f"{stage}/{folder}/model000001.pt", TINY, config=config)
    wider = {**TINY, "num_channels": 64}
    save_network(f"{stage}/foreign_ema/ema_0.9999_000001.pt", wider)
    parameters = list(new_network(wider).parameters())
    optimizer = th.optim.AdamW(parameters)
    for p in parameters:
        p.grad = th.zeros_like(p)
    optimizer.step()
    th.save(optimizer.state_dict(), stage / "foreign_opt" / "opt000001.pt")
    return stage


def train(data="{stage}/good", model=TINY, **extra):
    return [script("image_train"), *flags(data_dir=data, **{**model, **TRAIN, **extra})]


def train_classifier(**extra):
    options = {**TINY_CLASSIFIER, "num_workers": 0, "batch_size": 2, "iterations": 2, **extra}
    return [script("classifier_train"), *flags(data_dir="{stage}/good", **options)]


def sample(path="{stage}/model.pt", model=TINY, **extra):
    options = {**model, "num_samples": 2, "batch_size": 2, "timestep_respacing": "2", **extra}
    return [script("image_sample"), *flags(model_path=path, **options)]


def sample_guided(path="{stage}/conditional.pt", classifier="{stage}/classifier.pt", **extra):
    options = {**CONDITIONAL, "num_classes": 10, "num_samples": 2, "batch_size": 2, "timestep_respacing": "2"}
    options.update({name: value for name, value in TINY_CLASSIFIER.items() if name not in options}, **extra)
    return [script("classifier_sample"), *flags(model_path=path, classifier_path=classifier, **options)]


# {mistake: (command, words that the last line of its output must contain)}; {stage} is the folder of the stage fixture.
CASES = {
    # Data
    "no data_dir": (train(""), ["--data_dir is missing"]),
    "data_dir does not exist": (train("{stage}/nowhere"), ["--data_dir", "{stage}/nowhere", "no such folder"]),
    "data_dir is a file": (train("{stage}/model.pt"), ["--data_dir", "{stage}/model.pt", "not a folder"]),
    "data_dir is empty": (train("{stage}/empty"), ["--data_dir", "{stage}/empty", "no image"]),
    "data_dir without images": (train("{stage}/no_images"), ["--data_dir", "{stage}/no_images", "no image", "png"]),
    "fewer images than a batch": (train(batch_size=9), ["--batch_size 9", "has 8"]),
    "unreadable image": (train("{stage}/broken"), ["{stage}/broken/0_1.png"]),
    "more classes than num_classes": (train(model={**CONDITIONAL, "num_classes": 3}), ["4 classes", "--num_classes 3"]),
    "more classes than the classifier's": (train_classifier(num_classes=2), ["4 classes", "--num_classes 2"]),
    "unknown number of channels": (train(in_channels=2), ["--in_channels", "2", "1, 3"]),
    # Flags with a fixed set of values
    "unknown schedule": (train(noise_schedule="sine"), ["--noise_schedule", "'sine'", "linear", "cosine"]),
    "unknown sampler": (
        train(schedule_sampler="best"),
        ["--schedule_sampler", "'best'", "uniform", "loss-second-moment"],
    ),
    "unknown pooling": (
        train_classifier(classifier_pool="max"),
        ["classifier_pool", "'max'", "adaptive", "attention", "spatial", "spatial_v2"],
    ),
    "unknown flag": (train(learning_rate=1), ["--learning_rate"]),
    # Values of the wrong type
    "not a boolean": (train(class_cond="maybe"), ["--class_cond", "maybe"]),
    "not a whole number": (train(batch_size="many"), ["--batch_size", "many"]),
    "not a number": (train(lr="fast"), ["--lr", "fast"]),
    "not a list of numbers": (train(model={**TINY, "channel_mult": "1,two"}), ["--channel_mult", "1,two"]),
    "not a number in a list": (train(model={**TINY, "channel_mult": "1,nan"}), ["--channel_mult", "nan"]),
    "blank list": (train(model={**TINY, "channel_mult": " "}), ["channel_mult ()"]),
    "not a list of whole numbers": (
        train(model={**TINY, "attention_resolutions": "8,4.5"}),
        ["--attention_resolutions", "8,4.5"],
    ),
    "a resolution of 0": (train(model={**TINY, "attention_resolutions": "16,0"}), ["--attention_resolutions", "16,0"]),
    "not a list of rates": (train(ema_rate="0.9,slow"), ["--ema_rate", "0.9,slow"]),
    # Numbers out of range
    "ddim without an integer stride": (
        sample(timestep_respacing="ddim300"),
        ["--timestep_respacing", "ddim300", "ddim334"],
    ),
    "training with batch_size 0": (train(batch_size=0), ["--batch_size", "0"]),
    "negative warm-up": (train(warmup_steps=-1), ["--warmup_steps -1", "at least 0"]),
    "annealing that would raise the learning rate": (train(lr_anneal_steps=-10), ["--lr_anneal_steps -10"]),
    "negative total_steps": (train(total_steps=-5), ["--total_steps -5"]),
    "infinite learning rate": (train(lr="inf"), ["--lr inf", "finite"]),
    "negative gradient norm": (train(max_grad_norm=-1), ["--max_grad_norm -1.0", "at least 0"]),
    "negative number of bad steps": (train(max_bad_steps=-1), ["--max_bad_steps -1"]),
    "negative number of checkpoints": (train(keep_checkpoints=-2), ["--keep_checkpoints -2"]),
    "negative sample_interval": (train(sample_interval=-2), ["--sample_interval -2"]),
    "iterations 0": (train_classifier(iterations=0), ["--iterations 0"]),
    "eval_interval 0": (train_classifier(eval_interval=0), ["--eval_interval 0"]),
    "save_interval 0": (train(save_interval=0), ["--save_interval", "0"]),
    "num_samples 0": (sample(num_samples=0), ["--num_samples", "0"]),
    "sampling with batch_size 0": (sample(batch_size=0), ["--batch_size", "0"]),
    "a negative seed": (sample(seed=-1), ["--seed", "-1"]),
    "num_channels 0": (train(model={**TINY, "num_channels": 0}), ["num_channels"]),
    "image_size that cannot be halved": (
        train(model={**TINY, "image_size": 18, "channel_mult": "1,1,1"}),
        ["18", "channel_mult"],
    ),
    "two half precisions at once": (train(use_fp16=True, use_bf16=True), ["use_fp16", "use_bf16"]),
    "class outside the model's": (
        sample("{stage}/conditional.pt", CONDITIONAL, classes="1,4"),
        ["--classes 1,4", "class 4", "0..3"],
    ),
    # Checkpoints
    "no model_path": (sample(""), ["--model_path is missing"]),
    "model_path does not exist": (sample("{stage}/gone.pt"), ["--model_path", "{stage}/gone.pt"]),
    "model_path is a folder": (sample("{stage}/good"), ["{stage}/good", "directory"]),
    "no classifier_path": (sample_guided(classifier=""), ["--classifier_path is missing"]),
    "resume_checkpoint does not exist": (
        train(resume_checkpoint="{stage}/model000001.pt"),
        ["--resume_checkpoint", "{stage}/model000001.pt"],
    ),
    "checkpoint of another architecture": (
        sample(model={**TINY, "num_channels": 64, "learn_sigma": True, "num_res_blocks": 2}),
        ["{stage}/model.pt", "time_embed.0.weight is (128, 32) in the file and (256, 64) here"],
    ),
    "resuming with another architecture": (
        train(model={**TINY, "num_channels": 64}, resume_checkpoint="{stage}/described/model000001.pt"),
        ["{stage}/described/config.json", "--num_channels 64", "num_channels 32"],
    ),
    "a model as the classifier": (
        sample_guided(classifier="{stage}/conditional.pt", num_classes=4),
        ["{stage}/conditional.pt", "do not fit the model"],
    ),
    "a pickle file": (sample("{stage}/pickle.pt"), ["{stage}/pickle.pt"]),
    "a pickle in torch's format": (sample("{stage}/zipped_pickle.pt"), ["{stage}/zipped_pickle.pt"]),
    "a truncated file": (sample("{stage}/half.pt"), ["{stage}/half.pt"]),
    "a flag that contradicts config.json": (
        sample("{stage}/described/model000001.pt", {"num_channels": 64}),
        ["--num_channels 64", "{stage}/described/config.json", "num_channels 32"],
    ),
    "an optimiser's state of another width": (
        train(resume_checkpoint="{stage}/foreign_opt/model000001.pt"),
        ["{stage}/foreign_opt/opt000001.pt"],
    ),
    "a moving average of another width": (
        train(resume_checkpoint="{stage}/foreign_ema/model000001.pt"),
        ["{stage}/foreign_ema/ema_0.9999_000001.pt"],
    ),
    # Sampling
    "unknown preset": (sample("", {}, preset="imagenet255"), ["--preset", "'imagenet255'", "imagenet256", "lsun_cat"]),
    "a preset of another script": (
        sample("", {}, preset="64_256_upsampler"),
        ["--preset 64_256_upsampler", "script"],
    ),
    "a preset without its file": (
        [script("image_sample"), *flags(preset="imagenet64", models_dir="{stage}/good")],
        ["--preset imagenet64", "{stage}/good/64x64_diffusion.pt", "--models_dir", "--model_path"],
    ),
    "too few steps for the schedule": (sample(diffusion_steps=10), ["--diffusion_steps 10", "cosine"]),
    "a diffusion process without steps": (sample(diffusion_steps=0), ["--diffusion_steps 0"]),
    # Log folder
    "log_dir below a file": (train(log_dir="{stage}/model.pt/log"), ["{stage}/model.pt/log"]),
}


def staged(name, stage, log_dir):
    """Return the command and the expected words of a case, with {stage} replaced by the folder."""
    argv, words = CASES[name]
    argv = [text.replace("{stage}", str(stage)) for text in argv]
    if "--log_dir" not in argv:
        argv += ["--log_dir", str(log_dir)]
    return argv, [word.replace("{stage}", str(stage)) for word in words]


@pytest.fixture(scope="module")
def outcomes(stage):
    return run_forked({name: staged(name, stage, stage / "log")[0] for name in CASES})


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(name, outcomes, stage):
    check_refused(outcomes[name], staged(name, stage, stage)[1])


def test_pickled_code_did_not_run(outcomes, stage):
    assert "a pickle file" in outcomes
    assert not (stage / "ran").exists()
    with open(stage / "pickle.pt", "rb") as f:  # pickle.load does run the code in pickle.pt
        pickle.load(f).close()
    assert (stage / "ran").exists()
    os.remove(stage / "ran")


def test_valid_input_is_accepted(stage, tmp_path):
    """The commands succeed with valid files, so each case above fails only because of its own mistake."""
    done = run_forked(
        {
            "train": [*(text.replace("{stage}", str(stage)) for text in train()), "--log_dir", str(tmp_path)],
            "sample": [*(text.replace("{stage}", str(stage)) for text in sample()), "--log_dir", str(tmp_path)],
        }
    )
    for outcome in done.values():
        outcome.check()


def test_two_ranks_print_an_error_only_once(stage, tmp_path):
    argv, words = staged("checkpoint of another architecture", stage, tmp_path)
    check_refused(run(argv, ranks=2), words, last=False)


def test_an_error_on_one_rank_of_two_is_printed(stage, tmp_path):
    # Only one of the two ranks reads the broken image; the shuffle decides which.
    argv, words = staged("unreadable image", stage, tmp_path)
    check_refused(run([*argv, "--batch_size", "1"], ranks=2), words, r"(rank 1: )?error: ", last=False)
