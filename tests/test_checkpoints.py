"""Checkpoint files: their names, atomic writes, and the config.json beside them."""

import json
import os
from types import SimpleNamespace

import pytest
import torch as th
from helpers import refused

from guided_diffusion import checkpoint_util, files, logger
from guided_diffusion.checkpoint_util import Checkpoint, fingerprint
from guided_diffusion.train_util import find_ema_checkpoint, parse_resume_step_from_filename
from guided_diffusion.training_job import record_run

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# File names and atomic writes

STEPS = {"model012000.pt": 12000, "/a/model1/model000005.pt": 5, "gs://bucket/model1000000.pt": 1000000,
         "ema_0.9999_012000.pt": 0, "model.pt": 0, "64x64_diffusion.pt": 0, "my_model000010.pt": 10}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_resume_step_is_parsed_from_the_file_name(name):
    assert parse_resume_step_from_filename(name) == STEPS[name]


def test_ema_checkpoint_is_found_by_step_and_rate(tmp_path):
    (tmp_path / "ema_0.9999_000012.pt").write_bytes(b"")
    main = str(tmp_path / "model000012.pt")
    for rate in ("0.9999", 0.9999):
        assert find_ema_checkpoint(main, 12, rate) == str(tmp_path / "ema_0.9999_000012.pt")
    assert find_ema_checkpoint(main, 13, "0.9999") is find_ema_checkpoint(main, 12, "0.5") is None
    assert find_ema_checkpoint(None, 12, "0.9999") is None


def test_atomic_writes_leave_either_the_old_or_the_new_file(quiet):
    path = os.path.join(quiet, "file")
    with files.write_atomically(path) as f:
        f.write(b"first")
        assert not os.path.exists(path)
    with pytest.raises(ZeroDivisionError):
        with files.write_atomically(path) as f:
            f.write(b"half of the sec")
            1 / 0
    assert open(path, "rb").read() == b"first"
    assert os.listdir(quiet) == ["file"]  # the failed write left no temporary file
    with files.write_atomically(path) as f:
        f.write(b"second")
    assert open(path, "rb").read() == b"second"


def test_fingerprints_identify_content(tmp_path):
    def of(name, value):
        th.save({"a": th.full((3,), value)}, tmp_path / name)
        return fingerprint(str(tmp_path / name))

    assert of("a.pt", 1.0) == of("b.pt", 1.0) != of("b.pt", 2.0)


# The config.json beside a checkpoint


def write_record(folder, **flags):
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return str(folder / "model.pt")


def test_config_json_is_read_once(quiet, monkeypatch):
    path = os.path.join(quiet, "model000001.pt")
    assert Checkpoint(path).config is Checkpoint(path).classes is None and Checkpoint(path).flags == {}
    checkpoint_util.write_config({"num_channels": 32, "channel_mult": "1,2"}, kind="diffusion", classes=["cat", "dog"])
    opened = []
    monkeypatch.setattr(files, "open_file", lambda path: opened.append(path) or open(path, "rb"))
    checkpoint = Checkpoint(path)
    assert checkpoint.flags == {"num_channels": 32, "channel_mult": "1,2"} and checkpoint.classes == ["cat", "dog"]
    assert checkpoint.config["kind"] == "diffusion" and checkpoint.config["world_size"] == 1
    assert opened == [os.path.join(quiet, "config.json")]


BAD_CONFIGS = ["", "{", "[]", "{}", '{"flags": 3}', "\x00\xff"]


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_damaged_config_json_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    refused(lambda: Checkpoint(str(tmp_path / "model.pt")).config, "not a training run's config.json")


def test_flags_that_contradict_the_config_are_named(tmp_path):
    path = write_record(tmp_path / "model", a=1, b=2, c=3, d=4, e=5)
    args = SimpleNamespace(a=9, b=2, c=9, d=9, e=9)
    settled = {name: (getattr(args, name), "on the command line") for name in "abcde"}
    refused(lambda: Checkpoint(path).adopt_flags(args, settled, "abcde"),
            "--a 9 on the command line, --c 9 on the command line, --d 9 on the command line contradict",
            "config.json, which says a 1, c 3, d 4")  # fmt: skip
    refused(
        lambda: Checkpoint(path).adopt_flags(args, settled, "ab"), "--a 9 on the command line contradicts", "says a 1"
    )


@pytest.mark.parametrize("num_classes, warned", [(2, False), (1000, True)])
def test_num_classes_above_the_number_of_classes_in_the_data_gives_a_warning(num_classes, warned, tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    record_run({"flags": {"num_classes": num_classes}}, "diffusion", ["cat", "dog"])
    logger.reset()
    assert ("the data have only 2 classes" in (tmp_path / "log.txt").read_text()) == warned


@pytest.mark.parametrize("size", [16, 32])
def test_classifier_and_guided_model_must_have_the_same_flags(size, tmp_path):
    """num_classes may differ, because an unconditional model does not use num_classes."""
    model = write_record(tmp_path / "model", class_cond=False, num_classes=1000, image_size=16)
    classifier = write_record(tmp_path / "classifier", num_classes=10, image_size=size)
    args = SimpleNamespace(class_cond=True, num_classes=1, image_size=64)
    settled = {}
    Checkpoint(model).adopt_flags(args, settled, ["class_cond", "num_classes", "image_size"])

    def adopt():
        Checkpoint(classifier).adopt_flags(args, settled, ["num_classes", "image_size"])

    if size == 16:
        adopt()
        assert (args.class_cond, args.num_classes, args.image_size) == (False, 10, 16)
    else:
        refused(adopt, "--image_size 16 in", "model/config.json contradicts", "classifier/config.json", "image_size 32")
