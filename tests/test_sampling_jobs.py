"""Sampling jobs: independence of the number of ranks, the original code's samples, restarts after kills, and memory."""

import json
import os
import random
import re

import numpy as np
import pytest
import torch as th
from helpers import DATA, refused
from launch import flags, run_ranks, script
from sampling import MODEL, check_alike, known_job_on_ranks, pictures, read_npz, run_here, save_network, shard_files

from guided_diffusion import sample_job
from guided_diffusion.random_util import random_labels
from guided_diffusion.sample_shards import SampleStore

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Seeds


def test_samples_depend_on_seed_and_index_alone(networks, monkeypatch, tmp_path):
    """Run on one to three ranks with batch sizes 1, 3 and 8, such that some ranks get a smaller batch or no batch."""
    options, found = dict(networks, num_samples=10, timestep_respacing=3, seed=3), {}
    for ranks, batch_size in [(1, 8), (1, 3), (2, 1), (3, 3), (3, 8)]:
        run = dict(options, batch_size=batch_size, log_dir=tmp_path / f"{ranks}-{batch_size}")
        if ranks == 1:
            run_here(monkeypatch, "classifier_sample", **run)
        else:
            run_ranks(ranks, [script("classifier_sample"), *flags(**run)])[0].check()
        found[ranks, batch_size] = read_npz(run["log_dir"])
    first = found[1, 8]
    assert first["arr_1"].tolist() == random_labels(3, range(10), 4).tolist()
    for other in found.values():
        check_alike(first["arr_0"], other["arr_0"])
        assert (other["arr_1"] == first["arr_1"]).all()
    for batch_size in (3, 8):  # with equal batches, samples on 1 and 3 ranks are bitwise equal
        assert (found[1, batch_size]["arr_0"] == found[3, batch_size]["arr_0"]).all()
    for seed in (3, 4):  # a job with fewer samples
        run = dict(options, num_samples=3, batch_size=3, seed=seed, log_dir=tmp_path / f"seed {seed}")
        run_here(monkeypatch, "classifier_sample", **run)
        same = read_npz(run["log_dir"])["arr_0"] == found[1, 3]["arr_0"][:3]
        assert same.all() if seed == 3 else same.mean() < 0.5
    assert len({image.tobytes() for image in first["arr_0"]}) == 10


# The original code's samples


class OriginalNoise:
    """Replaces SampleNoise: draws from torch's global generator, seeded as in the golden run of the original code."""

    def __init__(self, seed, indices, device="cpu", stream=0):
        th.manual_seed(42)
        self.count = len(indices)

    def randn(self, *shape):
        return th.randn(self.count, *shape)

    def randn_like(self, x):
        return th.randn_like(x)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_the_script_gives_the_original_code_s_samples(loop, monkeypatch, tmp_path):
    with np.load(DATA / "library.npz") as arrays:
        golden = arrays[f"e2e/{loop}"].astype(np.float64)
    model = dict(image_size=64, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="32",
                 class_cond=True, learn_sigma=True, resblock_updown=True)  # fmt: skip
    classifier = dict(classifier_width=64, classifier_depth=1)
    paths = {f"{name}_path": save_network(str(tmp_path / name / "model.pt"), flags)
             for name, flags in (("model", model), ("classifier", classifier))}  # fmt: skip
    monkeypatch.setattr(sample_job, "SampleNoise", OriginalNoise)
    run_here(
        monkeypatch, "classifier_sample", **paths, **model, **classifier, timestep_respacing="ddim5",
        use_ddim=loop.startswith("ddim"), classifier_scale=2.0, classes="5,250", num_samples=2, batch_size=2,
        log_dir=tmp_path / "out",
    )  # fmt: skip
    found = read_npz(tmp_path / "out")
    assert found["arr_1"].tolist() == [5, 250]
    want = np.floor(np.clip((golden + 1) * 127.5, 0, 255)).transpose(0, 2, 3, 1)
    assert np.abs(want - found["arr_0"][:, ::4, ::4]).max() <= 1  # values near 1 may round to 254 or 255


# Ranks


def test_batches_are_divided_among_the_ranks_also_after_a_restart(tmp_path):
    def made(*args):
        lines = re.findall(r"rank \d made .*", known_job_on_ranks(*args).check().output)
        return [line.split(" made ")[1] for line in sorted(lines)]

    first, few, killed = (tmp_path / name for name in ("first", "few", "killed"))
    assert made(3, first, 14, 3) == ["[[0, 1, 2], [9, 10, 11]]", "[[3, 4, 5], [12, 13]]", "[[6, 7, 8]]"]
    assert made(3, few, 2, 3) == ["[[0, 1]]", "[]", "[]"]
    assert made(3, few, 2, 3) == ["[]", "[]", "[]"]
    store = SampleStore(str(killed), (14, 2, 3, 3), {"seed": 0})
    store.open()
    for start, stop in [(0, 3), (6, 9), (12, 14)]:
        store.write(start, pictures(range(start, stop)))
    assert made(2, killed, 14, 5) == ["[[3, 4], [9]]", "[[5], [10, 11]]"]
    whole = [(folder / "samples_14x2x3x3.npz").read_bytes() for folder in (first, killed)]
    assert whole[0] == whole[1] and (read_npz(killed)["arr_0"] == pictures(range(14))).all()


# Restarts

# Wrapper that runs a sampling script, slows down the assembly of shards so that a test can kill it in time, and writes
# the list of shards to final.json before the shards are removed.
WATCHED = """
import json, os, runpy, sys, time
import sampling
from guided_diffusion.sample_shards import SampleStore
parts, remove_shards = SampleStore.parts, SampleStore.remove_shards

def slow_parts(self):
    for part in parts(self):
        time.sleep(0.01)
        yield part

def recording(self):
    with open(os.path.join(self.folder, "final.json"), "w") as f:
        json.dump(sampling.shard_files(self.shards), f)
    remove_shards(self)

SampleStore.parts, SampleStore.remove_shards = slow_parts, recording
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_and_restarted_jobs_give_the_same_file_as_undisturbed_jobs(networks, tmp_path):
    """Both ranks get SIGKILL twice during sampling and once while rank 0 assembles the shards."""
    argv = [script("classifier_sample"), *flags(**networks, num_samples=50, batch_size=2, timestep_respacing=2)]
    argv += ["--sampler", "dpmpp_2m_sde"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    shards, rng = killed / "shards", random.Random(0)

    def sample(folder, kill_at=None):
        return run_ranks(2, [*argv, "--log_dir", folder], WATCHED, kill_at)

    sample(alone)[0].check()
    seen = {}
    for pattern, count in [("shards/*-*.npz", 1), ("shards/*-*.npz", 13), ("samples_*.npz.*.tmp", 1)]:
        outcome, was_killed = sample(killed, (killed / pattern, count, rng.uniform(0, 0.02)))
        assert was_killed and outcome.returncode == -9, outcome.output
        now = shard_files(shards)
        assert seen.items() <= now.items()  # no shard was lost or written again
        seen = now
    assert len(seen) == 25 and list(killed.glob("samples_*.tmp"))
    outcome, _ = sample(killed)
    assert "50 of 50 samples exist already" in outcome.check().output
    assert json.loads((killed / "final.json").read_text()) == seen
    first, second = (next(folder.glob("samples_*.npz")).read_bytes() for folder in (alone, killed))
    assert first == second
    assert not shards.exists() and not list(killed.glob("**/*.tmp"))


def test_changed_flags_and_files_are_refused(networks, monkeypatch, tmp_path):
    classes, folder = tmp_path / "classes.txt", tmp_path / "out"
    classes.write_text("1\n2\n")
    options = dict(networks, num_samples=4, batch_size=2, timestep_respacing=2, classes=classes, log_dir=folder)
    run_here(monkeypatch, "classifier_sample", **options)
    before = {path.name: path.read_bytes() for path in folder.glob("samples*")}
    for name, value in dict(
        seed=1, timestep_respacing=3, classifier_scale=1.0, use_ddim=True, clip_denoised=False, use_bf16=True,
        classes="1,2", guidance_interval="0.2,0.8", classifier_use_fp16=True,
    ).items():  # fmt: skip
        changed = {**options, name: value}
        refused(lambda c=changed: run_here(monkeypatch, "classifier_sample", **c), f"--{name} ", value, "--log_dir")
    other = save_network(str(tmp_path / "other/model.pt"), MODEL, seed=9)
    refused(lambda: run_here(monkeypatch, "classifier_sample", **{**options, "model_path": other}), "--model_path")
    classes.write_text("1\n3\n")
    refused(lambda: run_here(monkeypatch, "classifier_sample", **options), "other labels")
    assert {path.name: path.read_bytes() for path in folder.glob("samples*")} == before
    # Flags that do not change the images may change, and checkpoints may move.
    classes.write_text("1\n2\n")
    moved = save_network(str(tmp_path / "moved/model.pt"), MODEL)
    run_here(monkeypatch, "classifier_sample", **{**options, "batch_size": 1, "model_path": moved})


# Memory

MEMORY = """
import resource, sys
import numpy as np, torch as th
from guided_diffusion import logger
from guided_diffusion.sample_job import sample_job
folder, size, count, labels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), th.zeros(100000, dtype=th.int64)
logger.configure(folder + "/log", format_strs=[])

class Noise:
    shape, num_steps = (3, size, size), 1
    def steps(self, indices):
        rng = np.random.default_rng(indices.start)
        yield {"sample": th.from_numpy(rng.random((len(indices), *self.shape), dtype=np.float32) * 2 - 1)}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

sample_job(Noise(), {}, 64, 16, labels[:64], rows_by_class=True, folder=folder + "/warm")
before = peak()
sample_job(Noise(), {}, count, 16, labels[:count], rows_by_class=True, folder=folder)
print(f"\\ngrew by {peak() - before:.1f} MB", flush=True)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    outcome, _ = run_ranks(1, [tmp_path, 160, 1200], MEMORY)
    assert os.path.getsize(tmp_path / "samples_1200x160x160x3.npz") > 90e6
    assert float(re.search(r"grew by (.*) MB", outcome.check().output)[1]) < 45
