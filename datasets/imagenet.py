"""Unpack ImageNet's archives into image files for training, and write a table of the classes.

The images of ILSVRC2012_img_train.tar are written to OUT_DIR/train, and those of ILSVRC2012_img_val.tar to OUT_DIR/val:
the original JPEG files, named WNID_*.JPEG, with one folder per class. OUT_DIR/classes.csv lists each class's label,
WordNet id and name; a label is the index of the class in the sorted list of WordNet ids. If the script was interrupted,
run the same command again to write the missing images.
"""

import argparse
import csv
import io
import os
import re
import tarfile
from collections import Counter

from _common import DAMAGE, check_count, files_in, open_tar, size_of, write_file
from tqdm import tqdm

from guided_diffusion.errors import InputError, reason, run

ARCHIVES = "ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "meta.mat"
VAL_LABELS = "ILSVRC2012_validation_ground_truth.txt"
NAMES = "LOC_synset_mapping.txt or synset_words.txt"

CLASS_TAR = re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
ANY_IMAGE = r".*\.JPEG"


def main():
    args = create_argparser().parse_args()
    classes, val_labels = read_devkit(args.devkit) if args.devkit else (read_names(args.names), None)
    with open_tar(args.archive, expected=ARCHIVES) as tar:
        split = which_split(tar)
        folder = os.path.join(args.out_dir, split)
        if split == "train":
            counts, new = unpack_train(tar, classes, folder)
        elif val_labels is None:
            raise InputError(f"{args.archive}: has no labels for the validation images: give --devkit {DEVKIT}")
        else:
            counts, new = unpack_val(tar, val_labels, folder)
    for wnid, count in counts.items():
        check_count(os.path.join(folder, wnid), ANY_IMAGE, count, args.archive)
    write_class_table(os.path.join(args.out_dir, "classes.csv"), classes)
    print(f"{folder}: {sum(counts.values()):,} images in {len(counts):,} classes, complete; {new:,} written now")


# The classes


def read_names(path):
    """Read a file with lines such as "n01440764 tench, Tinca tinca". Return {WordNet id: name}."""
    names = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in filter(str.strip, f):
            match = re.fullmatch(r"(n\d{8})\s+(.+)", line.strip())
            if not match:
                raise InputError(f"--names {path}: a line is not of the form 'n01440764 tench': {line[:40]!r}")
            names[match[1]] = match[2]
    return names


def read_devkit(path):
    """Read the development kit. Return {WordNet id: name}, and the WordNet ids of the validation images in order.

    The kit's list of validation labels uses ILSVRC2012_ID numbers, which are not in the order of WordNet ids. meta.mat
    also lists general synsets that are not classes; these synsets have children.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            f"--devkit {path}: reading its {META} needs scipy: pip install scipy (for the training images, "
            f"--names with {NAMES} is enough)"
        ) from None
    with open_tar(path, expected=DEVKIT) as tar:
        data = {name: tar.extractfile(member).read() for name, member in files_in(tar) if name in (META, VAL_LABELS)}
    try:
        classes = {
            int(synset["ILSVRC2012_ID"]): (str(synset["WNID"]), str(synset["words"]))
            for synset in loadmat(io.BytesIO(data[META]), squeeze_me=True)["synsets"]
            if synset["num_children"] == 0
        }
        labels = [classes[int(number)][0] for number in data[VAL_LABELS].split()]
    except Exception:  # scipy raises many types of exceptions for damaged files
        raise InputError(f"--devkit {path}: {META} or {VAL_LABELS} is missing or damaged: get {DEVKIT} again") from None
    return dict(classes.values()), labels


def write_class_table(path, classes):
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["label", "wnid", "name"])
    writer.writerows([label, wnid, classes[wnid]] for label, wnid in enumerate(sorted(classes)))
    write_file(path, table.getvalue().encode())


# The images


def which_split(tar):
    """Return "train" if the archive holds training images, or "val" if it holds validation images."""
    for name, _ in files_in(tar):
        if CLASS_TAR.fullmatch(name):
            return "train"
        if VAL_IMAGE.fullmatch(name):
            return "val"
    raise InputError(f"{tar.name}: holds neither n########.tar nor ILSVRC2012_val_########.JPEG: give {ARCHIVES}")


def unpack_train(tar, classes, folder):
    """Write the missing training images. Return {WordNet id: number of images}, and the number written now."""
    tars = {match[1]: member for name, member in files_in(tar) if (match := CLASS_TAR.fullmatch(name))}
    if odd := sorted(set(classes) ^ set(tars)):
        raise InputError(
            f"{tar.name}: {len(odd):,} classes are only in the tar or only in --devkit or --names, such as {odd[0]}: "
            f"give the complete ILSVRC2012_img_train.tar and the list of its classes"
        )
    counts, new = {}, 0
    with tqdm(total=sum(member.size for member in tars.values()), unit="B", unit_scale=True) as bar:
        for wnid, member in tars.items():
            counts[wnid], written = unpack_class(tar, member, os.path.join(folder, wnid))
            new += written
            bar.update(member.size)
    return counts, new


def unpack_class(tar, member, folder):
    """Write the missing images of one class. Return the number of images, and the number of images written now."""
    os.makedirs(folder, exist_ok=True)
    wnid = os.path.basename(folder)
    names, new = set(), 0
    try:
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as class_tar:
            for name, image in files_in(class_tar):
                if re.fullmatch(rf"{wnid}_\d+\.JPEG", name):
                    names.add(name)
                    new += write_missing(class_tar, image, os.path.join(folder, name))
    except DAMAGE as e:
        raise InputError(f"{tar.name}: {member.name} inside is damaged ({reason(e)}): get the archive again") from None
    return len(names), new


def unpack_val(tar, labels, folder):
    """Write the missing validation images. Return {WordNet id: number of images}, and how many were written now.

    :param labels: the WordNet ids of the validation images, in the order of the images' numbers.
    """
    images = {int(match[1]): member for name, member in files_in(tar) if (match := VAL_IMAGE.fullmatch(name))}
    if sorted(images) != list(range(1, len(labels) + 1)):
        raise InputError(
            f"{tar.name}: has {len(images):,} images, but --devkit {len(labels):,} labels: give both files complete"
        )
    for wnid in set(labels):
        os.makedirs(os.path.join(folder, wnid), exist_ok=True)
    new = 0
    for number, member in tqdm(images.items(), unit=" images"):
        wnid = labels[number - 1]
        path = os.path.join(folder, wnid, f"{wnid}_{os.path.basename(member.name)}")
        new += write_missing(tar, member, path)
    return Counter(labels), new


def write_missing(tar, member, path):
    """Write a member to `path`, unless `path` exists with the member's size. Return True if the file was written."""
    if size_of(path) == member.size:
        return False
    write_file(path, tar.extractfile(member).read())
    return True


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help=ARCHIVES)
    parser.add_argument("out_dir", help="the output folder, the same for both archives")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--devkit", help=f"{DEVKIT}: the classes, and labels of the validation images (needs scipy)")
    classes.add_argument("--names", help=f"{NAMES}: the classes, enough for training images")
    return parser


if __name__ == "__main__":
    run(main)
