"""The four scripts as a user runs them, from training on a few handwritten digits to guided samples."""

import csv
import json
import os

import numpy as np
import pytest
import torch as th
from launch import ROOT, TINY, TINY_CLASSIFIER, flags, run, run_forked, run_ranks, script
from PIL import Image
from sampling import new_network

from guided_diffusion.script_util import model_and_diffusion_defaults

NUM_IMAGES = 48
MODEL = dict(TINY, class_cond=True, num_classes=10, learn_sigma=True)
# The learning rate is high so that, after a few steps, the network's output depends on its input and label.
TRAIN = dict(batch_size=4, lr=1e-2, log_interval=1, num_workers=0, ema_rate="0.5,0.9", seed=0)
SAMPLE = dict(num_samples=10, timestep_respacing=4, seed=3)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with a few dozen images of digits."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    argv = [os.path.join(ROOT, "datasets", "digits.py"), str(folder), "--size", "16"]
    run_forked({"digits": argv})["digits"].check()
    for path in folder.iterdir():
        if int(path.stem.split("_")[1]) >= NUM_IMAGES:
            path.unlink()
    assert len({path.name[0] for path in folder.iterdir()}) == 10
    return str(folder)


def image_train(data_dir, log_dir, *, ranks=None, launcher=None, env=None, **extra):
    """Run image_train.py under a launcher or, without a launcher, in forked processes, which start faster."""
    folder = dict(log_dir=log_dir) if log_dir else {}
    argv = [script("image_train"), *flags(data_dir=data_dir, **folder, **{**MODEL, **TRAIN, **extra})]
    if launcher:
        return run(argv, ranks=ranks, launcher=launcher, env=env).check()
    return run_ranks(ranks, argv, env=env, quick_end=True)[0].check()


def checkpoints(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt"))


def load(folder, name):
    return th.load(os.path.join(folder, name), weights_only=True)


def read_rows(folder):
    with open(os.path.join(folder, "progress.csv"), newline="") as f:
        return list(csv.DictReader(f))


def check_checkpoints(folder, step, rates=("0.5", "0.9")):
    """Check that all files of a checkpoint exist and that their weights load into a network made from the flags."""
    names = [f"model{step:06d}.pt", *(f"ema_{rate}_{step:06d}.pt" for rate in rates)]
    assert {*names, f"opt{step:06d}.pt"} <= set(checkpoints(folder))
    for name in names:
        state_dict = load(folder, name)
        new_network(MODEL).load_state_dict(state_dict, strict=True)
        assert all(v.dtype == th.float32 and v.isfinite().all() for v in state_dict.values())
    assert all(s["step"] == step for s in load(folder, f"opt{step:06d}.pt")["state"].values())


# Training a diffusion model


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """The folder of a training run on 2 ranks that ended after saving its first checkpoint."""
    folder = str(tmp_path_factory.mktemp("trained"))
    env = {"DIFFUSION_TRAINING_TEST": "1"}
    image_train(digits, folder, ranks=2, launcher="mpiexec", save_interval=4, total_steps=1000, env=env)
    return folder


def test_diffusion_training_test_ends_the_run_after_the_first_save(trained):
    assert checkpoints(trained) == [f"{kind}000004.pt" for kind in ("ema_0.5_", "ema_0.9_", "model", "opt", "state")]


def test_checkpoints_load(trained):
    check_checkpoints(trained, 4)


def test_config_json_has_the_flags_of_the_run(trained, digits):
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
    assert [float(row["samples"]) for row in rows] == [8, 16, 24, 32]  # each of the 2 ranks trains on 4 images per step
    assert all(0 < float(row["loss"]) < 100 and float(row["grad_norm"]) > 0 for row in rows)
    assert os.path.getsize(os.path.join(trained, "log.txt")) > 0


def test_training_on_one_rank_with_fp16_and_openai_logdir(digits, tmp_path):
    env = {"OPENAI_LOGDIR": str(tmp_path / "from_env"), "OPENAI_LOG_FORMAT": "stdout,json"}
    # With this learning rate, gradients do not overflow in float16.
    image_train(digits, None, ranks=1, env=env, use_fp16=True, lr=1e-4, save_interval=2, total_steps=3)
    check_checkpoints(tmp_path / "from_env", 2)
    check_checkpoints(tmp_path / "from_env", 3)  # a run also saves a checkpoint at its end
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
    assert not (tmp_path / "unused").exists()  # --log_dir overrides OPENAI_LOGDIR
    assert done.output.count("creating model") == 1  # only rank 0 logs


def test_training_without_a_launcher_does_not_need_mpi4py(digits, tmp_path):
    # An mpi4py module that raises ImportError comes first on the path.
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "mpi4py.py").write_text("raise ImportError('no MPI here')\n")
    (tmp_path / "temporary").mkdir()
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), ROOT]), "TMPDIR": str(tmp_path / "temporary")}
    options = dict(MODEL, **TRAIN, data_dir=digits, use_bf16=True, save_interval=2, total_steps=2)
    done = run([script("image_train"), *flags(**options)], env=env).check()
    # Without --log_dir and OPENAI_LOGDIR, the run folder is a dated folder in the temporary directory. The first line
    # of the output names the folder.
    (folder,) = (tmp_path / "temporary").glob("openai-*")
    assert done.output.splitlines()[0] == f"Logging to {folder}"
    check_checkpoints(folder, 2)


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
    new_network(TINY_CLASSIFIER).load_state_dict(load(classifier, "model000003.pt"), strict=True)
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
    # eval_interval=2: held-out metrics are logged at steps 0 and 2.
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
    """Check the .npz and .png files of a sampling run. Return the images and labels."""
    stem = os.path.join(folder, f"samples_{'x'.join(map(str, shape))}")
    with np.load(stem + ".npz") as f:
        arrays = dict(f)
    assert arrays["arr_0"].shape == shape and arrays["arr_0"].dtype == np.uint8
    with Image.open(stem + ".png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 64
    return arrays["arr_0"], arrays.get("arr_1")


@pytest.fixture(scope="session")
def sampled(trained, classifier, tmp_path_factory):
    """Samples from the trained networks: {name of the job: (images, labels)}."""
    folder = tmp_path_factory.mktemp("sampled")
    model = flags(model_path=os.path.join(trained, "ema_0.5_000004.pt"), batch_size=10, **SAMPLE)
    guide = flags(classifier_path=os.path.join(classifier, "model000003.pt"), classifier_scale=50.0)
    jobs = {
        "unguided": [script("image_sample"), *model, "--classes", "balanced"],
        "of class 5": [script("image_sample"), *model, "--classes", "5"],
        "guided": [script("classifier_sample"), *model, *guide, "--classes", "balanced"],
    }
    jobs = {name: [*argv, "--log_dir", str(folder / name)] for name, argv in jobs.items()}
    for outcome in run_forked(jobs).values():
        outcome.check()
    return {name: read_samples(folder / name) for name in jobs}


def test_samples_of_balanced_classes(sampled):
    images, labels = sampled["unguided"]
    assert images.std() > 5  # the images are not blank
    assert len({image.tobytes() for image in images}) == len(images)
    assert labels.dtype == np.int64 and sorted(labels) == list(range(10))


def test_labels_reach_the_model(sampled):
    (balanced, labels), (images, fives) = sampled["unguided"], sampled["of class 5"]
    assert (fives == 5).all()
    assert (images[labels == 5] == balanced[labels == 5]).all()  # samples with equal noise and label are equal
    assert all((images[i] != balanced[i]).any() for i in np.flatnonzero(labels != 5))


def test_classifier_guidance_changes_the_images(sampled):
    assert (sampled["guided"][0] != sampled["unguided"][0]).any()
    assert (sampled["guided"][1] == sampled["unguided"][1]).all()


def test_grey_images_without_classes(digits, tmp_path):
    """Only the classifier gets labels, because a model without classes would refuse them."""
    grey = dict(MODEL, class_cond=False, in_channels=1)
    model = flags(model_path=tmp_path / "model" / "model000002.pt", batch_size=10, **SAMPLE)
    guide = flags(classifier_path=tmp_path / "classifier" / "model000001.pt", classifier_scale=50.0, classes="7,3")
    train_classifier = flags(data_dir=digits, batch_size=4, num_workers=0, iterations=1, in_channels=1)
    jobs = {
        "model": [script("image_train"), *flags(data_dir=digits, total_steps=2, **grey, **TRAIN)],
        "classifier": [script("classifier_train"), *train_classifier, *flags(**TINY_CLASSIFIER)],
        "unguided": [script("image_sample"), *model],
        "guided": [script("classifier_sample"), *model, *guide],
    }
    for outcome in run_forked({name: [*argv, "--log_dir", tmp_path / name] for name, argv in jobs.items()}).values():
        outcome.check()
    images, none = read_samples(tmp_path / "unguided", (10, 16, 16, 1))
    guided, labels = read_samples(tmp_path / "guided", (10, 16, 16, 1))
    assert images.std() > 5 and none is None
    assert (guided != images).any() and labels.tolist() == [7, 3] * 5
