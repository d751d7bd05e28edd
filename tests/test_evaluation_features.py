"""The evaluator's metrics for a network with known features, on any number of ranks; its cache; bad input files."""

import itertools
import json
import math
import os
import zipfile

import numpy as np
import pytest
from helpers import as_rank
from known_features import (
    BAD,
    BATCH_SIZES,
    REFERENCE,
    SAMPLES,
    STORED,
    Command,
    KnownNetwork,
    check,
    evaluate,
    save,
    save_pair,
    statistics,
    survey,
    truth,
)
from launch import run_ranks

from evaluations.batches import Batch
from evaluations.evaluator import load_inception
from evaluations.features import METRICS, Features, reference_features, share
from guided_diffusion.errors import InputError

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def command(monkeypatch, capsys):
    return Command(monkeypatch, capsys)


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


# Metrics


@pytest.mark.parametrize("size", [None, 2, 3])
def test_metrics_do_not_depend_on_ranks_batch_size_or_file_format(size, tmp_path):
    folders = {}
    for stored in STORED:
        (tmp_path / stored).mkdir()
        folders[stored] = save_pair(tmp_path / stored, stored)
    if size is None:
        found = survey(folders)
    else:
        code = "import known_features\nknown_features.survey_on_ranks()"
        outcome, _ = run_ranks(size, [json.dumps(folders)], code=code)
        found = json.loads(outcome.check().output.splitlines()[-1])
    for figures in found["figures"]:
        assert list(figures) == list(METRICS)
        check(figures)
    for batch_size in BATCH_SIZES:  # features may depend on the batch, so all rank counts use the same batches
        batches = [x[i : i + batch_size] for x in (REFERENCE, SAMPLES) for i in range(0, len(x), batch_size)]
        assert found["seen"][str(batch_size)] == sorted(batch.tobytes().hex() for batch in batches)
    check(found["limited"], truth(REFERENCE, SAMPLES[:15]))


@pytest.mark.parametrize("stored", STORED)
def test_arrays_of_images_are_writable(stored, tmp_path):
    """torch.from_numpy warns about arrays that are not writable."""
    for images in Batch(save(tmp_path / "b.npz", REFERENCE, stored)).images(0, 37, 10):
        assert images.flags.writeable and images.dtype == np.uint8


def test_images_are_divided_evenly_among_ranks(monkeypatch):
    for size, count in itertools.product(range(1, 8), (1, 4, 31, 32, 33, 1000)):
        shares = []
        for rank in range(size):
            as_rank(monkeypatch, rank, size)
            shares.append(share(count, 8))
        assert [i for part in shares for i in part] == list(range(count))
        batches = [-(-len(part) // 8) for part in shares]
        assert max(batches) - min(batches) <= 1


def test_only_the_requested_metrics_are_computed(pair):
    want = truth(REFERENCE, SAMPLES)
    for name in METRICS:
        network = KnownNetwork()
        assert evaluate(pair, wanted=[name], network=network) == {name: pytest.approx(want[name], rel=1e-9)}
        assert sum(map(len, network.seen)) == (26 if name == "is" else 63)


def test_statistics_replace_the_reference_images(pair, tmp_path):
    """FID and sFID use the stored statistics; precision and recall use the images in arr_0, which may be fewer."""
    few = REFERENCE[5:17]
    np.savez(tmp_path / "stats.npz", arr_0=few, **statistics(REFERENCE))
    reference, network = Batch(str(tmp_path / "stats.npz")), KnownNetwork()
    assert reference_features(network, reference, 8, ["is", "fid", "sfid"]) is None and not network.seen
    want = truth(REFERENCE, SAMPLES)
    want["precision"], want["recall"] = (truth(few, SAMPLES)[name] for name in ("precision", "recall"))
    check(evaluate([tmp_path / "stats.npz", pair[1]], network=network), want)
    assert sum(map(len, network.seen)) == 12 + len(SAMPLES)


def test_grey_images_are_evaluated_as_three_equal_channels(command, pair, tmp_path):
    grey = save(tmp_path / "grey.npz", SAMPLES[..., :1])
    out, err = command(pair[0], grey)
    assert err.count("grey.npz: grey images, evaluated as three equal channels") == 1
    assert command(pair[0], save(tmp_path / "colour.npz", SAMPLES[..., :1].repeat(3, axis=3)))[0] == out


# The cache


def test_cached_reference_features_are_reused(pair, tmp_path):
    def images_read(identity="a", **options):
        network = KnownNetwork()
        check(evaluate(pair, network=network, cache_dir=str(tmp_path / "cache"), identity=identity, **options))
        return sum(map(len, network.seen)) - len(SAMPLES)

    assert [images_read(), images_read(), images_read(batch_size=4)] == [37, 0, 0]
    assert [images_read("b"), images_read("b")] == [37, 0]  # another network has its own cache file
    assert [images_read(wanted=["fid"]), images_read(wanted=["fid"])] == [37, 0]  # FID alone has its own file
    assert [images_read(wanted=["precision"]), images_read(wanted=["recall"])] == [37, 0]
    assert len(os.listdir(tmp_path / "cache")) == 4
    save(pair[0], REFERENCE + 1)  # a file with an unchanged name but new content
    network = KnownNetwork()
    reference_features(network, Batch(pair[0]), 8, METRICS, str(tmp_path / "cache"), "a")
    assert sum(map(len, network.seen)) == 37


def test_a_damaged_cache_file_is_replaced(pair, tmp_path):
    cache = dict(cache_dir=str(tmp_path / "cache"), identity="a")
    evaluate(pair, **cache)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:300] + b"\0" * 200 + whole[500:]):
        path.write_bytes(damaged)
        check(evaluate(pair, **cache))
        assert path.read_bytes() == whole


# Features that are not finite


@pytest.mark.parametrize("bad, place", [(math.nan, 0), (math.nan, 9), (math.inf, 5), (-math.inf, 6)])
@pytest.mark.parametrize("where, named", [(0, "0 to 3"), (25, "24 to 25")])
def test_features_that_are_not_finite_are_refused(bad, place, where, named, tmp_path):
    images = SAMPLES.copy()
    images[where, 0, 0, 0] = BAD
    path = save(tmp_path / "bad.npz", images)
    for wanted in METRICS:
        with pytest.raises(InputError, match=f"bad.npz: images {named} have features that are not finite"):
            Features(KnownNetwork(bad, place), Batch(path), 4, [wanted])


RANK = """
import sys, known_features as k
k.dist_util.setup_dist()
k.Features(k.KnownNetwork(), k.Batch(sys.argv[1]), 4, ["fid"])
"""


def test_an_error_on_one_rank_ends_all_ranks(tmp_path):
    images = SAMPLES.copy()
    images[21, 0, 0, 0] = BAD  # the second rank evaluates image 21
    path = save(tmp_path / "bad.npz", images)
    done, _ = run_ranks(2, [path], code=RANK)
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    assert f"error: {path}: images 20 to 23 have features that are not finite" in done.output


# The command line


def test_the_command_prints_the_metrics(command, pair, tmp_path):
    want = truth(REFERENCE, SAMPLES)
    cache = ["--cache_dir", tmp_path / "cache"]
    out, err = command(*pair, "--json", tmp_path / "new" / "figures.json", *cache)
    lines = [line.split(": ") for line in out.splitlines()]
    assert [name for name, _ in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert [float(value) for _, value in lines] == [pytest.approx(want[name], rel=1e-9) for name in METRICS]
    record = json.loads((tmp_path / "new" / "figures.json").read_text())
    figures = dict(zip(METRICS, (float(value) for _, value in lines)))
    assert record == {"reference": pair[0], "samples": pair[1], "dtype": "fp32", **figures}
    assert "warning: 26 samples: FID is biased" in err and "resized" not in err

    command.network.seen.clear()
    again, err = command(*pair, *cache)
    (kept,) = (tmp_path / "cache").iterdir()
    assert again == out and f"using the features kept in {kept}" in err
    assert sum(map(len, command.network.seen)) == len(SAMPLES)
    out, _ = command(*pair, "--metrics", " Recall,fid ,")
    assert [line.split(":")[0] for line in out.splitlines()] == ["FID", "Recall"]


def test_the_command_warns_about_questionable_input(command, pair, tmp_path, monkeypatch):
    larger = save(tmp_path / "larger.npz", SAMPLES.repeat(2, axis=1))
    assert "warning: samples are 6x2, reference images 3x2: both are resized" in command(pair[0], larger)[1]
    monkeypatch.setattr("evaluations.features.ADVISED", 26)
    assert "biased" not in command(*pair)[1]
    assert "warning: 25 samples: FID is biased" in command(*pair, "--num_samples", 25)[1]


GOOD = statistics(REFERENCE)
OF_OTHERS = {name: (x[:-1] if x.ndim == 1 else x[:-1, :-1]) for name, x in GOOD.items()}
BAD_STATISTICS = {
    "of other features": (OF_OTHERS, "of 5 features, but the network has 6"),
    "unlike each other": ({**GOOD, "sigma": np.eye(5)}, "mu is 6, but sigma is 5x5"),
    "a row too few": ({**GOOD, "sigma_s": np.eye(4)[:3]}, "mu_s is 4, but sigma_s is 3x4"),
    "a mean that is a table": ({**GOOD, "mu": np.zeros((1, 6))}, "mu is 1x6, but sigma is 6x6"),
    "text": ({**GOOD, "mu": np.array(["many"] * 6)}, "many"),
    "objects": ({**GOOD, "sigma_s": np.array([None] * 4)}, "allow_pickle"),
    "infinite": ({**GOOD, "sigma_s": np.full((4, 4), np.inf)}, "mu_s or sigma_s contains NaN or infinite values"),
    "not numbers": ({**GOOD, "mu": np.full(6, np.nan)}, "mu or sigma contains NaN or infinite values"),
    "no mu_s": ({k: v for k, v in GOOD.items() if k != "mu_s"}, "has only mu, sigma, sigma_s;"),
    "sigma alone": ({"sigma": GOOD["sigma"]}, "has only sigma;"),
}


def test_files_with_bad_statistics_are_refused(command, pair, tmp_path):
    for case, (arrays, words) in BAD_STATISTICS.items():
        np.savez(tmp_path / "bad.npz", arr_0=REFERENCE, **arrays)
        line = command.refused(tmp_path / "bad.npz", pair[1])
        assert "bad.npz" in line and words in line, (case, line)


@pytest.mark.parametrize(
    "name, save_as", [("arr_0.npy", np.savez_compressed), ("sigma.npy", np.savez_compressed), ("sigma.npy", np.savez)]
)
def test_damaged_files_are_refused(name, save_as, command, pair, tmp_path):
    path = tmp_path / "bad.npz"
    save_as(path, arr_0=REFERENCE, **GOOD)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    with open(path, "r+b") as f:
        f.seek(info.header_offset + info.compress_size // 2 + 60)
        f.write(b"\xaa" * 20)
    assert str(path) in command.refused(path, pair[1])


IMAGES = np.zeros((8, 6, 5, 3), np.uint8)
BAD_FILES = {
    "missing": (None, "no such file"),
    "text": (b"an error page, perhaps", "not an .npz with images"),
    "a folder": ("folder", "not an .npz with images"),
    "an .npy": (IMAGES, "not an .npz with images"),
    "other names": (dict(images=IMAGES, labels=IMAGES), "arr_0"),
    "floats": (dict(arr_0=IMAGES + 0.5), "float64; uint8 from 0 to 255 is expected"),
    "channels first": (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), "8x3x6x5; N x height x width x 3 is expected"),
    "four channels": (dict(arr_0=IMAGES[..., [0, 1, 2, 0]]), "N x height x width x 3 is expected"),
    "no channels": (dict(arr_0=IMAGES[..., 0]), "N x height x width x 3 is expected"),
    "no image": (dict(arr_0=IMAGES[:0]), "N x height x width x 3 is expected"),
    "a number": (dict(arr_0=np.uint8(3)), "N x height x width x 3 is expected"),
    "objects": (dict(arr_0=np.array([None, 1])), "not an array of plain numbers"),
    "three images": (dict(arr_0=IMAGES[:3]), "3 images; the metrics need at least 4"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_without_usable_images_are_refused(case, command, pair, tmp_path):
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
    for paths in ((path, pair[1]), (pair[0], path)):
        line = command.refused(*paths)
        assert line.startswith(str(path)) and words in line, line
    assert not command.network.seen  # files are checked before any features are computed


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--metrics", "fid,kid"], "'kid': choose some of is,fid,sfid,precision,recall"),
        (["--batch_size", 0], "--batch_size 0: must be at least 1"),
        (["--num_samples", -1], "--num_samples -1: must be at least 0"),
        (["--num_samples", 3], "samples.npz: 3 images; the metrics need at least 4"),
        (["--json", "{folder}/file/figures.json"], "file/figures.json: cannot be written"),
        (["--json", "{folder}"], "cannot be written"),
        (["--cache_dir", "{folder}/file"], "cannot be written"),
    ],
)
def test_bad_flags_are_refused(flags, words, command, pair, tmp_path):
    (tmp_path / "file").write_text("")
    assert words in command.refused(*pair, *(str(flag).format(folder=tmp_path) for flag in flags))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_unavailable_devices_are_refused():
    for name in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=f"--device {name}: not available"):
            load_inception("", "fp32", name)


@pytest.mark.parametrize("moment", ["network", "cache", "json"])
def test_an_interrupt_leaves_no_partial_file(moment, command, pair, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = sorted(os.listdir(tmp_path))
    (tmp_path / "cache").mkdir()
    if moment == "network":
        command.network = KnownNetwork(interrupt_at=3)
    else:
        monkeypatch.setattr(
            {"cache": np, "json": json}[moment], {"cache": "savez", "json": "dumps"}[moment], interrupted
        )
    with pytest.raises(KeyboardInterrupt):
        command(*pair, "--batch_size", 8, "--json", tmp_path / "figures.json", "--cache_dir", tmp_path / "cache")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "cache"])
    assert len(os.listdir(tmp_path / "cache")) == (moment == "json")  # the cache file was written before the JSON file
