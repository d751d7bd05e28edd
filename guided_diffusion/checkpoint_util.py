"""Checkpoints: their names, writing and finding them, loading weights with errors one can act on, and config.json.

A run's folder holds modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt, where NNNNNN counts the optimiser's steps,
and config.json, which says what the model is.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import zipfile
from contextlib import suppress
from itertools import islice

import torch as th

from . import dist_util, files, logger
from .errors import InputError, RunStopped

CONFIG_NAME = "config.json"


def parse_resume_step_from_filename(filename):
    """The step in a name such as path/to/model012000.pt: 12000. Other names give 0."""
    match = re.search(r"model(\d+)(\.[^/\\]*)?$", filename)
    return int(match.group(1)) if match else 0


def get_blob_logdir():
    """Where checkpoints go: the run's folder, or the environment variable DIFFUSION_BLOB_LOGDIR."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint():
    """A checkpoint to resume from without being told, or None. For a cluster's own code to replace.

    TrainLoop asks `train_util.find_resume_checkpoint` before it looks at its `resume_checkpoint`.
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


def resolve_resume_checkpoint(value):
    """The path that --resume_checkpoint means: "auto" is the newest complete checkpoint of the run's folder, or "".

    Every rank must call it: rank 0 looks, and all take what it found.
    """
    if value != "auto":
        return value
    return dist_util.broadcast_object(_newest_complete(get_blob_logdir()) if dist_util.get_rank() == 0 else None)


def _newest_complete(folder):
    names = set(files.list_dir(folder))
    for name in names:
        if re.fullmatch(r"(model|opt|state|ema_|config|progress).*\.\d+\.tmp", name):  # left by a kill within a write
            files.remove(files.join(folder, name))
    steps = {int(m.group(1)) for name in names if (m := re.fullmatch(r"(?:model|opt|state)(\d+)\.pt", name))}
    for step in sorted(steps, reverse=True):
        # The model is written last: without it, the others may be of a save that was cut short.
        missing = [name for name in (model_name(step), opt_name(step), state_name(step)) if name not in names]
        if not missing:
            return files.join(folder, model_name(step))
        logger.warn(f"ignoring the half-written checkpoint of step {step}: there is no {missing[0]}")
    return ""


def refuse_later_checkpoints(step):
    """Refuse to train in a folder with checkpoints of later steps than `step`. Not a collective: rank 0 calls it.

    They are of another run, and "auto" would take the newest of the mixture.
    """
    folder = get_blob_logdir()
    found = [int(m.group(1)) for name in files.list_dir(folder) if (m := re.fullmatch(r"model(\d+)\.pt", name))]
    if max(found, default=0) > step:
        raise InputError(
            f"--log_dir {folder} holds {model_name(max(found))}, of a run that got further than this one starts from: "
            f"go on with --resume_checkpoint auto, or give another --log_dir, or move the later checkpoints away"
        )


def beside(checkpoint, name):
    """The path of another file in a checkpoint's folder, or None where there is none."""
    path = files.join(files.dirname(checkpoint), name)
    return path if files.exists(path) else None


def is_of_this_run(checkpoint):
    """Whether a checkpoint lies in the run's own folder."""
    return os.path.realpath(files.dirname(checkpoint)) == os.path.realpath(get_blob_logdir())


def find_ema_checkpoint(main_checkpoint, step, rate):
    """The moving average of this rate beside a model file, or None."""
    return beside(main_checkpoint, ema_name(rate, step)) if main_checkpoint else None


def save(obj, name):
    """Write tensors (a state_dict) to a file of the run's folder, whole or not at all."""
    with files.write_atomically(files.join(get_blob_logdir(), name)) as f:
        th.save(obj, f)


def save_set(named, last_good=""):
    """Write the files of a checkpoint: pairs (name, tensors), in order. Not a collective: rank 0 calls it.

    :param last_good: the checkpoint that an error refers to.
    :return: the path of the last file.
    :raises RunStopped: when the disk is full or out of reach; then none of the files is left behind.
    """
    folder, written = get_blob_logdir(), []
    try:
        for name, obj in named:
            written.append(files.join(folder, name))
            with files.disk_errors(written[-1], f"the last good checkpoint is {last_good or 'none yet'}"):
                save(obj, name)
    except RunStopped:
        for path in written:
            with suppress(OSError):
                files.remove(path)
        raise
    return written[-1]


def prune(newest, keep):
    """Remove all checkpoints of the run's folder before the last `keep` up to step `newest`; 0 keeps all.

    Those of later steps, of another run perhaps, stay. Not a collective: rank 0 calls it.
    """
    if keep < 1:
        return
    folder = get_blob_logdir()
    by_step = {}
    for name in files.list_dir(folder):
        if match := re.fullmatch(r"(?:model|opt|state|ema_[^_]+_)(\d+)\.pt", name):
            by_step.setdefault(int(match.group(1)), []).append(name)
    steps = sorted(step for step in by_step if step <= newest and model_name(step) in by_step[step])
    for step in by_step:
        if step < min(steps[-keep:], default=0):
            # The model's file first: without it, the rest no longer looks like a checkpoint.
            for name in sorted(by_step[step], key=lambda name: not name.startswith("model")):
                files.remove(files.join(folder, name))


def require_path(flag, path):
    """Refuse a flag that must name an existing file and does not."""
    if not path:
        raise InputError(f"--{flag} is missing: give the path of a checkpoint (.pt)")
    if not files.exists(path):
        raise InputError(f"--{flag} {path}: no such file")


# The configuration beside a checkpoint


def write_config(flags, **facts):
    """Write config.json to the run's folder, from rank 0: the flags, and what is needed to tell how a model came about.

    :param flags: a dict of all flags.
    :param facts: more entries, such as the class table.
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
    try:
        done = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def read_config(checkpoint):
    """The config.json beside a checkpoint as a dict, or None."""
    path = beside(checkpoint, CONFIG_NAME)
    if path is None:
        return None
    try:
        with files.open_file(path) as f:
            config = json.loads(f.read())
        config["flags"].items()
        classes, global_batch = config.get("classes") or [], config.get("global_batch", 1)
        if not all(isinstance(name, str) for name in classes) or type(global_batch) is not int or global_batch < 1:
            raise ValueError
        return config
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{path}: not the config.json of a training run; restore it or remove it") from None


def check_recorded(source, name, value, like):
    """Refuse a flag's value of another kind than `like`, as a hand may have put it into a config.json: "false"."""
    kinds = {bool: (bool, "true or false"), int: (int, "a whole number"), float: ((int, float), "a number")}
    kind, expected = kinds.get(type(like), (str, "a text"))
    if like is not None and (not isinstance(value, kind) or isinstance(value, bool) != isinstance(like, bool)):
        raise InputError(
            f"{source}: {name} is {json.dumps(value)}, where {expected} was expected: put it right, or remove the file "
            f"and give all flags"
        )


def fingerprint(path):
    """A short text that tells a file's content from another's. Of zip archives, as torch writes, it reads the index."""
    digest = hashlib.sha256()
    with files.open_file(path) as f:
        if zipfile.is_zipfile(f):
            with zipfile.ZipFile(f) as archive:
                digest.update(
                    repr([(i.filename.split("/")[-1], i.CRC, i.file_size) for i in archive.infolist()]).encode()
                )
        else:
            f.seek(0)
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def settle(args, settled, name, value, source):
    """Set a flag to what a preset or a config says.

    :param settled: see adopt_config.
    :raises InputError: for a flag that is settled with another value: it names both sources.
    """
    if name in settled and not _same_value(settled[name][0], value):
        other, where = settled[name]
        raise InputError(f"--{name} {other} {where} contradicts {source}, which says {name} {value}")
    settled.setdefault(name, (value, f"in {source}"))
    setattr(args, name, value)


def adopt_config(args, settled, flag, names, prefix=""):
    """Take a model's flags from the config.json beside its checkpoint, if there is one.

    :param args: the parsed flags, changed in place.
    :param settled: {name: (value, source)} of the flags that must not be contradicted: at first those given by hand
        (script_util.given_flags). What is taken is added.
    :param flag: the name of the flag with the checkpoint's path.
    :param names: the flags to take, where they are recorded.
    :param prefix: what their names in `args` begin with, beyond those recorded.
    :raises InputError: for a flag that is settled and recorded with different values: it names both.
    """
    path = getattr(args, flag)
    require_path(flag, path)
    config = read_config(path)
    if config is None:
        return
    source = files.join(files.dirname(path), CONFIG_NAME)
    recorded = dict(config["flags"])
    if recorded.get("class_cond") is False:
        recorded.pop("num_classes", None)  # of no meaning for such a model; a classifier beside it has its own
    for name in names:
        if name in recorded:
            check_recorded(source, name, recorded[name], getattr(args, prefix + name, None))
            settle(args, settled, prefix + name, recorded[name], source)


def _same_value(a, b):
    """Whether two values of a flag mean the same: lists may have spaces."""
    return a == b or (isinstance(a, str) and isinstance(b, str) and a.replace(" ", "") == b.replace(" ", ""))


# Weights


WRAPPERS = ("ema", "state_dict", "model_state_dict", "model")  # entries under which files hold weights, best first
PREFIXES = ("module.", "_orig_mod.")  # which DistributedDataParallel and torch.compile put before the names
OTHER_FILES = {  # what people save by mistake, by the lower-case beginnings of the files
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull downloads the file)",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"\x89hdf": "an HDF5 file",
}


def read_weights(model, path, device="cpu"):
    """Read a checkpoint whose names and shapes must be those of `model`: its state_dict.

    The file may be torch's or safetensors'. Wrapping dicts (WRAPPERS) and prefixes of names (PREFIXES) are removed.

    :raises InputError: when they are not: it names the flags that differ, as far as weights can tell.
    """
    state_dict = _unwrap(path, _read_tensors(path, device))
    expected = model.state_dict()
    prefix = next(iter(state_dict), "").removesuffix(next(iter(expected), ""))
    if prefix and state_dict.keys() == {prefix + name for name in expected}:
        raise InputError(f"{path}: the names of all weights begin with {prefix!r}: save them without this prefix")
    if {k: v.shape for k, v in state_dict.items()} != {k: v.shape for k, v in expected.items()}:
        raise InputError(f"{path}: a checkpoint of another architecture: {_differences(state_dict, expected)}")
    return state_dict


def _read_tensors(path, device):
    """The content of a file that torch.save or safetensors wrote."""
    try:
        with files.open_file(path) as f:
            start = f.read(64)
    except OSError:
        start = b""  # load_state_dict reports it
    for signature, what in OTHER_FILES.items():
        if start.lower().startswith(signature):
            raise InputError(f"{path}: {what}, not a checkpoint")
    if start[8:9] != b"{" or int.from_bytes(start[:8], "little") > 10**8:  # the head of a safetensors file
        return dist_util.load_state_dict(path, map_location=device)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise InputError(f"{path}: a safetensors file; to read it: pip install safetensors") from None
    try:
        with files.open_file(path) as f:
            return {name: v.to(device) for name, v in load(f.read()).items()}
    except SafetensorError as e:
        raise InputError(f"{path}: a damaged safetensors file ({e})") from None


def _unwrap(path, content):
    """The state_dict in a checkpoint's content, without wrapping dicts and prefixes. Logs what it removes."""
    while not (isinstance(content, dict) and content and all(isinstance(v, th.Tensor) for v in content.values())):
        entries = list(content) if isinstance(content, dict) else []
        name = next((name for name in WRAPPERS if name in entries), None)
        if {"state", "param_groups"} <= set(entries):
            raise InputError(f"{path}: an optimizer's state, not a model's weights")
        if name is None:
            found = f"a dict with the entries {', '.join(map(str, entries[:5]))}" if entries else type(content).__name__
            raise InputError(f"{path}: not a model's weights, but {found}")
        logger.log(f"{path}: using the weights under {name!r}, of the entries {', '.join(map(str, entries))}")
        content = content[name]
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in content)), None):
        logger.log(f"{path}: removing the prefix {prefix!r} from the names of the weights")
        content = {name.removeprefix(prefix): v for name, v in content.items()}
    return content


def read_weights_to_train(model, path, device="cpu"):
    """read_weights, which are refused where they are not finite: no step mends them."""
    state_dict = read_weights(model, path, device)
    if bad := not_finite(state_dict):
        raise InputError(
            f"{path}: refused: {len(bad)} of {len(state_dict)} tensors are not finite, the first {bad[0]}: take an "
            f"earlier checkpoint (--resume_checkpoint auto does once this step's files are moved away)"
        )
    return state_dict


@th.no_grad()
def not_finite(state_dict):
    """The names of the tensors that hold a number that is not finite."""
    named = {name: v for name, v in state_dict.items() if v.is_floating_point() and v.numel()}
    if not named:
        return []
    # Both extremes are NaN where one element is. They need no memory, and all tensors together one word from the GPU.
    extremes = th.stack([th.stack(v.aminmax()).float() for v in named.values()])
    return [name for name, finite in zip(named, extremes.isfinite().all(dim=1).tolist()) if not finite]


def load_weights(model, path):
    """Load a checkpoint into `model`: see read_weights."""
    model.load_state_dict(read_weights(model, path), strict=True)


def _differences(found, expected, most=3):
    """Say how two state_dicts differ: by the flags behind them, else by the first names."""
    found_facts, expected_facts = describe_weights(found), describe_weights(expected)
    if found_facts["network"] != expected_facts["network"]:
        return f"the network in the file is {found_facts['network']}, not {expected_facts['network']}"
    differing = [
        f"{name} is {found_facts.get(name)} in the file and {expected_facts.get(name)} by the flags"
        for name in {**found_facts, **expected_facts}
        if found_facts.get(name) != expected_facts.get(name)
    ]
    if not differing:
        names = [
            n
            for n in {**expected, **found}
            if n not in found or n not in expected or found[n].shape != expected[n].shape
        ]
        differing = [f"{n} differs" for n in names]
    more = f" (and {len(differing) - most} more)" if len(differing) > most else ""
    return "; ".join(islice(differing, most)) + more


def describe_weights(state_dict):
    """Read off a state_dict the flags it was built with, as far as names and shapes show them: a dict by flag name.

    A file that is none of this package's networks gives only {"network": "none of this package"}.
    """
    try:
        return _describe({name: tuple(v.shape) for name, v in state_dict.items()})
    except (KeyError, IndexError, ZeroDivisionError):
        return {"network": "none of this package"}


def _describe(shape):
    is_unet = "output_blocks.0.0.in_layers.0.weight" in shape
    facts = {"network": "a diffusion model" if is_unet else "a classifier"}
    width = shape["time_embed.0.weight"][1]
    facts["num_channels" if is_unet else "classifier_width"] = width
    facts["in_channels (twice that for an upsampler)"] = shape["input_blocks.0.0.weight"][1]
    facts.update(_unet_facts(shape, width) if is_unet else _classifier_facts(shape, width))
    widened = shape.get("input_blocks.1.0.emb_layers.1.weight", (0,))[0]
    prefix = "" if is_unet else "classifier_"
    facts[f"{prefix}use_scale_shift_norm"] = widened == 2 * shape.get("input_blocks.1.0.out_layers.0.weight", (0,))[0]
    return facts


def _count(shape, stem):
    return len({name.split(".")[1] for name in shape if name.startswith(stem + ".")})


def _block_width(shape, block):
    return shape[f"{block}.0.out_layers.0.weight"][0]


def _unet_facts(shape, width):
    blocks = [f"output_blocks.{i}" for i in range(_count(shape, "output_blocks"))]

    def layers(block, layer):  # the layers of a block that have a parameter of this name
        return [i for i in (1, 2) if f"{block}.{i}.{layer}" in shape]

    ups = [b for b in blocks if layers(b, "in_layers.0.weight") or layers(b, "conv.weight")]
    depth = blocks.index(ups[0]) if ups else len(blocks) - 1
    levels = blocks[:: depth + 1]
    attention = [i for i, b in enumerate(reversed(levels)) if layers(b, "qkv.weight")]
    labels = shape.get("label_emb.weight")
    facts = {
        "class_cond": labels is not None,
        "learn_sigma (output channels)": shape["out.2.weight"][0],
        "num_res_blocks": depth,
        "channel_mult": ",".join(f"{_block_width(shape, b) / width:g}" for b in reversed(levels)),
        "attention_resolutions (levels with attention)": ",".join(map(str, attention)),
        "resblock_updown": any(layers(b, "in_layers.0.weight") for b in ups),
    }
    if labels is not None:
        facts["num_classes"] = labels[0]
    return facts


def _classifier_facts(shape, width):
    # What sits on one of four heads: out.2 pools by attention, out.3 is a convolution, out.0 a linear layer.
    if "out.2.positional_embedding" in shape:
        pool, classes = "attention", shape["out.2.c_proj.weight"][0]
    elif "out.3.bias" in shape and len(shape["out.3.weight"]) > 2:
        pool, classes = "adaptive", shape["out.3.weight"][0]
    elif "out.3.bias" in shape:
        pool, classes = "spatial_v2", shape["out.3.weight"][0]
    else:
        pool, classes = "spatial", shape["out.2.weight"][0]
    blocks = [f"input_blocks.{i}" for i in range(1, _count(shape, "input_blocks"))]
    residual = [b for b in blocks if f"{b}.0.out_layers.0.weight" in shape]
    facts = {
        "classifier_pool": pool,
        "num_classes": classes,
        "classifier_depth and image_size (number of blocks)": len(blocks),
        "classifier_resblock_updown": residual == blocks,
        "channel multiples (widths of the blocks)": ",".join(f"{_block_width(shape, b) / width:g}" for b in residual),
        "classifier_attention_resolutions (blocks with attention)": ",".join(
            b.split(".")[1] for b in blocks if f"{b}.1.qkv.weight" in shape
        ),
    }
    if pool == "attention":
        facts["image_size (positions that attention pools)"] = shape["out.2.positional_embedding"][1] - 1
    return facts
