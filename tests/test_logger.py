"""Metrics and messages, and the files they go to."""

import csv
import io
import json
import os
import re
import sys
import time

import numpy as np
import pytest
import torch as th
import tqdm

from guided_diffusion import logger
from guided_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No logger from another test, and none left behind."""
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    logger.reset()
    yield
    logger.reset()


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Gathering


def test_rows(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json"])
    logger.logkv("step", 1)
    logger.logkv("step", 2)  # replaces
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkvs({"a": 3, "b": 4})
    assert logger.getkvs() == {"step": 2, "loss": 3.0, "a": 3, "b": 4}
    assert logger.dumpkvs() == {"step": 2, "loss": 3.0, "a": 3, "b": 4}
    assert logger.getkvs() == {}
    # A new row's mean knows nothing of the last row's.
    logger.logkv_mean("loss", 10.0)
    assert logger.dumpkvs() == {"loss": 10.0}
    assert read_json(tmp_path / "progress.json") == [{"step": 2, "loss": 3.0, "a": 3, "b": 4}, {"loss": 10.0}]


def test_metrics_before_configure_are_kept_in_memory(capsys):
    logger.logkv("early", 1)
    assert logger.get_dir() is None
    assert logger.dumpkvs() == {"early": 1}


def test_values_of_numpy_and_torch(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json", "csv", "log"])
    logger.logkvs({"n": np.float32(0.5), "i": np.int64(7), "t": th.tensor(2.5), "s": "text"})
    logger.dumpkvs()
    assert read_json(tmp_path / "progress.json") == [{"n": 0.5, "i": 7, "t": 2.5, "s": "text"}]
    row = read_csv(tmp_path / "progress.csv")[0]
    assert float(row["n"]) == 0.5 and int(row["i"]) == 7 and float(row["t"]) == 2.5 and row["s"] == "text"
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"\| t +\| 2\.5 +\|", log) and re.search(r"\| s +\| text +\|", log)


def test_profile_kv_adds_up_the_seconds(tmp_path):
    logger.configure(str(tmp_path), format_strs=[])
    for _ in range(2):
        with logger.profile_kv("nap"):
            time.sleep(0.02)
    with pytest.raises(KeyError):
        with logger.profile_kv("failed"):
            raise KeyError
    values = logger.dumpkvs()
    assert 0.04 <= values["wait_nap"] < 2
    assert values["wait_failed"] >= 0


# Formats


def test_log_is_a_table(tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    logger.log("first", 2, "third")
    logger.logkvs({"loss": 0.123456, "big": 1234567.0, "k" * 60: 1})
    logger.dumpkvs()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[:2] == [f"Logging to {tmp_path}", "first 2 third"]
    table = lines[2:]
    assert len({len(line) for line in table}) == 1  # the columns line up
    assert set(table[0]) == set(table[-1]) == {"-"}
    cells = dict(re.fullmatch(r"\| (.*?) +\| (.*?) +\|", line).groups() for line in table[1:-1])
    assert cells["loss"] == "0.123" and float(cells["big"]) == 1.23e6
    assert any(key.startswith("kkk") and key.endswith("...") for key in cells)


def test_empty_rows_print_no_table(tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    logger.dumpkvs()
    assert (tmp_path / "log.txt").read_text().splitlines() == [f"Logging to {tmp_path}"]


def test_stdout(tmp_path, capsys):
    logger.configure(str(tmp_path), format_strs=["stdout"])
    logger.log("a message")
    logger.logkv("loss", 1.5)
    logger.dumpkvs()
    out = capsys.readouterr().out
    assert "a message\n" in out and re.search(r"\| loss \| 1\.5 +\|", out)
    assert os.listdir(tmp_path) == []


def test_messages_to_an_open_file():
    file = io.StringIO()
    output = logger.HumanOutputFormat(file)
    output.writeseq(["a", 1])
    output.close()
    assert file.getvalue() == "a 1\n"  # and not closed: it is not the logger's


def test_names_in_another_encoding_are_escaped(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9_0.png")  # as the file system gives it where names are UTF-8
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    logger.configure(str(tmp_path), format_strs=["stdout", "log"])
    for imported in (True, False):  # tqdm writes above its bars, where there are any
        monkeypatch.setitem(sys.modules, "tqdm", tqdm) if imported else monkeypatch.delitem(sys.modules, "tqdm")
        logger.warn(name, "caf\u00e9")
    logger.logkv(name, 1)
    logger.dumpkvs()
    said = terminal.buffer.getvalue().decode("ascii")
    assert said.count("caf\\udce9_0.png caf\\xe9\n") == 2 and "| caf\\udce9_0.png | 1 |" in said
    assert (tmp_path / "log.txt").read_text().count("caf\\udce9_0.png caf") == 2


def test_csv_columns_that_appear_later(tmp_path):
    logger.configure(str(tmp_path), format_strs=["csv"])
    for row in ({"a": 1, "text": 'commas, "quotes"\nand lines'}, {"b": 2}, {"a": 3, "b": 4, "c": None}):
        logger.logkvs(row)
        logger.dumpkvs()
    rows = read_csv(tmp_path / "progress.csv")
    assert rows == [
        {"a": "1", "text": 'commas, "quotes"\nand lines', "b": "", "c": ""},
        {"a": "", "text": "", "b": "2", "c": ""},
        {"a": "3", "text": "", "b": "4", "c": ""},
    ]
    assert os.listdir(tmp_path) == ["progress.csv"]  # no temporary file stays


def test_json_survives_numbers_that_are_not_finite(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json"])
    logger.logkv("loss", float("nan"))
    logger.dumpkvs()
    assert np.isnan(read_json(tmp_path / "progress.json")[0]["loss"])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.configure(str(tmp_path), format_strs=["tensorboard"])
    for step, loss in [(10, 0.5), (20, 0.25)]:
        logger.logkvs({"step": step, "loss": loss, "text": "not a number"})
        logger.dumpkvs()
    logger.reset()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert "text" not in events.Tags()["scalars"]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(rows):
        for step, loss in rows:
            logger.logkvs({"step": step, "loss": loss})
            logger.dumpkvs()

    logger.configure(str(tmp_path), format_strs=["tensorboard"])
    write([(10, 0.5), (20, 0.25), (30, 7.0)])
    logger.reset()
    logger.configure(str(tmp_path), format_strs=["tensorboard"])
    logger.get_current().rewind(20)  # the checkpoint was of step 20: its row comes again
    write([(20, 0.3), (30, 0.2)])
    logger.reset()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.3), (30, 0.2)]


def test_torn_lines_are_dropped(tmp_path):
    """A full disk cuts a row short: the next must not run on from it, and a rewind must not trip over it."""
    (tmp_path / "progress.json").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "progress.csv").write_text("loss,step\n0.5,1\n0.2")
    logger.configure(str(tmp_path), format_strs=["csv", "json"])
    logger.get_current().rewind(2)
    logger.logkvs({"step": 2, "loss": 0.25})
    logger.dumpkvs()
    logger.reset()
    assert [row["step"] for row in read_json(tmp_path / "progress.json")] == [1, 2]
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["loss,step", "0.5,1", "0.25,2"]


def test_nothing_is_forgotten_before_something_takes_its_place(tmp_path):
    """A command that fails on a typo has asked to rewind, and written no row: what was there is all there is."""
    before = {"progress.json": '{"step": 1, "loss": 0.5}\n{"step": 2, "lo', "progress.csv": "loss,step\n0.5,1\n0.2"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    logger.configure(str(tmp_path), format_strs=["csv", "json"])
    logger.get_current().rewind(0)
    logger.reset()
    assert {name: (tmp_path / name).read_text() for name in before} == before

    logger.configure(str(tmp_path), format_strs=["csv", "json"])
    logger.get_current().rewind(0)
    logger.get_current().do_rewind()  # as a checkpoint does that comes before a row
    logger.reset()
    assert {name: (tmp_path / name).read_text() for name in before} == {
        "progress.json": "",
        "progress.csv": "loss,step\n",
    }


def test_rows_of_others_stay(tmp_path):
    """A file without steps is no run's: a new run adds to it, and takes nothing, not even a line without an end."""
    for name, text in [("json", '{"name": "a"}\n{"name": "b"}'), ("csv", "name\na\nb")]:
        (tmp_path / f"progress.{name}").write_text(text)
    logger.configure(str(tmp_path), format_strs=["csv", "json"])
    logger.get_current().rewind(0)
    logger.logkv("step", 0)
    logger.dumpkvs()
    logger.reset()
    assert read_json(tmp_path / "progress.json") == [{"name": "a"}, {"name": "b"}, {"step": 0}]
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["name,step", "a,", "b,", ",0"]


def test_a_run_that_goes_on_appends(tmp_path):
    for part in (1, 2):
        logger.configure(str(tmp_path), format_strs=["log", "csv", "json"])
        logger.log(f"part {part}")
        logger.logkvs({"step": part, f"only{part}": part})
        logger.dumpkvs()
        logger.reset()
    log = (tmp_path / "log.txt").read_text()
    assert log.index("part 1") < log.index("part 2")
    assert [row["step"] for row in read_json(tmp_path / "progress.json")] == [1, 2]
    assert read_csv(tmp_path / "progress.csv") == [
        {"step": "1", "only1": "1", "only2": ""},
        {"step": "2", "only1": "", "only2": "2"},
    ]


# Levels


def test_levels(tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    logger.debug("debug 1")  # left out by default
    logger.info("info 1")
    logger.set_level(logger.WARN)
    logger.log("info 2")
    logger.warn("warn 2")
    logger.error("error 2")
    logger.set_level(logger.DEBUG)
    logger.debug("debug 3")
    logger.set_level(logger.DISABLED)
    logger.error("error 4")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[1:] == ["info 1", "warn 2", "error 2", "debug 3"]


# Where to


def test_configure_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "deep" / "run"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,csv")
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "deep" / "run")
    assert sorted(os.listdir(logger.get_dir())) == ["progress.json"]  # the csv has no columns yet
    logger.configure(str(tmp_path / "other"), format_strs=["log"])  # arguments go before
    assert os.listdir(tmp_path / "other") == ["log.txt"]


def test_defaults(tmp_path, capsys):
    logger.configure(str(tmp_path))
    logger.logkv("loss", 1)
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "progress.csv"]
    assert "loss" in capsys.readouterr().out


def test_other_ranks_write_files_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logger, "_rank", lambda: 2)
    logger.configure(str(tmp_path))
    logger.log("hello")
    assert os.listdir(tmp_path) == ["log-rank002.txt"]
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "json")
    logger.configure(str(tmp_path))
    assert "progress-rank002.json" in os.listdir(tmp_path)
    assert capsys.readouterr().out == ""


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    logger.configure("~/run", format_strs=[])
    assert logger.get_dir() == str(tmp_path / "run") and os.path.isdir(tmp_path / "run")


def test_default_folders_differ(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = logger.default_dir()
    time.sleep(0.002)
    assert first != logger.default_dir()
    assert os.path.dirname(first) == str(tmp_path) and re.match(r"openai-\d{4}-\d\d-\d\d-", os.path.basename(first))


def test_bad_formats_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="'xml'.*stdout, log, json, csv, tensorboard"):
        logger.configure(str(tmp_path), format_strs=["xml"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run"):
        logger.configure(str(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match="--log_dir s3://b/run: must be a local folder"):
        logger.configure("s3://b/run")


@pytest.mark.parametrize("rows", [0, 5000])
def test_a_csv_that_is_not_text_is_refused(rows, tmp_path):
    (tmp_path / "progress.csv").write_bytes(b"0.5,1\n" * rows + b"\x89PNG\xff\n")
    with pytest.raises(InputError, match=r"^[^\n]*progress\.csv: not a CSV file [^\n]*--log_dir$"):
        logger.configure(str(tmp_path), format_strs=["csv"])


def test_scoped_configure(tmp_path):
    logger.configure(str(tmp_path / "outer"), format_strs=["json"])
    logger.logkv("outer", 1)
    with pytest.raises(ZeroDivisionError):
        with logger.scoped_configure(str(tmp_path / "inner"), format_strs=["json"]):
            assert logger.get_dir() == str(tmp_path / "inner")
            logger.logkv("inner", 2)
            logger.dumpkvs()
            1 / 0
    assert logger.get_dir() == str(tmp_path / "outer")  # an exception, too, ends the scope
    logger.logkv("more", 3)
    logger.dumpkvs()
    assert read_json(tmp_path / "outer" / "progress.json") == [{"outer": 1, "more": 3}]
    assert read_json(tmp_path / "inner" / "progress.json") == [{"inner": 2}]


def test_scoped_configure_that_fails_leaves_the_logger_as_it_was(tmp_path):
    logger.configure(str(tmp_path), format_strs=["json"])
    with pytest.raises(InputError):
        with logger.scoped_configure(str(tmp_path / "inner"), format_strs=["xml"]):
            pass
    assert logger.get_dir() == str(tmp_path)


# Averages over ranks


class FakeComm:
    """Stands for MPI's communicator of several ranks: `others` are what the others hand in."""

    def __init__(self, rank, others):
        self.rank = rank
        self.others = others

    def allgather(self, mine):
        return [mine, *self.others]


def test_averages_over_ranks_are_weighted_by_counts(tmp_path):
    comm = FakeComm(0, [{"loss": (10.0, 1), "theirs": (7.0, 2)}, {}])
    logger.configure(str(tmp_path), format_strs=["json"], comm=comm)
    for value in (1.0, 2.0, 3.0):
        logger.logkv_mean("loss", value)
    logger.logkv("mine", 5)
    logger.logkv("text", "not a number")
    expected = {"loss": (1 + 2 + 3 + 10) / 4, "theirs": 7.0, "mine": 5.0}
    assert logger.dumpkvs() == pytest.approx(expected)
    assert read_json(tmp_path / "progress.json") == [pytest.approx(expected)]


def test_other_ranks_average_and_do_not_write(tmp_path):
    writer = logger.JSONOutputFormat(str(tmp_path / "other.json"))
    other = logger.Logger(str(tmp_path), [writer], comm=FakeComm(1, [{"loss": (3.0, 1)}]))
    other.logkv_mean("loss", 1.0)
    assert other.dumpkvs() == {"loss": 2.0}
    other.close()
    assert (tmp_path / "other.json").read_text() == ""


def test_set_comm(tmp_path):
    logger.configure(str(tmp_path), format_strs=[])
    logger.get_current().set_comm(FakeComm(0, [{"loss": (3.0, 1)}]))
    logger.logkv("loss", 1.0)
    assert logger.dumpkvs() == {"loss": 2.0}
