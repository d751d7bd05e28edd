"""Data sets: from small archives, made here as their makers make theirs, to folders to train on."""

import csv
import gzip
import io
import os
import re
import runpy
import shlex
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
from launch import ROOT, Outcome, run
from PIL import Image
from scipy.io import savemat

from guided_diffusion.image_datasets import class_labels, class_names
from guided_diffusion.presets import get_preset

DATASETS = os.path.join(ROOT, "datasets")
sys.path.append(DATASETS)

import _common  # noqa: E402
import cifar10  # noqa: E402
import imagenet  # noqa: E402
import lsun_bedroom  # noqa: E402

# In the archives' order, which is not the sorted one.
NAMES = {"n03000000": "crane", "n01000000": "tench, Tinca tinca", "n02000000": 'a "quoted" name'}
# The development kit's own numbers follow yet another order; the synset of number 4 is above the classes.
KIT = [(1, "n02000000", 0), (2, "n03000000", 0), (3, "n01000000", 0), (4, "n00001740", 3)]
VAL_TRUTH = [3, 1, 1, 2, 3]
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def call(module, *args):
    """Run a script's command in this process."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        status = 0
        try:
            _common.run(module.main)
        except SystemExit as e:  # a text is printed, and the status 1, as the interpreter would
            status = e.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return Outcome(status, output.getvalue(), 0, 0)


def tree(folder):
    """What a folder holds, below it too: {path: bytes}."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def tar_bytes(contents):
    """A tar of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# What the archives hold


def train_images():
    """{WordNet id: {file name: bytes}}; unpacking does not look into the JPEGs, so any bytes will do."""
    rng = np.random.default_rng(0)
    return {wnid: {f"{wnid}_{7 * i}.JPEG": rng.bytes(3000 + i) for i in range(4)} for wnid in NAMES}


def train_tar(images=None):
    images = images or train_images()
    return tar_bytes({f"{wnid}.tar": tar_bytes(files) for wnid, files in images.items()})


def val_images():
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": b"val %d " % i * 500 for i in range(len(VAL_TRUTH))}


def devkit():
    synsets = np.zeros(
        len(KIT), dtype=[(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    )
    for synset, (number, wnid, children) in zip(synsets, KIT):
        synset["ILSVRC2012_ID"], synset["WNID"], synset["num_children"] = number, wnid, children
        synset["words"], synset["gloss"] = NAMES.get(wnid, "entity"), "that which is"
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in VAL_TRUTH).encode()
    folder = "ILSVRC2012_devkit_t12/data/"
    return gzip.compress(
        tar_bytes({folder + "meta.mat": meta.getvalue(), folder + "ILSVRC2012_validation_ground_truth.txt": truth})
    )


def cifar_pixels(batch, i):
    """Image i of a file, uint8 [32, 32, 3]: red tells rows apart, green columns, blue pixels, files and images."""
    rows, columns = np.mgrid[:32, :32]
    blue = 17 * rows * columns + 40 * batch + i
    return np.stack([rows * 8 + i, columns * 8, blue % 256], axis=2).astype(np.uint8)


def cifar_files(per_batch=2):
    """Files 0 to 4 are for training, 5 for tests. Image i of file b has label (3 * b + i) % 10."""
    files = {"batches.meta.txt": "".join(name + "\n" for name in CIFAR_NAMES).encode() + b"\n"}
    for b, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
        records = [
            bytes([(3 * b + i) % 10]) + cifar_pixels(b, i).transpose(2, 0, 1).tobytes() for i in range(per_batch)
        ]
        files[name] = b"".join(records)
    return files


def cifar_tar(files):
    return gzip.compress(tar_bytes({"cifar-10-batches-bin/" + name: data for name, data in files.items()}))


def encode(pixels, form="webp", **options):
    data = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(data, form, **options)
    return data.getvalue()


def lossless(pixels):
    return encode(pixels, lossless=True, exact=True)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_lmdb(path, entries):
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Every archive, whole."""
    stage = tmp_path_factory.mktemp("archives")
    (stage / "train.tar").write_bytes(train_tar())
    (stage / "val.tar").write_bytes(tar_bytes(val_images()))
    (stage / "devkit.tar.gz").write_bytes(devkit())
    (stage / "names.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in NAMES.items()))
    (stage / "cifar.tar.gz").write_bytes(cifar_tar(cifar_files()))
    write_lmdb(stage / "lmdb", {b"key%d" % i: lossless(noise(i, 32, 48, 3)) for i in range(10)})
    return stage


# Each script's command on its whole archive
COMMANDS = {
    "imagenet": (imagenet, ["{stage}/train.tar", "{out}", "--names", "{stage}/names.txt"]),
    "imagenet_val": (imagenet, ["{stage}/val.tar", "{out}", "--devkit", "{stage}/devkit.tar.gz"]),
    "lsun": (lsun_bedroom, ["--image-size", "32", "--num_workers", "2", "{stage}/lmdb", "{out}"]),
    "cifar10": (cifar10, ["{stage}/cifar.tar.gz", "{out}"]),
}


def command(name, stage, out):
    module, args = COMMANDS[name]
    return module, [text.format(stage=stage, out=out) for text in args]


@pytest.fixture(scope="module")
def complete(stage, tmp_path_factory):
    """What each script writes, undisturbed."""
    folders = {name: tmp_path_factory.mktemp(name) for name in COMMANDS}
    for name, folder in folders.items():
        module, args = command(name, stage, folder)
        call(module, *args).check()
    return folders


# ImageNet


def test_training_images_are_the_archives_bytes_in_a_folder_for_each_class(complete):
    images = {f"train/{wnid}/{name}": data for wnid, files in train_images().items() for name, data in files.items()}
    written = tree(complete["imagenet"])
    assert {name: data for name, data in written.items() if name.endswith(".JPEG")} == images
    assert sorted(set(written) - set(images)) == ["classes.csv", "train/counts.csv"]


def test_class_table_numbers_the_sorted_ids_as_training_does(complete):
    with open(complete["imagenet"] / "classes.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows == [{"label": str(i), "wnid": wnid, "name": NAMES[wnid]} for i, wnid in enumerate(sorted(NAMES))]
    assert class_names(str(complete["imagenet"] / "train")) == [row["wnid"] for row in rows]


def test_validation_images_are_named_by_the_class_that_the_development_kit_gives_them(complete):
    wnids = {number: wnid for number, wnid, _ in KIT}
    images = zip(VAL_TRUTH, val_images().items())
    expected = {f"val/{wnids[t]}/{wnids[t]}_{name}": data for t, (name, data) in images}
    assert {k: v for k, v in tree(complete["imagenet_val"]).items() if k != "classes.csv"} == expected


def test_both_archives_share_a_folder_and_a_class_table(stage, complete, tmp_path):
    for name in ("imagenet", "imagenet_val"):
        module, args = command(name, stage, tmp_path)
        call(module, *args).check()
    assert tree(tmp_path) == tree(complete["imagenet"]) | tree(complete["imagenet_val"])
    trained = class_names(str(tmp_path / "train"))
    held_out = sorted(name for name in tree(tmp_path) if name.startswith("val"))
    assert class_labels(held_out, trained) == [0, 0, 1, 1, 2]  # n01 twice, n02 twice, n03


def test_a_complete_class_is_not_opened_again(stage, tmp_path, monkeypatch):
    module, args = command("imagenet", stage, tmp_path)
    assert "12 images in 3 classes, complete; 12 written now" in call(module, *args).check().output
    monkeypatch.setattr(imagenet, "unpack_class", None)
    assert "12 images in 3 classes, complete; 0 written now" in call(module, *args).check().output


def test_names_lead_nowhere_else(stage, tmp_path):
    """Folders in an archive's names, links and strangers' files are of no consequence."""
    images = train_images()
    wnid = "n01000000"
    honest = dict(images[wnid])
    images[wnid] = {f"../../../{name}": data for name, data in honest.items()}
    images[wnid].update(
        {"/etc/notes.txt": b"text", f"{wnid}_x.JPEG": b"x", "n03000000_5.JPEG": b"y", f"{wnid}_1.sh": b"z"}
    )
    buffer = io.BytesIO(tar_bytes(images[wnid]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo(f"{wnid}_99.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    tars = {f"../{wnid}.tar": buffer.getvalue()}
    tars.update({f"{other}.tar": tar_bytes(images[other]) for other in images if other != wnid})
    (tmp_path / "train.tar").write_bytes(tar_bytes(tars))
    call(imagenet, tmp_path / "train.tar", tmp_path / "a" / "b" / "out", "--names", stage / "names.txt").check()
    out = tmp_path / "a" / "b" / "out"
    assert {path.name: path.read_bytes() for path in (out / "train" / wnid).iterdir()} == honest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "train.tar"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"] and [p.name for p in out.parent.iterdir()] == ["out"]


# LSUN


def make_squares(tmp_path, images, size, *flags):
    """The squares of a database of these encoded images, in order: arrays [size, size, 3]."""
    write_lmdb(tmp_path / "db", {b"%04d" % i: data for i, data in enumerate(images)})
    call(lsun_bedroom, "--image-size", size, *flags, tmp_path / "db", tmp_path / "out").check()
    paths = sorted((tmp_path / "out").iterdir())
    return [np.asarray(Image.open(path)) for path in paths]


def test_squares_are_means_of_blocks_from_the_middle(tmp_path):
    """Halving with a box filter takes the mean of 2x2 pixels; twice the size repeats each."""
    means = noise(0, 4, 7, 3).astype(int) // 2 + 40
    offsets = np.array([[-30, 10], [6, 14]])  # of mean 0, and of whole means in each row and column
    wide = np.kron(means, np.ones((2, 2, 1), int)) + np.tile(offsets, (4, 7))[..., None]
    small = noise(1, 2, 3, 3)
    squares = make_squares(tmp_path, [lossless(wide), lossless(wide.transpose(1, 0, 2)), lossless(small)], 4)
    assert np.array_equal(squares[0], means[:, 1:5])  # 7 columns: one off the left, two off the right
    assert np.array_equal(squares[1], means.transpose(1, 0, 2)[1:5])
    assert np.array_equal(squares[2], np.kron(small, np.ones((2, 2, 1), int))[:, 1:5])


def test_sides_are_rounded_to_the_nearest(tmp_path):
    # 10x7 pixels, the shorter side to 4: 5.71 columns make 6, of which the middle 4 are taken.
    pixels = np.zeros((7, 10, 3), np.uint8)
    pixels[:, 5:] = 200
    (square,) = make_squares(tmp_path, [lossless(pixels)], 4)
    assert np.array_equal(square[0, :, 0], [0, 0, 200, 200])


def test_every_image_becomes_rgb(tmp_path):
    grey, colour = noise(0, 4, 4), noise(1, 4, 4, 3)
    opaque = np.concatenate([colour, np.full((4, 4, 1), 255)], axis=2)
    images = [encode(grey, "png"), lossless(opaque), encode(colour, "png")]
    squares = make_squares(tmp_path, images, 4)
    assert np.array_equal(squares[0], np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(squares[1], colour) and np.array_equal(squares[2], colour)


def test_files_are_numbered_in_the_order_of_the_keys(tmp_path):
    greys = {b"b": 20, b"a": 10, b"c": 30, b"Z": 0}  # an lmdb sorts them by bytes
    write_lmdb(tmp_path / "db", {key: encode(np.full((8, 8, 3), grey), "png") for key, grey in greys.items()})
    data = tmp_path / "db" / "data.mdb"  # the file will do as well as its folder
    call(lsun_bedroom, "--prefix", "church", "--image_size", 8, data, tmp_path / "out").check()
    found = {path.name: int(np.asarray(Image.open(path)).mean()) for path in (tmp_path / "out").iterdir()}
    assert found == {f"church_{i:07d}.png": 10 * i for i in range(4)}


def test_more_entries_than_are_in_memory_at_a_time(tmp_path):
    images = [encode(np.full((2, 2), i), "png") for i in range(2 * lsun_bedroom.CHUNK + 1)]
    squares = make_squares(tmp_path, images, 2, "--num_workers", 1)
    assert [int(square[0, 0, 0]) for square in squares] == list(range(len(images)))


def test_a_database_may_lack_pages_that_it_does_not_use(tmp_path):
    """As lmdb's own tools can leave it: the file ends before the last page that was ever in use."""
    values = {b"k%d" % i: encode(noise(i, 32, 32, 3), "png") for i in range(9)}
    write_lmdb(tmp_path / "db", values)
    with lmdb.open(str(tmp_path / "db"), map_size=2**24) as env:
        for change in (lambda t: t.put(b"z", bytes(50_000)), lambda t: t.delete(b"z")):
            with env.begin(write=True) as transaction:
                change(transaction)
        page = env.stat()["psize"]
    data = tmp_path / "db" / "data.mdb"
    os.truncate(data, data.stat().st_size - page)
    call(lsun_bedroom, "--image-size", 32, tmp_path / "db", tmp_path / "out").check()
    assert len(tree(tmp_path / "out")) == 9


def test_entries_that_cannot_be_decoded(tmp_path):
    """They are named, the others are written, and the command fails unless it may leave them out."""
    whole = lossless(noise(0, 16, 16, 3))
    write_lmdb(tmp_path / "db", {b"k0": whole, b"k1": b"no image", b"k2": whole, b"k\xff3": whole[:200]})
    args = ["--image-size", 16, tmp_path / "db", tmp_path / "out"]
    done = call(lsun_bedroom, *args)
    check_refused(done, ["2 of 4 entries", "first k1", "--skip_bad_images True"])
    assert "the entry with the key k1\n" in done.output and r"the entry with the key k\xff3" in done.output
    names = ["bedroom_0000000.png", "bedroom_0000002.png"]
    assert sorted(tree(tmp_path / "out")) == names
    done = call(lsun_bedroom, "--skip_bad_images", True, *args).check()
    assert "2 images of 16x16 pixels, complete, 2 bad ones left out; 0 written now" in done.output
    assert sorted(tree(tmp_path / "out")) == names


# CIFAR-10


def check_cifar(folder):
    expected = {"train": [(b, i) for b in range(5) for i in range(2)], "test": [(5, i) for i in range(2)]}
    for split, origins in expected.items():
        names = [f"{CIFAR_NAMES[(3 * b + i) % 10]}_{n:05d}.png" for n, (b, i) in enumerate(origins)]
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(names)
        for name, (b, i) in zip(names, origins):
            assert np.array_equal(np.asarray(Image.open(folder / split / name)), cifar_pixels(b, i))
    paths = [str(path) for path in (folder / "train").iterdir()]
    assert class_labels(paths, CIFAR_NAMES) == [CIFAR_NAMES.index(Path(path).name.split("_")[0]) for path in paths]


def test_cifar10_from_its_archive(complete):
    check_cifar(complete["cifar10"])


@pytest.mark.parametrize("given", ["cifar-10-batches-bin", "."])
def test_cifar10_from_the_unpacked_folder(stage, tmp_path, given):
    with tarfile.open(stage / "cifar.tar.gz") as tar:
        tar.extractall(tmp_path)  # of the test's own making; older Pythons know no filter
    call(cifar10, tmp_path / given, tmp_path / "out").check()
    check_cifar(tmp_path / "out")


# Kills and restarts

# A script that meets its end when it is about to rename its fourth file, with the temporary one written; or with the
# disk full, as far as it can tell: no file can grow beyond 500 bytes.
DYING = """
import os, resource, runpy, signal, sys
how, sys.argv = sys.argv[1], sys.argv[2:]
signal.signal(signal.SIGINT, signal.default_int_handler)
rename, renamed = os.replace, []
def dying(*paths):
    renamed.append(paths)
    if len(renamed) == 4 and how != "full":
        os.kill(os.getpid(), getattr(signal, how))
    rename(*paths)
os.replace = dying
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "full"])
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_ends_a_run_leaves_whole_files_and_the_next_run_adds_the_rest(name, how, stage, complete, tmp_path):
    module, args = command(name, stage, tmp_path)
    done = run(["-c", DYING, how, module.__file__, *args])
    assert "Traceback" not in done.output
    if how == "full":
        check_refused(done, ["cannot be written", "File too large", str(tmp_path)])
    else:
        assert done.returncode == {"SIGKILL": -9, "SIGINT": 130}[how], done.output
    reference = tree(complete[name])
    left = {path: data for path, data in tree(tmp_path).items() if path not in ("classes.csv", "train/counts.csv")}
    leftovers = [path for path in left if path.endswith(".tmp")]
    whole = set(left) - set(leftovers)
    assert all(left[path] == reference[path] for path in whole)
    if name != "lsun":  # its second worker may have got further
        assert len(leftovers) == (how == "SIGKILL") and len(whole) < len(reference)
    assert how == "SIGKILL" or not leftovers
    assert how == "full" or len(whole) >= 2
    written = {path: (tmp_path / path).stat().st_mtime_ns for path in whole}

    call(module, *args).check()
    assert tree(tmp_path) == reference  # the leftovers are gone
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in whole} == written


@pytest.mark.parametrize("name", COMMANDS)
def test_lost_and_emptied_files_come_back(name, stage, complete, tmp_path):
    """Some file systems leave empty files after a power cut. All is checked, also where a run has ended well."""
    module, args = command(name, stage, tmp_path)
    call(module, *args).check()
    images = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".png", ".JPEG"))
    images[0].unlink()
    images[-1].write_bytes(b"")
    done = call(module, *args).check()
    assert tree(tmp_path) == tree(complete[name])
    assert sum(map(int, re.findall(r"(\d+) written now", done.output))) == 2


# What goes wrong


def check_refused(done, words):
    """It failed, and said so in one last line with all the words."""
    assert done.returncode > 0, done.output
    assert "Traceback" not in done.output, done.output
    last = done.output.rstrip().splitlines()[-1]
    assert re.match(r"(\w+\.py: )?error: ", last) and done.output.count("error: ") == 1, done.output
    assert all(word in last for word in words), last
    assert len(last) < 500


@pytest.fixture(scope="module")
def bad(stage, tmp_path_factory):
    """Archives, flags and folders that are not what a script needs."""
    bad = tmp_path_factory.mktemp("bad")
    train, val = stage / "train.tar", stage / "val.tar"
    (bad / "text").write_text("a page that says 404, perhaps\n" * 100)
    (bad / "nothing").write_bytes(b"")
    (bad / "folder").mkdir()
    (bad / "cut_train.tar").write_bytes(train.read_bytes()[:30_000])
    (bad / "cut_val.tar").write_bytes(val.read_bytes()[:10_000])
    long = cifar_tar({**cifar_files(), "readme.html": noise(0, 200_000).tobytes()})
    (bad / "cut_cifar.tar.gz").write_bytes(long[:100_000])
    images = train_images()
    (bad / "two.tar").write_bytes(train_tar({wnid: images[wnid] for wnid in list(NAMES)[:2]}))
    damaged = bytearray(train_tar())
    name = damaged.index(b"n01000000_14.JPEG")
    damaged[name + 3] = ord("x")  # its header's checksum is wrong now
    (bad / "damaged_train.tar").write_bytes(damaged)
    (bad / "no_tars.tar").write_bytes(tar_bytes({f"{wnid}.tar": b"no tar " * 100 for wnid in NAMES}))
    (bad / "mislabelled.tar").write_bytes(
        tar_bytes({f"{wnid}.tar": tar_bytes({"n04000000_1.JPEG": b"x"}) for wnid in NAMES})
    )
    (bad / "test.tar").write_bytes(tar_bytes({"test/ILSVRC2012_test_00000001.JPEG": b"x"}))
    few = list(val_images().items())
    (bad / "few_val.tar").write_bytes(tar_bytes(dict(few[:4])))
    (bad / "many_val.tar").write_bytes(tar_bytes(dict([*few, ("ILSVRC2012_val_00000006.JPEG", b"x")])))
    (bad / "no_meta.tar.gz").write_bytes(gzip.compress(tar_bytes({"data/readme.txt": b"x"})))
    truth = "ILSVRC2012_validation_ground_truth.txt"
    (bad / "damaged_meta.tar.gz").write_bytes(gzip.compress(tar_bytes({"meta.mat": b"x" * 500, truth: b"1\n"})))
    with tarfile.open(stage / "devkit.tar.gz") as tar:
        meta = tar.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()
    (bad / "strange_truth.tar.gz").write_bytes(gzip.compress(tar_bytes({"meta.mat": meta, truth: b"1\n5\n"})))
    (bad / "ids.txt").write_text("n01000000 tench\nn02000000\n")
    (bad / "binary.txt").write_bytes(b"\xff\xfe" * 100)
    (bad / "fewer_names.txt").write_text("n01000000 tench\nn02000000 other\n")

    python = {f"cifar-10-batches-py/data_batch_{i}": b"pickle" for i in range(1, 6)}
    (bad / "cifar_python.tar.gz").write_bytes(gzip.compress(tar_bytes(python)))
    files = cifar_files()
    changes = {
        "lacking": {"data_batch_2.bin": None, "test_batch.bin": None},
        "uneven": {"data_batch_3.bin": files["data_batch_3.bin"][:3073]},
        "ragged": {"data_batch_3.bin": files["data_batch_3.bin"][:-1]},
        "empty": {"test_batch.bin": b""},
        "mislabelled": {"data_batch_5.bin": b"\x0a" + files["data_batch_5.bin"][1:]},
        "misnamed": {"batches.meta.txt": b"../airplane\n" + files["batches.meta.txt"][9:]},
    }
    for kind, change in changes.items():
        kept = {name: data for name, data in {**files, **change}.items() if data is not None}
        (bad / f"cifar_{kind}.tar.gz").write_bytes(cifar_tar(kept))

    write_lmdb(bad / "cut_lmdb", {b"%02d" % i: noise(i, 5000).tobytes() for i in range(50)})
    os.truncate(bad / "cut_lmdb" / "data.mdb", 130_000)
    write_lmdb(bad / "empty_lmdb", {})
    image = encode(noise(0, 32, 32, 3), "png")
    for kind, name in {"other_size": "bedroom_0000003.png", "strangers": "bedroom_0000012.png"}.items():
        (bad / kind).mkdir()
        (bad / kind / name).write_bytes(image)
    (bad / "other_classes").mkdir()
    (bad / "other_classes" / "classes.csv").write_text("label,wnid,name\n0,n01000000,tench\n")
    return bad


def unpack(archive="{stage}/train.tar", out="{out}", **flags):
    flags = flags or dict(names="{stage}/names.txt")
    return imagenet, [archive, out, *(text for name, value in flags.items() for text in (f"--{name}", value))]


def unpack_val(archive="{stage}/val.tar", devkit="{stage}/devkit.tar.gz"):
    return unpack(archive, devkit=devkit)


def squares(lmdb_path="{stage}/lmdb", out="{out}", *flags):
    return lsun_bedroom, [lmdb_path, out, *flags]


def cifar(archive="{stage}/cifar.tar.gz", out="{out}"):
    return cifar10, [archive, out]


# What is run, and words of what it must say
CASES = {
    "no archive": (unpack("{bad}/gone.tar"), ["{bad}/gone.tar", "No such file", "ILSVRC2012_img_train.tar"]),
    "a folder as archive": (unpack("{bad}/folder"), ["{bad}/folder", "Is a directory", "ILSVRC2012_img_train.tar"]),
    "a text as archive": (unpack("{bad}/text"), ["{bad}/text", "not a tar archive", "ILSVRC2012_img_train.tar"]),
    "an empty archive": (unpack("{bad}/nothing"), ["{bad}/nothing", "not a tar archive"]),
    "CIFAR-10 as ImageNet": (unpack("{stage}/cifar.tar.gz"), ["{stage}/cifar.tar.gz", "ILSVRC2012_img_train.tar"]),
    "the test images": (unpack("{bad}/test.tar"), ["{bad}/test.tar", "test images"]),
    "no classes": ((imagenet, ["{stage}/train.tar", "{out}"]), ["--devkit", "--names"]),
    "validation without labels": (unpack("{stage}/val.tar"), ["{stage}/val.tar", "labels", "--devkit"]),
    "a training archive cut short": (unpack("{bad}/cut_train.tar"), ["{bad}/cut_train.tar", "cut short"]),
    "a training archive of fewer classes": (unpack("{bad}/two.tar"), ["{bad}/two.tar", "1 of the 3", "n02000000"]),
    "a training archive of more classes": (
        unpack(names="{bad}/fewer_names.txt"),
        ["{stage}/train.tar", "--names", "n03000000"],
    ),
    "a damaged class": (unpack("{bad}/damaged_train.tar"), ["{bad}/damaged_train.tar", "n01000000.tar", "bad header"]),
    "classes that are no tars": (unpack("{bad}/no_tars.tar"), ["{bad}/no_tars.tar", "n03000000.tar"]),
    "classes that hold others": (unpack("{bad}/mislabelled.tar"), ["n03000000.tar has no n03000000_*.JPEG"]),
    "a validation archive cut short": (unpack_val("{bad}/cut_val.tar"), ["{bad}/cut_val.tar", "cut short"]),
    "too few validation images": (unpack_val("{bad}/few_val.tar"), ["{bad}/few_val.tar", "4 of 5"]),
    "too many validation images": (unpack_val("{bad}/many_val.tar"), ["ILSVRC2012_val_00000006.JPEG", "5 labels"]),
    "names that are not there": (unpack(names="{bad}/gone.txt"), ["--names {bad}/gone.txt", "No such file"]),
    "names without names": (unpack(names="{bad}/ids.txt"), ["--names {bad}/ids.txt", "line 2", "n02000000"]),
    "names in binary": (unpack(names="{bad}/binary.txt"), ["--names {bad}/binary.txt", "not a text file"]),
    "an empty list of names": (unpack(names="{bad}/nothing"), ["--names {bad}/nothing", "no class"]),
    "the archive as its own names": (unpack(names="{stage}/train.tar"), ["--names {stage}/train.tar"]),
    "no development kit": (unpack_val(devkit="{bad}/gone"), ["{bad}/gone", "No such file", "ILSVRC2012_devkit_t12"]),
    "another kit": (unpack_val(devkit="{bad}/no_meta.tar.gz"), ["--devkit {bad}/no_meta.tar.gz", "meta.mat"]),
    "a damaged kit": (unpack_val(devkit="{bad}/damaged_meta.tar.gz"), ["{bad}/damaged_meta.tar.gz", "meta.mat"]),
    "a kit whose files do not fit": (unpack_val(devkit="{bad}/strange_truth.tar.gz"), ["{bad}/strange_truth.tar.gz"]),
    "a folder of other classes": (unpack(out="{bad}/other_classes"), ["{bad}/other_classes/classes.csv", "OUT_DIR"]),
    "unpacking below a file": (unpack(out="{bad}/text/out"), ["{bad}/text/out", "choose another"]),
    "no lmdb": (squares("{bad}/gone"), ["{bad}/gone", "no such file", "bedroom_train_lmdb"]),
    "a folder as lmdb": (squares("{bad}/folder"), ["{bad}/folder/data.mdb", "no such file"]),
    "a text as lmdb": (squares("{bad}/text"), ["{bad}/text", "not an lmdb"]),
    "an lmdb cut short": (squares("{bad}/cut_lmdb"), ["{bad}/cut_lmdb/data.mdb", "cut short"]),
    "an empty lmdb": (squares("{bad}/empty_lmdb"), ["{bad}/empty_lmdb/data.mdb", "without entries"]),
    "another image size": (
        squares("{stage}/lmdb", "{bad}/other_size", "--image-size", "16"),
        ["{bad}/other_size/bedroom_0000003.png", "32x32", "--image-size 16"],
    ),
    "another database's images": (
        squares("{stage}/lmdb", "{bad}/strangers", "--image-size", "32"),
        ["{bad}/strangers", "11 images", "{stage}/lmdb 10"],
    ),
    "image size 0": (squares("{stage}/lmdb", "{out}", "--image-size", "0"), ["image_size 0"]),
    "no workers": (squares("{stage}/lmdb", "{out}", "--num_workers", "0"), ["--num_workers 0"]),
    "a prefix with a folder": (squares("{stage}/lmdb", "{out}", "--prefix", "a/b"), ["--prefix 'a/b'"]),
    "a prefix that is two classes": (squares("{stage}/lmdb", "{out}", "--prefix", "bed_room"), ["--prefix 'bed_room'"]),
    "no boolean": (squares("{stage}/lmdb", "{out}", "--skip_bad_images", "maybe"), ["--skip_bad_images", "'maybe'"]),
    "squares below a file": (squares("{stage}/lmdb", "{bad}/text/out"), ["{bad}/text/out", "choose another"]),
    "no CIFAR-10": (cifar("{bad}/gone"), ["{bad}/gone", "No such file", "cifar-10-binary.tar.gz"]),
    "CIFAR-10 for Python": (cifar("{bad}/cifar_python.tar.gz"), ["Python", "cifar-10-binary.tar.gz"]),
    "ImageNet as CIFAR-10": (cifar("{stage}/val.tar"), ["{stage}/val.tar", "data_batch_1.bin"]),
    "an empty folder as CIFAR-10": (cifar("{bad}/folder"), ["{bad}/folder", "data_batch_1.bin"]),
    "CIFAR-10 without two files": (cifar("{bad}/cifar_lacking.tar.gz"), ["lacks data_batch_2.bin, test_batch.bin"]),
    "CIFAR-10 cut short": (cifar("{bad}/cut_cifar.tar.gz"), ["{bad}/cut_cifar.tar.gz", "cut short"]),
    "CIFAR-10 files of two lengths": (cifar("{bad}/cifar_uneven.tar.gz"), ["data_batch_3.bin has 1 images, others 2"]),
    "a CIFAR-10 file cut short": (cifar("{bad}/cifar_ragged.tar.gz"), ["data_batch_3.bin", "6,145 bytes", "3,073"]),
    "an empty CIFAR-10 file": (cifar("{bad}/cifar_empty.tar.gz"), ["test_batch.bin", "0 bytes"]),
    "CIFAR-10 with a label 10": (cifar("{bad}/cifar_mislabelled.tar.gz"), ["data_batch_5.bin", "label 10"]),
    "CIFAR-10 with other names": (cifar("{bad}/cifar_misnamed.tar.gz"), ["batches.meta.txt"]),
    "CIFAR-10 below a file": (cifar(out="{bad}/text/out"), ["{bad}/text/out", "choose another"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(name, stage, bad, tmp_path):
    (module, args), words = CASES[name]
    places = SimpleNamespace(stage=stage, bad=bad, out=tmp_path / "out")
    check_refused(
        call(module, *(text.format(**vars(places)) for text in args)), [word.format(**vars(places)) for word in words]
    )


@pytest.mark.parametrize("package, name", [("scipy", "imagenet_val"), ("lmdb", "lsun")])
def test_a_package_that_is_not_installed(package, name, stage, tmp_path, monkeypatch):
    for module in [package, *(m for m in sys.modules if m.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    module, args = command(name, stage, tmp_path)
    check_refused(call(module, *args), [f"pip install {package}"])


def test_a_damaged_archive_leaves_the_whole_classes_for_a_restart_with_a_good_one(stage, bad, complete, tmp_path):
    check_refused(call(*[imagenet, bad / "damaged_train.tar", tmp_path, "--names", stage / "names.txt"]), [])
    assert len(list(tmp_path.rglob("*.JPEG"))) == 6  # of the first class, and two of the second
    module, args = command("imagenet", stage, tmp_path)
    assert "6 written now" in call(module, *args).check().output
    assert tree(tmp_path) == tree(complete["imagenet"])


# Commands


def test_a_users_commands_do_without_torch(stage, complete, tmp_path):
    """Loading it takes seconds. A mistake is met here too, as elsewhere it is in this process."""
    module, args = command("imagenet", stage, tmp_path / "imagenet")
    done = run([module.__file__, *args]).check()
    assert done.output.splitlines()[-1] == (
        f"{tmp_path}/imagenet/train: 12 images in 3 classes, complete; 12 written now"
    )
    assert tree(tmp_path / "imagenet") == tree(complete["imagenet"])
    check_refused(run([cifar10.__file__, str(tmp_path / "gone"), str(tmp_path)]), ["gone", "cifar-10-binary.tar.gz"])
    everything = "import sys; sys.path.insert(0, sys.argv[1]); import imagenet, lsun_bedroom, cifar10; "
    run(["-c", everything + "sys.exit('torch' in sys.modules)", DATASETS]).check()


def readme_commands():
    """The commands in the README's blocks: {script: [(number of ranks, arguments), ...]}."""
    text = (Path(DATASETS) / "README.md").read_text().replace("\\\n", " ")
    found = {}
    for line in re.findall(
        r"^(?:mpiexec|python) .*$", "\n".join(re.findall(r"^```\n(.*?)^```", text, re.S | re.M)), re.M
    ):
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks = int(words[2]) if words[0] == "mpiexec" else 1
        found.setdefault(words[at], []).append((ranks, words[at + 1 :]))
    return found


def test_readme_commands_are_those_of_the_scripts_and_of_the_released_models():
    parsed = {}
    for script, commands in readme_commands().items():
        parser = runpy.run_path(os.path.join(ROOT, script), run_name="readme")["create_argparser"]()
        parsed[script] = [(ranks, parser.parse_args(args)) for ranks, args in commands]
    assert {os.path.basename(script): len(commands) for script, commands in parsed.items()} == {
        "imagenet.py": 2, "lsun_bedroom.py": 1, "cifar10.py": 1, "digits.py": 1, "image_train.py": 3,
        "classifier_train.py": 1,
    }  # fmt: skip
    models, classifiers = parsed["scripts/image_train.py"], parsed["scripts/classifier_train.py"]
    for (ranks, args), name in zip(
        [*models[:2], *classifiers], ["64x64_diffusion", "lsun_bedroom", "64x64_classifier"]
    ):
        preset = get_preset(name)
        expected = {**preset.all_flags(), **preset.training}
        assert ranks * args.batch_size == expected.pop("global_batch")
        expected.pop("classifier_use_fp16", None)
        assert {flag: getattr(args, flag) for flag in expected} == expected
