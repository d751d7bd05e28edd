"""Sampling jobs: seeds, labels, exactly N, restarts after kills, the original's numbers, memory, pictures, progress."""

import json
import os
import random
import re

import numpy as np
import pytest
import torch as th
from helpers import DATA, fill_by_name, refused, relative_error
from launch import flags, script
from sampling import (
    KNOWN_JOB,
    MODEL,
    KnownSampler,
    check_alike,
    known_job,
    pictures,
    read_npz,
    run_here,
    run_ranks,
    save_broken,
    save_network,
    shard_files,
)

from guided_diffusion import sample_util
from guided_diffusion.random_util import random_labels
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


# Seeds: ranks and batches have no say

LAYOUTS = """
import runpy, sys
argv = sys.argv[2:]
for batch_size, folder in [text.split("=") for text in sys.argv[1].split(",")]:
    sys.argv = [*argv, "--batch_size", batch_size, "--log_dir", folder]
    runpy.run_path(argv[0], run_name="__main__")
"""


def test_samples_are_functions_of_seed_and_index(networks, tmp_path):
    """1, 2 and 3 ranks with batches of 1, 3 and 8; the second rank's last batch is short, the third's empty."""
    argv = [script("classifier_sample"), *flags(**networks, num_samples=10, timestep_respacing=3, seed=3)]
    for number, (ranks, sizes) in enumerate([(1, (1, 3, 8)), (2, (8, 3, 1)), (3, (3, 1, 8)), (2, (3,))]):
        runs = ",".join(f"{size}={tmp_path}/{number}-{size}" for size in sizes)
        run_ranks(ranks, [runs, *argv], LAYOUTS)[0].check()
    found = {path.name: read_npz(path) for path in tmp_path.glob("?-?")}
    assert len(found) == 10
    first = found["0-8"]
    assert first["arr_1"].tolist() == random_labels(3, range(10), 4).tolist()
    for other in found.values():
        check_alike(first["arr_0"], other["arr_0"])
        assert (other["arr_1"] == first["arr_1"]).all()
    same = [next((tmp_path / name).glob("*.npz")).read_bytes() for name in ("1-3", "3-3")]
    assert same[0] == same[1]  # the same layout: the same file


def test_another_seed_makes_other_samples(networks, monkeypatch, tmp_path):
    def sample(seed, num_samples=6):
        folder = str(tmp_path / f"{seed}.{num_samples}")
        options = dict(networks, classifier_scale=0, num_samples=num_samples, timestep_respacing=3, use_ddim=True)
        run_here(monkeypatch, "classifier_sample", log_dir=folder, seed=seed, batch_size=3, **options)
        return read_npz(folder)["arr_0"]

    images, others = sample(0), sample(1)
    assert (images != others).mean() > 0.9
    assert len({image.tobytes() for image in [*images, *others]}) == 12
    assert (sample(0, 3) == images[:3]).all()  # and the number of samples has no part in it


# The original's numbers, through the script


class OriginalNoise:
    """In the place of SampleNoise: what the original drew, from torch's generator as the golden run seeded it."""

    def __init__(self, seed, indices, device="cpu", stream=0):
        th.manual_seed(42)
        self.count = len(indices)

    def randn(self, *shape):
        return th.randn(self.count, *shape)

    def randn_like(self, x):
        return th.randn_like(x)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_the_script_s_samples_are_the_original_s(loop, monkeypatch, tmp_path):
    with np.load(DATA / "library.npz") as arrays:
        golden = arrays[f"e2e/{loop}"]
    model = dict(image_size=64, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="32",
                 class_cond=True, learn_sigma=True, resblock_updown=True)  # fmt: skip
    classifier = dict(classifier_width=64, classifier_depth=1)
    networks = {
        "model": create_model_and_diffusion(**{**model_and_diffusion_defaults(), **model})[0],
        "classifier": create_classifier(**{**classifier_defaults(), **classifier}),
    }
    for name, network in networks.items():
        th.save(fill_by_name(network).state_dict(), tmp_path / f"{name}.pt")

    samples, to_uint8 = [], sample_util.to_uint8
    monkeypatch.setattr(sample_util, "to_uint8", lambda x, *rest: samples.append(x) or to_uint8(x, *rest))
    monkeypatch.setattr(sample_util, "SampleNoise", OriginalNoise)
    run_here(
        monkeypatch, "classifier_sample", model_path=tmp_path / "model.pt", classifier_path=tmp_path / "classifier.pt",
        **model, **classifier, timestep_respacing="ddim5", use_ddim=loop.startswith("ddim"), classifier_scale=2.0,
        classes="5,250", num_samples=2, batch_size=2, log_dir=tmp_path / "out",
    )  # fmt: skip
    (sample,) = samples
    assert relative_error(sample[:, :, ::4, ::4], golden) < 5e-5
    found = read_npz(tmp_path / "out")
    assert found["arr_1"].tolist() == [5, 250]
    want = np.clip((golden.astype(np.float64) + 1) * 127.5, 0, 255).transpose(0, 2, 3, 1)
    assert (np.abs(np.floor(want) - found["arr_0"][:, ::4, ::4].astype(int)) <= 1).all()


# Exactly N


@pytest.mark.parametrize("num_samples, batch_size", [(10, 4), (10, 1), (8, 4), (3, 16)])
def test_exactly_as_many_are_made_as_asked_for(num_samples, batch_size, tmp_path):
    sampler, arrays = known_job(tmp_path, num_samples, batch_size)
    assert [i for asked in sampler.asked for i in asked] == list(range(num_samples))
    assert [len(asked) for asked in sampler.asked[:-1]] == [batch_size] * (len(sampler.asked) - 1)
    assert (arrays["arr_0"] == pictures(range(num_samples))).all()


def test_ranks_share_the_work_and_what_is_missing(tmp_path):
    """Three ranks take turns; after a restart on two with other batches, they make only what was lost."""
    first, again, folder = (tmp_path / name for name in ("first", "again", "killed"))

    def made(*args):
        outcome = run_ranks(*args, KNOWN_JOB)[0].check()
        return [line.split(" made ")[1] for line in sorted(re.findall(r"rank \d made .*", outcome.output))]

    assert made(3, [first, 14, 3]) == ["[[0, 1, 2], [9, 10, 11]]", "[[3, 4, 5], [12, 13]]", "[[6, 7, 8]]"]
    assert made(3, [again, 2, 3]) == ["[[0, 1]]", "[]", "[]"]

    store = sample_util.SampleStore(str(folder), (14, 2, 3, 3), {"seed": 0})  # as a kill would leave it
    store.open()
    for start, stop in [(0, 3), (6, 9), (12, 14)]:
        store.write(start, pictures(range(start, stop)))
    assert made(2, [folder, 14, 5]) == ["[[3, 4], [9]]", "[[5], [10, 11]]"]
    whole = [(f / "samples_14x2x3x3.npz").read_bytes() for f in (first, folder)]
    assert whole[0] == whole[1] and (read_npz(folder)["arr_0"] == pictures(range(14))).all()


# Kills

# A script with an assembly that is slow enough to be met within it, and which notes what shards it was made of.
WATCHED = """
import json, os, runpy, sys, time
from guided_diffusion.sample_store import SampleStore
parts, remove_shards = SampleStore.parts, SampleStore.remove_shards

def slow_parts(self):
    for part in parts(self):
        time.sleep(0.01)
        yield part

def noting(self):
    found = {e.name: [e.stat().st_ino, e.stat().st_mtime_ns] for e in os.scandir(self.shards) if e.name[-4:] == ".npz"}
    if found:
        with open(os.path.join(self.folder, "final.json"), "w") as f:
            json.dump(found, f)
    remove_shards(self)

SampleStore.parts, SampleStore.remove_shards = slow_parts, noting
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_jobs_end_as_if_they_had_not_been(networks, tmp_path):
    """SIGKILL to both ranks among the batches and in the midst of the assembly."""
    argv = [script("classifier_sample"), *flags(**networks, num_samples=70, batch_size=2, timestep_respacing=2)]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    shards, rng = killed / "shards", random.Random(0)

    def sample(folder, pattern=None, count=0):
        kill_at = None if pattern is None else (pattern, count, rng.uniform(0, 0.02))
        return run_ranks(2, [*argv, "--log_dir", folder], WATCHED, kill_at)

    sample(alone)[0].check()
    seen = {}
    for count in (1, 9, 17, 31, "assembly", "assembly"):
        among = (f"{shards}/*-*.npz", count) if count != "assembly" else (f"{killed}/samples_*.npz.*.tmp", 1)
        outcome, was_killed = sample(killed, *among)
        assert was_killed and outcome.returncode == -9, outcome.output
        now = shard_files(shards)
        assert seen.items() <= now.items()  # none was made twice, and none was lost
        seen = now
    assert len(seen) == 35 and list(killed.glob("samples_*.tmp"))
    outcome, _ = sample(killed)
    assert "70 of 70 samples are there already" in outcome.check().output
    assert json.loads((killed / "final.json").read_text()) == seen
    first, second = (next(folder.glob("samples_*.npz")).read_bytes() for folder in (alone, killed))
    assert first == second
    assert not shards.exists() and not list(killed.glob("**/*.tmp"))


def test_a_job_goes_on_in_another_layout(networks, monkeypatch, tmp_path):
    """After a kill on two ranks with batches of 3: one rank with batches of 8 makes the rest."""
    options = dict(networks, num_samples=20, timestep_respacing=2)
    reference, folder = str(tmp_path / "reference"), str(tmp_path / "moved")
    run_here(monkeypatch, "classifier_sample", **options, batch_size=20, log_dir=reference)
    argv = [script("classifier_sample"), *flags(**options, batch_size=3, log_dir=folder)]
    assert run_ranks(2, argv, kill_at=(f"{folder}/shards/*-*.npz", 2, 0))[1]
    before = shard_files(os.path.join(folder, "shards"))
    made, make = [], sample_util._make
    monkeypatch.setattr(sample_util, "_make", lambda sampler, i, *rest: made.extend(i) or make(sampler, i, *rest))
    run_here(monkeypatch, "classifier_sample", **options, batch_size=8, log_dir=folder)
    there = [i for name in before for i in range(*map(int, name[:-4].split("-")))]
    assert len(there) >= 6 and sorted(made + there) == list(range(20))
    check_alike(read_npz(reference)["arr_0"], read_npz(folder)["arr_0"])


def test_a_changed_flag_is_refused_and_another_file_is_too(networks, monkeypatch, tmp_path):
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
    # What leaves the images as they are may change; and so may the place of a checkpoint.
    classes.write_text("1\n2\n")
    moved = save_network(str(tmp_path / "moved/model.pt"), MODEL)
    run_here(monkeypatch, "classifier_sample", **{**options, "batch_size": 1, "model_path": moved})


# Samples that are no numbers


def test_a_sample_without_a_number_is_named_and_nothing_is_written_for_it(tmp_path):
    sampler = KnownSampler(fail_at=13)
    refused(lambda: known_job(tmp_path, 20, 4, sampler, save_images=str(tmp_path / "each")), "sample 13 ")
    assert sorted(os.listdir(tmp_path / "shards"))[:-1] == [f"{i:09d}-{i + 4:09d}.npz" for i in (0, 4, 8)]
    assert not list(tmp_path.glob("samples*")) and len(os.listdir(tmp_path / "each")) == 12
    known_job(tmp_path, 20, 4)  # once that is repaired, the job goes on


def test_a_network_in_trouble_is_reported(networks, monkeypatch, tmp_path):
    broken = save_broken(tmp_path / "broken.pt", networks)
    options = {**networks, "model_path": broken, "num_samples": 2, "timestep_respacing": 1}
    refused(lambda: run_here(monkeypatch, "classifier_sample", **options, log_dir=tmp_path / "out"), "sample 0 is not")
    assert not list((tmp_path / "out").glob("samples*"))


# Memory

MEMORY = """
import resource, sys
import numpy as np, torch as th
from guided_diffusion import dist_util, logger
from guided_diffusion.sample_job import sample_job
dist_util.setup_dist()
folder, size, labels = sys.argv[1], int(sys.argv[2]), th.zeros(100000, dtype=th.int64)
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
sample_job(Noise(), {}, int(sys.argv[3]), 16, labels[: int(sys.argv[3])], rows_by_class=True, folder=folder)
print(f"\\nrank {dist_util.get_rank()} grew by {peak() - before:.1f} MB", flush=True)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """184 MB of images pass through two ranks and into one file: 92 each, if they kept theirs."""
    outcome, _ = run_ranks(2, [tmp_path, 160, 2400], MEMORY)
    grown = [float(mb) for mb in re.findall(r"grew by (.*) MB", outcome.check().output)]
    assert os.path.getsize(tmp_path / "samples_2400x160x160x3.npz") > 180e6
    assert len(grown) == 2 and max(grown) < 50, grown  # 10 to 35 by how the allocator cuts its memory
