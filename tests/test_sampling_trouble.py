"""Sampling on several ranks in trouble: one line from one of them, a status that is not zero, and no work lost."""

import os

import numpy as np
import pytest
from launch import BAR_INTERRUPTED, flags, script
from sampling import (
    KNOWN_JOB,
    RUN_SCRIPT,
    UPSAMPLER,
    pictures,
    read_npz,
    run_here,
    run_ranks,
    save_broken,
    save_network,
    shard_files,
)

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


@pytest.fixture(scope="module")
def networks(networks):
    return {**networks, "timestep_respacing": 2}


def check_ended(outcome, *words):
    """Every rank failed, and one line says why."""
    assert outcome.returncode == 1 and "Traceback" not in outcome.output, outcome.output
    errors = [line for line in outcome.output.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: "), outcome.output
    assert all(str(word) in errors[0] for word in words), errors[0]


BAD_FLAGS = {
    "unknown preset": (dict(preset="imagenet255"), ["'imagenet255'"]),
    "unknown class": (dict(classes="whale"), ["--classes whale"]),
    "class outside": (dict(classes="4"), ["class 4", "0..3"]),
    "no samples": (dict(num_samples=0), ["--num_samples 0"]),
    "no batch": (dict(batch_size=0), ["--batch_size 0"]),
    "no steps": (dict(timestep_respacing=0), ["--timestep_respacing 0"]),
    "other flags": (dict(num_channels=64), ["model.pt", "num_channels is 32 in the file and 64 by the flags"]),
    "another job": (dict(seed=1), ["--seed 0, not 1", "--log_dir"]),
}


def test_two_ranks_refuse_bad_input_in_one_line(networks, monkeypatch, tmp_path):
    run_here(monkeypatch, "classifier_sample", **networks, num_samples=2, log_dir=tmp_path)
    for name, (changes, words) in BAD_FLAGS.items():
        options = {**networks, "num_samples": 2, "log_dir": tmp_path, **changes}
        outcome, _ = run_ranks(2, [script("classifier_sample"), *flags(**options)])
        check_ended(outcome, *words)
        assert "c10d" not in outcome.output, outcome.output  # torch, of a store that has gone
    np.savez(tmp_path / "base.npz", pictures(range(2), (8, 8, 3)))
    path = save_network(str(tmp_path / "upsampler/model.pt"), UPSAMPLER)
    options = dict(UPSAMPLER, model_path=path, base_samples=tmp_path / "base.npz", log_dir=tmp_path / "large")
    outcome, _ = run_ranks(2, [script("super_res_sample"), *flags(**options)])
    check_ended(outcome, "--base_samples", "no labels")


def test_two_ranks_refuse_a_damaged_finished_file_in_one_line(networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 2, "log_dir": tmp_path / "out", "save_images": tmp_path / "images"}
    run_here(monkeypatch, "classifier_sample", **options)
    victim = tmp_path / "out" / "samples_2x8x8x3.npz"
    os.truncate(victim, victim.stat().st_size - 7)
    outcome, _ = run_ranks(2, [script("classifier_sample"), *flags(**options)])
    check_ended(outcome, victim, "damaged", "remove it and run this again")
    assert "complete" not in outcome.output
    victim.unlink()
    run_ranks(2, [script("classifier_sample"), *flags(**options)])[0].check()
    assert len(read_npz(tmp_path / "out")["arr_0"]) == 2


@pytest.mark.parametrize("index, kept", [(6, [0, 8]), (13, [0, 4, 8, 16])])
def test_a_sample_without_a_number_on_one_rank_ends_all_and_keeps_the_others_batches(index, kept, tmp_path):
    outcome, _ = run_ranks(3, [tmp_path, 20, 4, index], KNOWN_JOB)
    check_ended(outcome, f"sample {index} is not finite")
    assert sorted(shard_files(tmp_path / "shards")) == [f"{i:09d}-{i + 4:09d}.npz" for i in kept]
    run_ranks(3, [tmp_path, 20, 4], KNOWN_JOB)[0].check()
    assert (read_npz(tmp_path)["arr_0"] == pictures(range(20))).all()


def test_a_network_without_numbers_names_a_sample(networks, tmp_path):
    broken = save_broken(tmp_path / "broken.pt", networks)
    options = {**networks, "model_path": broken, "num_samples": 8, "batch_size": 2}
    outcome, _ = run_ranks(2, [script("classifier_sample"), *flags(**options, log_dir=tmp_path / "out")])
    check_ended(outcome, "sample 0 is not finite")
    assert not list((tmp_path / "out").glob("**/*.npz"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_while_a_progress_bar_is_made(ranks, networks, tmp_path):
    options = {**networks, "num_samples": 2, "log_dir": tmp_path}
    outcome, _ = run_ranks(ranks, [script("classifier_sample"), *flags(**options)], BAR_INTERRUPTED + RUN_SCRIPT)
    assert outcome.returncode == (-2 if ranks == 1 else 130)  # Python ends "-c" by the signal
    assert "Traceback" not in outcome.output and outcome.output.splitlines()[-1] == "interrupted", outcome.output


def test_a_truncated_shard_is_made_again_with_a_warning(networks, monkeypatch, tmp_path):
    options = {**networks, "num_samples": 12, "batch_size": 2}
    run_here(monkeypatch, "classifier_sample", **options, log_dir=tmp_path / "whole")
    folder, argv = tmp_path / "cut", [script("classifier_sample"), *flags(**options, log_dir=tmp_path / "cut")]
    assert run_ranks(2, argv, kill_at=(folder / "shards/*-*.npz", 3, 0))[1]
    before = shard_files(folder / "shards")
    victim = folder / "shards" / sorted(before)[1]
    os.truncate(victim, victim.stat().st_size - 7)
    outcome = run_ranks(2, argv)[0].check()
    warnings = [line for line in outcome.output.splitlines() if "made again" in line]
    assert len(warnings) == 1 and str(victim) in warnings[0]
    assert f"{2 * len(before) - 2} of 12 samples are there already" in outcome.output
    names = ["whole", "cut"]
    assert len({(tmp_path / name / "samples_12x8x8x3.npz").read_bytes() for name in names}) == 1


# A limit on the size of files stands in for a full disk: it refuses writes in the midst of a file.
LIMITED = """
import resource, runpy, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_keeps_what_is_there(ranks, networks, tmp_path):
    def sample(folder, batch_size, limit=10**9, **options):
        argv = [script("classifier_sample"), *flags(**networks, num_samples=160, batch_size=batch_size, log_dir=folder)]
        return run_ranks(ranks, [limit, *argv], LIMITED, **options)

    free, full = tmp_path / "free", tmp_path / "full"
    sample(free, 8)[0].check()
    npz, png = ((free / f"samples_160x8x8x3.{kind}").stat().st_size for kind in ("npz", "png"))

    # Amid the shards: batches of eight images are kept, then those of forty don't fit.
    assert sample(full, 8, kill_at=(full / "shards/*-*.npz", 2, 0))[1]
    before = shard_files(full / "shards")
    assert 2 <= len(before) <= 4 and all((full / "shards" / name).stat().st_size < 2500 for name in before)
    words = [full / "shards", "cannot be written (File too large)", f"{8 * len(before)} of 160 samples are kept"]
    check_ended(sample(full, 40, limit=4000)[0], *words)
    assert shard_files(full / "shards") == before

    # Then at the picture, and last at the assembled file.
    assert 4000 < png < npz - 100
    for limit, name in [(png - 100, "samples_160x8x8x3.png"), (npz - 100, "samples_160x8x8x3.npz")]:
        check_ended(sample(full, 8, limit)[0], full / name, "File too large", "160 of 160 samples are kept")
        assert not [*full.glob("**/*.tmp"), *full.glob("samples*.npz")]
        assert shard_files(full / "shards").items() >= before.items()
    outcome = sample(full, 8)[0].check()
    assert "160 of 160 samples are there already" in outcome.output
    assert (read_npz(full)["arr_0"] == read_npz(free)["arr_0"]).all()
