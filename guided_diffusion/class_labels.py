"""Class labels for sampling, from the --classes flag: class numbers, class names or files."""

import csv
import io
import re

import numpy as np
import torch as th

from . import files
from .errors import InputError, check_at_least, reason
from .random_util import random_labels


def choose_labels(classes, num_samples, num_classes, seed, names=None):
    """Return the label of each sample: int64 [num_samples], or None for an unconditional model.

    :param classes: "" draws labels uniformly at random. "balanced" cycles through all classes. A list such as "207,360"
        cycles through the listed class numbers or names. The path of a .txt file (one class number per line) or of a
        .npy file cycles through the class numbers in the file.
    :param num_classes: the number of classes, or None for an unconditional model.
    :param names: the class names in the order of their labels, if known. A class name may contain several synonyms
        separated by commas, as in ImageNet.
    """
    if num_classes is None:
        if classes:
            raise InputError(f"--classes {classes}: the model is not class-conditional; leave --classes out")
        return None
    check_at_least(1, num_samples=num_samples)
    if not classes:
        return random_labels(seed, range(num_samples), num_classes)
    if classes == "balanced":
        chosen = range(num_classes)
    elif classes.endswith((".txt", ".npy")):
        chosen = _read_classes(classes)
    else:
        chosen = _parse_classes(classes, names)
    outside = [c for c in chosen if not 0 <= c < num_classes]
    if outside:
        raise InputError(f"--classes {classes}: no class {outside[0]}; the model has the classes 0..{num_classes - 1}")
    return th.tensor(chosen, dtype=th.int64)[th.arange(num_samples) % len(chosen)]


def _parse_classes(classes, names):
    parts = [part.strip() for part in classes.split(",")]
    numbers = {}
    for i, name in enumerate(names or []):
        for synonym in (name, *name.split(",")):
            numbers.setdefault(synonym.strip().lower(), i)
    for part in parts:
        if re.fullmatch(r"-?\d+", part):  # a number is always a label, even if some class names are numbers
            numbers[part.lower()] = int(part)
        if part.lower() not in numbers:
            unknown = "class names need a config.json or --class_table; give class numbers"
            known = f"the first classes are {', '.join(names[:5])}" if names else unknown
            raise InputError(f"--classes {classes}: no class {part!r}; {known}")
    return [numbers[part.lower()] for part in parts]


def _read_classes(path):
    try:
        with files.open_file(path) as f:
            if path.endswith(".npy"):
                chosen = np.load(f, allow_pickle=False).reshape(-1)
            else:
                chosen = np.array([int(line) for line in f.read().decode().split()])
        if not len(chosen) or chosen.dtype.kind not in "iu":
            raise ValueError("the file holds no whole numbers")
        return chosen.tolist()
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"--classes {path}: expected a file of class numbers, one per line ({reason(e)})") from None


def read_class_table(path):
    """Return the class names in a CSV file with the columns label, name and, optionally, wnid.

    The class names are returned in the order of their labels. A wnid becomes another synonym in the class name.
    """
    try:
        with files.open_file(path) as f:
            rows = list(csv.DictReader(io.TextIOWrapper(f, "utf-8")))
        table = {int(row["label"]): ",".join(filter(None, [row.get("wnid"), row["name"]])) for row in rows}
        return [table[i] for i in range(len(table))]
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise InputError(
            f"--class_table {path}: expected a CSV file with the columns label (counted from 0) and name, such as the "
            f"classes.csv that datasets/imagenet.py writes ({reason(e)})"
        ) from None
