"""The evaluator from end to end: golden figures of the original, ranks, threads, all kinds of files, and bad input."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from launch import ROOT, clean_environment, run
from test_evaluation_download import write_graph

from evaluations import inception
from evaluations.batches import Batch
from evaluations.errors import EvaluationError
from evaluations.inception import InceptionV3, legacy_resize, read_graph
from evaluations.metrics import frechet_distance, manifold_radii, precision_recall

pytestmark = pytest.mark.usefixtures("cpu")

DATA = os.path.join(os.path.dirname(__file__), "data", "evaluator")
EVALUATOR = os.path.join(ROOT, "evaluations", "evaluator.py")
COUNTS = {32: (60, 50), 64: (400, 300)}  # images of the golden pairs by their size
LINES = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
sys.path.insert(0, DATA)


def blobs(count, size, samples=False):
    """Of the batches that the original was run on, the first so many images."""
    import make_batches

    return make_batches.blobs(count, size, [2, size], 9, 1.5, 0.05) if samples else make_batches.blobs(
        count, size, [1, size]
    )  # fmt: skip


def make_graph(path, *args):
    """Write a graph of the Inception graph's structure with seeded weights: that which the original was run with."""
    argv = [sys.executable, os.path.join(DATA, "make_graph.py"), "-o", path, *args]
    subprocess.run(argv, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with the graph, the golden pairs of 32 and 64 pixels, and fewer images of the first."""
    stage = tmp_path_factory.mktemp("evaluator")
    make_graph(stage / "graph.pb")
    for size, (reference, samples) in COUNTS.items():
        np.savez(stage / f"ref{size}.npz", arr_0=blobs(reference, size))
        np.savez(stage / f"sample{size}.npz", arr_0=blobs(samples, size, samples=True))
    np.savez(stage / "few_ref.npz", arr_0=blobs(24, 32))
    np.savez_compressed(stage / "few.npz", arr_0=blobs(16, 32, samples=True))
    return stage


@functools.cache
def golden(size):
    with np.load(os.path.join(DATA, f"golden_{size}.npz")) as f:
        return dict(f)


def evaluate(stage, *args, ref="ref32.npz", samples="sample32.npz", ranks=None):
    """Run the evaluator; paths are names in the stage."""
    argv = [EVALUATOR, str(stage / ref), str(stage / samples), "--inception_path", str(stage / "graph.pb"), *args]
    return run(argv, ranks=ranks, timeout=300)


def figures(stage, *args, **options):
    path = stage / "figures.json"
    evaluate(stage, *args, "--json", str(path), **options).check()
    return {k: v for k, v in json.loads(path.read_text()).items() if isinstance(v, float)}


FEW = dict(ref="few_ref.npz", samples="few.npz")


@pytest.fixture(scope="module")
def few(stage):
    """What one process prints of the few images, batches of 8, on two threads; its cache is in the stage."""
    paths = [stage / FEW["ref"], stage / FEW["samples"], "--inception_path", stage / "graph.pb"]
    return subprocess.run(
        [sys.executable, EVALUATOR, *paths, "--batch_size", "8", "--cache_dir", stage / "cache"],
        env=clean_environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive"), capture_output=True, text=True,
        check=True,
    )  # fmt: skip


def printed(done):
    """Figures by their lines of the evaluator's output."""
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    return {name: float(lines[line]) for name, line in LINES.items() if line in lines}


# Golden figures

# In float64, of TensorFlow's activations
EXACT = {
    32: {"fid": 56.69938126690853, "sfid": 708.6537196472954, "precision": 0.82, "recall": 0.8},
    64: {"fid": 26.090373225600487, "sfid": 444.8676530752458, "precision": 0.8666666666666667, "recall": 0.67},
}


@pytest.mark.parametrize("size", COUNTS)
def test_figures_are_the_original_s(size, stage):
    """On two ranks with a thread each: quick also where other work shares the cores."""
    paths = dict(ref=f"ref{size}.npz", samples=f"sample{size}.npz")
    cache = stage / f"cache{size}"
    got = figures(stage, "--cache_dir", str(cache), ranks=2, **paths)
    want, exact = golden(size), EXACT[size]
    for name in ("fid", "sfid"):
        assert got[name] == pytest.approx(exact[name], rel=1e-6)
        assert got[name] == pytest.approx(float(want[name]), rel=2e-6)
    assert got["is"] == pytest.approx(float(want["inception_score"]), rel=1e-5)
    assert (got["precision"], got["recall"]) == (exact["precision"], exact["recall"])

    radii = manifold_radii(kept_features(cache)["pool"]).sqrt().numpy()
    original = np.sqrt(want["radii_ref"][:, 0])  # of distances in float16
    assert np.abs(radii / original - 1).max() < 0.02 and np.abs(np.median(radii / original) - 1) < 0.002


def kept_features(cache):
    """The arrays of the one file in a cache folder."""
    (kept,) = cache.iterdir()
    with np.load(kept) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("size", [32, 64])
def test_features_are_the_original_s(size, stage):
    network, want = network_of(stage), golden(size)
    for which in ("ref", "sample"):
        got = network(th.from_numpy(blobs(8, size, which == "sample")))
        for kind, features in zip(("pool", "spatial"), got):
            reference = want[f"{kind}_{which}"]
            assert features.shape == reference.shape
            assert np.linalg.norm(features.numpy() - reference) < 1e-4 * np.linalg.norm(reference)
            rows = np.linalg.norm(features.numpy() - reference, axis=1) / np.linalg.norm(reference, axis=1)
            assert rows.max() < 1e-4


@functools.cache
def network_of(stage):
    return InceptionV3(read_graph(stage / "graph.pb"))


def test_features_depend_neither_on_threads_nor_on_the_batch(stage):
    """A batch of fewer than 16 images, and a single thread, once led to other kernels."""
    network, images = network_of(stage), th.from_numpy(blobs(18, 32))
    before, found = th.get_num_threads(), {}
    try:
        for threads, count in ((1, 18), (1, 5), (2, 5), (2, 1)):
            th.set_num_threads(threads)
            found[threads, count] = network(images[:count])
    finally:
        th.set_num_threads(before)
    for (_, count), got in found.items():
        for features, want in zip(got, found[1, 18]):
            assert float((features - want[:count]).norm()) <= 1e-9 * float(want[:count].norm())


def test_float32_is_not_rounded_to_tf32_on_a_gpu(stage, monkeypatch):
    """torch's default lets a GPU do so in convolutions; the setting is the process's, so it is put back."""
    convolve, seen = inception._convolve, []

    def noting(*args):
        seen.append(th.backends.cudnn.allow_tf32)
        return convolve(*args)

    monkeypatch.setattr(inception, "_convolve", noting)
    network_of(stage)(th.zeros(1, 8, 8, 3, dtype=th.uint8))
    assert seen and not any(seen) and th.backends.cudnn.allow_tf32


def test_resize_looks_at_the_top_left():
    """Position i * in / out, between its lower and upper neighbour: no half pixels."""
    x = th.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 3, 4)
    got = legacy_resize(x, 6)[0, 0]
    want = [min(i * 4 / 6, 3) for i in range(6)]
    assert th.allclose(got, th.tensor(want).expand(6, 6), atol=1e-6)
    assert th.equal(legacy_resize(x[..., :3], 3), x[..., :3])


def test_output_is_the_original_s_lines(few):
    assert [line.split(":")[0] for line in few.stdout.splitlines()] == list(LINES.values())
    assert "16 samples: FID is biased" in few.stderr


def test_ranks_find_the_same(stage, few):
    """On other threads, too; one of three ranks has no samples."""
    metrics = "is,fid,precision,recall"
    got = figures(stage, "--batch_size", "8", "--metrics", metrics, ranks=3, **FEW)
    assert got == {name: pytest.approx(printed(few)[name], rel=1e-9) for name in metrics.split(",")}


def statistics(kept):
    """The mean and covariance that features in a cache have, by kind."""
    return {
        kind: (kept[f"{kind}_mean"], kept[f"{kind}_scatter"] / (int(kept[f"{kind}_n"]) - 1))
        for kind in ("pool", "spatial")
    }


def test_statistics_stand_for_images_on_ranks_too(stage, few):
    (mu, sigma), (mu_s, sigma_s) = statistics(kept_features(stage / "cache")).values()
    with np.load(stage / "few_ref.npz") as f:
        np.savez(stage / "stats.npz", arr_0=f["arr_0"][:4], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    got = figures(stage, "--metrics", "is,sfid", ref="stats.npz", samples="few.npz", ranks=2)
    assert got == {name: pytest.approx(printed(few)[name], rel=1e-9) for name in ("is", "sfid")}


def test_a_batch_is_at_no_distance_from_itself(stage, few):
    kept = kept_features(stage / "cache")
    assert abs(frechet_distance(*statistics(kept)["pool"] * 2)) < 1e-6
    assert precision_recall(kept["pool"], kept["pool"]) == (1, 1)


# All kinds of files


def save_npy(f, array, version):
    np.lib.format.write_array(f, array, version=version)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_batches_are_read_however_they_are_stored(tmp_path, compressed, fortran, version):
    import zipfile

    images = np.random.default_rng(0).integers(0, 256, (11, 5, 4, 3), dtype=np.uint8)
    array = np.asfortranarray(images) if fortran else images
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as z:
        with z.open("arr_0.npy", "w") as f:
            save_npy(f, array, version)
    batch = Batch(str(tmp_path / "b.npz"))
    assert batch.shape == images.shape
    assert (np.concatenate(list(batch.images(0, 11, 4))) == images).all()
    assert (np.concatenate(list(batch.images(3, 9, 5))) == images[3:9]).all()


# Bad input

IMAGES = np.zeros((8, 6, 5, 3), np.uint8)
BAD_BATCHES = {
    "no images": (dict(images=IMAGES), ["arr_0 is missing", "images"]),
    "values from 0 to 1": (dict(arr_0=np.full(IMAGES.shape, 0.5)), ["float64", "x * 255"]),
    "values from -1 to 1": (dict(arr_0=np.full(IMAGES.shape, -0.5, np.float32)), ["float32", "(x + 1) * 127.5"]),
    "wide integers": (dict(arr_0=IMAGES.astype(np.int64)), ["int64", "uint8"]),
    "channels first": (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), ["8x3x6x5", "NCHW"]),
    "one channel": (dict(arr_0=IMAGES[..., :1]), ["8x6x5x1", "1 channels"]),
    "four channels": (dict(arr_0=np.zeros((8, 6, 5, 4), np.uint8)), ["4 channels"]),
    "one image without a batch": (dict(arr_0=IMAGES[0]), ["6x5x3", "Nx"]),
    "empty": (dict(arr_0=IMAGES[:0]), ["0x6x5x3"]),
    "mu without sigma": (dict(arr_0=IMAGES, mu=np.zeros(2048)), ["mu without sigma, mu_s, sigma_s"]),
    "no spatial pair": (dict(arr_0=IMAGES, mu=np.zeros(2), sigma=np.eye(2)), ["without mu_s, sigma_s"]),
    "not finite": (
        dict(arr_0=IMAGES, mu=np.full(2, np.nan), sigma=np.eye(2), mu_s=np.zeros(2), sigma_s=np.eye(2)),
        ["mu has values that are not finite"],
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(case, tmp_path):
    arrays, words = BAD_BATCHES[case]
    path = str(tmp_path / "bad.npz")
    np.savez(path, **arrays)
    with pytest.raises(EvaluationError) as caught:
        Batch(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [path, *words]), message


def refused(done, *words):
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.output


@pytest.mark.parametrize("ranks", [None, 2])
def test_bad_commands(ranks, stage):
    refused(evaluate(stage, ref="gone.npz", ranks=ranks), "gone.npz: no such file")


def test_bad_graphs(stage, tmp_path):
    (tmp_path / "cut.pb").write_bytes((stage / "graph.pb").read_bytes()[:1_000_000])
    (tmp_path / "text.pb").write_text("an error page, perhaps")
    (tmp_path / "folder.pb").mkdir()
    for name, words in (("cut", "cut short"), ("text", "not a TensorFlow graph"), ("folder", "cannot be read")):
        with pytest.raises(EvaluationError, match=f"{name}.pb: .*{words}") as caught:
            read_graph(tmp_path / f"{name}.pb")
        assert "\n" not in str(caught.value)
    refused(evaluate(stage, "--inception_path", str(tmp_path / "none.pb")), "none.pb: no such file", "https://")


@pytest.mark.parametrize("ranks", [None, 2])
def test_weights_that_are_no_numbers(ranks, stage, tmp_path):
    graph = write_graph(tmp_path / "nan.pb", mixed_2__tower__conv_1__batchnorm__beta=float("nan"))
    done = evaluate(stage, "--inception_path", str(graph), "--batch_size", "2", **FEW, ranks=ranks)
    first = r"(0 to 1|12 to 13)" if ranks else "0 to 1"
    refused(done, f"{stage}/few_ref.npz: images ", "have features that are not finite: the network's weights")
    assert re.search(f"images {first} have", done.output), done.output


def test_constants_may_be_one_repeated_value(stage, tmp_path):
    want, got = read_graph(stage / "graph.pb"), read_graph(make_graph(tmp_path / "compact.pb", "--compact-gamma"))
    assert want.keys() == got.keys() and all(np.array_equal(want[k], got[k]) for k in want)


def test_no_network_and_no_graph(stage, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    argv = [EVALUATOR, str(stage / "few_ref.npz"), str(stage / "few.npz")]
    done = run(argv, env=env)
    refused(done, "classify_image_graph_def.pb", "https://", "--inception_path", str(tmp_path))
    assert not any(name.endswith(".tmp") for _, _, names in os.walk(tmp_path) for name in names)


def test_a_launcher_without_its_library_is_told_in_one_line():
    argv = [os.path.join(ROOT, "evaluations", "evaluator.py"), "a.npz", "b.npz"]
    done = run(argv, env=dict(PMI_SIZE="2", PMI_RANK="0", MPI4PY_LIBMPI="/nonexistent/libmpi.so"))
    assert done.returncode == 1 and done.output.count("\n") == 1
    assert done.output.startswith("error: started by an MPI launcher") and "pip install mpi4py mpich" in done.output
