"""NpzArray and write_npz: all .npz variants, reading a few rows at a time, and damaged files."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from sampling import pictures

from guided_diffusion.npz_arrays import DAMAGED, NpzArray, write_npz


def save_archive(path, compressed, version, fortran, **arrays):
    """Write an .npz archive in the given .npy format version, which numpy.savez cannot choose."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            out = io.BytesIO()
            array = np.asfortranarray(array) if fortran else np.ascontiguousarray(array)
            np.lib.format.write_array(out, array, version=version)
            archive.writestr(f"{name}.npy", out.getvalue())
    return str(path)


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_variants_of_npz_archives_are_read(version, compressed, fortran, tmp_path):
    images, labels = pictures(range(9), (4, 5, 3)), np.arange(9, dtype=">i4") * 3
    arrays = dict(first=np.zeros(3), arr_0=images, arr_1=labels, empty=images[:0])
    path = save_archive(tmp_path / "a.npz", compressed, version, fortran, **arrays)
    found = NpzArray(path, "arr_0")
    assert found.shape == images.shape and found.dtype == images.dtype and len(found) == 9
    for index in (slice(None), slice(3, 7), slice(8, 30), slice(9, 1), np.array([7, 0, 8, 0, 5]), np.array([], int)):
        assert np.array_equal(found[index], images[index])
    assert np.array_equal(NpzArray(path, "arr_1")[:], labels)
    assert len(NpzArray(path, "empty")) == 0
    with pytest.raises(KeyError):
        NpzArray(path, "arr_2")


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{}], dtype=object))  # unpickling an object array could run arbitrary code
    with pytest.raises(ValueError):
        NpzArray(str(tmp_path / "a.npz"), "arr_0")


def test_rows_are_read_without_the_rest_of_the_array(tmp_path):
    images = np.repeat(pictures(range(40), (32, 32, 3)), 200, axis=0)  # 24 MB
    np.savez(tmp_path / "a.npz", images)
    tracemalloc.start()
    try:
        array = NpzArray(str(tmp_path / "a.npz"), "arr_0")
        for start in range(0, len(images), 500):
            assert (array[np.arange(start, start + 10)] == images[start]).all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 4


@pytest.mark.parametrize("cut", [0, 1, 30, 300, -300, -1])
def test_truncated_archives_raise_one_of_the_documented_exceptions(cut, tmp_path):
    np.savez(tmp_path / "a.npz", pictures(range(9)))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:cut])
    with pytest.raises(DAMAGED):
        NpzArray(str(tmp_path / "a.npz"), "arr_0")


def test_numpy_reads_archives_written_in_parts(tmp_path):
    images = pictures(range(10))
    with open(tmp_path / "a.npz", "wb") as f:
        parts = (images[i : i + 4] for i in (0, 4, 8))
        write_npz(f, {"arr_0": (images.shape, np.uint8, parts), "arr_1": ((10,), np.int64, [np.arange(10)])})
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["arr_1"], np.arange(10))
