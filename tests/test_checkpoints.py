"""Checkpoint files: their names, atomic writes, and the record of flags beside them."""

import json
import os
from types import SimpleNamespace

import pytest
import torch as th

from guided_diffusion import checkpoint_util, files, logger
from guided_diffusion.checkpoint_util import adopt_config, read_config
from guided_diffusion.errors import InputError
from guided_diffusion.script_util import identity_flags, model_and_diffusion_defaults
from guided_diffusion.train_util import find_ema_checkpoint, parse_resume_step_from_filename
from guided_diffusion.training_setup import record_run

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Names and writes


@pytest.mark.parametrize(
    "name, step",
    [
        ("model012000.pt", 12000),
        ("/a/model1/model000005.pt", 5),
        ("gs://bucket/model1000000.pt", 1000000),
        ("ema_0.9999_012000.pt", 0),
        ("model.pt", 0),
        ("64x64_diffusion.pt", 0),
        ("my_model000010.pt", 10),
    ],
)
def test_resume_step_from_a_name(name, step):
    assert parse_resume_step_from_filename(name) == step


def test_find_ema_checkpoint(tmp_path):
    (tmp_path / "ema_0.9999_000012.pt").write_bytes(b"")
    main = str(tmp_path / "model000012.pt")
    assert find_ema_checkpoint(main, 12, "0.9999") == str(tmp_path / "ema_0.9999_000012.pt")
    assert find_ema_checkpoint(main, 12, 0.9999) == str(tmp_path / "ema_0.9999_000012.pt")
    assert find_ema_checkpoint(main, 13, "0.9999") is None
    assert find_ema_checkpoint(main, 12, "0.5") is None
    assert find_ema_checkpoint(None, 12, "0.9999") is None


def test_atomic_writes(quiet):
    path = os.path.join(quiet, "file")
    with files.write_atomically(path) as f:
        f.write(b"first")
        assert not os.path.exists(path)  # not before it is whole
    with pytest.raises(ZeroDivisionError):
        with files.write_atomically(path) as f:
            f.write(b"half of the sec")
            1 / 0
    assert open(path, "rb").read() == b"first"
    assert os.listdir(quiet) == ["file"]  # nothing half-done stays
    with files.write_atomically(path) as f:
        f.write(b"second")
    assert open(path, "rb").read() == b"second"


def test_a_save_that_fails_leaves_the_old_checkpoint(quiet):
    checkpoint_util.save({"a": th.ones(2)}, "model000001.pt")
    with pytest.raises(Exception, match="pickle|local object"):
        checkpoint_util.save({"a": lambda: None}, "model000001.pt")
    assert os.listdir(quiet) == ["model000001.pt"]
    assert th.load(os.path.join(quiet, "model000001.pt"))["a"].tolist() == [1, 1]


# The record beside a checkpoint


def test_config_is_read_back(quiet):
    checkpoint = os.path.join(quiet, "model000001.pt")
    assert checkpoint_util.read_config(checkpoint) is None
    checkpoint_util.write_config({"num_channels": 32, "channel_mult": "1,2"}, kind="diffusion")
    config = checkpoint_util.read_config(checkpoint)
    assert config["flags"] == {"num_channels": 32, "channel_mult": "1,2"}
    assert config["kind"] == "diffusion" and config["world_size"] == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"flags": 3}', "\x00\xff"])
def test_damaged_config(content, quiet):
    with open(os.path.join(quiet, "config.json"), "w", encoding="latin-1") as f:
        f.write(content)
    with pytest.raises(InputError, match="config.json"):
        checkpoint_util.read_config(os.path.join(quiet, "model000001.pt"))


def write_record(folder, **flags):
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return str(folder / "model.pt")


def test_adopt_config(tmp_path):
    path = write_record(tmp_path / "model", width=10, depth=20, seed=30, levels="1,2")
    args = SimpleNamespace(model_path=path, width=1, depth=2, seed=3, levels="1, 2")
    settled = {"depth": (20, "on the command line"), "levels": ("1, 2", "on the command line")}
    adopt_config(args, settled, "model_path", ["width", "depth", "levels", "unrecorded"])
    assert (args.width, args.depth, args.seed) == (10, 20, 3)  # only what was named
    assert settled["width"][0] == 10
    with pytest.raises(InputError, match="--width 5 on the command line contradicts .*, which says width 10"):
        adopt_config(args, {"width": (5, "on the command line")}, "model_path", ["width"])


@pytest.mark.parametrize(
    "name, value, default, expected",
    [
        ("predict_xstart", "false", False, "true or false"),  # which is true, as a text
        ("predict_xstart", 0, False, "true or false"),
        ("num_channels", "32", 128, "a whole number"),
        ("num_channels", 32.0, 128, "a whole number"),
        ("num_channels", None, 128, "a whole number"),
        ("num_channels", True, 128, "a whole number"),
        ("dropout", "x", 0.0, "a number"),
        ("channel_mult", 1, "", "a text"),
    ],
)
def test_values_of_another_kind_are_refused(name, value, default, expected, tmp_path):
    path = write_record(tmp_path / "model", **{name: value})
    with pytest.raises(InputError, match=rf"config.json: {name} is .*, where {expected} was expected"):
        adopt_config(SimpleNamespace(model_path=path, **{name: default}), {}, "model_path", [name])


def test_whole_numbers_may_stand_for_others(tmp_path):
    args = SimpleNamespace(model_path=write_record(tmp_path / "model", dropout=0), dropout=0.1)
    adopt_config(args, {}, "model_path", ["dropout"])
    assert args.dropout == 0


@pytest.mark.parametrize("extra", [{"classes": 5}, {"classes": [1, 2]}, {"global_batch": "4"}, {"global_batch": -8}])
def test_records_of_another_kind_are_refused(extra, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {}, **extra}))
    with pytest.raises(InputError, match="not the config.json of a training run"):
        read_config(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("num_classes, warned", [(2, False), (1000, True)])
def test_room_for_more_classes_than_the_data_have_is_warned_of(num_classes, warned, monkeypatch, tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    record_run({"flags": {"num_classes": num_classes}}, "diffusion", ["cat", "dog"])
    logger.reset()
    assert ("2 classes, fewer than --num_classes" in (tmp_path / "log.txt").read_text()) == warned


def test_a_checkpoint_without_a_record_changes_nothing(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    args = SimpleNamespace(model_path=str(tmp_path / "model.pt"), width=1)
    adopt_config(args, {}, "model_path", ["width"])
    assert args.width == 1


def test_flags_of_running_are_not_adopted():
    """How a model was run in training says nothing about how to run it in sampling."""
    names = identity_flags(model_and_diffusion_defaults())
    assert {"num_channels", "num_heads", "use_new_attention_order", "noise_schedule", "learn_sigma"} <= set(names)
    assert not {"use_fp16", "use_bf16", "dropout", "timestep_respacing", "use_checkpoint"} & set(names)


def test_classes_of_an_unconditional_model_do_not_bind_its_classifier(tmp_path):
    model = write_record(tmp_path / "model", class_cond=False, num_classes=1000, image_size=16)
    classifier = write_record(tmp_path / "classifier", num_classes=10, image_size=16)
    args = SimpleNamespace(model_path=model, classifier_path=classifier, class_cond=True, num_classes=1, image_size=64)
    settled = {}
    adopt_config(args, settled, "model_path", ["class_cond", "num_classes", "image_size"])
    adopt_config(args, settled, "classifier_path", ["num_classes", "image_size"])
    assert (args.class_cond, args.num_classes, args.image_size) == (False, 10, 16)


def test_a_classifier_of_another_image_size_is_refused(tmp_path):
    model = write_record(tmp_path / "model", image_size=16)
    classifier = write_record(tmp_path / "classifier", image_size=32)
    args = SimpleNamespace(model_path=model, classifier_path=classifier, image_size=64)
    settled = {}
    adopt_config(args, settled, "model_path", ["image_size"])
    with pytest.raises(InputError, match="image_size 16 in .*model.* contradicts .*classifier.*image_size 32"):
        adopt_config(args, settled, "classifier_path", ["image_size"])
