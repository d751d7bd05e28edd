"""Helpers for sampling tests: small networks, scripts run in the test process, and samples of known content."""

import json
import math
import os
import runpy
import sys

import numpy as np
import pytest
import torch as th
from helpers import fill_by_name, randn
from launch import flags, run_ranks, script

from guided_diffusion import dist_util, logger
from guided_diffusion.sample_job import sample_job
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

# Flags of small networks: one sampling step takes one or two milliseconds.
MODEL = dict(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2,
             attention_resolutions="8", class_cond=True, num_classes=4, learn_sigma=True,
             predict_xstart=True)  # fmt: skip
CLASSIFIER = dict(image_size=8, num_classes=4, classifier_width=64, classifier_depth=1,
                  classifier_attention_resolutions="4")  # fmt: skip
UPSAMPLER = dict(large_size=16, small_size=8, num_channels=32, num_res_blocks=1, num_heads=2,
                 attention_resolutions="8", class_cond=True, num_classes=4, learn_sigma=True,
                 predict_xstart=True)  # fmt: skip


def new_network(flags, seed=0):
    """Build the network that these flags describe, with nonzero weights that differ between seeds."""
    if "large_size" in flags:
        network = sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), **flags})[0]
    elif "classifier_width" in flags:
        network = create_classifier(**{**classifier_defaults(), **flags})
    else:
        network = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})[0]
    fill_by_name(network)
    with th.no_grad():
        for i, p in enumerate(network.parameters()):
            p.add_(0.05 * randn(1000 * seed + i, *p.shape) * bool(seed))
    return network


def save_network(path, flags, seed=0, config=None):
    """Write a network's checkpoint and, unless config is None, its config.json. Returns the checkpoint's path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    th.save(new_network(flags, seed).state_dict(), path)
    if config is not None:
        with open(os.path.join(os.path.dirname(path), "config.json"), "w") as f:
            json.dump({"flags": flags, **config}, f)
    return str(path)


def guided_networks(folder):
    """Write a diffusion model and a classifier with random weights; return classifier_sample's flags for both."""
    paths = dict(
        model_path=save_network(str(folder / "diffusion/model.pt"), MODEL),
        classifier_path=save_network(str(folder / "classifier/model.pt"), CLASSIFIER, seed=1),
    )
    return dict(paths, **MODEL, **{k: v for k, v in CLASSIFIER.items() if k not in MODEL}, classifier_scale=30.0)


def save_broken(path, networks):
    """Write a copy of the diffusion model of guided_networks in which one weight is NaN."""
    broken = th.load(networks["model_path"])
    broken["out.2.bias"][0] = math.nan
    th.save(broken, path)
    return path


def prefixed(prefix, flags):
    return {prefix + name: value for name, value in flags.items()}


def run_here(monkeypatch, name, **values):
    """Run a script in the test process, without a process group. The script's InputError is raised to the caller."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script(name), *flags(**values)])
        patch.setattr(dist_util, "setup_dist", lambda: None)
        patch.setenv("OPENAI_LOG_FORMAT", "log")
        try:
            runpy.run_path(script(name), run_name="__main__")
        finally:
            logger.reset()


class Settled(Exception):
    """Raised to stop a script after its flags are complete."""


def settled_flags(monkeypatch, module, set_up, name, cuda=False, **values):
    """Run a script until its flags are complete, and return them by name.

    :param set_up: name of the function in `module` that completes and returns the flags, alone or first in a tuple.
    :param cuda: the value that torch.cuda.is_available returns to the script.
    """
    complete = getattr(module, set_up)

    def stop(*args):
        raise Settled(complete(*args))

    with monkeypatch.context() as patch, pytest.raises(Settled) as caught:
        patch.setattr(module, set_up, stop)
        patch.setattr(th.cuda, "is_available", lambda: cuda)
        run_here(monkeypatch, name, **values)
    (found,) = caught.value.args
    return vars(found[0] if isinstance(found, tuple) else found)


def read_npz(folder):
    """Load the only samples_*.npz in a folder. Returns a dict of arrays by name."""
    (name,) = [name for name in os.listdir(folder) if name.startswith("samples_") and name.endswith(".npz")]
    with np.load(os.path.join(folder, name)) as arrays:
        found = dict(arrays)
    assert name == f"samples_{'x'.join(map(str, found['arr_0'].shape))}.npz" and found["arr_0"].dtype == np.uint8
    return found


def check_alike(images, others):
    """Check that two sets of images differ by at most one grey level, and that 99 % of the values are identical."""
    assert 5 < images.std() and 0.1 < ((images > 0) & (images < 255)).mean()  # neither blank nor all clipped
    difference = np.abs(images.astype(int) - others.astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.99


# Samples of known content, made without a network


def picture(index, shape=(2, 3, 3)):
    """Return a random uint8 image [H, W, C] that depends only on the index."""
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def pictures(indices, shape=(2, 3, 3)):
    return np.stack([picture(i, shape) for i in indices])


class KnownSampler:
    """Stands in for a BatchSampler: sample i is picture(i). `asked` records the requested index ranges.

    :param fail_at: index of a sample that contains NaN.
    """

    num_steps = 3

    def __init__(self, shape=(3, 2, 3), fail_at=None):
        self.shape, self.fail_at = shape, fail_at
        self.asked = []

    def steps(self, indices):
        self.asked.append(indices)
        size = (*self.shape[1:], self.shape[0])
        # Add half a grey level, so that rounding errors do not change the uint8 value.
        x = th.from_numpy((pictures(indices, size).astype(np.float32) + 0.5) / 127.5 - 1).permute(0, 3, 1, 2)
        if self.fail_at in indices:
            x = x.clone()
            x[self.fail_at - indices.start, -1, 0, 0] = float("nan")
        for step in range(self.num_steps):
            last = step == self.num_steps - 1
            yield {"sample": x if last else th.zeros_like(x), "pred_xstart": x}


def known_job(folder, num_samples, batch_size, sampler=None, job=None, **options):
    """Run sample_job with a KnownSampler. Returns the sampler and the arrays of the .npz file."""
    sampler = sampler or KnownSampler()
    path = sample_job(sampler, job or {"seed": 0}, num_samples, batch_size, folder=str(folder), **options)
    with np.load(path) as arrays:
        return sampler, dict(arrays)


KNOWN_JOB = """
import json, resource, sys
import sampling
from guided_diffusion import dist_util, logger
dist_util.setup_dist()
folder, num_samples, batch_size, limit, options = sys.argv[1:]
logger.configure(folder + "/log", format_strs=[])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
sampler = sampling.KnownSampler(**json.loads(options))
sampling.known_job(folder, int(num_samples), int(batch_size), sampler)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print(f"\\nrank {dist_util.get_rank()} made {[list(asked) for asked in sampler.asked]}", flush=True)
"""


def known_job_on_ranks(ranks, folder, num_samples, batch_size, limit=-1, **options):
    """Run known_job on several ranks.

    :param limit: maximum file size in bytes (-1: no limit).
    :param options: arguments of KnownSampler.
    :return: an Outcome, whose output lists the samples that each rank made.
    """
    return run_ranks(ranks, [folder, num_samples, batch_size, limit, json.dumps(options)], KNOWN_JOB)[0]


def shard_files(folder):
    """Map the name of each finished shard in a folder to its inode and mtime, which change if it is rewritten."""
    found = sorted((e for e in os.scandir(folder) if e.name.endswith(".npz")), key=lambda e: e.name)
    return {e.name: [e.stat().st_ino, e.stat().st_mtime_ns] for e in found}
