"""The evaluator with the Inception network: the original's metrics and features, ranks, threads, bad graph files."""

import functools
import json
import os
import sys

import numpy as np
import pytest
import torch as th
from launch import ROOT, check_refused, run, run_ranks

from evaluations import inception
from evaluations.inception import InceptionV3, legacy_resize, read_graph
from evaluations.metrics import frechet_distance, manifold_radii, precision_recall
from guided_diffusion.errors import InputError

pytestmark = pytest.mark.usefixtures("cpu")

DATA = os.path.join(os.path.dirname(__file__), "data", "evaluator")
EVALUATOR = os.path.join(ROOT, "evaluations", "evaluator.py")
COUNTS = {32: (60, 50), 64: (400, 300)}  # {image size: (reference images, samples)}
LINES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]
# Metrics computed in float64 from the activations of TensorFlow's network, by image size
EXACT = {
    32: {"fid": 56.69938126690853, "sfid": 708.6537196472954, "precision": 0.82, "recall": 0.8},
    64: {"fid": 26.090373225600487, "sfid": 444.8676530752458, "precision": 0.8666666666666667, "recall": 0.67},
}
sys.path.insert(0, DATA)


def blobs(count, size, samples=False):
    """The first `count` images of the batch on which the original evaluator was run."""
    import make_batches

    options = ([2, size], 9, 1.5, 0.05) if samples else ([1, size],)
    return make_batches.blobs(count, size, *options)


@functools.cache
def golden(size):
    with np.load(os.path.join(DATA, f"golden_{size}.npz")) as f:
        return dict(f)


@functools.cache
def network_of(graph):
    return InceptionV3(read_graph(graph))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with reference and sample batches, for which the original's results are recorded."""
    stage = tmp_path_factory.mktemp("evaluator")
    for size, (reference, samples) in COUNTS.items():
        np.savez(stage / f"ref{size}.npz", arr_0=blobs(reference, size))
        np.savez_compressed(stage / f"sample{size}.npz", arr_0=blobs(samples, size, samples=True))
    return stage


def evaluate(stage, graph, size, *args, ranks=None):
    """Run the evaluator on the reference and sample batches with images of `size` pixels."""
    pair = [str(stage / f"ref{size}.npz"), str(stage / f"sample{size}.npz")]
    cache = ["--cache_dir", str(stage / f"cache{size}")]
    return run([EVALUATOR, *pair, "--inception_path", str(graph), *cache, *args], ranks=ranks, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_metrics_match_the_original(size, stage, inception_graph):
    """The first run uses two ranks. The second run has no launcher and reuses the cached reference features."""
    done = evaluate(stage, inception_graph, size, "--json", str(stage / "figures.json"), ranks=2).check()
    assert "samples: FID is biased" in done.output
    got, want, exact = json.loads((stage / "figures.json").read_text()), golden(size), EXACT[size]
    for name in ("fid", "sfid"):
        assert got[name] == pytest.approx(exact[name], rel=1e-6)
        assert got[name] == pytest.approx(float(want[name]), rel=2e-6)
    assert got["is"] == pytest.approx(float(want["inception_score"]), rel=1e-5)
    assert (got["precision"], got["recall"]) == (exact["precision"], exact["recall"])

    (kept,) = (stage / f"cache{size}").iterdir()
    with np.load(kept) as arrays:
        pool, mean, covariance = arrays["pool"], arrays["pool_mean"], arrays["pool_scatter"] / (arrays["pool_n"] - 1)
    assert rows_error(pool[:8], want["pool_ref"]) < 1e-4
    radii = manifold_radii(pool).sqrt().numpy()
    original = np.sqrt(want["radii_ref"][:, 0])  # the original computes distances in float16
    assert np.abs(radii / original - 1).max() < 0.02 and np.abs(np.median(radii / original) - 1) < 0.002
    assert precision_recall(pool, pool) == (1, 1)
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-6

    output = evaluate(stage, inception_graph, size, "--num_samples", "8").check().output
    assert f"using the features kept in {kept}" in output
    assert [line.split(":")[0] for line in output.splitlines()][-5:] == LINES


def rows_error(found, want):
    return (np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1)).max()


def test_features_match_the_original_for_any_threads_and_batch_size(inception_graph):
    """PyTorch uses other convolution kernels for small batches on one thread."""
    pytest.importorskip("tensorboard")
    network, want = network_of(inception_graph), golden(64)
    images = th.from_numpy(np.concatenate([blobs(8, 64), blobs(8, 64, samples=True)]))
    found = network(images)
    for kind, features in zip(("pool", "spatial"), found):
        assert rows_error(features.numpy(), np.concatenate([want[f"{kind}_ref"], want[f"{kind}_sample"]])) < 1e-4
    before = th.get_num_threads()
    try:
        for threads, count in ((1, 4), (2, 4), (2, 1)):
            th.set_num_threads(threads)
            for features, whole in zip(network(images[:count]), found):
                assert float((features - whole[:count]).norm()) <= 1e-9 * float(whole[:count].norm())
    finally:
        th.set_num_threads(before)


def test_float32_is_not_rounded_to_tf32_on_a_gpu(inception_graph, monkeypatch):
    """PyTorch allows TF32 in convolutions by default. The network must restore this global setting."""
    pytest.importorskip("tensorboard")
    convolve, seen = inception._convolve, []

    def recording(*args):
        seen.append(th.backends.cudnn.allow_tf32)
        return convolve(*args)

    monkeypatch.setattr(inception, "_convolve", recording)
    network_of(inception_graph)(th.zeros(1, 8, 8, 3, dtype=th.uint8))
    assert seen and not any(seen) and th.backends.cudnn.allow_tf32


def test_legacy_resize_aligns_the_top_left_pixels():
    """Output pixel i interpolates the input at i * in_size / out_size, without a half-pixel offset."""
    x = th.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 3, 4)
    got = legacy_resize(x, 6)[0, 0]
    want = [min(i * 4 / 6, 3) for i in range(6)]
    assert th.allclose(got, th.tensor(want).expand(6, 6), atol=1e-6)
    assert th.equal(legacy_resize(x[..., :3], 3), x[..., :3])


# Bad input


def test_a_missing_batch_file_ends_all_ranks(stage, tmp_path):
    argv = [EVALUATOR, str(stage / "gone.npz"), str(stage / "sample32.npz")]
    check_refused(run_ranks(2, argv)[0], ["gone.npz: no such file"], last=False)


def test_bad_inception_graphs_are_refused(inception_graph, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "cut.pb").write_bytes(inception_graph.read_bytes()[:1_000_000])
    (tmp_path / "text.pb").write_text("an error page, perhaps")
    (tmp_path / "folder.pb").mkdir()
    for name, words in (("cut", "truncated"), ("text", "not a TensorFlow graph"), ("folder", "cannot be read")):
        with pytest.raises(InputError, match=f"{name}.pb: .*{words}") as caught:
            read_graph(tmp_path / f"{name}.pb")
        assert "\n" not in str(caught.value)


def test_a_missing_inception_graph_without_internet_is_an_error(stage, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done, _ = run_ranks(None, [EVALUATOR, stage / "ref32.npz", stage / "sample32.npz"], env=env)
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    words = ("error: classify_image_graph_def.pb", "https://", "--inception_path", str(tmp_path))
    assert all(word in done.output.splitlines()[-1] for word in words), done.output
    assert not any(name.endswith(".tmp") for _, _, names in os.walk(tmp_path) for name in names)
