"""Key-value metrics and messages, to the terminal, text, CSV, JSON and TensorBoard.

`logkv` and `logkv_mean` gather values and `dumpkvs` writes them as one row. The environment variables OPENAI_LOGDIR
(where to), OPENAI_LOG_FORMAT (which formats on rank 0: any of stdout, log, json, csv, tensorboard, with commas) and
OPENAI_LOG_FORMAT_MPI (on other ranks) set what `configure` is not told. Files are appended to, so that a run that is
resumed in its folder goes on with its records.
"""

import csv
import datetime
import io
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager

from . import files
from .errors import InputError, choose

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50


class KVWriter:
    """Something that writes rows of metrics."""

    def writekvs(self, kvs):
        """Write the dict `kvs`."""
        raise TypeError(f"{type(self).__name__} does not write metrics")

    def rewind(self, step):
        """Forget the rows whose "step" is `step` or later: a resumed run will write them again."""

    def close(self):
        """Release what it holds."""


class HumanOutputFormat(KVWriter):
    """A table for people, and messages; to a path or an open text file."""

    def __init__(self, filename_or_file):
        self.own = isinstance(filename_or_file, str)
        self.file = open(filename_or_file, "a") if self.own else filename_or_file

    def writekvs(self, kvs):
        if not kvs:
            return
        cells = [(_shorten(key), _shorten(_format(value))) for key, value in sorted(kvs.items())]
        widths = [max(map(len, column)) for column in zip(*cells)]
        rule = "-" * (sum(widths) + 7)
        rows = [f"| {key:<{widths[0]}} | {value:<{widths[1]}} |" for key, value in cells]
        self._write("\n".join([rule, *rows, rule]))

    def writeseq(self, seq):
        """Write a message, given in parts."""
        self._write(" ".join(map(str, seq)))

    def _write(self, text):
        # A file's name may be in another encoding than the terminal's or the log's: what does not fit is escaped.
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self.file is sys.stdout and "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=self.file)  # above a progress bar, not through it
        else:
            self.file.write(text + "\n")
        self.file.flush()

    def close(self):
        if self.own:
            self.file.close()


def _format(value):
    return f"{float(value):<8.3g}".rstrip() if hasattr(value, "__float__") else str(value)


def _shorten(text, limit=40):
    return text if len(text) <= limit else text[: limit - 3] + "..."


class JSONOutputFormat(KVWriter):
    """One JSON object a line."""

    def __init__(self, filename):
        self.filename = filename
        self.file = open(filename, "a")
        self.mended = False

    def _mend(self):
        if not self.mended:  # not before the first row: a command that fails leaves the file as it is
            _end_last_line(self.filename, cut=self._has_steps())
            self.mended = True

    def _has_steps(self):
        with open(self.filename, errors="replace") as f:
            return any("step" in _parsed(line, damaged={}) for line in f)

    def rewind(self, step):
        self._mend()
        if not self._has_steps():
            return
        self.file.close()
        with open(self.filename) as f:
            lines = [line for line in f if _is_before(_parsed(line, damaged={"step": math.inf}), step)]
        _rewrite(self.filename, lambda f: f.writelines(lines))
        self.file = open(self.filename, "a")

    def writekvs(self, kvs):
        self._mend()
        plain = {k: v.item() if hasattr(v, "item") else v for k, v in sorted(kvs.items())}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A CSV file, rewritten with more columns when new keys appear."""

    def __init__(self, filename):
        self.filename = filename
        self.keys = []
        self.mended = False
        if os.path.exists(filename):
            try:
                with open(filename, newline="") as f:
                    self.keys = [*csv.reader(f), []][0]  # all rows are read: new columns and rewind need them later
            except (UnicodeDecodeError, csv.Error) as e:
                raise InputError(f"{filename}: not a CSV file ({e}): remove it, or give another --log_dir") from None

    def _mend(self):
        if not self.mended:  # not before the first row: a command that fails leaves the file as it is
            _end_last_line(self.filename, cut="step" in self.keys)
            self.mended = True

    def writekvs(self, kvs):
        self._mend()
        new = sorted(kvs.keys() - set(self.keys))
        if new:
            self._add_columns(new)
        kvs = {k: v.item() if hasattr(v, "item") else v for k, v in kvs.items()}
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow(["" if kvs.get(k) is None else kvs[k] for k in self.keys])
        with open(self.filename, "a") as f:
            f.write(row.getvalue())

    def _add_columns(self, new):
        rows = self._rows()
        self.keys += new
        self._write_all(rows)

    def _rows(self):
        if not os.path.exists(self.filename):
            return []
        with open(self.filename, newline="") as f:
            return list(csv.reader(f))[1:]

    def _write_all(self, rows):
        padded = [row + [""] * (len(self.keys) - len(row)) for row in rows]
        _rewrite(self.filename, lambda f: csv.writer(f, lineterminator="\n").writerows([self.keys, *padded]))

    def rewind(self, step):
        self._mend()
        if "step" in self.keys:
            self._write_all([row for row in self._rows() if _is_before(dict(zip(self.keys, row)), step)])


def _end_last_line(filename, cut):
    """End a last line without an end, which a full disk or a kill has left: the next row would run on from it.

    :param cut: drop the line. For a run's records; in another file it may be whole.
    """
    if os.path.exists(filename):
        with open(filename, "rb+") as f:
            text = f.read()
            if text and not text.endswith(b"\n"):
                f.truncate(text.rfind(b"\n") + 1) if cut else f.write(b"\n")


def _parsed(line, damaged):
    """A row of JSON; `damaged` for what is none."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) else damaged
    except ValueError:
        return damaged


def _is_before(row, step):
    try:
        return float(row["step"]) < step
    except (KeyError, TypeError, ValueError):  # a row without a step is of no run's curve
        return True


def _rewrite(filename, write):
    temporary = f"{filename}.{os.getpid()}.tmp"
    with open(temporary, "w", newline="") as f:
        write(f)
    os.replace(temporary, filename)


class TensorBoardOutputFormat(KVWriter):
    """TensorBoard event files. The x axis is the metric "step"; without one it counts rows."""

    def __init__(self, dir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "OPENAI_LOG_FORMAT asks for tensorboard, which is missing: pip install tensorboard"
            ) from None
        self.open = lambda **options: SummaryWriter(dir, **options)
        self.writer = self.open()
        self.rows = 0

    def rewind(self, step):
        self.writer.close()
        self.writer = self.open(purge_step=step)

    def writekvs(self, kvs):
        self.rows += 1
        for key, value in sorted(kvs.items()):
            if hasattr(value, "__float__"):
                self.writer.add_scalar(key, float(value), int(kvs.get("step", self.rows)))
        self.writer.flush()

    def close(self):
        self.writer.close()


FORMATS = {
    "stdout": lambda dir, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda dir, suffix: HumanOutputFormat(os.path.join(dir, f"log{suffix}.txt")),
    "json": lambda dir, suffix: JSONOutputFormat(os.path.join(dir, f"progress{suffix}.json")),
    "csv": lambda dir, suffix: CSVOutputFormat(os.path.join(dir, f"progress{suffix}.csv")),
    "tensorboard": lambda dir, suffix: TensorBoardOutputFormat(dir),
}


class Logger:
    """Gathers metrics and hands them to its output formats.

    :param dir: the folder of the run.
    :param output_formats: KVWriters; those with a `writeseq` also get the messages.
    :param comm: an MPI communicator: metrics are then averaged over its ranks, weighted by their counts.
    """

    def __init__(self, dir, output_formats, comm=None):
        self.name2val = {}
        self.name2cnt = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.rewind_to = None

    def logkv(self, key, val):
        self.name2val[key] = val

    def logkv_mean(self, key, val):
        count = self.name2cnt[key]
        self.name2val[key] = (self.name2val.get(key, 0.0) * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self):
        """Write the metrics gathered since the last call, and return them. With a comm, every rank must call it."""
        values, write = dict(self.name2val), True
        if self.comm is not None:
            values, write = self._average_over_ranks(), self.comm.rank == 0
        if write:
            self.do_rewind()
            for writer in self.output_formats:
                with self._disk_errors():
                    writer.writekvs(values)
        self.name2val.clear()
        self.name2cnt.clear()
        return values

    def _average_over_ranks(self):
        mine = {k: (v, self.name2cnt.get(k, 1)) for k, v in self.name2val.items() if hasattr(v, "__float__")}
        sums = defaultdict(float)
        counts = defaultdict(float)
        for metrics in self.comm.allgather(mine):
            for key, (value, count) in metrics.items():
                sums[key] += float(value) * count
                counts[key] += count
        return {key: sums[key] / counts[key] for key in sums}

    def log(self, *args, level=INFO):
        if self.level <= level:
            for writer in self.output_formats:
                if hasattr(writer, "writeseq"):
                    with self._disk_errors():
                        writer.writeseq(args)

    def _disk_errors(self):
        return files.disk_errors(self.dir or "the terminal", "what has been saved is safe")

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def rewind(self, step):
        """Have the rows from `step` on forgotten: a run that resumes from there will write them again.

        They stay until the next row, or do_rewind: a run that fails before it has anything of its own removes nothing.
        """
        self.rewind_to = step

    def do_rewind(self):
        """Forget the rows now, if `rewind` was called."""
        if self.rewind_to is None:
            return
        for writer in self.output_formats:
            with self._disk_errors():
                writer.rewind(self.rewind_to)
        self.rewind_to = None

    def close(self):
        for writer in self.output_formats:
            writer.close()


_stdout_only = Logger(dir=None, output_formats=[HumanOutputFormat(sys.stdout)])
_current = None


def get_current():
    """The logger in use; one that only prints is used until `configure` makes another."""
    return _current if _current is not None else _stdout_only


def configure(dir=None, format_strs=None, comm=None, log_suffix=""):
    """Start logging to a folder.

    :param dir: the folder, made if need be. By default that of default_dir().
    :param format_strs: names of output formats. By default those of OPENAI_LOG_FORMAT on rank 0 (stdout, log, csv) and
        of OPENAI_LOG_FORMAT_MPI elsewhere (log).
    """
    global _current
    dir = os.path.expanduser(dir or default_dir())
    if files.is_url(dir):
        raise InputError(f"--log_dir {dir}: must be a local folder; the variable DIFFUSION_BLOB_LOGDIR may be a URL")
    try:
        os.makedirs(dir, exist_ok=True)
    except OSError as e:
        raise InputError(f"--log_dir {dir}: cannot make this folder ({e.strerror})") from None
    rank = _rank()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = os.environ.get(variable, default).split(",")
    formats = [choose("log format", name, FORMATS)(dir, log_suffix) for name in filter(None, format_strs)]
    reset()
    _current = Logger(dir=dir, output_formats=formats, comm=comm)
    if formats:
        log(f"Logging to {dir}")


def default_dir():
    """Where to log without being told: OPENAI_LOGDIR, or a new dated folder under the system's temporary one."""
    return os.environ.get("OPENAI_LOGDIR") or os.path.join(
        tempfile.gettempdir(), datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    )


def progress_bar(**kwargs):
    """A tqdm bar, with an ETA where the total is known; on rank 0 only."""
    from tqdm import tqdm

    return tqdm(disable=_rank() != 0, mininterval=0.5, dynamic_ncols=True, smoothing=0.05, **kwargs)


def _rank():
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def reset():
    """Close the current logger; log to the terminal alone."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


@contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """Log elsewhere for the length of a block."""
    global _current
    outer, _current = _current, None
    try:
        configure(dir=dir, format_strs=format_strs, comm=comm)
        yield
    finally:
        reset()
        _current = outer


def logkv(key, val):
    """Set a metric's value for this row; a later value replaces it."""
    get_current().logkv(key, val)


def logkv_mean(key, val):
    """Add to a metric that is averaged over the row."""
    get_current().logkv_mean(key, val)


def logkvs(d):
    """Set several metrics."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs():
    """Write this row of metrics, and return it as a dict."""
    return get_current().dumpkvs()


def getkvs():
    """The metrics of the row so far."""
    return get_current().name2val


def log(*args, level=INFO):
    """Write a message, given in parts."""
    get_current().log(*args, level=level)


def debug(*args):
    log(*args, level=DEBUG)


def info(*args):
    log(*args, level=INFO)


def warn(*args):
    log(*args, level=WARN)


def error(*args):
    log(*args, level=ERROR)


def set_level(level):
    """Leave out messages below this level."""
    get_current().set_level(level)


def get_dir():
    """The folder logged to; None if there is none."""
    return get_current().get_dir()


@contextmanager
def profile_kv(scopename):
    """Add the seconds that a block takes to the metric wait_SCOPENAME."""
    start = time.time()
    try:
        yield
    finally:
        values = getkvs()
        values[f"wait_{scopename}"] = values.get(f"wait_{scopename}", 0.0) + time.time() - start
