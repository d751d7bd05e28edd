"""Which images a folder holds, and in which order: on a disk or at a URL, listed or remembered, on all ranks."""

import errno
import gzip
import json
import os
import time
from types import SimpleNamespace

import blobfile
import numpy as np
import pytest
from launch import run
from PIL import Image

from guided_diffusion import files, image_listing, logger
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import _list_image_files_recursively, load_data
from guided_diffusion.image_listing import list_images


def make_files(folder, names):
    """Empty files: listing does not open them."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()


def listed(folder):
    """The paths in a folder relative to it."""
    paths = list_images(str(folder))
    assert paths == _list_image_files_recursively(str(folder))
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def count_scans(monkeypatch):
    """A list that grows with the path of each folder that is listed."""
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: [scanned.append(path), scandir(path)][1])
    return scanned


def capture(monkeypatch, *names):
    """A list that grows with what is logged by these functions of the logger."""
    messages = []
    for name in names:
        monkeypatch.setattr(logger, name, lambda *args: messages.append(" ".join(map(str, args))))
    return messages


# Which files


def test_images_are_told_by_their_extension(tmp_path):
    images = ["a.b/w_3.GIF", "b/deep/x_2.Jpeg", "b/y_1.JPG", "c.jpg", "v_4.webp", "z_0.png"]
    make_files(tmp_path, [*images, "notes.txt", "png", "image.png.bak", "b/list.csv", "b/.hidden"])
    assert listed(tmp_path) == images


def test_order_is_folder_by_folder_as_strings_sort(tmp_path, monkeypatch):
    expected = ["10.png", "9.png", "B.png", "a/1.png", "a/b/2.png", "a/c.png", "a-.png", "b.png", "b_/x.png", "é.png"]
    # "a" < "a-.png", though "a/..." > "a-..." as strings: a folder stands where its name does.
    make_files(tmp_path, expected[::-1])
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)[::-1]

        def __enter__(self):
            return self.entries

        def __exit__(self, *error):
            pass

    assert listed(tmp_path) == expected
    monkeypatch.setattr(os, "scandir", Reversed)
    assert listed(tmp_path) == expected


@pytest.mark.parametrize("ending", ["", "/"])
def test_paths_start_with_the_folder_as_it_was_given(ending, tmp_path, monkeypatch):
    make_files(tmp_path, ["data/a/x.png", "data/y.png"])
    monkeypatch.chdir(tmp_path)
    assert list_images("data" + ending) == ["data/a/x.png", "data/y.png"]


def test_linked_folders_are_followed_and_circles_end(tmp_path, monkeypatch):
    make_files(tmp_path, ["data/a/1.png", "else/2.png", "data/a/deep/3.png"])
    os.symlink(tmp_path / "else", tmp_path / "data" / "linked")
    os.symlink(tmp_path / "else" / "2.png", tmp_path / "data" / "file_link.png")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "deep" / "up")
    os.symlink(".", tmp_path / "data" / "here")
    os.symlink("itself", tmp_path / "data" / "itself")
    os.symlink(tmp_path / "gone", tmp_path / "data" / "dangling")
    warnings = capture(monkeypatch, "warn")
    assert listed(tmp_path / "data") == ["a/1.png", "a/deep/3.png", "file_link.png", "linked/2.png"]
    assert {w.split(": ")[0] for w in warnings} == {str(tmp_path / "data" / n) for n in ("here", "a/deep/up")}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    make_files(tmp_path, ["a/1.png", "secret/2.png"])
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputError, match=r"--data_dir .*Permission denied.*secret"):
        list_images(str(tmp_path))


def test_files_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    make_files(tmp_path, [f"{d}/{i}.png" for d in range(3) for i in range(50)])
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: [asked.append(path), stat(path, **kwargs)][1])
    assert len(list_images(str(tmp_path))) == 150
    assert len(asked) < 20


def test_a_slow_listing_shows_progress_and_a_quick_one_does_not(tmp_path, monkeypatch, capfd):
    make_files(tmp_path, [f"{i}.png" for i in range(6)])
    assert len(list_images(str(tmp_path))) == 6
    assert capfd.readouterr().err == ""
    scan_dir = files.scan_dir
    monkeypatch.setattr(files, "scan_dir", lambda path: ([time.sleep(0.3), entry][1] for entry in scan_dir(path)))
    assert len(list_images(str(tmp_path))) == 6
    assert "listing images: 6 images" in capfd.readouterr().err


# URLs


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The local folder that gs://bucket shows: blobfile itself, on local paths."""

    def local(url):
        assert url.startswith("gs://bucket/")
        return str(tmp_path / "bucket" / url.removeprefix("gs://bucket/"))

    fake = SimpleNamespace(
        isdir=lambda url: blobfile.isdir(local(url)),
        exists=lambda url: blobfile.exists(local(url)),
        scandir=lambda url: blobfile.scandir(local(url)),
        listdir=lambda url: blobfile.listdir(local(url)),
        BlobFile=lambda url, mode: blobfile.BlobFile(local(url), mode),
        join=blobfile.join,
        Error=blobfile.Error,
    )
    monkeypatch.setattr(files, "_blobfile", lambda: fake)
    return tmp_path / "bucket"


def test_images_at_a_url(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_listing, "CACHE_FROM", 1)
    for i, name in enumerate(["cat_0.png", "a/dog_1.png", "a/b/cat_2.png"]):
        os.makedirs((bucket / "data" / name).parent, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 50 * i, np.uint8)).save(bucket / "data" / name)
    (bucket / "labels.csv").write_text("cat_0.png,0\na/dog_1.png,5\na/b/cat_2.png,2\n")
    url = "gs://bucket/data"
    assert list_images(url) == [f"{url}/a/b/cat_2.png", f"{url}/a/dog_1.png", f"{url}/cat_0.png"]
    options = dict(data_dir=url, batch_size=3, image_size=4, class_cond=True, deterministic=True, num_workers=0)
    for labels, expected in [("name", [0, 1, 0]), ("gs://bucket/labels.csv", [2, 5, 0])]:
        images, cond = next(load_data(**options, labels=labels))
        assert [round(float(x.mean() + 1) * 127.5) for x in images] == [100, 50, 0]
        assert cond["y"].tolist() == expected
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="gs://bucket/gone: no such folder"):
        list_images("gs://bucket/gone")


def test_a_url_that_fails_is_named(bucket, monkeypatch):
    def fail(url):
        raise blobfile.Error("no credentials\nand more lines")

    monkeypatch.setattr(files._blobfile(), "isdir", fail)
    with pytest.raises(InputError) as caught:
        list_images("gs://bucket/data")
    assert str(caught.value) == "--data_dir gs://bucket/data: cannot list it (no credentials)"


# The cache


@pytest.fixture
def big(tmp_path, monkeypatch):
    """A folder that counts as big, whose time stamps are old enough; the cache is in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_listing, "CACHE_FROM", 8)
    monkeypatch.setattr(image_listing, "SETTLED_NS", -1)
    folder = tmp_path / "data"
    make_files(folder, [f"{d}/{i}.png" for d in "abc" for i in range(3)])
    return folder


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_unchanged_folders_are_not_listed_again(big, tmp_path, monkeypatch):
    first = list_images(str(big))
    assert len(cached(tmp_path)) == 1
    scanned, messages = count_scans(monkeypatch), capture(monkeypatch, "log")
    assert list_images(str(big)) == first and len(first) == 9
    assert scanned == []
    assert len(messages) == 1 and messages[0].startswith(f"9 images in {big}, by the listing kept in ")
    # The same folder by another path: paths follow it, the listing is the same.
    monkeypatch.chdir(big)
    assert list_images("../data") == [path.replace(str(big), "../data") for path in first]
    assert scanned == []


def test_changes_are_seen_and_only_changed_folders_listed(big, tmp_path, monkeypatch):
    list_images(str(big))
    scanned, messages = count_scans(monkeypatch), capture(monkeypatch, "log")

    def check(expected, *folders):
        scanned.clear(), messages.clear()
        assert [os.path.relpath(path, big) for path in list_images(str(big))] == sorted(expected)
        assert scanned == [os.path.join(big, name) if name else str(big) for name in folders]
        assert bool(folders) == (messages[0].endswith("listed anew"))
        scanned.clear()
        list_images(str(big))
        assert scanned == []  # what was listed anew is remembered

    names = {f"{d}/{i}.png" for d in "abc" for i in range(3)}
    make_files(big, ["b/new.png"])
    check(names | {"b/new.png"}, "b")
    os.remove(big / "c" / "0.png")
    names = names - {"c/0.png"} | {"b/new.png"}
    check(names, "c")
    os.rename(big / "a" / "1.png", big / "a" / "7.png")
    names = names - {"a/1.png"} | {"a/7.png"}
    check(names, "a")
    make_files(big, ["d/deep/1.png"])
    names |= {"d/deep/1.png"}
    check(names, "", "d", "d/deep")
    os.rename(big / "d", big / "e")
    names = names - {"d/deep/1.png"} | {"e/deep/1.png"}
    check(names, "", "e", "e/deep")
    # Another folder in the place of one that had the same time of change.
    times = os.stat(big / "a")
    make_files(big, ["../other/8.png"])
    os.rename(big / "a", big / "../old")
    os.rename(big / "../other", big / "a")
    os.utime(big / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    check({n for n in names if n[0] != "a"} | {"a/8.png"}, "", "a")


def test_a_link_that_comes_to_lead_to_a_folder_is_seen(big, tmp_path):
    os.symlink(tmp_path / "later", big / "link")
    assert len(list_images(str(big))) == 9
    make_files(tmp_path, ["later/x.png"])
    assert len(list_images(str(big))) == 10
    os.rename(tmp_path / "later", tmp_path / "gone")
    assert len(list_images(str(big))) == 9


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(big, monkeypatch):
    monkeypatch.setattr(image_listing, "SETTLED_NS", 3600 * 10**9)
    list_images(str(big))
    scanned = count_scans(monkeypatch)
    list_images(str(big))
    assert len(scanned) == 4


def test_few_images_are_not_remembered(big, tmp_path, monkeypatch):
    monkeypatch.setattr(image_listing, "CACHE_FROM", 10)
    list_images(str(big))
    assert cached(tmp_path) == []


def damage(path, how):
    whole = path.read_bytes()
    record = json.loads(gzip.decompress(whole))
    if how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "bits":
        path.write_bytes(whole[:30] + b"\0\xff\0\xff" + whole[34:])
    elif how == "text":
        path.write_text("a page that says 404")
    else:
        other = {
            "another version": {**record, "version": 0},
            "a list": [1],
            "no folders": {"version": record["version"]},
            "another shape": {**record, "folders": {"": ["1 2", "name"]}},
            "numbers for names": {**record, "folders": {"": ["1 2", [3], []]}},
        }[how]
        path.write_bytes(gzip.compress(json.dumps(other).encode()))


HOW = ["empty", "half", "bits", "text", "another version", "a list", "no folders", "another shape", "numbers for names"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_cache_is_ignored_and_made_anew(how, big, tmp_path, monkeypatch):
    first = list_images(str(big))
    damage(cached(tmp_path)[0], how)
    scanned = count_scans(monkeypatch)
    assert list_images(str(big)) == first
    assert len(scanned) == 4
    scanned.clear()
    assert list_images(str(big)) == first
    assert scanned == []


def test_a_cache_that_cannot_be_written_costs_nothing(big, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(list_images(str(big))) == 9
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.chdir(tmp_path)
    assert len(list_images(str(big))) == 9
    assert not (tmp_path / "relative").exists()


def test_names_that_are_no_text_are_remembered(big, tmp_path):
    odd = os.fsencode(big) + b"/a/\xff\xfe.png"
    try:
        open(odd, "w").close()
    except OSError:
        pytest.skip("this file system takes text only")
    first = list_images(str(big))
    assert list_images(str(big)) == first and os.fsdecode(odd) in first


# Ranks

EPOCH = """
import os, sys
import numpy as np
scans, scandir = [], os.scandir
def counting(*args):
    scans.append(args)
    return scandir(*args)
from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
dist_util.setup_dist()
rank = dist_util.get_rank()
os.scandir = counting
folder, out = sys.argv[1:]
data = load_data(data_dir=folder, batch_size=7, image_size=2, class_cond=True, random_flip=False, num_workers=1, seed=3)
os.scandir = scandir
steps = 10_000 // 21
seen, labels = [], []
for _ in range(2 * steps):
    x, cond = next(data)
    pixels = ((x[:, :, 0, 0] + 1) * 127.5).round().long()
    seen += (pixels[:, 0] * 256 + pixels[:, 1]).tolist()
    labels += cond["y"].tolist()
np.savez(f"{out}/{rank}.npz", seen=seen, labels=labels, scans=len(scans), classes=data.classes)
"""


def test_ten_thousand_images_on_three_ranks(tmp_path):
    """An epoch shows every image to one rank, once, with its label, but for a last partial batch."""
    names = ["zebra", "10", "ant", "9", "Bee", "cow"]
    for i in range(10_000):
        folder = tmp_path / "data" / f"{i % 7}" / f"{i % 90}"
        if i < 7 * 90:
            folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((2, 2, 3), (i // 256, i % 256, 0), np.uint8))
        image.save(folder / f"{names[i % 6]}_{i}.png", compress_level=0)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run(["-c", EPOCH, str(tmp_path / "data"), str(tmp_path)], ranks=3, env=cache, timeout=120).check()
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(3)]
    assert [int(r["scans"]) for r in ranks] == [1 + 7 + 7 * 90, 0, 0]  # the folders, and rank 0 alone looked
    assert {len(r["seen"]) for r in ranks} == {2 * (10_000 // 21) * 7}
    table = ["10", "9", "Bee", "ant", "cow", "zebra"]
    first, second = [], []
    for r in ranks:
        assert r["classes"].tolist() == table
        assert [table[y] for y in r["labels"]] == [names[i % 6] for i in r["seen"]]
        half = len(r["seen"]) // 2
        first += r["seen"][:half].tolist()
        second += r["seen"][half:].tolist()
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch) == 10_000 - 10_000 % 21
        assert set(epoch) <= set(range(10_000))
    assert first != second
    assert len(list((tmp_path / "cache").rglob("*.json.gz"))) == 1  # 10,000 images are worth remembering


MISTAKE = """
import sys
from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
dist_util.setup_dist()
assert dist_util.from_rank_0(lambda: dist_util.get_rank() + 5) == 5
load_data(data_dir=sys.argv[1], batch_size=1, image_size=4, class_cond=True, labels=sys.argv[2])
"""


def test_a_mistake_that_rank_0_finds_is_said_once(tmp_path):
    make_files(tmp_path, ["data/a_0.png", "data/a_1.png"])
    (tmp_path / "labels.csv").write_text("path,label\na_0.png,cat\n")
    done = run(["-c", MISTAKE, str(tmp_path / "data"), str(tmp_path / "labels.csv")], ranks=2)
    assert done.returncode > 0 and "Traceback" not in done.output
    errors = [line for line in done.output.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith("error: --labels "), done.output
    assert "no label for 1 of 2 images, the first of them a_1.png" in errors[0]
