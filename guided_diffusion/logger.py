"""Log metrics and messages to the terminal and to text, CSV, JSON and TensorBoard files.

`logkv` and `logkv_mean` collect metrics, and `dumpkvs` writes the metrics as one row. Environment variables give the
defaults of `configure`: OPENAI_LOGDIR is the folder, OPENAI_LOG_FORMAT the formats on rank 0, separated by commas
(stdout, log, json, csv, tensorboard), and OPENAI_LOG_FORMAT_MPI the formats on the other ranks.

All formats append to their files. Before training, `truncate_records` drops the rows that the run will write again.
"""

import csv
import io
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from datetime import datetime
from functools import partial

from tqdm import tqdm

from . import dist_util, files
from .errors import InputError, choose

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class KVWriter:
    """The base class of the output formats for metrics."""

    def writekvs(self, kvs):
        """Write the dict `kvs` as one row."""
        raise NotImplementedError

    def close(self):
        """Close files and end threads."""


class HumanOutputFormat(KVWriter):
    """Writes metrics as a table, and messages, to a path or to an open text file."""

    def __init__(self, filename_or_file):
        self.target = filename_or_file

    def writekvs(self, kvs):
        if not kvs:
            return
        cells = [(_to_cell(key), _to_cell(value)) for key, value in sorted(kvs.items())]
        widths = [max(map(len, column)) for column in zip(*cells)]
        rule = "-" * (sum(widths) + 7)
        rows = [f"| {key:<{widths[0]}} | {value:<{widths[1]}} |" for key, value in cells]
        self._write("\n".join([rule, *rows, rule]))

    def writeseq(self, seq):
        """Write a message, given in parts."""
        self._write(" ".join(map(str, seq)))

    def _write(self, text):
        if isinstance(self.target, str):
            return _append(self.target, text + "\n")
        # The encoding of a terminal may lack characters that occur in a file name.
        encoding = getattr(self.target, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        tqdm.write(text, file=self.target)  # prints above progress bars, not into them
        self.target.flush()


def _to_cell(value, limit=40):
    text = f"{float(value):.3g}" if hasattr(value, "__float__") else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class JSONOutputFormat(KVWriter):
    """Writes a JSON object per line."""

    def __init__(self, filename):
        self.filename = filename

    def writekvs(self, kvs):
        _append(self.filename, json.dumps({k: _to_python(v) for k, v in sorted(kvs.items())}) + "\n")


class CSVOutputFormat(KVWriter):
    """Writes a CSV file. When new keys appear, the file is rewritten with more columns."""

    def __init__(self, filename):
        self.filename = filename
        self.keys = next(csv.reader(_read_lines(filename)), [])

    def writekvs(self, kvs):
        if new := sorted(kvs.keys() - set(self.keys)):
            self.keys += new
            rows = [line.rstrip("\n") + "," * len(new) + "\n" for line in _read_lines(self.filename)[1:]]
            _replace(self.filename, [_to_csv(self.keys), *rows])
        _append(self.filename, _to_csv([_to_python(kvs.get(key)) for key in self.keys]))


class TensorBoardOutputFormat(KVWriter):
    """Writes TensorBoard event files. The x axis is the metric "step", or else the number of the row."""

    def __init__(self, dir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("OPENAI_LOG_FORMAT: tensorboard is missing: pip install tensorboard") from None
        self.open = partial(SummaryWriter, dir)
        self.writer, self.rows = None, 0

    def writekvs(self, kvs):
        self.rows += 1
        step = int(kvs.get("step", self.rows))
        if self.writer is None:  # purge_step hides events of an earlier run
            self.writer = self.open(purge_step=step)
        for key, value in sorted(kvs.items()):
            if hasattr(value, "__float__"):
                self.writer.add_scalar(key, float(value), step)
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()


FORMATS = {
    "stdout": lambda dir, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda dir, suffix: HumanOutputFormat(os.path.join(dir, f"log{suffix}.txt")),
    "json": lambda dir, suffix: JSONOutputFormat(os.path.join(dir, f"progress{suffix}.json")),
    "csv": lambda dir, suffix: CSVOutputFormat(os.path.join(dir, f"progress{suffix}.csv")),
    "tensorboard": lambda dir, suffix: TensorBoardOutputFormat(dir),
}


# Files of metrics


def _to_python(value):
    """Convert numpy and torch scalars to Python's."""
    return value.item() if hasattr(value, "item") else value


def _to_csv(row):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _read_lines(filename):
    """Return the complete lines of a file, or an empty list if the file does not exist."""
    if not os.path.exists(filename):
        return []
    with open(filename, encoding="utf-8") as f:
        return [line for line in f if line.endswith("\n")]


def _append(filename, text):
    with (
        files.disk_errors(filename, "what has been saved is safe"),
        open(filename, "a", encoding="utf-8", errors="backslashreplace") as f,
    ):
        f.write(text)


def _replace(filename, lines):
    with files.write_atomically(filename, sync=False) as f:
        f.write("".join(lines).encode("utf-8", "backslashreplace"))


def truncate_records(folder, step):
    """Drop the rows of `step` and of later steps from the metrics of all ranks in `folder`, and an unfinished last row.

    A run that starts from the checkpoint of `step` (0 for a new run) will write these rows again. Rank 0 calls this
    function once, before the first row. Rows without a step, and the messages in log.txt, are kept.
    """
    for name in files.list_dir(folder):
        if re.fullmatch(r"progress(-rank\d+)?\.(csv|json)", name):
            path = os.path.join(folder, name)
            lines = _read_lines(path)
            rows = [{}, *csv.DictReader(lines)] if name.endswith(".csv") else map(json.loads, lines)
            kept = [line for line, row in zip(lines, rows, strict=True) if float(row.get("step") or -1) < step]
            _replace(path, kept)


class Logger:
    """Collects metrics and passes them to output formats.

    :cvar CURRENT: the logger that the functions of this module use. Before `configure`, it only prints.
    :param dir: the run folder.
    :param output_formats: a list of KVWriters. Those with a method `writeseq` also get the messages.
    :param comm: an MPI communicator. Metrics are averaged over its ranks, weighted by the counts of logkv_mean.
    """

    def __init__(self, dir, output_formats, comm=None):
        self.name2val = {}
        self.name2cnt = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        self.name2val[key] = val

    def logkv_mean(self, key, val):
        count = self.name2cnt[key]
        self.name2val[key] = (self.name2val.get(key, 0.0) * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self):
        """Write the metrics since the last call, and return them. With a comm, every rank must call this method."""
        values = dict(self.name2val) if self.comm is None else self._average_over_ranks()
        if self.comm is None or self.comm.rank == 0:
            for writer in self.output_formats:
                writer.writekvs(values)
        self.name2val.clear()
        self.name2cnt.clear()
        return values

    def _average_over_ranks(self):
        mine = {k: (v, self.name2cnt.get(k, 1)) for k, v in self.name2val.items() if hasattr(v, "__float__")}
        sums, counts = defaultdict(float), defaultdict(float)
        for key, (value, count) in [item for metrics in self.comm.allgather(mine) for item in metrics.items()]:
            sums[key] += float(value) * count
            counts[key] += count
        return {key: sums[key] / counts[key] for key in sums}

    def log(self, *args, level=INFO):
        if self.level <= level:
            for writer in self.output_formats:
                if hasattr(writer, "writeseq"):
                    writer.writeseq(args)

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        for writer in self.output_formats:
            writer.close()


Logger.DEFAULT = Logger.CURRENT = Logger(dir=None, output_formats=[HumanOutputFormat(sys.stdout)])


def get_current():
    """Return the current logger. Before `configure`, it only prints."""
    return Logger.CURRENT


def configure(dir=None, format_strs=None, comm=None, log_suffix=""):
    """Start logging to a folder.

    :param dir: the folder, which is created if necessary. The default is `default_dir()`.
    :param format_strs: the names of output formats. The defaults are OPENAI_LOG_FORMAT on rank 0 (or stdout, log and
        csv), and OPENAI_LOG_FORMAT_MPI on other ranks (or log).
    :param comm: an MPI communicator; see Logger.
    :param log_suffix: a suffix of the file names, before the extension.
    """
    dir = os.path.expanduser(dir or default_dir())
    if files.is_url(dir):
        raise InputError(f"--log_dir {dir}: must be a local folder; the variable DIFFUSION_BLOB_LOGDIR may be a URL")
    os.makedirs(dir, exist_ok=True)
    rank = dist_util.get_rank()
    log_suffix += f"-rank{rank:03d}" if rank > 0 else ""
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = os.environ.get(variable, default).split(",")
    formats = [choose("log format", name, FORMATS)(dir, log_suffix) for name in filter(None, format_strs)]
    reset()
    Logger.CURRENT = Logger(dir=dir, output_formats=formats, comm=comm)
    log(f"Logging to {dir}")


def default_dir():
    """Return OPENAI_LOGDIR if it is set, and otherwise the path of a dated folder in the system's temporary folder."""
    return os.environ.get("OPENAI_LOGDIR") or f"{tempfile.gettempdir()}/openai-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}"


def progress_bar(**kwargs):
    """Return a tqdm progress bar that is shown on rank 0 only. If the total is known, it shows the remaining time."""
    return tqdm(disable=dist_util.get_rank() > 0, mininterval=0.5, dynamic_ncols=True, smoothing=0.05, **kwargs)


def reset():
    """Close the current logger, and log only to the terminal from then on."""
    Logger.CURRENT.close()
    Logger.CURRENT = Logger.DEFAULT


@contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """Log to another folder within a `with` block."""
    outer, Logger.CURRENT = Logger.CURRENT, Logger.DEFAULT
    try:
        configure(dir=dir, format_strs=format_strs, comm=comm)
        yield
    finally:
        reset()
        Logger.CURRENT = outer


def logkv(key, val):
    """Set a metric of the current row. A later value replaces an earlier one."""
    get_current().logkv(key, val)


def logkv_mean(key, val):
    """Add a value to the mean that is a metric of the current row."""
    get_current().logkv_mean(key, val)


def logkvs(d):
    """Set several metrics of the current row."""
    getkvs().update(d)


def dumpkvs():
    """Write the current row of metrics and return it as a dict."""
    return get_current().dumpkvs()


def getkvs():
    """Return the metrics of the current row."""
    return get_current().name2val


def log(*args, level=INFO):
    """Write a message, given in parts."""
    get_current().log(*args, level=level)


debug, info, warn, error = (partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))


def set_level(level):
    """Discard messages below the given level."""
    get_current().set_level(level)


def get_dir():
    """Return the folder of the log files, or None if there is none."""
    return get_current().get_dir()


@contextmanager
def profile_kv(scopename):
    """Add the duration of a `with` block, in seconds, to the metric wait_SCOPENAME."""
    start = time.time()
    try:
        yield
    finally:
        key = f"wait_{scopename}"
        logkv(key, getkvs().get(key, 0.0) + time.time() - start)
