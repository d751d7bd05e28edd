"""Write CIFAR-10 as PNG files such as airplane_00000.png to OUT_DIR/train and OUT_DIR/test, for training.

The number in a file name is the image's index in the training or test set. The alphabetical order of the ten class
names is the order of CIFAR-10's labels 0 to 9. If the script was interrupted, run the same command again to write the
missing images.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from _common import check_count, files_in, open_tar, size_of, write_png
from PIL import Image
from tqdm import tqdm

from guided_diffusion.errors import InputError, run

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # indexed by label
SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # bytes per image: a label, then the red, green and blue planes


def main():
    args = create_argparser().parse_args()
    batches = read_batches(args.archive)
    for split, parts in SPLITS.items():
        records = np.concatenate([batches[part] for part in parts])
        folder = os.path.join(args.out_dir, split)
        new = write_images(records, folder)
        check_count(folder, r".*\.png", len(records), args.archive)
        print(f"{folder}: {len(records):,} images in {len(NAMES)} classes, complete; {new:,} written now")


def read_batches(path):
    """Read CIFAR-10's binary version from an archive or folder. Return {file name: records uint8 [N, 3073]}."""
    wanted = {name for batch in SPLITS.values() for name in batch}
    if os.path.isdir(path):
        data = {file.name: file.read_bytes() for file in Path(path).rglob("*.bin")}
    else:
        with open_tar(path, expected=ARCHIVE) as tar:
            data = {name: tar.extractfile(member).read() for name, member in files_in(tar) if name in wanted}
    if missing := sorted(wanted - set(data)):
        raise InputError(f"{path}: lacks {', '.join(missing)}: incomplete, or not the binary version: give {ARCHIVE}")
    for name in wanted:
        if len(data[name]) % RECORD:
            raise InputError(f"{path}: {name} has {len(data[name]):,} bytes, not a multiple of {RECORD:,}: truncated")
    return {name: np.frombuffer(data[name], np.uint8).reshape(-1, RECORD) for name in wanted}


def write_images(records, folder):
    """Write the images that are not in `folder` yet, as CLASS_INDEX.png. Return the number of images written."""
    os.makedirs(folder, exist_ok=True)
    new = 0
    for i, record in enumerate(tqdm(records, unit=" images")):
        path = os.path.join(folder, f"{NAMES[record[0]]}_{i:05d}.png")
        if not size_of(path):
            write_png(path, Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0).copy()))
            new += 1
    return new


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help=f"path of {ARCHIVE}, or of the folder {FOLDER} unpacked from it")
    parser.add_argument("out_dir", help="the output folder")
    return parser


if __name__ == "__main__":
    run(main)
