"""SampleStore: shards of any order and size, restarts, damaged files, and folders of other jobs."""

import os
import random

import numpy as np
import pytest
from helpers import refused
from sampling import pictures, read_npz

from guided_diffusion import logger
from guided_diffusion.sample_shards import SampleStore

pytestmark = pytest.mark.usefixtures("quiet", "cpu")
SIZE = (2, 3, 3)
JOB = {"seed": 0, "classifier_scale": 1.0, "classes": ""}
FINISHED = ["samples_20x2x3x3.json", "samples_20x2x3x3.npz"]


def new_store(folder, count=20, job=JOB, labelled=True):
    return SampleStore(str(folder), (count, *SIZE), job, np.arange(count) % 7 if labelled else None)


def opened(folder, spans=(), **options):
    """A store with a shard on disk for each span (start, stop) of samples."""
    store = new_store(folder, **options)
    store.open()
    for start, stop in spans:
        store.write(start, pictures(range(start, stop)))
    return store


def finish(store):
    store.assemble()
    store.remove_shards()


def some_spans(rng):
    """Split range(20) at random places. Return the spans (start, stop) in random order."""
    edges = sorted({0, 20, *(rng.randrange(20) for _ in range(6))})
    spans = list(zip(edges, edges[1:]))
    return rng.sample(spans, len(spans))


@pytest.mark.parametrize("labelled", [True, False])
def test_shards_of_any_sizes_are_assembled_into_identical_files(labelled, tmp_path):
    rng, found = random.Random(0), set()
    for attempt in range(10):
        folder, spans = tmp_path / str(attempt), some_spans(rng)[attempt % 3 :]
        store = opened(folder, spans, labelled=labelled)
        gaps = new_store(folder, labelled=labelled).open()
        assert gaps == store.missing() == sorted(gaps)
        held = [i for start, stop in [*spans, *gaps] for i in range(start, stop)]
        assert sorted(held) == list(range(20))
        finish(opened(folder, gaps, labelled=labelled))
        assert sorted(os.listdir(folder)) == FINISHED
        found.add((folder / FINISHED[1]).read_bytes())
    assert len(found) == 1
    arrays = read_npz(folder)
    assert arrays.keys() == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
    assert (arrays["arr_0"] == pictures(range(20))).all()
    if labelled:
        assert arrays["arr_1"].tolist() == [i % 7 for i in range(20)] and arrays["arr_1"].dtype == np.int64


# Restarts and damage


def test_a_truncated_shard_is_removed_and_the_others_are_kept(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warn", lambda *args: warnings.append(" ".join(map(str, args))))
    opened(tmp_path, [(0, 5), (5, 12), (12, 20)])
    path = tmp_path / "shards/000000005-000000012.npz"
    whole = path.read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert new_store(tmp_path).open() == [(5, 12)] and not path.exists()
        assert str(path) in warnings.pop() and not warnings
    path.write_bytes(whole)
    assert new_store(tmp_path).open() == [] and not warnings


@pytest.mark.parametrize("labelled", [True, False])
def test_a_damaged_finished_file_is_refused(labelled, tmp_path):
    finish(opened(tmp_path, [(0, 20)], labelled=labelled))
    path = tmp_path / FINISHED[1]
    whole, store = path.read_bytes(), new_store(tmp_path, labelled=labelled)
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(store.open, path, "damaged", "remove it and run this again")
        assert path.exists()  # a damaged result file is not removed automatically
    for arr_0 in (pictures(range(19)), pictures(range(20)).astype(float)):
        np.savez(path, arr_0, np.arange(20) % 7)
        refused(store.open, path, "damaged")
    path.unlink()
    assert store.open() == [(0, 20)]


def test_samples_without_a_readable_record_of_their_job_are_refused(tmp_path):
    opened(tmp_path, [(0, 5)])
    record = tmp_path / "shards/job.json"
    whole = record.read_bytes()
    for content in (b"", b"{", b"[1, 2]", None):
        record.unlink()
        record.write_bytes(content) if content is not None else None
        refused(new_store(tmp_path).open, record, "--log_dir")
        assert (tmp_path / "shards/000000000-000000005.npz").exists()
        record.write_bytes(whole)
    assert new_store(tmp_path).open() == [(5, 20)]
    (tmp_path / FINISHED[1]).write_bytes(b"somebody's")
    refused(new_store(tmp_path).open, FINISHED[0], "--log_dir")
    assert (tmp_path / FINISHED[1]).read_bytes() == b"somebody's"


def test_temporary_files_are_removed(tmp_path):
    opened(tmp_path, [(0, 20)])
    names = [*FINISHED, "samples_20x2x3x3.png", "shards/000000000-000000005.npz", "shards/job.json"]
    left = [tmp_path / f"{name}.77.tmp" for name in names]
    others = [tmp_path / "notes.tmp", tmp_path / "samples.csv"]
    for path in [*left, *others]:
        path.write_bytes(b"half")
    assert new_store(tmp_path).open() == []
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


@pytest.mark.parametrize("removed", range(4))
def test_a_restart_removes_shards_left_beside_the_finished_npz(removed, tmp_path):
    shards = ["000000000-000000008.npz", "000000008-000000020.npz", "job.json"]
    folder = tmp_path / "job"
    opened(folder, [(0, 8), (8, 20)]).assemble()
    assert sorted(os.listdir(folder / "shards")) == shards
    for name in shards[:removed]:
        (folder / "shards" / name).unlink()
    assert new_store(folder).open() == []
    assert sorted(os.listdir(folder)) == FINISHED


# Other jobs


@pytest.mark.parametrize("complete", [False, True])
def test_another_job_is_refused_and_changes_nothing(complete, tmp_path):
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    store = opened(tmp_path, [(0, 20)] if complete else [(0, 8)])
    if complete:
        finish(store)
    before = contents()
    for name, value in {"seed": 1, "classifier_scale": 2.5, "classes": "3", "clip_denoised": False}.items():
        refused(new_store(tmp_path, job={**JOB, name: value}).open, f"--{name} {JOB.get(name)}", value, "--log_dir")
    refused(new_store(tmp_path, job={k: v for k, v in JOB.items() if k != "classes"}).open, "--classes")
    other = new_store(tmp_path)
    other.labels = np.where(np.arange(20) == 5, 6, other.labels)  # as if the file given by --classes had changed
    refused(other.open, "other labels", "--log_dir")
    assert contents() == before
    assert new_store(tmp_path).open() == ([] if complete else [(8, 20)])


def test_a_job_of_more_or_fewer_samples_uses_the_existing_ones(tmp_path):
    opened(tmp_path, [(0, 8), (8, 14)])
    assert new_store(tmp_path, count=30).open() == [(14, 30)]
    shorter = new_store(tmp_path, count=10)
    assert shorter.open() == []
    finish(shorter)
    arrays = read_npz(tmp_path)
    assert (arrays["arr_0"] == pictures(range(10))).all() and arrays["arr_1"].tolist() == [i % 7 for i in range(10)]
    assert new_store(tmp_path, count=10).open() == []
    assert new_store(tmp_path).open() == [(0, 8), (14, 20)]  # the shard (8, 14) still exists
