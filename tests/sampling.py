"""What the tests of sampling share: scripts run in this process, ranks that are forked and killed, known images."""

import atexit
import functools
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile

import numpy as np
import torch as th
from helpers import fill_by_name, randn
from launch import ROOT, Outcome, clean_environment, flags, script

from guided_diffusion import dist_util, logger
from guided_diffusion.sample_util import sample_job
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

# Networks whose steps take a millisecond or two
MODEL = dict(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2,
             attention_resolutions="8", class_cond=True, num_classes=4, learn_sigma=True,
             predict_xstart=True)  # fmt: skip
CLASSIFIER = dict(image_size=8, num_classes=4, classifier_width=64, classifier_depth=1,
                  classifier_attention_resolutions="4")  # fmt: skip
UPSAMPLER = dict(large_size=16, small_size=8, num_channels=32, num_res_blocks=1, num_heads=2,
                 attention_resolutions="8", class_cond=True, num_classes=4, learn_sigma=True,
                 predict_xstart=True)  # fmt: skip


def new_network(flags, seed=0):
    """A network of these flags whose every weight matters; another for another seed."""
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
    """Write a network's checkpoint, and beside it a config.json where `config` has entries for it: the path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    th.save(new_network(flags, seed).state_dict(), path)
    if config is not None:
        with open(os.path.join(os.path.dirname(path), "config.json"), "w") as f:
            json.dump({"flags": flags, **config}, f)
    return str(path)


def guided_networks(folder):
    """A diffusion model and a classifier with random weights: the flags by which classifier_sample takes them."""
    paths = dict(
        model_path=save_network(str(folder / "diffusion/model.pt"), MODEL),
        classifier_path=save_network(str(folder / "classifier/model.pt"), CLASSIFIER, seed=1),
    )
    return dict(paths, **MODEL, **{k: v for k, v in CLASSIFIER.items() if k not in MODEL}, classifier_scale=30.0)


def save_broken(path, networks):
    """Write guided_networks' diffusion model with one weight that is no number."""
    broken = th.load(networks["model_path"])
    broken["out.2.bias"][0] = math.nan
    th.save(broken, path)
    return path


def prefixed(prefix, flags):
    return {prefix + name: value for name, value in flags.items()}


def run_here(monkeypatch, name, **values):
    """Run a script in this process, without a process group. What it refuses is raised."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script(name), *flags(**values)])
        patch.setattr(dist_util, "setup_dist", lambda: None)
        patch.setenv("OPENAI_LOG_FORMAT", "log")
        try:
            runpy.run_path(script(name), run_name="__main__")
        finally:
            logger.reset()


def read_npz(folder):
    """The arrays of the one .npz of samples in a folder, by name."""
    (name,) = [name for name in os.listdir(folder) if name.startswith("samples_") and name.endswith(".npz")]
    with np.load(os.path.join(folder, name)) as arrays:
        found = dict(arrays)
    assert name == f"samples_{'x'.join(map(str, found['arr_0'].shape))}.npz" and found["arr_0"].dtype == np.uint8
    return found


def check_alike(images, others):
    """Batches of other sizes round sums in another order, which may tip a value over to the next grey level."""
    assert 5 < images.std() and 0.1 < ((images > 0) & (images < 255)).mean()  # neither blank nor all clipped
    difference = np.abs(images.astype(int) - others.astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.995


# Samples of known content, without a network


def picture(index, shape=(2, 3, 3)):
    """The image of an index: uint8 (H, W, C), another for each."""
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def pictures(indices, shape=(2, 3, 3)):
    return np.stack([picture(i, shape) for i in indices])


class KnownSampler:
    """In the place of a BatchSampler: sample i is picture(i). It notes the ranges that it is asked for.

    :param fail_at: the index of a sample that is no number.
    """

    num_steps = 3

    def __init__(self, shape=(3, 2, 3), fail_at=None):
        self.shape, self.fail_at = shape, fail_at
        self.asked = []

    def steps(self, indices):
        self.asked.append(indices)
        size = (*self.shape[1:], self.shape[0])
        # In the middle of a grey level, so that rounding has no say
        x = th.from_numpy((pictures(indices, size).astype(np.float32) + 0.5) / 127.5 - 1).permute(0, 3, 1, 2)
        if self.fail_at in indices:
            x = x.clone()
            x[self.fail_at - indices.start, -1, 0, 0] = float("nan")
        for step in range(self.num_steps):
            last = step == self.num_steps - 1
            yield {"sample": x if last else th.zeros_like(x), "pred_xstart": x}


def known_job(folder, num_samples, batch_size, sampler=None, job=None, **options):
    """sample_job with a KnownSampler, which is returned with the arrays that it ended in."""
    sampler = sampler or KnownSampler()
    path = sample_job(sampler, job or {"seed": 0}, num_samples, batch_size, folder=str(folder), **options)
    with np.load(path) as arrays:
        return sampler, dict(arrays)


# Ranks that are forked from a process which has the imports behind it, and killed when the time has come

_RANKS = """
import gc, glob, json, os, signal, socket, sys, time
import guided_diffusion.sample_util, guided_diffusion.sampling_setup, guided_diffusion.image_datasets, sampling
gc.freeze()  # collections in the forks would touch, and so copy, every page

def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def become(job, rank, master_port):
    signal.alarm(job["limit"])
    fd = os.open(job["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(fd, 1), os.dup2(fd, 2)
    ranks = str(job["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port))
    sys.argv = ["-c", *job["argv"]]

def kill(children):
    for child in children:
        os.kill(child, signal.SIGKILL)

def watch(job, children):
    # Wait for the end of all ranks, or for the moment to kill them: their exit statuses, and whether they were killed
    alive, statuses, killed, failed = list(children), {}, False, None
    while alive:
        for child in list(alive):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                alive.remove(child)
                statuses[child] = os.waitstatus_to_exitcode(status)
                failed = failed or (statuses[child] != 0 and time.time())
        if failed and time.time() - failed > 0.1:  # as launchers do
            kill(alive)
        if job["pattern"] and not killed and len(glob.glob(job["pattern"])) >= job["count"]:
            time.sleep(job["delay"])
            kill(alive)  # what has ended meanwhile is a zombie: no other process can have its number
            killed = True
        time.sleep(0.0005)
    return [statuses[child] for child in children], killed

for line in sys.stdin:
    job, start, master_port, children = json.loads(line), time.time(), port(), []
    open(job["output"], "w").close()
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            break
        children.append(child)
    if not child:
        become(job, rank, master_port)
        break
    statuses, killed = watch(job, children)
    output = open(job["output"], errors="replace").read()
    print(json.dumps([statuses, killed, output, time.time() - start, time.time()]), flush=True)
else:
    sys.exit()
exec(job["code"], {"__name__": "__main__"})
"""

# What a rank runs: a script by its path, as the first argument; or other code.
RUN_SCRIPT = "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"

# A known_job. Arguments: its folder, the number of samples, the batch size and, where one is to fail, its index.
KNOWN_JOB = """
import sys
import sampling
from guided_diffusion import dist_util, logger
dist_util.setup_dist()
folder, num_samples, batch_size, fail_at = (*sys.argv[1:], -1)[:4]
logger.configure(folder + "/log", format_strs=[])
sampler = sampling.KnownSampler(fail_at=int(fail_at))
sampling.known_job(folder, int(num_samples), int(batch_size), sampler)
print(f"\\nrank {dist_util.get_rank()} made {[list(asked) for asked in sampler.asked]}", flush=True)
"""


@functools.cache
def _ranks():
    env = clean_environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], os.path.join(ROOT, "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", _RANKS], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.stdin.close)
    return process


def run_ranks(ranks, argv, code=RUN_SCRIPT, kill_at=None, limit=60):
    """Run code on several ranks, started as torchrun starts them.

    :param argv: the arguments that it sees as sys.argv[1:].
    :param kill_at: (a pattern of paths, how many must be there, seconds): then all ranks get SIGKILL.
    :return: an Outcome, whose return code is the first that is not zero, and whether it was killed.
    """
    pattern, count, delay = kill_at or ("", 0, 0)
    with tempfile.NamedTemporaryFile() as output:
        job = dict(ranks=ranks, argv=[str(a) for a in argv], code=code, output=output.name, limit=limit)
        process = _ranks()
        process.stdin.write(json.dumps(dict(job, pattern=str(pattern), count=count, delay=delay)) + "\n")
        process.stdin.flush()
        statuses, killed, *rest = json.loads(process.stdout.readline())
    return Outcome(next(filter(None, statuses), 0), *rest), killed


def shard_files(folder):
    """What tells the finished shards of a folder from others of the same names."""
    return {e.name: [e.stat().st_ino, e.stat().st_mtime_ns] for e in os.scandir(folder) if e.name[-4:] == ".npz"}
