"""The evaluator from end to end: golden figures of the original, all kinds of files, ranks, and bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from launch import ROOT, run

from evaluations.batches import Batch
from evaluations.errors import EvaluationError
from evaluations.inception import InceptionV3, legacy_resize, read_graph

DATA = os.path.join(os.path.dirname(__file__), "data", "evaluator")
EVALUATOR = os.path.join(ROOT, "evaluations", "evaluator.py")
sys.path.insert(0, DATA)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A graph of the Inception graph's structure with seeded weights, and the batches that the original was run on."""
    import make_batches

    stage = tmp_path_factory.mktemp("evaluator")
    subprocess.run([sys.executable, f"{DATA}/make_graph.py", "-o", stage / "graph.pb"], check=True, capture_output=True)
    np.savez(stage / "ref.npz", arr_0=make_batches.blobs(60, 32, [1, 32]))
    samples = make_batches.blobs(50, 32, [2, 32], n_blobs=9, sharp=1.5, tint=0.05)
    np.savez(stage / "sample.npz", arr_0=samples)
    return stage


@pytest.fixture(scope="module")
def golden():
    with np.load(os.path.join(DATA, "golden_32.npz")) as f:
        return dict(f)


def evaluate(stage, *args, ref="ref.npz", samples="sample.npz", ranks=None, env=None):
    """Run the evaluator; paths are names in the stage."""
    argv = [EVALUATOR, str(stage / ref), str(stage / samples), "--inception_path", str(stage / "graph.pb"), *args]
    return run(argv, ranks=ranks, env={"OMP_NUM_THREADS": "2", **(env or {})}, timeout=120)


def figures(stage, *args, **options):
    path = stage / "figures.json"
    evaluate(stage, *args, "--json", str(path), **options).check()
    return {k: v for k, v in json.loads(path.read_text()).items() if isinstance(v, float)}


@pytest.fixture(scope="module")
def whole(stage):
    return figures(stage)


# Golden figures

EXACT = {"fid": 56.69938126690853, "sfid": 708.6537196472954}  # in float64, of TensorFlow's activations


def test_figures_are_the_original_s(whole, golden):
    for name, exact in EXACT.items():
        assert whole[name] == pytest.approx(exact, rel=1e-6)
        assert whole[name] == pytest.approx(float(golden[name]), rel=2e-6)
    assert whole["is"] == pytest.approx(float(golden["inception_score"]), rel=1e-5)
    assert (whole["precision"], whole["recall"]) == (0.82, 0.8)


def test_features_are_the_original_s(stage, golden):
    network = InceptionV3(read_graph(stage / "graph.pb"))
    for which, name in (("ref", "ref.npz"), ("sample", "sample.npz")):
        images = next(Batch(str(stage / name)).images(0, 8, 8))
        for kind, got in zip(("pool", "spatial"), network(th.from_numpy(images))):
            want = golden[f"{kind}_{which}"]
            assert got.shape == want.shape
            assert np.linalg.norm(got.numpy() - want) < 1e-4 * np.linalg.norm(want)


def test_resize_looks_at_the_top_left():
    """Position i * in / out, between its lower and upper neighbour: no half pixels."""
    x = th.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 3, 4)
    got = legacy_resize(x, 6)[0, 0]
    want = [min(i * 4 / 6, 3) for i in range(6)]
    assert th.allclose(got, th.tensor(want).expand(6, 6), atol=1e-6)
    assert th.equal(legacy_resize(x[..., :3], 3), x[..., :3])


def test_output_is_the_original_s_lines(stage):
    done = subprocess.run(
        [sys.executable, EVALUATOR, stage / "ref.npz", stage / "sample.npz", "--inception_path", stage / "graph.pb",
         "--num_samples", "20"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert "20 samples: FID is biased" in done.stderr


def test_ranks_find_the_same(stage, whole):
    got = figures(stage, "--metrics", "is,fid,precision,recall", ranks=3, env={"OMP_NUM_THREADS": "1"})
    # Batches fall otherwise, and convolutions round by batch; all else does not depend on the split.
    assert got == {name: pytest.approx(whole[name], rel=2e-6) for name in got} and len(got) == 4


def test_a_batch_is_at_no_distance_from_itself(stage):
    got = figures(stage, "--metrics", "fid,precision,recall", samples="ref.npz")
    assert abs(got["fid"]) < 1e-6
    assert (got["precision"], got["recall"]) == (1, 1)


def test_statistics_and_the_cache_stand_for_images(stage, whole):
    cache = stage / "cache"
    options = ["--metrics", "fid,sfid", "--cache_dir", str(cache)]
    assert figures(stage, *options) == {name: whole[name] for name in ("fid", "sfid")}
    assert len(list(cache.iterdir())) == 1
    again = evaluate(stage, *options).check()
    assert "its features are those kept in" in again.output and f"FID: {whole['fid']}" in again.output

    with np.load(next(cache.iterdir())) as kept:
        stats = {}
        for kind, suffix in (("pool", ""), ("spatial", "_s")):
            stats[f"mu{suffix}"] = kept[f"{kind}_mean"]
            stats[f"sigma{suffix}"] = kept[f"{kind}_scatter"] / (int(kept[f"{kind}_n"]) - 1)
    with np.load(stage / "ref.npz") as f:
        np.savez(stage / "with_statistics.npz", arr_0=f["arr_0"][:4], **stats)
    got = figures(stage, "--metrics", "fid,sfid", ref="with_statistics.npz")
    assert got == {name: pytest.approx(whole[name], rel=1e-9) for name in ("fid", "sfid")}


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


def test_bad_commands(stage, tmp_path):
    (stage / "text.npz").write_text("not an archive")
    with np.load(stage / "sample.npz") as f:
        np.savez(stage / "three.npz", arr_0=f["arr_0"][:3])
    whole = (stage / "sample.npz").read_bytes()
    (stage / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (stage / "cut.pb").write_bytes((stage / "graph.pb").read_bytes()[:1_000_000])
    refused(evaluate(stage, ref="gone.npz"), "gone.npz: no such file")
    refused(evaluate(stage, samples="text.npz"), "text.npz: not an .npz file")
    refused(evaluate(stage, samples="cut.npz"), "cut.npz: not an .npz file")
    refused(evaluate(stage, samples="three.npz"), "three.npz: 3 images", "at least 4")
    refused(evaluate(stage, "--metrics", "fid,kid"), "--metrics fid,kid", "'kid'", "recall")
    refused(evaluate(stage, "--inception_path", str(stage / "cut.pb")), "cut.pb")
    refused(evaluate(stage, "--inception_path", str(stage / "none.pb")), "none.pb: no such file", "https://")
    refused(evaluate(stage, ref="gone.npz", ranks=2), "gone.npz: no such file")


def test_another_graph_is_refused_by_its_first_missing_node(tmp_path):
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    graph.node.add(name="conv/weights", op="Const")
    (tmp_path / "other.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(EvaluationError, match="no node conv/conv2d_params"):
        read_graph(tmp_path / "other.pb")


def test_constants_may_be_one_repeated_value(stage, tmp_path):
    path = tmp_path / "compact.pb"
    subprocess.run(
        [sys.executable, f"{DATA}/make_graph.py", "-o", path, "--compact-gamma"], check=True, capture_output=True
    )
    want, got = read_graph(stage / "graph.pb"), read_graph(path)
    assert want.keys() == got.keys() and all(np.array_equal(want[k], got[k]) for k in want)


def test_no_network_and_no_graph(stage, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    argv = [EVALUATOR, str(stage / "ref.npz"), str(stage / "sample.npz")]
    done = run(argv, env=env)
    refused(done, "classify_image_graph_def.pb", "https://", "--inception_path", str(tmp_path))
    assert not any(name.endswith(".tmp") for _, _, names in os.walk(tmp_path) for name in names)
