"""Write CIFAR-10 as images to train on: PNGs named airplane_00000.png and so on, in OUT_DIR/train and OUT_DIR/test.

The number is the image's place in the training or test set. Sorted, the ten names have CIFAR-10's own labels, 0 to 9.
Run the same command again after a kill: it writes the missing images.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from _common import check_count, files_in, open_tar, run, size_of, write_png
from PIL import Image
from tqdm import tqdm

from guided_diffusion.errors import InputError

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
NAMES = "batches.meta.txt"
SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # a label; the red, the green and the blue values


def main():
    args = create_argparser().parse_args()
    data = read_files(args.archive)
    names = read_class_names(args.archive, data[NAMES])
    batches = {name: read_batch(args.archive, name, data[name]) for batch in SPLITS.values() for name in batch}
    check_batches(args.archive, batches, names)
    for split, parts in SPLITS.items():
        images = [image for part in parts for image in batches[part][0]]
        labels = [names[label] for part in parts for label in batches[part][1]]
        folder = os.path.join(args.out_dir, split)
        new = write_images(images, labels, folder)
        check_count(folder, r".*\.png", len(images), args.archive)
        print(f"{folder}: {len(images):,} images in {len(names)} classes, complete; {new:,} written now")


def read_files(path):
    """Read the files of the binary version, 180 MB, from its archive or the folder in it: {name: bytes}."""
    wanted = {NAMES, *(name for batch in SPLITS.values() for name in batch)}
    if os.path.isdir(path):
        inner = os.path.join(path, FOLDER)
        folder = inner if os.path.isdir(inner) else path
        present = set(os.listdir(folder))
        data = {name: Path(folder, name).read_bytes() for name in wanted & present}
    else:
        present, data = set(), {}
        with open_tar(path, expected=ARCHIVE) as tar:
            for name, member in files_in(tar):
                present.add(name)
                if name in wanted:
                    data[name] = tar.extractfile(member).read()
    if "data_batch_1" in present or "data_batch_1.mat" in present:
        raise InputError(f"{path}: the version of CIFAR-10 for Python or Matlab: give the binary one, {ARCHIVE}")
    missing = sorted(wanted - set(data))
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}: incomplete, or not CIFAR-10: give {ARCHIVE}")
    return data


def read_class_names(path, text):
    """Return the ten names in the order of the labels, which is alphabetical."""
    names = text.decode("ascii", errors="replace").split()
    if len(names) != 10 or names != sorted(set(names)) or not all(name.isalpha() for name in names):
        raise InputError(f"{path}: {NAMES} does not list CIFAR-10's ten classes: get {ARCHIVE} again")
    return names


def read_batch(path, name, data):
    """Return the images uint8 [N, 32, 32, 3] and labels uint8 [N] of one file."""
    if not data or len(data) % RECORD:
        raise InputError(
            f"{path}: {name} has {len(data):,} bytes, not a multiple of {RECORD:,}: truncated: get it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def check_batches(path, batches, names):
    """Refuse files with different numbers of images, or with labels that have no name."""
    counts = {name: len(labels) for name, (_, labels) in batches.items()}
    short, most = min(counts, key=counts.get), max(counts.values())
    if counts[short] < most:
        raise InputError(f"{path}: {short} has {counts[short]:,} images, others {most:,}: truncated: get it again")
    for name, (_, labels) in batches.items():
        if labels.max() >= len(names):
            raise InputError(
                f"{path}: {name} has a label {labels.max()}, beyond {len(names) - 1}: damaged: get it again"
            )


def write_images(images, labels, folder):
    """Write the missing images, named by their labels. Returns their number."""
    os.makedirs(folder, exist_ok=True)
    new = 0
    for i, (image, name) in enumerate(zip(tqdm(images, unit=" images"), labels)):
        path = os.path.join(folder, f"{name}_{i:05d}.png")
        if not size_of(path):
            write_png(path, Image.fromarray(image))
            new += 1
    return new


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help=f"{ARCHIVE}, or the folder {FOLDER} unpacked from it")
    parser.add_argument("out_dir", help="the folder to write to")
    return parser


if __name__ == "__main__":
    run(main)
