"""Samples on disk: shards in any order and of any sizes, damage, other jobs; and arrays in .npz files of all kinds."""

import io
import json
import os
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import refused
from sampling import picture, pictures

from guided_diffusion import logger
from guided_diffusion.errors import InputError
from guided_diffusion.sample_store import NpzArray, SampleStore

pytestmark = pytest.mark.usefixtures("quiet", "cpu")
SIZE = (2, 3, 3)
JOB = {"seed": 0, "classifier_scale": 1.0, "classes": ""}


def new_store(folder, count=20, job=JOB, labels="index"):
    labels = np.arange(count) % 7 if isinstance(labels, str) else labels
    return SampleStore(str(folder), (count, *SIZE), job, labels)


def fill(store, spans):
    for start, stop in spans:
        store.write(start, pictures(range(start, stop)))


def some_spans(rng, count, share=1.0):
    """Adjoining spans that part 0..count, in any order; or a share of them."""
    edges = sorted({0, count, *(rng.randrange(count) for _ in range(6))})
    spans = list(zip(edges, edges[1:]))
    return rng.sample(spans, round(share * len(spans)))


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warn", lambda *args: said.append(" ".join(map(str, args))))
    return said


# From shards to one .npz


@pytest.mark.parametrize("labelled", [True, False])
def test_shards_of_any_sizes_become_the_same_file(labelled, tmp_path):
    rng, files = random.Random(0), set()
    for attempt in range(5):
        store = new_store(tmp_path / str(attempt), labels="index" if labelled else None)
        assert store.open() == [(0, 20)]
        fill(store, some_spans(rng, 20))
        assert store.missing() == [] and store.count == 20
        path = store.assemble()
        store.remove_shards()
        files.add((tmp_path / str(attempt) / "samples_20x2x3x3.npz").read_bytes())
        assert sorted(os.listdir(tmp_path / str(attempt))) == ["samples_20x2x3x3.json", "samples_20x2x3x3.npz"]
    assert len(files) == 1  # byte for byte
    arrays = read(path)
    assert (arrays["arr_0"] == pictures(range(20))).all() and arrays["arr_0"].dtype == np.uint8
    assert arrays.keys() == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
    if labelled:
        assert arrays["arr_1"].tolist() == [i % 7 for i in range(20)] and arrays["arr_1"].dtype == np.int64


def test_what_is_missing_is_what_no_shard_holds(tmp_path):
    rng = random.Random(1)
    for attempt in range(20):
        folder, held = tmp_path / str(attempt), some_spans(rng, 20, share=0.5)
        store = new_store(folder)
        store.open()
        fill(store, held)
        gaps = new_store(folder).open()  # another process's view
        assert gaps == sorted(gaps) and all(start < stop for start, stop in gaps)
        missing = [i for start, stop in gaps for i in range(start, stop)]
        assert missing == [i for i in range(20) if not any(start <= i < stop for start, stop in held)]


def test_single_samples_and_parts(tmp_path):
    store = new_store(tmp_path)
    store.open()
    fill(store, [(7, 20), (0, 4), (4, 7)])
    wanted = [0, 3, 4, 11, 19]
    assert (store.images(wanted) == pictures(wanted)).all()
    assert [(start, len(part())) for start, part in store.parts()] == [(0, 4), (4, 3), (7, 13)]
    store.assemble()
    store.remove_shards()
    again = new_store(tmp_path)
    assert again.open() == [] and again.count == 20
    assert (np.concatenate([part() for _, part in again.parts()]) == pictures(range(20))).all()


# Damage


def damaged_versions(whole, rng, flips=150):
    """A file cut off at some places, and with single bits turned."""
    for length in {0, 1, 4, 30, len(whole) // 2, len(whole) - 1, *rng.sample(range(len(whole)), 10)}:
        yield whole[:length]
    for place in rng.sample(range(len(whole)), flips):
        turned = bytearray(whole)
        turned[place] ^= 1 << rng.randrange(8)
        yield bytes(turned)
    yield b"a page that says 404, perhaps" * 30


@pytest.mark.parametrize("labelled", [True, False])
def test_a_damaged_shard_is_made_again_and_others_are_kept(labelled, tmp_path, monkeypatch):
    labels = "index" if labelled else None
    store = new_store(tmp_path, labels=labels)
    store.open()
    fill(store, [(0, 5), (5, 12), (12, 20)])
    path, said, noticed = tmp_path / "shards" / "000000005-000000012.npz", warnings(monkeypatch), 0
    whole = path.read_bytes()
    for content in damaged_versions(whole, random.Random(2)):
        path.write_bytes(content)
        del said[:]
        store = new_store(tmp_path, labels=labels)
        if store.open():
            noticed += 1
            assert store.missing() == [(5, 12)] and not path.exists()
            assert len(said) == 1 and str(path) in said[0] and "made again" in said[0]
        else:  # a bit in which nobody is interested, such as one of the file's date
            assert not said and (store.images(range(20)) == pictures(range(20))).all()
    assert noticed > 120


@pytest.mark.parametrize("labelled", [True, False])
def test_a_damaged_finished_file_is_not_called_complete(labelled, tmp_path):
    labels, path, noticed = "index" if labelled else None, tmp_path / "samples_20x2x3x3.npz", 0
    store = new_store(tmp_path, labels=labels)
    store.open()
    fill(store, [(0, 20)])
    store.assemble()
    store.remove_shards()
    whole = path.read_bytes()
    for content in damaged_versions(whole, random.Random(3)):
        path.write_bytes(content)
        try:
            assert new_store(tmp_path, labels=labels).open() == []
        except InputError:
            noticed += 1
            refused(new_store(tmp_path, labels=labels).open, path, "damaged", "remove it and run this again")
        else:  # a bit in which nobody is interested
            found = read(path)
            assert (found["arr_0"] == pictures(range(20))).all()
            assert not labelled or (found["arr_1"] == store.labels).all()
        assert path.read_bytes() == content  # it is the user's to remove
    assert noticed > 100
    path.unlink()
    assert new_store(tmp_path, labels=labels).open() == [(0, 20)]


def test_a_finished_file_with_other_arrays_is_damaged(tmp_path):
    path, images, labels = tmp_path / "samples_20x2x3x3.npz", pictures(range(20)), np.arange(20) % 7
    (tmp_path / "samples_20x2x3x3.json").write_text(json.dumps(JOB))
    write_npz(path, arr_0=images, arr_1=labels)
    assert new_store(tmp_path).open() == []
    others = [(images[:19], labels), (images.astype(float), labels), (images, labels[1:]), (images, labels + 0.5)]
    for arr_0, arr_1 in others:
        write_npz(path, arr_0=arr_0, arr_1=arr_1)
        refused(new_store(tmp_path).open, path, "damaged", "remove it and run this again")
    write_npz(path, arr_0=images)  # no labels, where they are wanted
    refused(new_store(tmp_path).open, path, "damaged", "arr_1", "remove it and run this again")


def test_a_big_finished_file_is_checked_by_the_block(tmp_path):
    images = np.repeat(pictures(range(40), (32, 32, 3)), 200, axis=0)  # 24 MB
    (tmp_path / "samples_8000x32x32x3.json").write_text(json.dumps(JOB))
    path = tmp_path / "samples_8000x32x32x3.npz"
    write_npz(path, arr_0=images)
    tracemalloc.start()
    try:
        assert SampleStore(str(tmp_path), images.shape, JOB).open() == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 4
    with open(path, "rb+") as f:  # and to its end
        f.seek(images.nbytes - 1000)
        f.write(b"damage")
    refused(SampleStore(str(tmp_path), images.shape, JOB).open, path, "damaged")


def test_a_job_s_record_that_is_damaged_or_gone_is_not_taken_for_granted(tmp_path):
    store = new_store(tmp_path)
    store.open()
    fill(store, [(0, 5)])
    record = tmp_path / "shards" / "job.json"
    whole = record.read_bytes()
    for content in (b"", b"{", b"[1, 2]", None):
        record.unlink(missing_ok=True)
        record.write_bytes(content) if content is not None else None
        refused(new_store(tmp_path).open, record, "--log_dir")
        assert (tmp_path / "shards" / "000000000-000000005.npz").exists()
    record.write_bytes(whole)
    assert new_store(tmp_path).open() == [(5, 20)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    store = new_store(tmp_path)
    store.open()
    fill(store, [(0, 20)])
    left = [tmp_path / "samples_20x2x3x3.npz.77.tmp", tmp_path / "samples_20x2x3x3.json.77.tmp"]
    left.append(tmp_path / "shards" / "000000000-000000005.npz.77.tmp")
    others = [tmp_path / "notes.tmp", tmp_path / "samples_9x2x3x3.npz.77.tmp", tmp_path / "samples.csv"]
    for path in [*left, *others]:
        path.write_bytes(b"half")
    assert new_store(tmp_path).open() == []
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    # The same after the end of the assembly: the rename of another process may have been the last that it did.
    store.assemble()
    left[0].write_bytes(b"half")
    assert new_store(tmp_path).open() == [] and not left[0].exists() and not (tmp_path / "shards").exists()


@pytest.mark.parametrize("removed", range(4))
def test_shards_go_once_the_npz_is_there(removed, tmp_path):
    folder = tmp_path / "job"
    store = new_store(folder)
    store.open()
    fill(store, [(0, 8), (8, 20)])
    shards = ["000000000-000000008.npz", "000000008-000000020.npz", "job.json"]
    assert sorted(os.listdir(folder / "shards")) == shards
    store.assemble()
    for name in shards[:removed]:  # killed after so many
        (folder / "shards" / name).unlink()
    assert new_store(folder).open() == []
    assert sorted(os.listdir(folder)) == ["samples_20x2x3x3.json", "samples_20x2x3x3.npz"]
    assert (read(folder / "samples_20x2x3x3.npz")["arr_0"] == pictures(range(20))).all()


# Jobs that are not the same


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("complete", [False, True])
def test_another_job_is_refused_and_touches_nothing(complete, tmp_path):
    store = new_store(tmp_path)
    store.open()
    fill(store, [(0, 20)] if complete else [(0, 8)])
    if complete:
        store.assemble()
        store.remove_shards()
    before = contents(tmp_path)
    changes = {"seed": 1, "classifier_scale": 2.5, "classes": "3", "clip_denoised": False}
    for name, value in changes.items():
        refused(new_store(tmp_path, job={**JOB, name: value}).open, f"--{name} {JOB.get(name)}", value, "--log_dir")
    fewer = {name: value for name, value in JOB.items() if name != "classes"}
    refused(new_store(tmp_path, job=fewer).open, "--classes")
    other = np.arange(20) % 7
    other[5] = 6  # the same flags, but the file that has the classes says something else
    refused(new_store(tmp_path, labels=other).open, "other labels", "--log_dir")
    assert contents(tmp_path) == before
    assert new_store(tmp_path).open() == ([] if complete else [(8, 20)])


def test_an_npz_of_unknown_origin_is_in_the_way(tmp_path):
    tmp_path.joinpath("samples_20x2x3x3.npz").write_bytes(b"somebody's")
    refused(new_store(tmp_path).open, "samples_20x2x3x3.json", "--log_dir")
    assert tmp_path.joinpath("samples_20x2x3x3.npz").read_bytes() == b"somebody's"


def test_a_job_for_more_or_fewer_samples_takes_what_is_there(tmp_path, monkeypatch):
    said = warnings(monkeypatch)
    store = new_store(tmp_path)
    store.open()
    fill(store, [(0, 8), (8, 14)])
    longer = new_store(tmp_path, count=30)
    assert longer.open() == [(14, 30)]
    shorter = new_store(tmp_path, count=10)
    assert shorter.open() == [] and not said
    arrays = read(shorter.assemble())
    assert (arrays["arr_0"] == pictures(range(10))).all() and arrays["arr_1"].tolist() == [i % 7 for i in range(10)]
    shorter.remove_shards()
    assert new_store(tmp_path, count=10).open() == []
    assert new_store(tmp_path).open() == [(0, 8), (14, 20)]  # what the short one's .npz does not hold has stayed


def test_a_complete_job_leaves_another_s_shards_alone(tmp_path):
    store = new_store(tmp_path)
    store.open()
    fill(store, [(0, 20)])
    store.assemble()
    store.remove_shards()
    other = new_store(tmp_path, count=30, job={**JOB, "seed": 5})
    other.open()
    fill(other, [(0, 4)])
    assert new_store(tmp_path).open() == []
    assert new_store(tmp_path, count=30, job={**JOB, "seed": 5}).open() == [(4, 30)]


# Arrays in archives


def npy(array, version, fortran):
    """The bytes of a .npy file; of version 3 too, which numpy writes only where it must."""
    out = io.BytesIO()
    array = np.asfortranarray(array) if fortran else np.ascontiguousarray(array)
    np.lib.format.write_array(out, array, version=version)
    return out.getvalue()


def write_npz(path, compressed=False, version=(1, 0), fortran=False, **arrays):
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy(array, version, fortran))
    return str(path)


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_all_kinds_of_archives(version, compressed, fortran, tmp_path):
    images, labels = pictures(range(9), (4, 5, 3)), np.arange(9, dtype=">i4") * 3
    path = write_npz(tmp_path / "a.npz", compressed, version, fortran, first=np.zeros(3), arr_0=images, arr_1=labels)
    found = NpzArray(path, "arr_0")
    assert found.shape == images.shape and found.dtype == images.dtype and len(found) == 9
    for index in (slice(None), slice(3, 7), slice(8, 30), np.array([7, 0, 8, 0, 0, 5]), np.array([], int)):
        assert np.array_equal(found[index], images[index])
    assert np.array_equal(NpzArray(path, "arr_1")[:], labels)
    with pytest.raises(KeyError):
        NpzArray(path, "arr_2")


def test_numpy_s_own_archives_are_read(tmp_path):
    images = pictures(range(5))
    np.savez(tmp_path / "a.npz", images, np.arange(5))
    np.savez_compressed(tmp_path / "b.npz", images, np.arange(5))
    for name in ("a.npz", "b.npz"):
        assert np.array_equal(NpzArray(str(tmp_path / name), "arr_0")[1:4], images[1:4])
    np.savez(tmp_path / "c.npz", np.empty((0, 4, 4, 3), np.uint8), np.array([{}], dtype=object))
    assert len(NpzArray(str(tmp_path / "c.npz"), "arr_0")) == 0
    with pytest.raises(ValueError):  # objects could run code
        NpzArray(str(tmp_path / "c.npz"), "arr_1")


@pytest.mark.parametrize("compressed", [False, True])
def test_big_arrays_are_read_by_the_row(compressed, tmp_path):
    images = np.repeat(pictures(range(40), (32, 32, 3)), 200, axis=0)  # 24 MB
    path = write_npz(tmp_path / "a.npz", compressed, arr_0=images)
    tracemalloc.start()
    try:
        array = NpzArray(path, "arr_0")
        for start in range(0, len(images), 500):
            assert (array[np.arange(start, start + 10)] == images[start]).all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 4
    assert (array[np.array([3, 7999, 201])] == images[[3, 7999, 201]]).all()


def test_damage_to_an_archive_shows_at_once(tmp_path):
    for compressed in (False, True):
        path = write_npz(tmp_path / "a.npz", compressed, arr_0=pictures(range(50), (32, 32, 3)))
        content = bytearray(open(path, "rb").read())
        content[len(content) // 2] ^= 1
        open(path, "wb").write(content)
        with pytest.raises(Exception, match="(?i)crc|invalid|decompress"):
            NpzArray(path, "arr_0")


def test_pictures_differ():
    assert len({picture(i).tobytes() for i in range(100)}) == 100
    assert json.loads(json.dumps(JOB)) == JOB
