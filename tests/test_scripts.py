"""The four commands as a user runs them, on a few handwritten digits, from data to guided samples."""

import csv
import json
import os

import numpy as np
import pytest
import torch as th
from launch import ROOT, TINY, TINY_CLASSIFIER, flags, run, run_forked, run_ranks, script
from PIL import Image

from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

NUM_IMAGES = 48
MODEL = dict(TINY, class_cond=True, num_classes=10, learn_sigma=True)
# A high learning rate: a few steps are to give a network whose output depends on its input and label.
TRAIN = dict(batch_size=4, lr=1e-2, log_interval=1, num_workers=0, ema_rate="0.5,0.9", seed=0)
SAMPLE = dict(num_samples=10, timestep_respacing=4, seed=3)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of a few dozen digits."""
    folder = tmp_path_factory.mktemp("digits")
    argv = [os.path.join(ROOT, "datasets", "digits.py"), str(folder), "--size", "16"]
    run_forked({"digits": argv})["digits"].check()
    for path in folder.iterdir():
        if int(path.stem.split("_")[1]) >= NUM_IMAGES:
            path.unlink()
    assert len({path.name[0] for path in folder.iterdir()}) == 10
    return str(folder)


def image_train(data_dir, log_dir, *, ranks=None, launcher=None, env=None, **extra):
    """Train under a launcher, or without one and sooner."""
    folder = dict(log_dir=log_dir) if log_dir else {}
    argv = [script("image_train"), *flags(data_dir=data_dir, **folder, **{**MODEL, **TRAIN, **extra})]
    if launcher:
        return run(argv, ranks=ranks, launcher=launcher, env=env).check()
    return run_ranks(ranks, argv, env=env, quick_end=True)[0].check()


def checkpoints(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt"))


def load(folder, name):
    return th.load(os.path.join(folder, name), weights_only=True)


def new_model(**extra):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL, **extra})[0]


def read_rows(folder):
    with open(os.path.join(folder, "progress.csv"), newline="") as f:
        return list(csv.DictReader(f))


def check_checkpoints(folder, step, rates=("0.5", "0.9")):
    """The files of a step are there, and their weights load into a network made from the flags."""
    names = [f"model{step:06d}.pt", *(f"ema_{rate}_{step:06d}.pt" for rate in rates)]
    assert {*names, f"opt{step:06d}.pt"} <= set(checkpoints(folder))
    for name in names:
        state_dict = load(folder, name)
        new_model().load_state_dict(state_dict, strict=True)
        assert all(v.dtype == th.float32 and v.isfinite().all() for v in state_dict.values())
    assert all(s["step"] == step for s in load(folder, f"opt{step:06d}.pt")["state"].values())


# Training a diffusion model


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """The folder of a run on 2 ranks that ended after its first save."""
    folder = str(tmp_path_factory.mktemp("trained"))
    env = {"DIFFUSION_TRAINING_TEST": "1"}
    image_train(digits, folder, ranks=2, launcher="mpiexec", save_interval=4, total_steps=1000, env=env)
    return folder


def test_training_test_variable_ends_the_run_after_the_first_save(trained):
    assert checkpoints(trained) == [f"{kind}000004.pt" for kind in ("ema_0.5_", "ema_0.9_", "model", "opt", "state")]


def test_checkpoints_load(trained):
    check_checkpoints(trained, 4)


def test_config_says_what_was_run(trained, digits):
    with open(os.path.join(trained, "config.json")) as f:
        config = json.load(f)
    expected = {**MODEL, **TRAIN, "data_dir": digits, "save_interval": 4, "total_steps": 1000, "log_dir": trained}
    assert {name: config["flags"][name] for name in expected} == expected
    assert model_and_diffusion_defaults().keys() <= config["flags"].keys()
    assert (config["kind"], config["world_size"]) == ("diffusion", 2)
    assert config["versions"]["torch"] == th.__version__


def test_progress_is_logged(trained):
    rows = read_rows(trained)
    assert [float(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["samples"]) for row in rows] == [8, 16, 24, 32]  # 4 images on each of 2 ranks
    assert all(0 < float(row["loss"]) < 100 and float(row["grad_norm"]) > 0 for row in rows)
    assert os.path.getsize(os.path.join(trained, "log.txt")) > 0


def test_training_on_one_rank_with_fp16_into_logdir_of_the_environment(digits, tmp_path):
    env = {"OPENAI_LOGDIR": str(tmp_path / "from_env"), "OPENAI_LOG_FORMAT": "stdout,json"}
    # A learning rate at which the gradient stays far from overflow.
    image_train(digits, None, ranks=1, env=env, use_fp16=True, lr=1e-4, save_interval=2, total_steps=3)
    check_checkpoints(tmp_path / "from_env", 2)
    check_checkpoints(tmp_path / "from_env", 3)  # the end of the run is saved too
    names = os.listdir(tmp_path / "from_env")
    assert "progress.json" in names and "progress.csv" not in names and "log.txt" not in names
    rows = [json.loads(line) for line in (tmp_path / "from_env" / "progress.json").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["lg_loss_scale"] for row in rows] == pytest.approx([20, 20.001, 20.002])


def test_training_on_three_ranks_with_importance_sampling_and_microbatches(digits, tmp_path):
    folder, env = tmp_path / "used", {"OPENAI_LOGDIR": str(tmp_path / "unused")}
    options = dict(schedule_sampler="loss-second-moment", microbatch=3, num_workers=1, save_interval=2, total_steps=2)
    done = image_train(digits, folder, ranks=3, env=env, **options)
    check_checkpoints(folder, 2)
    assert [float(row["samples"]) for row in read_rows(folder)] == [12, 24]
    assert not (tmp_path / "unused").exists()  # --log_dir goes before OPENAI_LOGDIR
    assert done.output.count("creating model") == 1  # one rank speaks for all


def test_plain_python_needs_no_mpi4py(digits, tmp_path):
    # A module of that name that cannot be imported stands before the real one.
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "mpi4py.py").write_text("raise ImportError('no MPI here')\n")
    (tmp_path / "temporary").mkdir()
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), ROOT]), "TMPDIR": str(tmp_path / "temporary")}
    options = dict(MODEL, **TRAIN, data_dir=digits, use_bf16=True, save_interval=2, total_steps=2)
    done = run([script("image_train"), *flags(**options)], env=env).check()
    # Without a folder by flag or environment: a dated one under the temporary folder, named in the first line.
    (folder,) = (tmp_path / "temporary").glob("openai-*")
    assert done.output.splitlines()[0] == f"Logging to {folder}"
    check_checkpoints(folder, 2)


@pytest.fixture(scope="session")
def resumed(trained, digits, tmp_path_factory):
    """The folder of a run on 2 ranks that goes on from `trained` for two steps, saving at each."""
    folder = str(tmp_path_factory.mktemp("resumed"))
    checkpoint = os.path.join(trained, "model000004.pt")
    image_train(digits, folder, ranks=2, resume_checkpoint=checkpoint, save_interval=1, total_steps=6)
    return folder


def test_resuming_goes_on_from_the_step(resumed):
    assert checkpoints(resumed) == [
        f"{kind}{step:06d}.pt" for kind in ("ema_0.5_", "ema_0.9_", "model", "opt", "state") for step in (5, 6)
    ]
    assert [float(row["step"]) for row in read_rows(resumed)] == [4, 5]
    assert [float(row["samples"]) for row in read_rows(resumed)] == [40, 48]


def test_resuming_loads_weights(resumed, trained):
    before, after = load(trained, "model000004.pt"), load(resumed, "model000005.pt")
    # Adam moves a weight by about the learning rate; another initialisation would differ by more.
    moved = max(float((after[k] - before[k]).abs().max()) for k in before)
    assert 0 < moved < 4 * TRAIN["lr"]


def test_resuming_loads_the_optimizer(resumed, trained):
    before, after = load(trained, "opt000004.pt"), load(resumed, "opt000005.pt")
    assert before["state"].keys() == after["state"].keys()
    for i, state in after["state"].items():
        assert state["step"] == 5
        # v = 0.999 v_before + 0.001 g^2: never below the first term, which a fresh start would not have
        assert (state["exp_avg_sq"] >= 0.999 * before["state"][i]["exp_avg_sq"] * (1 - 1e-5)).all()


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_resuming_loads_the_averages(rate, resumed, trained):
    average = load(trained, f"ema_{rate}_000004.pt")
    for step in (5, 6):
        weights, saved = load(resumed, f"model{step:06d}.pt"), load(resumed, f"ema_{rate}_{step:06d}.pt")
        average = {k: rate * average[k] + (1 - rate) * weights[k] for k in average}
        for name, value in saved.items():
            assert th.allclose(value, average[name], rtol=1e-5, atol=1e-6), name


def test_a_run_that_fails_leaves_the_record_alone(trained, digits):
    # A config.json overwritten by a mistyped command would misdescribe the checkpoints beside it.
    path = os.path.join(trained, "config.json")
    with open(path, "rb") as f:
        before = f.read()
    options = dict(data_dir=digits, log_dir=trained, resume_checkpoint="auto", schedule_sampler="foo", num_workers=0)
    done = run_forked({"train": [script("image_train"), *flags(**options)]})["train"]
    assert done.returncode != 0 and "--schedule_sampler" in done.output
    with open(path, "rb") as f:
        assert f.read() == before


# Training a classifier


@pytest.fixture(scope="session")
def classifier(digits, tmp_path_factory):
    """The folder of a classifier trained on 2 ranks, with held-out data."""
    folder = str(tmp_path_factory.mktemp("classifier"))
    argv = [
        script("classifier_train"),
        *flags(data_dir=digits, val_data_dir=digits, log_dir=folder, batch_size=4, microbatch=3, num_workers=0),
        *flags(iterations=3, save_interval=2, log_interval=1, eval_interval=2, lr=1e-3, anneal_lr=True, seed=0),
        *flags(**TINY_CLASSIFIER),
    ]
    run_ranks(2, argv, quick_end=True)[0].check()
    return folder


def test_classifier_checkpoints_load(classifier):
    assert checkpoints(classifier) == [f"{kind}{step:06d}.pt" for kind in ("model", "opt", "state") for step in (2, 3)]
    network = create_classifier(**{**classifier_defaults(), **TINY_CLASSIFIER})
    network.load_state_dict(load(classifier, "model000003.pt"), strict=True)
    with open(os.path.join(classifier, "config.json")) as f:
        config = json.load(f)
    assert config["kind"] == "classifier"
    assert {name: config["flags"][name] for name in TINY_CLASSIFIER} == TINY_CLASSIFIER


def test_classifier_logs_training_and_held_out_metrics(classifier):
    rows = read_rows(classifier)
    assert len(rows) == 3
    for row in rows:
        assert float(row["train_loss"]) > 0
        assert 0 <= float(row["train_acc@1"]) <= float(row["train_acc@5"]) <= 1
    # Evaluated every other step, the first included.
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True]


def test_classifier_trains_in_half_precision(digits, tmp_path):
    common = flags(data_dir=digits, batch_size=1, iterations=2, save_interval=2, num_workers=0, **TINY_CLASSIFIER)
    argv = {
        kind: [*common, f"--classifier_use_{kind}", "True", "--log_dir", tmp_path / kind] for kind in ("fp16", "bf16")
    }
    done = run_forked({kind: [script("classifier_train"), *argv[kind]] for kind in argv})
    for kind, outcome in done.items():
        outcome.check()
        state_dict = load(tmp_path / kind, "model000002.pt")
        assert all(v.dtype == th.float32 and v.isfinite().all() for v in state_dict.values())


# Sampling


def read_samples(folder, shape=(10, 16, 16, 3)):
    """The images and labels of a run's samples, after a look at the files."""
    stem = os.path.join(folder, f"samples_{'x'.join(map(str, shape))}")
    with np.load(stem + ".npz") as f:
        arrays = dict(f)
    assert arrays["arr_0"].shape == shape and arrays["arr_0"].dtype == np.uint8
    with Image.open(stem + ".png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 64
    return arrays["arr_0"], arrays.get("arr_1")


def check_alike(samples):
    """Batches of other sizes round sums in another order, which may tip a value over to the next grey level."""
    first, *others = samples
    assert first.std() > 5  # not blank
    for other in others:
        difference = np.abs(first.astype(int) - other.astype(int))
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999


@pytest.fixture(scope="session")
def unguided(trained, tmp_path_factory):
    """Samples by image_sample on 1, 2 and 3 ranks with different batch sizes, a digit of each class."""
    results = []
    for ranks, batch_size in [(1, 10), (2, 3), (3, 2)]:  # the last two with a short, and with an empty, last batch
        folder = str(tmp_path_factory.mktemp(f"unguided{ranks}"))
        argv = [
            script("image_sample"),
            *flags(model_path=os.path.join(trained, "ema_0.5_000004.pt"), log_dir=folder, classes="balanced"),
            *flags(batch_size=batch_size, **SAMPLE),
        ]
        run_ranks(ranks, argv, quick_end=True)[0].check()
        results.append(read_samples(folder))
    return results


def test_samples_do_not_depend_on_ranks_and_batches(unguided):
    check_alike([images for images, _ in unguided])


def test_samples_differ_from_each_other(unguided):
    images = unguided[0][0]
    assert len({image.tobytes() for image in images}) == len(images)


def test_balanced_classes(unguided):
    for _, labels in unguided:
        assert labels.dtype == np.int64
        assert sorted(labels) == list(range(10))


@pytest.fixture(scope="session")
def guided(trained, classifier, tmp_path_factory):
    """Samples by classifier_sample with DDIM on 1, 2 and 3 ranks with different batch sizes, of two classes."""
    results = []
    for ranks, batch_size in [(1, 10), (2, 3), (3, 2)]:
        folder = str(tmp_path_factory.mktemp(f"guided{ranks}"))
        argv = [
            script("classifier_sample"),
            *flags(model_path=os.path.join(trained, "ema_0.5_000004.pt"), log_dir=folder, classes="7,3"),
            *flags(classifier_path=os.path.join(classifier, "model000003.pt"), classifier_scale=5.0),
            *flags(batch_size=batch_size, use_ddim=True, **SAMPLE),
        ]
        run_ranks(ranks, argv, quick_end=True)[0].check()
        results.append(read_samples(folder))
    return results


def test_guided_samples_do_not_depend_on_ranks_and_batches(guided):
    check_alike([images for images, _ in guided])


def test_listed_classes_take_turns(guided):
    for _, labels in guided:
        assert labels.tolist() == [7, 3] * 5


@pytest.fixture(scope="session")
def variants(trained, classifier, tmp_path_factory):
    """Samples under several flags in plain python: {name: (images, labels)}."""
    folder = tmp_path_factory.mktemp("variants")
    model = flags(model_path=os.path.join(trained, "ema_0.5_000004.pt"), batch_size=10, **SAMPLE)
    guide = flags(classifier_path=os.path.join(classifier, "model000003.pt"))
    ddim = flags(classes="7,3", use_ddim=True, classifier_scale=5.0)
    jobs = {
        "again": [script("image_sample"), *model, "--classes", "balanced"],
        "other seed": [script("image_sample"), *model, "--classes", "balanced", "--seed", "4"],
        "other label": [script("image_sample"), *model, "--classes", "5"],
        "drawn labels": [script("image_sample"), *model],
        "scale 0": [script("classifier_sample"), *model, *guide, *flags(classes="balanced", classifier_scale=0)],
        "guided": [script("classifier_sample"), *model, *guide, *flags(classes="balanced", classifier_scale=50.0)],
        "fp16": [script("image_sample"), *model, *flags(classes="balanced", use_fp16=True)],
        "bf16": [script("image_sample"), *model, *flags(classes="balanced", use_bf16=True)],
        "guided bf16": [
            script("classifier_sample"), *model, *guide, *ddim, *flags(use_bf16=True, classifier_use_bf16=True)
        ],
    }  # fmt: skip
    jobs = {name: [*argv, "--log_dir", str(folder / name)] for name, argv in jobs.items()}
    for outcome in run_forked(jobs).values():
        outcome.check()
    return {name: read_samples(folder / name) for name in jobs}


@pytest.fixture(scope="session")
def unconditional(digits, tmp_path_factory):
    """Samples of a model without classes, of grey images: unguided, and with a classifier of the classes."""
    folder = tmp_path_factory.mktemp("unconditional")
    options = {**MODEL, **TRAIN, "class_cond": False, "in_channels": 1}
    grey_classifier = {**TINY_CLASSIFIER, "in_channels": 1}
    model = flags(model_path=folder / "model" / "model000002.pt", batch_size=10, **SAMPLE)
    guide = flags(classifier_path=folder / "classifier" / "model000001.pt", classes="7,3")
    jobs = {
        "model": [script("image_train"), *flags(data_dir=digits, total_steps=2, **options)],
        "classifier": [
            script("classifier_train"),
            *flags(data_dir=digits, batch_size=4, num_workers=0, iterations=1, **grey_classifier),
        ],
        "unguided": [script("image_sample"), *model],
        "scale 0": [script("classifier_sample"), *model, *guide, "--classifier_scale", "0"],
        "guided": [script("classifier_sample"), *model, *guide, "--classifier_scale", "50"],
    }
    jobs = {name: [*argv, "--log_dir", str(folder / name)] for name, argv in jobs.items()}
    for outcome in run_forked(jobs).values():
        outcome.check()
    return {name: read_samples(folder / name, (10, 16, 16, 1)) for name in ("unguided", "scale 0", "guided")}


def test_a_model_without_classes(unconditional):
    images, labels = unconditional["unguided"]
    assert images.std() > 5 and labels is None


def test_a_classifier_guides_a_model_without_classes(unconditional):
    # The labels are the classifier's alone: the model must not be given them.
    assert (unconditional["scale 0"][0] == unconditional["unguided"][0]).all()
    assert (unconditional["guided"][0] != unconditional["unguided"][0]).any()
    assert unconditional["guided"][1].tolist() == [7, 3] * 5


def test_a_seed_repeats_a_run(variants, unguided):
    assert (variants["again"][0] == unguided[0][0]).all()
    assert (variants["other seed"][0] != unguided[0][0]).mean() > 0.5


def test_labels_reach_the_model(variants, unguided):
    images, labels = variants["other label"]
    assert (labels == 5).all()
    five = unguided[0][1] == 5
    assert (images[five] == unguided[0][0][five]).all()  # the same noise and label
    assert all((images[i] != unguided[0][0][i]).any() for i in np.flatnonzero(~five))


def test_labels_are_drawn_from_the_model_s_classes(variants):
    labels = variants["drawn labels"][1]
    assert labels.shape == (10,) and labels.dtype == np.int64
    assert set(labels) <= set(range(10)) and len(set(labels)) > 1


def test_guidance_of_scale_zero_is_none(variants, unguided):
    images, labels = variants["scale 0"]
    assert (images == unguided[0][0]).all()
    assert (labels == unguided[0][1]).all()
    assert (variants["guided"][0] != unguided[0][0]).any()  # and another scale is some


@pytest.mark.parametrize("name, most", [("fp16", 0.3), ("bf16", 2), ("guided bf16", 2)])
def test_half_precision_samples_resemble_full(name, most, variants, unguided, guided):
    full = guided[0] if "guided" in name else unguided[0]
    images, labels = variants[name]
    assert (labels == full[1]).all()
    assert 0 < np.abs(images.astype(int) - full[0].astype(int)).mean() < most
