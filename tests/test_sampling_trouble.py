"""Failures of sampling jobs: a one-line error, a nonzero exit status, and no finished sample lost."""

import os

import pytest
from helpers import as_rank, refused
from launch import flags, run_ranks, script
from sampling import KnownSampler, known_job, known_job_on_ranks, pictures, read_npz, run_here, save_broken, shard_files

from guided_diffusion import dist_util

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


@pytest.fixture(scope="module")
def networks(networks):
    return {**networks, "timestep_respacing": 2, "num_samples": 2}


def check_ended(outcome, *words):
    """Check that the job failed within 10 s, with one error line that contains all the words."""
    assert outcome.returncode == 1 and outcome.seconds < 10 and "Traceback" not in outcome.output, outcome.output
    errors = [line for line in outcome.output.replace("\r", "\n").splitlines() if "error:" in line]
    assert any(all(str(word) in line for word in words) for line in errors), outcome.output


def test_an_error_found_only_by_rank_0_ends_all_ranks(networks, monkeypatch, tmp_path):
    run_here(monkeypatch, "classifier_sample", **networks, log_dir=tmp_path)
    argv = [script("classifier_sample"), *flags(**networks, log_dir=tmp_path, seed=1)]
    check_ended(run_ranks(2, argv)[0], "--seed 0, not 1", "--log_dir")


def test_a_non_finite_sample_is_named_and_not_written(networks, monkeypatch, tmp_path):
    def known(**options):
        return known_job(tmp_path, 20, 4, save_images=str(tmp_path / "each"), **options)

    refused(lambda: known(sampler=KnownSampler(fail_at=13)), "sample 13 is not finite")
    assert list(shard_files(tmp_path / "shards")) == [f"{i:09d}-{i + 4:09d}.npz" for i in (0, 4, 8)]
    assert not list(tmp_path.glob("samples*")) and len(os.listdir(tmp_path / "each")) == 12
    os.truncate(tmp_path / "shards/000000004-000000008.npz", 100)  # a damaged shard is made again
    sampler, arrays = known()
    assert sampler.asked == [range(4, 8), range(12, 16), range(16, 20)]
    assert (arrays["arr_0"] == pictures(range(20))).all()
    options = {**networks, "model_path": save_broken(tmp_path / "broken.pt", networks), "log_dir": tmp_path / "out"}
    refused(lambda: run_here(monkeypatch, "classifier_sample", **options), "sample 0 is not finite")


def test_a_non_finite_sample_on_one_rank_ends_all_ranks(tmp_path):
    check_ended(known_job_on_ranks(3, tmp_path, 20, 4, fail_at=6), "sample 6 is not finite")
    assert not os.path.exists(tmp_path / "shards/000000004-000000008.npz")
    known_job_on_ranks(3, tmp_path, 20, 4).check()
    assert (read_npz(tmp_path)["arr_0"] == pictures(range(20))).all()


def test_finished_samples_are_kept_if_the_disk_is_full(tmp_path):
    """A file size limit stands in for a full disk: a write fails in the middle of a file."""
    size, count = dict(shape=(3, 8, 8)), 160
    known_job(tmp_path / "free", count, 8, KnownSampler(**size))
    npz = (tmp_path / "free/samples_160x8x8x3.npz").stat().st_size
    full = tmp_path / "full"
    with pytest.raises(Exception, match="sample 24"):
        known_job(full, count, 8, KnownSampler(**size, fail_at=24))
    before = shard_files(full / "shards")
    assert len(before) == 3
    # The limit is reached first in a shard (shards of 8 samples fit, shards of 40 do not), then in the .npz file.
    for ranks, batch_size, limit, name in [(2, 40, 4000, "shards"), (2, 8, npz - 100, "samples_160x8x8x3.npz")]:
        outcome = known_job_on_ranks(ranks, full, count, batch_size, limit, **size)
        check_ended(outcome, full / name, "cannot be written (File too large)", f"are kept in {full}")
        assert not [*full.glob("**/*.tmp"), *full.glob("samples*.npz")]
        assert shard_files(full / "shards").items() >= before.items()
    assert known_job_on_ranks(2, full, count, 8, **size).check().output.count("made []") == 2
    assert (read_npz(full)["arr_0"] == read_npz(tmp_path / "free")["arr_0"]).all()


def test_samples_written_by_another_rank_to_another_folder_are_reported_missing(monkeypatch, tmp_path):
    """If two nodes do not share --log_dir, the job fails and writes no incomplete .npz file."""
    with monkeypatch.context() as patch:
        as_rank(patch, 0, 2)
        patch.setattr(dist_util, "wait_for_all", lambda: None)
        refused(lambda: known_job(tmp_path, 20, 4), "samples 4 to 7", "--log_dir", "share")
    assert not list(tmp_path.glob("samples*"))
    assert known_job(tmp_path, 20, 4)[0].asked == [range(4, 8), range(12, 16)]
