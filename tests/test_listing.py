"""Listing the images in a folder or at a URL, their order, and their distribution over ranks."""

import errno
import os
import time

import blobfile
import numpy as np
import pytest
from launch import run_ranks
from PIL import Image

from guided_diffusion import files
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import _list_image_files_recursively, load_data
from guided_diffusion.image_listing import list_images


def make_files(folder, names):
    """Create empty files. They can stand in for images, because listing does not open files."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()


def listed(folder):
    """The paths that list_images finds in a folder, relative to the folder."""
    paths = list_images(str(folder))
    assert paths == _list_image_files_recursively(str(folder))
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def test_images_are_recognized_by_their_extension(tmp_path):
    images = ["a.b/w_3.GIF", "b/deep/x_2.Jpeg", "b/y_1.JPG", "c.jpg", "v_4.webp", "z_0.png"]
    make_files(tmp_path, [*images, "notes.txt", "png", "image.png.bak", "b/list.csv", "b/.hidden"])
    assert listed(tmp_path) == images


def test_resource_forks_of_macos_are_not_images(tmp_path):
    make_files(tmp_path, ["cat_024.png", "._cat_024.png", "dog_1.png", "sub/._dog_1.png"])
    data = load_data(data_dir=str(tmp_path), batch_size=2, image_size=4, class_cond=True)
    assert [os.path.basename(path) for path in data.dataset.local_images] == ["cat_024.png", "dog_1.png"]
    assert data.classes == ["cat", "dog"]
    (tmp_path / "labels.csv").write_text("cat_024.png,a\n._cat_024.png,3\ndog_1.png,b\n")
    options = dict(class_cond=True, labels=str(tmp_path / "labels.csv"))
    assert load_data(data_dir=str(tmp_path), batch_size=2, image_size=4, **options).classes == ["a", "b"]


def test_each_folder_is_listed_where_its_name_sorts(tmp_path):
    # The folder "a" comes before "a-.png", although "a/1.png" > "a-.png" as strings.
    expected = ["10.png", "9.png", "B.png", "a/1.png", "a/b/2.png", "a/c.png", "a-.png", "b.png", "b_/x.png", "é.png"]
    make_files(tmp_path, expected[::-1])
    assert listed(tmp_path) == expected


@pytest.mark.parametrize("ending", ["", "/"])
def test_paths_start_with_the_folder_as_it_was_given(ending, tmp_path, monkeypatch):
    make_files(tmp_path, ["data/a/x.png", "data/y.png"])
    monkeypatch.chdir(tmp_path)
    assert list_images("data" + ending) == ["data/a/x.png", "data/y.png"]


def test_links_to_folders_are_followed_except_cycles(tmp_path):
    make_files(tmp_path, ["data/a/1.png", "else/2.png", "else/notes.txt", "data/a/deep/3.png"])
    links = {"linked": "else", "file_link.png": "else/2.png", "text_link": "else/notes.txt", "dangling": "gone"}
    for name, target in {**links, "a/deep/up": "data", "here": "data", "itself": "data/itself"}.items():
        os.symlink(tmp_path / target, tmp_path / "data" / name)
    assert listed(tmp_path / "data") == ["a/1.png", "a/deep/3.png", "file_link.png", "linked/2.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_files(tmp_path, ["a/1.png", "secret/2.png"])
    listdir = os.listdir

    def guarded(path):
        if os.path.basename(path) == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", guarded)  # changing permissions would not stop root
    with pytest.raises(InputError, match=r"--data_dir .*secret .Permission denied"):
        list_images(str(tmp_path))


def test_listing_does_not_stat_each_file(tmp_path, monkeypatch):
    make_files(tmp_path, [f"{d}/{i}.png" for d in range(3) for i in range(50)])
    os.makedirs(tmp_path / "links")
    for i in range(50):
        os.symlink(tmp_path / "0" / f"{i}.png", tmp_path / "links" / f"{i}.png")
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: [asked.append(path), stat(path, **kwargs)][1])
    assert len(list_images(str(tmp_path))) == 200
    assert len(asked) < 20


def test_a_slow_listing_shows_progress_and_a_quick_one_does_not(tmp_path, monkeypatch, capfd):
    make_files(tmp_path, [f"{i}/x.png" for i in range(6)])
    assert len(list_images(str(tmp_path))) == 6
    assert capfd.readouterr().err == ""
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [time.sleep(0.3), listdir(path)][1])
    assert len(list_images(str(tmp_path))) == 6
    assert "listing images: 6 images" in capfd.readouterr().err


# URLs


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A local folder that stands in for gs://bucket: blobfile gets local paths instead of URLs."""

    def local(url):
        assert url.startswith("gs://bucket/")
        return str(tmp_path / "bucket" / url.removeprefix("gs://bucket/"))

    served = {"is_dir": blobfile.isdir, "exists": blobfile.exists, "open_file": files.open_file}
    for name, function in {**served, "list_dir": files.list_dir}.items():
        monkeypatch.setattr(files, name, lambda url, function=function: function(local(url)))
    return tmp_path / "bucket"


def test_images_at_a_url(bucket):
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
    with pytest.raises(InputError, match="gs://bucket/gone: no such folder"):
        list_images("gs://bucket/gone")


def test_a_url_that_fails_is_named(bucket, monkeypatch):
    def fail(url):
        raise blobfile.Error("no credentials\nand more lines")

    monkeypatch.setattr(files, "is_dir", fail)
    with pytest.raises(InputError) as caught:
        list_images("gs://bucket/data")
    assert str(caught.value) == "--data_dir gs://bucket/data: cannot list it (no credentials)"


# Ranks

EPOCHS = """
import os, sys
import numpy as np
scans, listdir = [], os.listdir
def counting(*args):
    scans.append(args)
    return listdir(*args)
from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data
dist_util.setup_dist()
os.listdir = counting
folder, out = sys.argv[1:]
data = load_data(data_dir=folder, batch_size=7, image_size=2, class_cond=True, random_flip=False, num_workers=1)
os.listdir = listdir
seen = []
for _ in range(2 * 1050 // 21):
    x, cond = next(data)
    pixels = ((x[:, :, 0, 0] + 1) * 127.5).round().long()
    seen += (pixels[:, 0] * 256 + pixels[:, 1]).tolist()
    assert (cond["y"] == (pixels[:, 0] * 256 + pixels[:, 1]) % 6).all()
np.savez(f"{out}/{dist_util.get_rank()}.npz", seen=seen, scans=len(scans), classes=data.classes)
"""


def test_three_ranks_share_each_epoch(tmp_path):
    """Without --seed, every image is shown once per epoch with its label, and only rank 0 lists the folders."""
    names = ["10", "9", "Bee", "ant", "cow", "zebra"]
    for i in range(1050):
        (tmp_path / "data" / f"{i % 7}" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((2, 2, 3), (i // 256, i % 256, 0), np.uint8))
        image.save(tmp_path / "data" / f"{i % 7}" / f"{i % 3}" / f"{names[i % 6]}_{i}.png")
    run_ranks(3, [tmp_path / "data", tmp_path], EPOCHS)[0].check()
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(3)]
    assert [int(r["scans"]) for r in ranks] == [1 + 7 + 7 * 3, 0, 0]
    assert all(r["classes"].tolist() == names for r in ranks)
    first, second = ([i for r in ranks for i in np.split(r["seen"], 2)[epoch].tolist()] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(1050)) and first != second
