"""Checkpoint files: their names, their weights, and the config.json beside them.

A run folder holds config.json and the checkpoint files modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt and
stateNNNNNN.pt. NNNNNN is the number of optimizer steps, and config.json records the flags of the run. The module
`training_state` writes the .pt files and resumes training from them. The class `Checkpoint` reads one file of weights
and the config.json beside it.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import zipfile
from contextlib import suppress
from functools import cached_property

import torch as th

from . import dist_util, files, logger
from .errors import InputError

CONFIG_NAME = "config.json"
WRAPPERS = ("ema", "state_dict", "model_state_dict", "model")  # keys of a file's weights, best first
PREFIXES = ("module.", "_orig_mod.")  # parameter name prefixes of DistributedDataParallel and torch.compile
OTHER_FILES = {  # files that are often downloaded by mistake, by their first bytes in lower case
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull` to download the file)",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"\x89hdf": "an HDF5 file",
}


# Names


def parse_resume_step_from_filename(filename):
    """Return the step in the file name of a model: 12000 for path/to/model012000.pt, and 0 for other names."""
    match = re.search(r"model(\d+)(\.[^/\\]*)?$", filename)
    return int(match.group(1)) if match else 0


def get_blob_logdir():
    """Return the folder for checkpoints: the environment variable DIFFUSION_BLOB_LOGDIR, or else the run folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint():
    """Return the path of a checkpoint that takes precedence over --resume_checkpoint, or None for no such checkpoint.

    The default is None. Other projects can replace `train_util.find_resume_checkpoint`, which TrainLoop calls.
    """
    return None


def model_name(step):
    return f"model{step:06d}.pt"


def opt_name(step):
    return f"opt{step:06d}.pt"


def state_name(step):
    return f"state{step:06d}.pt"


def ema_name(rate, step):
    return f"ema_{rate}_{step:06d}.pt"


def find_beside(checkpoint, name):
    """Return the path of the file `name` in the folder of a checkpoint, or None if there is no such file."""
    path = files.join(files.dirname(checkpoint), name)
    return path if files.exists(path) else None


def find_ema_checkpoint(main_checkpoint, step, rate):
    """Return the path of the EMA checkpoint with decay `rate` beside a model file, or None if there is no such file."""
    return find_beside(main_checkpoint, ema_name(rate, step)) if main_checkpoint else None


def require_path(flag, path):
    """Raise InputError unless `path`, the value of --`flag`, is an existing file."""
    if not path:
        raise InputError(f"--{flag} is missing: give the path of a checkpoint (.pt)")
    if not files.exists(path):
        raise InputError(f"--{flag} {path}: no such file")


# Checkpoints


class Checkpoint:
    """A file of weights and the config.json beside it. Both files are read on first use.

    :param path: a file written by torch.save or, if it ends in .safetensors, by safetensors. The file holds a
        state_dict, either directly or under one of the keys in WRAPPERS. Parameter names may have a prefix of PREFIXES.
    """

    def __init__(self, path):
        self.path = path
        self.config_path = files.join(files.dirname(path), CONFIG_NAME)

    @cached_property
    def config(self):
        """The content of config.json, a dict whose entry "flags" is a dict. None if there is no config.json."""
        if not files.exists(self.config_path):
            return None
        try:
            with files.open_file(self.config_path) as f:
                config = json.loads(f.read())
            config["flags"].items()
            return config
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{self.config_path}: not a training run's config.json; restore or remove it") from None

    @property
    def flags(self):
        """The flags recorded in config.json, as a dict. The dict is empty if there is no config.json."""
        flags = dict((self.config or {}).get("flags", {}))
        if flags.get("class_cond") is False:
            flags.pop("num_classes", None)  # unused by an unconditional model; its classifier may need another value
        return flags

    @property
    def classes(self):
        """The class names recorded in config.json, in the order of their labels. None if there are none."""
        return (self.config or {}).get("classes")

    def adopt_flags(self, args, settled, names, prefix=""):
        """Set flags in `args` to the values recorded in config.json.

        :param settled: the flags that must not be contradicted; see settle_flags.
        :param names: the names of the flags to set. Names that config.json does not record are ignored.
        :param prefix: a prefix that the flags have in `args` but not in config.json, such as "upsampler_".
        :raises InputError: if a recorded value contradicts a settled flag.
        """
        recorded = {prefix + name: self.flags[name] for name in names if name in self.flags}
        settle_flags(args, settled, recorded, self.config_path)

    def weights(self, model, finite=False):
        """Return the weights as a state_dict for `model`, on the CPU.

        :param finite: raise InputError for NaN or infinite weights, from which training cannot recover.
        :raises InputError: if the parameter names or shapes differ from those of the model.
        """
        found, expected = self._unwrap(self._read()), model.state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in expected.items()}:
            raise InputError(f"{self.path}: the weights do not fit the model: {self._describe_misfit(found, expected)}")
        if finite and (bad := not_finite(found)):
            raise InputError(
                f"{self.path}: {len(bad)} of {len(found)} tensors are not finite, the first is {bad[0]}: use an "
                f"earlier checkpoint, or move the files of this step away and use --resume_checkpoint auto"
            )
        return found

    def _read(self):
        """Load the file and return its content."""
        if self.path.endswith(".safetensors"):
            return self._read_safetensors()
        try:
            return dist_util.load_state_dict(self.path, map_location="cpu")
        except InputError:
            with suppress(OSError), files.open_file(self.path) as f:
                start = f.read(64).lower()
                for signature, what in OTHER_FILES.items():
                    if start.startswith(signature):
                        raise InputError(f"{self.path}: {what}, not a checkpoint") from None
            raise

    def _read_safetensors(self):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load
        except ImportError:
            raise InputError(f"{self.path}: reading this file needs safetensors: pip install safetensors") from None
        with files.open_file(self.path) as f:
            try:
                return load(f.read())
            except SafetensorError as e:
                raise InputError(f"{self.path}: a damaged safetensors file; copy it again ({e})") from None

    def _unwrap(self, content):
        """Return the state_dict in a file's content. Wrapping dicts and name prefixes are removed and logged."""
        while not (isinstance(content, dict) and content and all(isinstance(v, th.Tensor) for v in content.values())):
            entries = list(map(str, content)) if isinstance(content, dict) else []
            if {"state", "param_groups"} <= set(entries):
                raise InputError(f"{self.path}: an optimizer's state, not a model's weights")
            name = next((name for name in WRAPPERS if name in entries), None)
            if name is None:
                found = f"a dict with the keys {', '.join(entries[:5])}" if entries else type(content).__name__
                raise InputError(f"{self.path}: not a model's weights, but {found}")
            logger.log(f"{self.path}: using the weights under the key {name!r}; the keys are {', '.join(entries)}")
            content = content[name]
        while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in content)), None):
            logger.log(f"{self.path}: removing the prefix {prefix!r} from the parameter names")
            content = {name.removeprefix(prefix): v for name, v in content.items()}
        return content

    def _describe_misfit(self, found, expected):
        """Describe the first three parameters whose shapes differ between two state_dicts."""

        def shape(state_dict, name):
            return tuple(state_dict[name].shape) if name in state_dict else "missing"

        differing = [name for name in {**expected, **found} if shape(found, name) != shape(expected, name)]
        described = [f"{n} is {shape(found, n)} in the file and {shape(expected, n)} here" for n in differing[:3]]
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        advice = f". The flags of the checkpoint are recorded in {self.config_path}" if self.config else ""
        return "; ".join(described) + more + advice


def load_weights(model, path):
    """Load the weights of the checkpoint file `path` into `model`."""
    model.load_state_dict(Checkpoint(path).weights(model))


def fingerprint(path):
    """Return a hash of a file's content: 16 hexadecimal digits.

    For a zip archive, such as a file of torch.save, the hash covers the index, which contains checksums of the data.
    """
    digest = hashlib.sha256()
    with files.open_file(path) as f:
        if zipfile.is_zipfile(f):
            with zipfile.ZipFile(f) as archive:
                index = [(i.filename.split("/")[-1], i.CRC, i.file_size) for i in archive.infolist()]
            digest.update(repr(index).encode())
        else:
            f.seek(0)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def not_finite(state_dict):
    """Return the names of the tensors in a state_dict that have NaN or infinite elements."""
    return [name for name, v in state_dict.items() if not v.isfinite().all()]


# Recorded flags


def write_config(flags, **facts):
    """Write config.json to the checkpoint folder. Only rank 0 writes the file.

    :param flags: the values of all flags, as a dict.
    :param facts: further entries of config.json, such as the class names.
    """
    if dist_util.get_rank() != 0:
        return
    config = {
        **facts,
        "flags": flags,
        "world_size": dist_util.get_world_size(),
        "versions": {"python": platform.python_version(), "torch": th.__version__},
        "git_revision": _git_revision(),
    }
    with files.write_atomically(files.join(get_blob_logdir(), CONFIG_NAME)) as f:
        f.write((json.dumps(config, indent=1) + "\n").encode())


def _git_revision():
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def settle_flags(args, settled, values, source):
    """Set flags to the values that a preset or a config.json prescribes.

    :param args: the parsed flags, changed in place.
    :param settled: {name: (value, source)}, the flags that must not be contradicted. Initially these are the flags
        given on the command line (flags.given_flags). Each call of settle_flags adds the prescribed values.
    :param values: {name: value}, the prescribed values.
    :param source: a description of the preset or file, for error messages.
    :raises InputError: if a settled flag has another value. The message names up to three such flags and both sources.
    """
    wrong = [name for name, v in values.items() if name in settled and not _same_value(settled[name][0], v)][:3]
    if wrong:
        given = ", ".join(f"--{name} {settled[name][0]} {settled[name][1]}" for name in wrong)
        says = ", ".join(f"{name} {values[name]}" for name in wrong)
        raise InputError(f"{given} contradict{'s' if len(wrong) == 1 else ''} {source}, which says {says}")
    for name, value in values.items():
        settled.setdefault(name, (value, f"in {source}"))
        setattr(args, name, value)


def _same_value(a, b):
    """Return whether two values of a flag are equal, ignoring spaces in strings such as "32, 16, 8"."""
    return a == b or (isinstance(a, str) and isinstance(b, str) and a.replace(" ", "") == b.replace(" ", ""))
