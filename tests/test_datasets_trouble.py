"""Failures of the dataset scripts: kills and restarts, full disks, lost files, and invalid input."""

import gzip
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from archives import (
    COMMANDS,
    NAMES,
    call,
    cifar10,
    cifar_files,
    cifar_tar,
    command,
    digits,
    encode,
    imagenet,
    judge_digits,
    lsun_bedroom,
    noise,
    tar_bytes,
    train_images,
    train_tar,
    tree,
    val_images,
    write_lmdb,
)
from launch import check_refused, run

# Kills and restarts

# Wrapper that runs a dataset script and kills the script just before it renames its fourth temporary file.
# With how="full", writing more than 500 bytes to a file fails instead, which simulates a full disk.
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
def test_a_stopped_run_leaves_only_complete_files_and_a_rerun_adds_the_rest(name, how, archives, unpacked, tmp_path):
    module, args = command(name, archives, tmp_path)
    done = run(["-c", DYING, how, module.__file__, *args])
    if how == "full":
        check_refused(done, ["cannot be written", "File too large", str(tmp_path)])
    else:
        assert done.returncode == {"SIGKILL": -9, "SIGINT": 130}[how] and "Traceback" not in done.output, done.output
    reference = tree(unpacked[name])
    left = {path: data for path, data in tree(tmp_path).items() if path != "classes.csv"}
    leftovers = [path for path in left if path.endswith(".tmp")]
    whole = set(left) - set(leftovers)
    assert all(left[path] == reference[path] for path in whole)
    if name != "lsun":  # the second worker of lsun_bedroom.py may have written more files
        assert len(leftovers) == (how == "SIGKILL") and len(whole) < len(reference)
    assert how == "SIGKILL" or not leftovers
    assert how == "full" or len(whole) >= 2
    written = {path: (tmp_path / path).stat().st_mtime_ns for path in whole}

    call(module, *args).check()
    assert tree(tmp_path) == reference  # temporary files of the interrupted run are removed
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in whole} == written


SQUARES, LABELS = np.zeros((2, 16, 16, 1), np.uint8), np.zeros(2, int)
BAD_SAMPLES = [
    (None, ["No such file"]),
    (b"no archive", ["not an .npz"]),
    (dict(arr_0=SQUARES), ["arr_1", "labels"]),
    (dict(arr_0=SQUARES[:, :12, :12], arr_1=LABELS), ["(2, 12, 12, 1)", "8 pixels"]),
    (dict(arr_0=SQUARES, arr_1=np.zeros(3, int)), ["(3,)"]),
    (dict(arr_0=SQUARES, arr_1=LABELS[:, None]), ["(2, 1)"]),
    (dict(arr_0=SQUARES, arr_1=np.array(3)), ["not an .npz with arr_0 and arr_1"]),
    (dict(arr_0=SQUARES[:0], arr_1=LABELS[:0]), ["(0, 16, 16, 1)"]),
]


def test_judge_digits_refuses_invalid_samples(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    for content, words in BAD_SAMPLES:
        if isinstance(content, dict):
            np.savez(path, **content)
        elif content:
            path.write_bytes(content)
        check_refused(call(judge_digits, path), [str(path), *words])
    np.savez_compressed(path, arr_0=noise(0, 2, 16, 16, 1), arr_1=LABELS)
    data = bytearray(path.read_bytes())
    data[60:160] = b"\xff" * 100  # damage the compressed data
    path.write_bytes(data)
    check_refused(call(judge_digits, path), [str(path), "not an .npz"])
    np.savez(path, SQUARES, LABELS)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    check_refused(call(judge_digits, path), ["pip install scikit-learn"])


def test_digits_reports_bad_folders_flags_and_a_missing_package(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("")
    check_refused(call(digits, tmp_path / "file"), [str(tmp_path / "file"), "File exists"])
    check_refused(call(digits, tmp_path, "--size", 0), ["--size 0"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    check_refused(call(digits, tmp_path), ["pip install scikit-learn"])


def test_held_out_digits_are_not_among_the_training_digits(tmp_path):
    pytest.importorskip("sklearn")
    out, held_out, link = tmp_path / "out", tmp_path / "held_out", tmp_path / "link"
    link.symlink_to(out)
    for within in (out, f"{out}/", link, out / "held_out"):
        check_refused(
            call(digits, out, "--size", 8, "--held_out_dir", within), [f"--held_out_dir {within}", "or inside it"]
        )
    call(digits, out, "--size", 8, "--held_out_dir", held_out).check()
    assert len(tree(out)) == 1437 and len(tree(held_out)) == 360
    assert not set(tree(out)) & set(tree(held_out))
    call(digits, out, "--size", 8).check()  # without --held_out_dir, all 1,797 images are written
    done = call(digits, out, "--size", 8, "--held_out_dir", held_out)
    check_refused(done, [f"{out}: holds 1,797 images", "1,437"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_rerun_restores_lost_and_empty_files(name, archives, unpacked, tmp_path):
    """A rerun checks every file, even after a complete run: some file systems leave empty files after a power cut."""
    module, args = command(name, archives, tmp_path)
    call(module, *args).check()
    images = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".png", ".JPEG"))
    images[0].unlink()
    images[-1].write_bytes(b"")
    done = call(module, *args).check()
    assert tree(tmp_path) == tree(unpacked[name])
    assert sum(map(int, re.findall(r"(\d+) written now", done.output))) == 2


# Invalid input


@pytest.fixture(scope="module")
def bad(archives, tmp_path_factory):
    """A folder of damaged, incomplete and wrong input files."""
    bad = tmp_path_factory.mktemp("bad")
    train = archives / "train.tar"
    (bad / "text").write_text("a page that says 404, perhaps\n" * 100)
    (bad / "cut_train.tar").write_bytes(train.read_bytes()[:30_000])
    long = cifar_tar({**cifar_files(), "readme.html": noise(0, 200_000).tobytes()})
    (bad / "cut_cifar.tar.gz").write_bytes(long[:100_000])
    images = train_images()
    (bad / "two.tar").write_bytes(train_tar({wnid: images[wnid] for wnid in list(NAMES)[:2]}))
    damaged = bytearray(train_tar())
    name = damaged.index(b"n01000000_14.JPEG")
    damaged[name + 3] = ord("x")  # makes the checksum in the tar header wrong
    (bad / "damaged_train.tar").write_bytes(damaged)
    few = list(val_images().items())
    (bad / "few_val.tar").write_bytes(tar_bytes(dict(few[:4])))
    (bad / "many_val.tar").write_bytes(tar_bytes(dict([*few, ("ILSVRC2012_val_00000006.JPEG", b"x")])))
    (bad / "no_meta.tar.gz").write_bytes(gzip.compress(tar_bytes({"data/readme.txt": b"x"})))
    (bad / "ids.txt").write_text("n01000000 tench\nn02000000\n")

    python = {f"cifar-10-batches-py/data_batch_{i}": b"pickle" for i in range(1, 6)}
    (bad / "cifar_python.tar.gz").write_bytes(gzip.compress(tar_bytes(python)))
    files = cifar_files()
    changes = {
        "lacking": {"data_batch_2.bin": None, "test_batch.bin": None},
        "ragged": {"data_batch_3.bin": files["data_batch_3.bin"][:-1]},
    }
    for kind, change in changes.items():
        kept = {name: data for name, data in {**files, **change}.items() if data is not None}
        (bad / f"cifar_{kind}.tar.gz").write_bytes(cifar_tar(kept))

    write_lmdb(bad / "cut_lmdb", {b"%02d" % i: noise(i, 5000).tobytes() for i in range(50)})
    os.truncate(bad / "cut_lmdb" / "data.mdb", 130_000)
    image = encode(noise(0, 32, 32, 3), "png")
    for kind, name in {"other_size": "bedroom_0000003.png", "strangers": "bedroom_0000012.png"}.items():
        (bad / kind).mkdir()
        (bad / kind / name).write_bytes(image)
    return bad


def unpack(archive="{archives}/train.tar", out="{out}", **flags):
    flags = flags or dict(names="{archives}/names.txt")
    return imagenet, [archive, out, *(text for name, value in flags.items() for text in (f"--{name}", value))]


def unpack_val(archive="{archives}/val.tar", devkit="{archives}/devkit.tar.gz"):
    return unpack(archive, devkit=devkit)


def squares(lmdb_path="{archives}/lmdb", out="{out}", *flags):
    return lsun_bedroom, [lmdb_path, out, *flags]


def cifar(archive="{archives}/cifar.tar.gz", out="{out}"):
    return cifar10, [archive, out]


# {case: (command, words that its error message must contain)}
CASES = {
    "no archive": (unpack("{bad}/gone.tar"), ["{bad}/gone.tar", "No such file", "ILSVRC2012_img_train.tar"]),
    "a text as archive": (unpack("{bad}/text"), ["{bad}/text", "not a tar archive", "ILSVRC2012_img_train.tar"]),
    "no classes": ((imagenet, ["{archives}/train.tar", "{out}"]), ["--devkit", "--names"]),
    "validation without labels": (unpack("{archives}/val.tar"), ["{archives}/val.tar", "labels", "--devkit"]),
    "a training archive cut short": (unpack("{bad}/cut_train.tar"), ["{bad}/cut_train.tar", "truncated"]),
    "a training archive of fewer classes": (
        unpack("{bad}/two.tar"),
        ["{bad}/two.tar", "1 classes are only", "n02000000"],
    ),
    "a damaged class": (unpack("{bad}/damaged_train.tar"), ["{bad}/damaged_train.tar", "n01000000.tar", "bad header"]),
    "too few validation images": (unpack_val("{bad}/few_val.tar"), ["{bad}/few_val.tar", "4 images", "5 labels"]),
    "too many validation images": (unpack_val("{bad}/many_val.tar"), ["6 images", "5 labels"]),
    "names that are not there": (unpack(names="{bad}/gone.txt"), ["{bad}/gone.txt", "No such file"]),
    "names without names": (unpack(names="{bad}/ids.txt"), ["--names {bad}/ids.txt", "n02000000"]),
    "no development kit": (unpack_val(devkit="{bad}/gone"), ["{bad}/gone", "No such file", "ILSVRC2012_devkit_t12"]),
    "another kit": (unpack_val(devkit="{bad}/no_meta.tar.gz"), ["--devkit {bad}/no_meta.tar.gz", "meta.mat"]),
    "no lmdb": (squares("{bad}/gone"), ["{bad}/gone", "No such file", "bedroom_train_lmdb"]),
    "a text as lmdb": (squares("{bad}/text"), ["{bad}/text", "not an lmdb"]),
    "an lmdb cut short": (squares("{bad}/cut_lmdb"), ["{bad}/cut_lmdb/data.mdb", "truncated"]),
    "another image size": (
        squares("{archives}/lmdb", "{bad}/other_size", "--image-size", "16"),
        ["{bad}/other_size/bedroom_0000003.png", "--image-size 16"],
    ),
    "another database's images": (
        squares("{archives}/lmdb", "{bad}/strangers", "--image-size", "32"),
        ["{bad}/strangers", "11 images", "{archives}/lmdb 10"],
    ),
    "image size 0": (squares("{archives}/lmdb", "{out}", "--image-size", "0"), ["image_size 0"]),
    "a prefix that is two classes": (squares("{archives}/lmdb", "{out}", "--prefix", "a_b"), ["--prefix 'a_b'"]),
    "no CIFAR-10": (cifar("{bad}/gone"), ["{bad}/gone", "No such file", "cifar-10-binary.tar.gz"]),
    "CIFAR-10 for Python": (cifar("{bad}/cifar_python.tar.gz"), ["not the binary version", "cifar-10-binary.tar.gz"]),
    "CIFAR-10 without two files": (cifar("{bad}/cifar_lacking.tar.gz"), ["lacks data_batch_2.bin, test_batch.bin"]),
    "CIFAR-10 cut short": (cifar("{bad}/cut_cifar.tar.gz"), ["{bad}/cut_cifar.tar.gz", "truncated"]),
    "a CIFAR-10 file cut short": (cifar("{bad}/cifar_ragged.tar.gz"), ["data_batch_3.bin", "6,145 bytes", "3,073"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(name, archives, bad, tmp_path):
    (module, args), words = CASES[name]
    places = SimpleNamespace(archives=archives, bad=bad, out=tmp_path / "out")
    check_refused(
        call(module, *(text.format(**vars(places)) for text in args)), [word.format(**vars(places)) for word in words]
    )


@pytest.mark.parametrize("package, name", [("scipy", "imagenet_val"), ("lmdb", "lsun")])
def test_a_missing_package_is_named(package, name, archives, tmp_path, monkeypatch):
    for module in [package, *(m for m in sys.modules if m.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    module, args = command(name, archives, tmp_path)
    check_refused(call(module, *args), [f"pip install {package}"])


def test_a_rerun_with_a_good_archive_keeps_the_files_from_a_damaged_one(archives, bad, unpacked, tmp_path):
    check_refused(call(*[imagenet, bad / "damaged_train.tar", tmp_path, "--names", archives / "names.txt"]), [])
    assert len(list(tmp_path.rglob("*.JPEG"))) == 6  # four images of the first class and two of the second
    module, args = command("imagenet", archives, tmp_path)
    assert "6 written now" in call(module, *args).check().output
    assert tree(tmp_path) == tree(unpacked["imagenet"])
