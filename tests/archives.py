"""Helpers for the tests of datasets/: small archives in the published formats, and the commands that unpack them."""

import gzip
import io
import os
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, Outcome
from PIL import Image

DATASETS = os.path.join(ROOT, "datasets")
sys.path.append(DATASETS)

import cifar10  # noqa: E402
import digits  # noqa: E402, F401
import emoji  # noqa: E402, F401
import imagenet  # noqa: E402
import judge_digits  # noqa: E402, F401
import lsun_bedroom  # noqa: E402

from guided_diffusion.errors import run  # noqa: E402

# The order of the classes in the training archive, which is deliberately not the sorted order
NAMES = {"n03000000": "crane", "n01000000": "tench, Tinca tinca", "n02000000": 'a "quoted" name'}
# The development kit's synsets: (ILSVRC2012_ID, WordNet id, number of children). The ids are in neither the archive's
# order nor the sorted order. Synset 4 is an inner node of the hierarchy and not a class.
KIT = [(1, "n02000000", 0), (2, "n03000000", 0), (3, "n01000000", 0), (4, "n00001740", 3)]
VAL_TRUTH = [3, 1, 1, 2, 3]
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def tar_bytes(contents):
    """Return the bytes of a tar archive with the files {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# Contents of the archives


def train_images():
    """{WordNet id: {file name: bytes}}. The contents are random bytes, because unpacking does not decode JPEGs."""
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
    pytest.importorskip("scipy.io").savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in VAL_TRUTH).encode()
    folder = "ILSVRC2012_devkit_t12/data/"
    return gzip.compress(
        tar_bytes({folder + "meta.mat": meta.getvalue(), folder + "ILSVRC2012_validation_ground_truth.txt": truth})
    )


def cifar_pixels(batch, i):
    """Image i of a CIFAR-10 batch file: uint8 [32, 32, 3]. The colours encode the row, column, batch file and image."""
    rows, columns = np.mgrid[:32, :32]
    blue = 17 * rows * columns + 40 * batch + i
    return np.stack([rows * 8 + i, columns * 8, blue % 256], axis=2).astype(np.uint8)


def cifar_files(per_batch=2):
    """{file name: bytes} of CIFAR-10: five training batches, a test batch and the class names.

    Image i of batch b has label (3 * b + i) % 10.
    """
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
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def write_archives(folder):
    """Write every archive, undamaged, and return the folder."""
    (folder / "train.tar").write_bytes(train_tar())
    (folder / "val.tar").write_bytes(tar_bytes(val_images()))
    (folder / "devkit.tar.gz").write_bytes(devkit())
    (folder / "names.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in NAMES.items()))
    (folder / "cifar.tar.gz").write_bytes(cifar_tar(cifar_files()))
    write_lmdb(folder / "lmdb", {b"key%d" % i: lossless(noise(i, 32, 48, 3)) for i in range(10)})
    return folder


# Running the scripts

# {name: (script's module, arguments)}, each on an undamaged archive
COMMANDS = {
    "imagenet": (imagenet, ["{archives}/train.tar", "{out}", "--names", "{archives}/names.txt"]),
    "imagenet_val": (imagenet, ["{archives}/val.tar", "{out}", "--devkit", "{archives}/devkit.tar.gz"]),
    "lsun": (lsun_bedroom, ["--image-size", "32", "--num_workers", "2", "{archives}/lmdb", "{out}"]),
    "cifar10": (cifar10, ["{archives}/cifar.tar.gz", "{out}"]),
}


def command(name, archives, out):
    """The entry of COMMANDS with its folders filled in: (script's module, arguments)."""
    module, args = COMMANDS[name]
    return module, [text.format(archives=archives, out=out) for text in args]


def call(module, *args):
    """Run a dataset script in this process and return its exit status and output."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        status = 0
        try:
            run(module.main)
        except SystemExit as e:  # like the interpreter: print a string and exit with status 1
            status = e.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return Outcome(status, output.getvalue(), 0, 0)


def tree(folder):
    """All files in a folder and its subfolders: {relative path: bytes}."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
