"""The logger: metrics, messages, and the files that contain them."""

import csv
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    logger.reset()
    yield
    logger.reset()


def dump(*rows):
    for row in rows:
        logger.logkvs(row)
        logger.dumpkvs()


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_losses(folder):
    """Return the (step, value) points of the TensorBoard curve "loss"."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["scalars"].count("text") == 0
    return [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]


# Metrics


def test_metrics_of_a_row_are_replaced_or_averaged(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json"])
    logger.logkv("step", 1)
    logger.logkv("step", 2)  # replaces the first value
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkvs({"a": 3, "b": 4})
    assert logger.dumpkvs() == {"step": 2, "loss": 3.0, "a": 3, "b": 4}
    assert logger.getkvs() == {}
    logger.logkv_mean("loss", 10.0)  # earlier rows do not count
    assert logger.dumpkvs() == {"loss": 10.0}
    assert read_json(tmp_path / "progress.json") == [{"step": 2, "loss": 3.0, "a": 3, "b": 4}, {"loss": 10.0}]


def test_metrics_before_configure_are_kept_in_memory():
    logger.logkv("early", 1)
    assert logger.Logger.CURRENT.dumpkvs() == {"early": 1} and logger.get_dir() is None


def test_numpy_and_torch_values_are_written(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json", "csv"])
    dump({"n": np.float32(0.5), "i": np.int64(7), "t": th.tensor(2.5), "s": "text"}, {"n": float("nan")})
    first, second = read_json(tmp_path / "progress.json")
    assert first == {"n": 0.5, "i": 7, "t": 2.5, "s": "text"} and np.isnan(second["n"])
    assert (tmp_path / "progress.csv").read_text() == "i,n,s,t\n7,0.5,text,2.5\n,nan,,\n"


def test_profile_kv_adds_durations(tmp_path):
    logger.configure(str(tmp_path), format_strs=[])
    for _ in range(2):
        with pytest.raises(KeyError), logger.profile_kv("nap"):
            time.sleep(0.02)
            raise KeyError
    assert 0.04 <= logger.dumpkvs()["wait_nap"] < 2


# Formats


def test_log_is_a_table(tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    logger.log("first", 2, "third")
    dump({}, {"loss": th.tensor(0.123456), "big": 1234567.0, "k" * 60: "text"})  # an empty row prints no table
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[:2] == [f"Logging to {tmp_path}", "first 2 third"]
    table = lines[2:]
    assert len({len(line) for line in table}) == 1  # the columns line up
    assert set(table[0]) == set(table[-1]) == {"-"}
    cells = dict(re.fullmatch(r"\| (.*?) +\| (.*?) +\|", line).groups() for line in table[1:-1])
    assert cells["loss"] == "0.123" and float(cells["big"]) == 1.23e6
    assert any(key.startswith("kkk") and key.endswith("...") for key in cells)


def test_characters_that_cannot_be_encoded_are_escaped(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9_0.png")  # a Latin-1 file name on a UTF-8 file system
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    logger.configure(str(tmp_path), format_strs=["stdout", "log", "csv"])
    logger.warn(name, "caf\u00e9")
    dump({name: 1})
    logger.HumanOutputFormat(terminal).writeseq(["a", 1])
    printed = terminal.buffer.getvalue().decode("ascii")
    assert "caf\\udce9_0.png caf\\xe9\n" in printed and "| caf\\udce9_0.png | 1 |" in printed and "\na 1\n" in printed
    assert "caf\\udce9_0.png caf\u00e9\n" in (tmp_path / "log.txt").read_text("utf-8")
    assert (tmp_path / "progress.csv").read_text("utf-8") == "caf\\udce9_0.png\n1\n"


def test_csv_columns_that_appear_later(tmp_path):
    logger.configure(str(tmp_path), format_strs=["csv"])
    dump({"a": 1, "text": 'commas, "quotes"'}, {"b": 2}, {"a": 3, "b": 4, "c": None})
    expected = 'a,text,b,c\n1,"commas, ""quotes""",,\n,,2,\n3,,4,\n'
    assert (tmp_path / "progress.csv").read_text() == expected
    assert os.listdir(tmp_path) == ["progress.csv"]  # the temporary file is gone


# Records that a resumed run removes


def test_resumed_tensorboard_curve_has_no_duplicate_steps(tmp_path):
    pytest.importorskip("tensorboard")
    logger.configure(str(tmp_path), format_strs=["tensorboard"])
    dump({"step": 10, "loss": 0.5, "text": "no number"}, {"step": 20, "loss": 0.25}, {"step": 30, "loss": 7.0})
    assert read_losses(tmp_path) == [(10, 0.5), (20, 0.25), (30, 7.0)]
    logger.configure(str(tmp_path), format_strs=["tensorboard"])
    logger.truncate_records(str(tmp_path), 20)
    dump({"step": 20, "loss": 0.3}, {"step": 30, "loss": 0.2})
    assert read_losses(tmp_path) == [(10, 0.5), (20, 0.3), (30, 0.2)]


def test_rows_from_the_resumed_step_and_unfinished_rows_are_removed(tmp_path):
    rows = [{"step": 0, "loss": 3.5}, {"step": 1}, {"note": "no step"}, {"step": 2, "loss": 2.5}]
    logger.configure(str(tmp_path), format_strs=["csv", "json", "log"], log_suffix="-rank002")
    dump(*rows)
    for kind, text in [("csv", "1.5,,"), ("json", '{"loss": 1.5, "st')]:
        with open(tmp_path / f"progress-rank002.{kind}", "a") as f:
            f.write(text)
        shutil.copy(tmp_path / f"progress-rank002.{kind}", tmp_path / f"progress.{kind}")
    logger.configure(str(tmp_path), format_strs=["csv", "json", "log"])
    logger.truncate_records(str(tmp_path), 2)
    assert read_json(tmp_path / "progress-rank002.json") == rows[:3]
    dump({"step": 2, "loss": 2.25, "new": 1})
    expected = [*rows[:3], {"step": 2, "loss": 2.25, "new": 1}]
    assert read_json(tmp_path / "progress.json") == expected
    in_csv = [{k: str(row.get(k, "")) for k in ("step", "loss", "note", "new")} for row in expected]
    assert read_csv(tmp_path / "progress.csv") == in_csv


def test_other_files_are_not_truncated(tmp_path):
    """Files without a step column, files with other names, and messages are not truncated."""
    before = {"progress.csv": "name\na\nb\n", "progress.json": '{"a": 1}\n', "progress-old.csv": "step\n1\n2"}
    before["log.txt"] = "| step | 1 |\nstopping after"
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    logger.truncate_records(str(tmp_path), 0)
    assert {name: (tmp_path / name).read_text() for name in before} == before
    logger.configure(str(tmp_path), format_strs=["csv", "log"])
    dump({"step": 0})
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["name,step", "a,", "b,", ",0"]
    assert (tmp_path / "log.txt").read_text().startswith(before["log.txt"])


# Levels


def test_log_levels(tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    logger.debug("debug 1")  # below the default level
    logger.info("info 1")
    logger.set_level(logger.WARN)
    for write in (logger.log, logger.warn, logger.error):
        write("from warn on")
    logger.set_level(logger.DISABLED)
    logger.error("disabled")
    logger.set_level(logger.DEBUG)
    logger.debug("debug 2")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[1:] == ["info 1", "from warn on", "from warn on", "debug 2"]


# Folders and formats


def test_configure_by_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "deep" / "run"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,csv")
    logger.configure()
    dump({"loss": 1})
    assert logger.get_dir() == str(tmp_path / "deep" / "run")
    assert sorted(os.listdir(logger.get_dir())) == ["progress.csv", "progress.json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    logger.configure("~/other", format_strs=["log"])  # arguments take precedence over environment variables
    assert os.listdir(tmp_path / "other") == ["log.txt"]


FILES = [(0, {}, ["log.txt", "progress.csv"]), (2, {}, ["log-rank002.txt"])]
FILES += [(2, {"OPENAI_LOG_FORMAT_MPI": "json"}, ["progress-rank002.json"])]


@pytest.mark.parametrize("rank, environment, names", FILES)
def test_files_of_each_rank(rank, environment, names, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    logger.configure(str(tmp_path))
    logger.log("a message")
    dump({"loss": 1.5})
    assert sorted(os.listdir(tmp_path)) == names
    out = capsys.readouterr().out
    assert ("a message\n" in out and "| loss | 1.5 |" in out) if rank == 0 else out == ""


def test_default_folders_differ():
    first = logger.default_dir()
    time.sleep(0.002)
    assert first != logger.default_dir()
    assert re.match(rf"{tempfile.gettempdir()}/openai-\d{{4}}-\d\d-\d\d-", first)


def test_invalid_formats_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="'xml'.*stdout, log, json, csv, tensorboard"):
        logger.configure(str(tmp_path), format_strs=["xml"])
    with pytest.raises(InputError, match="--log_dir s3://b/run: must be a local folder"):
        logger.configure("s3://b/run")


def test_scoped_configure_restores_the_previous_logger(tmp_path):
    logger.configure(str(tmp_path / "outer"), format_strs=["json"])
    logger.logkv("outer", 1)
    with pytest.raises(ZeroDivisionError), logger.scoped_configure(str(tmp_path / "inner"), format_strs=["json"]):
        dump({"inner": 2})
        1 / 0
    with pytest.raises(InputError), logger.scoped_configure(str(tmp_path / "inner"), format_strs=["xml"]):
        pass
    dump({"more": 3})
    assert read_json(tmp_path / "outer" / "progress.json") == [{"outer": 1, "more": 3}]
    assert read_json(tmp_path / "inner" / "progress.json") == [{"inner": 2}]


# Averages over ranks


def test_averages_over_ranks_are_weighted_by_counts(tmp_path):
    others = [{"loss": (10.0, 1), "theirs": (7.0, 2)}, {}]  # metrics of two other ranks: (mean, count)
    comm = SimpleNamespace(rank=0, allgather=lambda mine: [mine, *others])
    logger.configure(str(tmp_path), format_strs=["json"], comm=comm)
    for value in (1.0, 2.0, 3.0):
        logger.logkv_mean("loss", value)
    logger.logkvs({"mine": 5, "text": "not a number"})
    expected = {"loss": (1 + 2 + 3 + 10) / 4, "theirs": 7.0, "mine": 5.0}
    assert logger.dumpkvs() == pytest.approx(expected)
    assert read_json(tmp_path / "progress.json") == [pytest.approx(expected)]

    # Ranks other than 0 return the averages but write no file.
    logger.configure(str(tmp_path / "other"), format_strs=["json"])
    logger.get_current().set_comm(SimpleNamespace(rank=1, allgather=lambda mine: [mine, {"loss": (3.0, 1)}]))
    logger.logkv("loss", 1.0)
    assert logger.dumpkvs() == {"loss": 2.0} and os.listdir(tmp_path / "other") == []
