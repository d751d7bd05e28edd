"""From stored images to figures over ranks, with a network of known features in Inception's place; and bad input.

From top to bottom: features by ranks and batches, figures, the cache, features that are no numbers, the command.
"""

import json
import math
import os
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch as th
from launch import run
from test_evaluation_metrics import by_hand

from evaluations import evaluator
from evaluations.batches import Batch
from evaluations.errors import EvaluationError
from evaluations.features import METRICS, Features, compare, reference_features
from evaluations.ranks import Ranks

pytestmark = pytest.mark.usefixtures("cpu")

RNG = np.random.default_rng(0)
REFERENCE = RNG.integers(0, 255, (37, 3, 2, 3), dtype=np.uint8)
SAMPLES = (RNG.integers(0, 255, (26, 3, 2, 3)) * [0.9, 0.8, 0.5]).astype(np.uint8)
BAD = 255  # a first pixel of this value gets features that are no numbers


class KnownNetwork:
    """In Inception's place: features are pixels, the same to the last bit in any batch.

    :param bad: what a bad image's feature `place` is; the first 6 are pool features, the next 4 spatial ones.
    :ivar seen: the batches of images that it was shown.
    """

    pool_dim, spatial_dim, device = 6, 4, th.device("cpu")

    def __init__(self, bad=math.nan, place=0):
        self.bad, self.place, self.seen = bad, place, []

    def __call__(self, images):
        self.seen.append(images.numpy().copy())
        flat = images.reshape(len(images), -1).float() / 64
        flat[images[:, 0, 0, 0] == BAD, self.place] = self.bad
        return flat[:, :6], flat[:, 6:10]

    def logits(self, pool):
        return 2 * pool[:, :5]


class ThreadRanks(Ranks):
    """One of several ranks, each of which is a thread of this process; they run in turn, from exchange to exchange."""

    def __init__(self, rank, size, values=None, barrier=None, turn=None):
        self.comm, self.rank, self.size, self.local_rank = None, rank, size, rank
        self.values, self.barrier, self.turn = values, barrier, turn

    def gather_all(self, value):
        self.values[self.rank] = value
        self._wait()
        values = list(self.values)
        self._wait()
        return values

    def gather(self, value):
        values = self.gather_all(value)
        return values if self.rank == 0 else None

    def _wait(self):
        self.turn.release()
        try:
            self.barrier.wait(30)
        finally:
            self.turn.acquire()


def on_ranks(size, work):
    """work(ranks) on so many ranks: rank 0's value. What a rank raises ends all, and is raised."""
    turn, barrier, values = threading.Lock(), threading.Barrier(size), [None] * size
    found, raised = [None] * size, []

    def run_rank(rank):
        with turn:  # Python 3.11 parses .npy headers in one thread at a time only (CPython's issue 106905)
            try:
                found[rank] = work(ThreadRanks(rank, size, values, barrier, turn))
            except threading.BrokenBarrierError:
                pass
            except BaseException as e:
                raised.append(e)
                barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return found[0]


def truth(reference, samples):
    """All figures, from pixels and definitions in numpy."""

    def features(images):
        flat = images.reshape(len(images), -1) / 64
        return flat[:, :6], flat[:, 6:10]

    def distance(a, b):
        (mu1, s1), (mu2, s2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
        root = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
        return ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * root

    (pool1, spatial1), (pool2, spatial2) = features(reference), features(samples)
    p = np.exp(2 * pool2[:, :5])
    p /= p.sum(axis=1, keepdims=True)
    score = np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    figures = {"is": score, "fid": distance(pool1, pool2), "sfid": distance(spatial1, spatial2)}
    figures["precision"], figures["recall"] = by_hand(pool1, pool2, 3)
    return figures


def save(path, images, stored):
    """Write a batch: "plain", "compressed" or in "fortran" order."""
    array = np.asfortranarray(images) if "fortran" in stored else images
    (np.savez_compressed if "compressed" in stored else np.savez)(path, arr_0=array)
    return str(path)


def evaluate(folder, size=1, batch_size=32, wanted=METRICS, network=None, stored="plain", limit=0, **options):
    paths = save(folder / "ref.npz", REFERENCE, stored), save(folder / "samples.npz", SAMPLES, stored)
    network = network or KnownNetwork()

    def work(ranks):
        reference, samples = map(Batch, paths)
        known = reference_features(network, reference, batch_size, ranks, wanted, **options)
        found = Features(network, samples, batch_size, ranks, wanted, limit)
        return compare(wanted, reference, known, found) if ranks.rank == 0 else None

    return on_ranks(size, work)


def check(figures, want=None):
    want = want or truth(REFERENCE, SAMPLES)
    assert figures == {name: pytest.approx(want[name], rel=1e-9) for name in figures}


# Figures


@pytest.mark.parametrize("stored", ["plain", "compressed", "fortran", "compressed fortran"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_figures_are_right_however_images_are_stored_and_dealt(size, stored, tmp_path):
    for batch_size in (1, 4, 13, 100):
        figures = evaluate(tmp_path, size, batch_size, stored=stored)
        assert list(figures) == list(METRICS)
        check(figures)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_images_are_read_once_and_a_batch_at_a_time(size, batch_size, tmp_path):
    """The batches are the same, whatever the ranks: features may depend on what else is in a batch."""
    network = KnownNetwork()
    path = save(tmp_path / "b.npz", REFERENCE, "compressed")
    on_ranks(size, lambda ranks: Features(network, Batch(path), batch_size, ranks, ["fid"]))
    want = sorted(REFERENCE[i : i + batch_size].tobytes() for i in range(0, 37, batch_size))
    assert sorted(images.tobytes() for images in network.seen) == want


@pytest.mark.parametrize("stored", ["plain", "compressed", "fortran", "compressed fortran"])
def test_batches_are_torch_s_to_keep(stored, tmp_path):
    """Arrays that cannot be written make torch warn the user."""
    for images in Batch(save(tmp_path / "b.npz", REFERENCE, stored)).images(0, 37, 10):
        assert images.flags.writeable and images.dtype == np.uint8


def test_ranks_share_evenly():
    for size in range(1, 8):
        for count in (1, 4, 31, 32, 33, 1000):
            shares = [ThreadRanks(rank, size).share(count, 8) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            batches = [-(-len(share) // 8) for share in shares]
            assert max(batches) - min(batches) <= 1


def test_a_limit_takes_the_first_samples(tmp_path):
    want = truth(REFERENCE, SAMPLES[:15])
    for size in (1, 3):
        check(evaluate(tmp_path, size, 4, limit=15), want)
    check(evaluate(tmp_path, limit=1000))


def test_only_what_is_wanted_is_computed(tmp_path):
    want = truth(REFERENCE, SAMPLES)
    for name in METRICS:
        network = KnownNetwork()
        figures = evaluate(tmp_path, wanted=[name], network=network)
        assert figures == {name: pytest.approx(want[name], rel=1e-9)}
        assert sum(map(len, network.seen)) == (26 if name == "is" else 63)


def statistics(images):
    flat = images.reshape(len(images), -1) / 64
    arrays = {}
    for suffix, x in (("", flat[:, :6]), ("_s", flat[:, 6:10])):
        arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = x.mean(axis=0), np.cov(x, rowvar=False)
    return arrays


def test_a_batch_s_own_statistics_stand_for_its_images(tmp_path):
    """They are of all images, of which arr_0 may be a few, for precision and recall alone."""
    few = REFERENCE[5:17]
    np.savez(tmp_path / "ref.npz", arr_0=few, **statistics(REFERENCE))
    reference, network = Batch(str(tmp_path / "ref.npz")), KnownNetwork()
    samples = Batch(save(tmp_path / "samples.npz", SAMPLES, "plain"))
    assert reference_features(network, reference, 8, Ranks(), ["is", "fid", "sfid"]) is None and not network.seen
    known = reference_features(network, reference, 8, Ranks(), METRICS)
    assert sum(map(len, network.seen)) == 12
    found = Features(network, samples, 8, Ranks(), METRICS)
    want = truth(REFERENCE, SAMPLES)
    want["precision"], want["recall"] = (truth(few, SAMPLES)[name] for name in ("precision", "recall"))
    check(compare(METRICS, reference, known, found), want)


# The cache


def test_the_cache_spares_the_reference(tmp_path):
    def figures(identity="a", **options):
        network = KnownNetwork()
        options = {"wanted": METRICS, "size": 1, **options}
        found = evaluate(tmp_path, network=network, cache_dir=str(tmp_path / "cache"), identity=identity, **options)
        check(found)
        return sum(map(len, network.seen)) - 26

    assert [figures(), figures(), figures(size=3), figures(size=3, batch_size=4)] == [37, 0, 0, 0]
    assert [figures("b"), figures("b")] == [37, 0]  # another network
    assert [figures(wanted=["fid"]), figures(wanted=["fid"])] == [37, 0]  # other features are kept
    assert [figures(wanted=["precision"]), figures(wanted=["recall"])] == [37, 0]
    assert len(os.listdir(tmp_path / "cache")) == 4


def test_the_cache_goes_by_content(tmp_path):
    for images in (REFERENCE, REFERENCE + 1):
        network = KnownNetwork()
        batch = Batch(save(tmp_path / "same_name.npz", images, "plain"))
        reference_features(network, batch, 8, Ranks(), METRICS, str(tmp_path / "cache"), "a")
        assert sum(map(len, network.seen)) == 37


@pytest.mark.parametrize("size", [1, 2])
def test_a_damaged_cache_is_made_anew(size, tmp_path):
    options = dict(size=size, cache_dir=str(tmp_path / "cache"), identity="a")
    evaluate(tmp_path, **options)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:300] + b"\0" * 200 + whole[500:]):
        path.write_bytes(damaged)
        check(evaluate(tmp_path, **options))
        assert path.read_bytes() == whole


# Features that are no numbers


@pytest.mark.parametrize("bad, place", [(math.nan, 0), (math.nan, 9), (math.inf, 5), (-math.inf, 6)])
@pytest.mark.parametrize("wanted", METRICS)
@pytest.mark.parametrize("where, named", [(0, "0 to 3"), (13, "12 to 15"), (25, "24 to 25")])
def test_features_that_are_not_finite_are_refused(bad, place, wanted, where, named, tmp_path):
    images = SAMPLES.copy()
    images[where, 0, 0, 0] = BAD
    path = save(tmp_path / "bad.npz", images, "plain")
    for size in (1, 2, 3):
        with pytest.raises(EvaluationError) as caught:
            on_ranks(size, lambda ranks: Features(KnownNetwork(bad, place), Batch(path), 4, ranks, [wanted]))
        message = str(caught.value)
        assert "\n" not in message and f"{path}: images {named} have features that are not finite" in message


# Only the second rank's share is bad: the first waits for it.
SECOND_RANK = """
import sys
sys.path.insert(0, sys.argv[1])
import test_evaluation_features as t
ranks = t.Ranks()
def work():
    features = t.Features(t.KnownNetwork(), t.Batch(sys.argv[2]), 4, ranks, ["fid"])
    print("rank", ranks.rank, features.moments["pool"].n)
t.evaluator.run_evaluation(work, ranks)
"""


def test_one_rank_s_trouble_ends_all(tmp_path):
    images = SAMPLES.copy()
    images[21, 0, 0, 0] = BAD
    path = save(tmp_path / "bad.npz", images, "plain")
    done = run(["-c", SECOND_RANK, os.path.dirname(__file__), path], ranks=2)
    lines = [line for line in done.output.splitlines() if "error:" in line]
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    assert len(lines) == 1 and f"error: {path}: images 20 to 23 have features that are not finite" in lines[0]


# The command, with the known network


class Command:
    """The evaluator, or another command, in this process.

    :ivar network: in Inception's place.
    """

    def __init__(self, monkeypatch, capsys, module=evaluator):
        self.monkeypatch, self.capsys, self.module, self.network = monkeypatch, capsys, module, KnownNetwork()

    def __call__(self, *args):
        """Its exit status, stdout and stderr."""
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [self.module.__name__, *map(str, args)])
            patch.setattr(self.module, "load_inception", lambda *args: (self.network, "known "))
            self.capsys.readouterr()
            try:
                self.module.main()
                status = 0
            except SystemExit as e:
                status = e.code
        return status, *self.capsys.readouterr()

    def refused(self, *args):
        """The one line by which it refuses its arguments."""
        status, out, err = self(*args)
        lines = err.splitlines()
        assert status == 1 and not out
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        return lines[-1].removeprefix("error: ")


@pytest.fixture
def command(monkeypatch, capsys):
    return Command(monkeypatch, capsys)


@pytest.fixture
def pair(tmp_path):
    return save(tmp_path / "ref.npz", REFERENCE, "plain"), save(tmp_path / "samples.npz", SAMPLES, "plain")


def test_the_command_prints_the_figures(command, pair, tmp_path):
    want = truth(REFERENCE, SAMPLES)
    status, out, err = command(*pair, "--json", tmp_path / "new" / "figures.json")
    lines = [line.split(": ") for line in out.splitlines()]
    assert status == 0 and [name for name, _ in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert [float(value) for _, value in lines] == [pytest.approx(want[name], rel=1e-9) for name in METRICS]
    record = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert record == {
        "reference": pair[0], "samples": pair[1], "dtype": "fp32",
        **dict(zip(METRICS, (float(value) for _, value in lines))),
    }  # fmt: skip
    assert "warning: 26 samples: FID is biased" in err

    _, out, _ = command(*pair, "--metrics", " Recall,fid ,")
    assert [line.split(":")[0] for line in out.splitlines()] == ["FID", "Recall"]


def test_the_command_keeps_a_cache(command, pair, tmp_path):
    _, want, _ = command(*pair, "--cache_dir", tmp_path / "cache")
    command.network.seen.clear()
    status, out, err = command(*pair, "--cache_dir", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    assert status == 0 and out == want and f"its features are those kept in {kept}" in err
    assert sum(map(len, command.network.seen)) == len(SAMPLES)


def test_warnings(command, pair, tmp_path, monkeypatch):
    larger = save(tmp_path / "larger.npz", SAMPLES.repeat(2, axis=1), "plain")
    status, _, err = command(pair[0], larger, "--metrics", "fid")
    assert status == 0 and "warning: samples are 6x2, the reference 3x2: both are resized" in err
    _, _, err = command(*pair, "--metrics", "fid")
    assert "resized" not in err
    monkeypatch.setattr("evaluations.features.ADVISED", 26)
    assert "biased" not in command(*pair)[2]
    assert "warning: 25 samples: FID is biased" in command(*pair, "--num_samples", 25)[2]


def nan_pair(tmp_path, which):
    images = SAMPLES.copy()
    images[2, 0, 0, 0] = BAD
    paths = {name: save(tmp_path / f"{name}.npz", SAMPLES, "plain") for name in ("ref", "samples")}
    paths[which] = save(tmp_path / "bad.npz", images, "plain")
    return [paths["ref"], paths["samples"]]


@pytest.mark.parametrize("which", ["ref", "samples"])
def test_bad_features_by_the_command(which, command, tmp_path):
    line = command.refused(*nan_pair(tmp_path, which), "--batch_size", 2)
    assert line.startswith(f"{tmp_path}/bad.npz: images 2 to 3 have features that are not finite")


GOOD_STATISTICS = statistics(REFERENCE)
BAD_STATISTICS = {
    "of other features": (
        {name: (x[:-1] if x.ndim == 1 else x[:-1, :-1]) for name, x in GOOD_STATISTICS.items()},
        "of 5 features, but these have 6",
    ),
    "unlike each other": ({**GOOD_STATISTICS, "sigma": np.eye(5)}, "mu is 6, but sigma is 5x5"),
    "a row too few": ({**GOOD_STATISTICS, "sigma_s": np.eye(4)[:3]}, "mu_s is 4, but sigma_s is 3x4"),
    "flat": ({**GOOD_STATISTICS, "sigma": np.zeros(6)}, "mu is 6, but sigma is 6"),
    "a mean that is a table": ({**GOOD_STATISTICS, "mu": np.zeros((1, 6))}, "mu is 1x6, but sigma is 6x6"),
    "text": ({**GOOD_STATISTICS, "mu": np.array(["many"] * 6)}, "mu"),
    "objects": ({**GOOD_STATISTICS, "sigma_s": np.array([None] * 4)}, "sigma_s"),
    "infinite": ({**GOOD_STATISTICS, "sigma_s": np.full((4, 4), np.inf)}, "sigma_s has values that are not finite"),
    "no mu_s": ({k: v for k, v in GOOD_STATISTICS.items() if k != "mu_s"}, "without mu_s"),
    "sigma alone": ({"sigma": GOOD_STATISTICS["sigma"]}, "sigma without mu, mu_s, sigma_s"),
}


@pytest.mark.parametrize("case", BAD_STATISTICS)
def test_bad_statistics(case, command, pair, tmp_path):
    arrays, words = BAD_STATISTICS[case]
    path = tmp_path / "bad.npz"
    np.savez(path, arr_0=REFERENCE, **arrays)
    line = command.refused(path, pair[1])
    assert str(path) in line and words in line, line


def damaged(path, name):
    """Spoil a member's data in the middle, in place."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    with open(path, "r+b") as f:
        f.seek(info.header_offset + info.compress_size // 2 + 60)
        f.write(b"\xaa" * 20)


@pytest.mark.parametrize(
    "name, save_as", [("arr_0.npy", np.savez_compressed), ("sigma.npy", np.savez_compressed), ("sigma.npy", np.savez)]
)
def test_damaged_files(name, save_as, command, pair, tmp_path):
    path = tmp_path / "bad.npz"
    save_as(path, arr_0=REFERENCE, **GOOD_STATISTICS)
    damaged(path, name)
    line = command.refused(path, pair[1])
    assert str(path) in line


IMAGES = np.zeros((8, 6, 5, 3), np.uint8)
BAD_FILES = {
    "missing": (None, "no such file"),
    "text": (b"an error page, perhaps", "not an .npz file"),
    "nothing": (b"", "not an .npz file"),
    "a folder": ("folder", "not an .npz file"),
    "an .npy": (IMAGES, "not an .npz file"),
    "other names": (dict(images=IMAGES, labels=IMAGES), "arr_0 is missing (it holds images, labels)"),
    "no array": ({}, "arr_0 is missing (it holds nothing)"),
    "0 to 1": (dict(arr_0=IMAGES + np.float32(0.5)), "float32 with values from 0.5 to 0.5: save x * 255"),
    "-1 to 1": (dict(arr_0=IMAGES - 0.25), "float64 with values from -0.25 to -0.25: save (x + 1) * 127.5"),
    "0 to 255 as floats": (dict(arr_0=IMAGES + 200.0), "float64; uint8 from 0 to 255 is expected"),
    "not finite": (dict(arr_0=IMAGES + np.nan), "float64; uint8 from 0 to 255 is expected"),
    "channels first": (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "transpose them to NHWC"),
    "one channel": (dict(arr_0=IMAGES[..., :1]), "1 channels in the last place; 3 are expected"),
    "four channels": (dict(arr_0=IMAGES[..., [0, 1, 2, 0]]), "4 channels in the last place; 3 are expected"),
    "no channels": (dict(arr_0=IMAGES[..., 0]), "Nx height x width x3 is expected"),
    "no image": (dict(arr_0=IMAGES[:0]), "Nx height x width x3 is expected"),
    "no pixels": (dict(arr_0=IMAGES[:, :0]), "Nx height x width x3 is expected"),
    "a number": (dict(arr_0=np.uint8(3)), "Nx height x width x3 is expected"),
    "booleans": (dict(arr_0=IMAGES > 0), "type bool"),
    "objects": (dict(arr_0=np.array([None, 1])), "cannot be read (it holds Python objects)"),
    "three images": (dict(arr_0=IMAGES[:3]), "3 images; the metrics need at least 4"),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, place, command, pair, tmp_path):
    content, words = BAD_FILES[case]
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, str):
        path.mkdir()
    elif content is not None:
        with open(path, "wb") as f:
            np.save(f, content)
    paths = list(pair)
    paths[place] = path
    line = command.refused(*paths)
    assert line.startswith(str(path)) and words in line, line
    assert not command.network.seen  # before hours go into features


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--metrics", "fid,kid"], "'kid': choose some of is,fid,sfid,precision,recall"),
        (["--batch_size", 0], "--batch_size must be at least 1"),
        (["--num_samples", -1], "--num_samples at least 0"),
        (["--num_samples", 3], "samples.npz: 3 images; the metrics need at least 4"),
        (["--device", "cuda:9"], "--device cuda:9: not to be had here"),
        (["--device", "abacus"], "--device abacus: not to be had here"),
        (["--json", "{folder}/file/figures.json"], "file/figures.json: cannot be written"),
        (["--json", "{folder}"], "cannot be written"),
        (["--cache_dir", "{folder}/file"], "cannot be written"),
    ],
)
def test_bad_flags(flags, words, command, pair, tmp_path):
    (tmp_path / "file").write_text("")
    line_of = command.refused if "--json" not in flags else lambda *args: command(*args)[2].splitlines()[-1]
    line = line_of(*pair, *(str(flag).format(folder=tmp_path) for flag in flags))
    assert words in line, line
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


# Ctrl-C


class InterruptedNetwork(KnownNetwork):
    def __call__(self, images):
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        return super().__call__(images)


def interrupted_write(f, **arrays):
    f.write(b"some of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["network", "cache", "json"])
def test_ctrl_c_leaves_no_file(moment, command, pair, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    (tmp_path / "cache").mkdir()
    if moment == "network":
        command.network = InterruptedNetwork()
    elif moment == "cache":
        monkeypatch.setattr("evaluations.files.np.savez", interrupted_write)
    else:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("evaluations.evaluator.json.dumps", interrupted)
    status, out, err = command(
        *pair, "--batch_size", 8, "--json", tmp_path / "figures.json", "--cache_dir", tmp_path / "cache"
    )
    assert status == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "cache"])
    assert len(os.listdir(tmp_path / "cache")) == (moment == "json")  # whole before that
