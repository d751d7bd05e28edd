"""Unpack ImageNet's archives into images to train on, and write the table of its classes.

ILSVRC2012_img_train.tar, a tar of 1,000 tars, goes to OUT_DIR/train, ILSVRC2012_img_val.tar to OUT_DIR/val: the
original JPEG files, named WNID_*.JPEG, in a folder for each class. OUT_DIR/classes.csv lists each class's label,
WordNet id and name; labels number the sorted ids. Run the same command again after a kill: it writes missing images.
"""

import argparse
import csv
import io
import os
import re
import tarfile
from collections import Counter

from _common import DAMAGE, check_count, count_files, files_in, open_tar, run, size_of, write_file
from tqdm import tqdm

from guided_diffusion.errors import InputError, reason

ARCHIVES = "ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "meta.mat"
VAL_LABELS = "ILSVRC2012_validation_ground_truth.txt"
NAMES = "LOC_synset_mapping.txt or synset_words.txt"

CLASS_TAR = re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TEST_IMAGE = re.compile(r"ILSVRC2012_test_\d{8}\.JPEG")
ANY_IMAGE = r".*\.JPEG"


def main():
    args = create_argparser().parse_args()
    classes, val_labels = read_devkit(args.devkit) if args.devkit else (read_names(args.names), None)
    with open_tar(args.archive, expected=ARCHIVES) as tar:
        split = which_split(tar)
        folder = os.path.join(args.out_dir, split)
        if split == "train":
            tars = find_class_tars(tar, classes)
            write_class_table(args.out_dir, classes)
            total, new = unpack_train(tar, tars, folder)
        elif val_labels is None:
            raise InputError(f"{args.archive}: the validation images' labels are not in it: give --devkit {DEVKIT}")
        else:
            write_class_table(args.out_dir, classes)
            total, new = unpack_val(tar, val_labels, folder)
    print(f"{folder}: {total:,} images in {len(classes):,} classes, complete; {new:,} written now")


# The classes


def read_names(path):
    """Read lines such as "n01440764 tench, Tinca tinca". Returns {WordNet id: name}."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line.strip() for line in f]
    except UnicodeDecodeError:
        raise InputError(f"--names {path}: not a text file: give {NAMES}") from None
    names = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"(n\d{8})\s+(.+)", line)
        if match:
            names[match[1]] = match[2]
        elif line:
            raise InputError(f"--names {path}: line {number} is not of the form 'n01440764 tench': {line[:40]!r}")
    if not names:
        raise InputError(f"--names {path}: no class in it: give {NAMES}")
    return names


def read_devkit(path):
    """Read the development kit. Returns {WordNet id: name}, and the list of the validation images' ids."""
    with open_tar(path, expected=DEVKIT) as tar:
        data = {name: tar.extractfile(member).read() for name, member in files_in(tar) if name in (META, VAL_LABELS)}
    if len(data) < 2:
        raise InputError(f"--devkit {path}: has no {META} or no {VAL_LABELS}: give {DEVKIT}")
    classes = read_meta(path, data[META])
    try:
        labels = [classes[int(number)][0] for number in data[VAL_LABELS].split()]
    except (ValueError, KeyError):
        raise InputError(f"--devkit {path}: {VAL_LABELS} does not fit {META}: get {DEVKIT} again") from None
    return dict(classes.values()), labels


def read_meta(path, data):
    """Read the development kit's meta.mat. Returns {the kit's own number: (WordNet id, name)}.

    The kit's numbers are not in the order of the ids; only its ground truth uses them. The file also lists the more
    general synsets above the classes, which have children.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            f"--devkit {path}: reading its {META} needs scipy: pip install scipy (for the training images, "
            f"--names with {NAMES} is enough)"
        ) from None
    try:
        return {
            int(synset["ILSVRC2012_ID"]): (str(synset["WNID"]), str(synset["words"]))
            for synset in loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
            if synset["num_children"] == 0
        }
    except Exception:  # scipy raises many types for damaged files
        raise InputError(f"--devkit {path}: its {META} is damaged: get {DEVKIT} again") from None


def write_class_table(out_dir, classes):
    """Write classes.csv. Refuses a folder whose classes.csv lists other classes."""
    path = os.path.join(out_dir, "classes.csv")
    os.makedirs(out_dir, exist_ok=True)
    if size_of(path):
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            before = {row.get("wnid") for row in csv.DictReader(f)}
        if before != set(classes):
            raise InputError(f"{path}: lists other classes than those given now: choose another OUT_DIR")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["label", "wnid", "name"])
    writer.writerows([label, wnid, classes[wnid]] for label, wnid in enumerate(sorted(classes)))
    write_file(path, table.getvalue().encode())


# The images


def which_split(tar):
    """Return "train" or "val": the images that the archive holds."""
    for name, _ in files_in(tar):
        if CLASS_TAR.fullmatch(name):
            return "train"
        if VAL_IMAGE.fullmatch(name):
            return "val"
        if TEST_IMAGE.fullmatch(name):
            raise InputError(f"{tar.name}: holds the test images, which have no labels: give {ARCHIVES}")
    raise InputError(f"{tar.name}: holds neither n########.tar nor ILSVRC2012_val_########.JPEG: give {ARCHIVES}")


def find_class_tars(tar, classes):
    """Find the tar of each listed class: {WordNet id: TarInfo} in the archive's order. Other classes are refused."""
    tars = {match[1]: member for name, member in files_in(tar) if (match := CLASS_TAR.fullmatch(name))}
    missing, unlisted = sorted(set(classes) - set(tars)), sorted(set(tars) - set(classes))
    if missing:
        raise InputError(
            f"{tar.name}: lacks {len(missing):,} of the {len(classes):,} classes that --devkit or --names lists, such "
            f"as {missing[0]}: truncated, or of another task: give ILSVRC2012_img_train.tar"
        )
    if unlisted:
        raise InputError(
            f"{tar.name}: has {len(unlisted):,} classes that --devkit or --names does not list, such as {unlisted[0]}: "
            f"give the list of all its classes"
        )
    return tars


def unpack_train(tar, tars, folder):
    """Unpack every class that is not complete. Returns the number of images, and how many were written now.

    counts.csv records the number of images of each complete class, so that a restart need not read its tar.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "counts.csv")
    counts, new = read_counts(path), 0
    with tqdm(total=sum(member.size for member in tars.values()), unit="B", unit_scale=True) as bar:
        for wnid, member in tars.items():
            class_folder = os.path.join(folder, wnid)
            if wnid not in counts or counts[wnid] != count_files(class_folder, ANY_IMAGE):
                counts[wnid], written = unpack_class(tar, member, class_folder)
                new += written
                write_file(path, "".join(f"{key},{count}\n" for key, count in counts.items()).encode())
            bar.update(member.size)
    return sum(counts[wnid] for wnid in tars), new


def read_counts(path):
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        matches = [re.fullmatch(r"(n\d{8}),(\d+)\n", line) for line in f]
    return {match[1]: int(match[2]) for match in matches if match}


def unpack_class(tar, member, folder):
    """Write the missing images of one class. Returns the number of its images, and how many were written now."""
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
        raise InputError(f"{tar.name}: its {member.name} is damaged ({reason(e)}): get the archive again") from None
    if not names:
        raise InputError(f"{tar.name}: its {member.name} has no {wnid}_*.JPEG: give ILSVRC2012_img_train.tar")
    check_count(folder, ANY_IMAGE, len(names), tar.name)
    return len(names), new


def unpack_val(tar, labels, folder):
    """Write the missing images, named by their class. Returns their number, and how many were written now.

    :param labels: the WordNet ids of all validation images, in order.
    """
    per_class = Counter(labels)
    for wnid in per_class:
        os.makedirs(os.path.join(folder, wnid), exist_ok=True)
    found, new = set(), 0
    with tqdm(total=len(labels), unit=" images") as bar:
        for name, image in files_in(tar):
            match = VAL_IMAGE.fullmatch(name)
            if not match:
                continue
            number = int(match[1])
            if not 1 <= number <= len(labels):
                raise InputError(f"{tar.name}: has {name}, but --devkit {len(labels):,} labels: give {DEVKIT}")
            wnid = labels[number - 1]
            new += write_missing(tar, image, os.path.join(folder, wnid, f"{wnid}_{name}"))
            bar.update(number not in found)
            found.add(number)
    if len(found) < len(labels):
        raise InputError(f"{tar.name}: has {len(found):,} of {len(labels):,} images: truncated: get it again")
    for wnid, count in per_class.items():
        check_count(os.path.join(folder, wnid), ANY_IMAGE, count, tar.name)
    return len(labels), new


def write_missing(tar, member, path):
    """Write a member to `path` unless a file of that size exists. Returns whether it was written."""
    if size_of(path) == member.size:
        return False
    write_file(path, tar.extractfile(member).read())
    return True


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help=ARCHIVES)
    parser.add_argument("out_dir", help="the folder to write to; give both archives the same")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--devkit", help=f"{DEVKIT}: the classes, and the validation images' labels (needs scipy)")
    classes.add_argument("--names", help=f"{NAMES}: the classes alone, which is enough for the training images")
    return parser


if __name__ == "__main__":
    run(main)
