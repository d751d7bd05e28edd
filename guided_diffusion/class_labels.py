"""Class labels of samples: from --classes, numbers, names and files."""

import csv
import io
import re

import numpy as np
import torch as th

from . import files
from .errors import InputError, check_at_least, reason
from .random_util import random_labels


def choose_labels(classes, num_samples, num_classes, seed, names=None):
    """The label of every sample: int64 [num_samples]. None if num_classes is None, for a model without labels.

    :param classes: "" draws labels uniformly; "balanced" cycles through all classes; "207,360" cycles through these,
        as do a list of names and a file of numbers, .txt (one per line) or .npy.
    :param names: the class names in the order of their labels, if they are known. A name may be a list of synonyms
        separated by commas, as ImageNet's are.
    """
    if num_classes is None:
        if classes:
            raise InputError(f"--classes {classes}: the model is not class-conditional")
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
        raise InputError(f"--classes {classes}: class {outside[0]} is outside the model's 0..{num_classes - 1}")
    return th.tensor(chosen, dtype=th.int64)[th.arange(num_samples) % len(chosen)]


def _parse_classes(classes, names):
    parts = [part.strip() for part in classes.split(",")]
    numbers = {}
    for i, name in enumerate(names or []):
        for synonym in (name, *name.split(",")):
            numbers.setdefault(synonym.strip().lower(), i)
    for part in parts:
        if re.fullmatch(r"-?\d+", part):  # a number is a label, even if classes have numbers as names
            numbers[part.lower()] = int(part)
        if part.lower() not in numbers:
            unknown = "names are unknown without a config.json or --class_table: give numbers"
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
            raise ValueError("no whole numbers")
        return chosen.tolist()
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"--classes {path}: not a list of class numbers, one per line ({reason(e)})") from None


def read_class_table(path):
    """The class names of a CSV file with the columns label, name and perhaps wnid, in the order of the labels."""
    try:
        with files.open_file(path) as f:
            rows = list(csv.DictReader(io.TextIOWrapper(f, "utf-8")))
        table = {int(row["label"]): ",".join(filter(None, [row.get("wnid"), row["name"]])) for row in rows}
        return [table[i] for i in range(len(table))]
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise InputError(
            f"--class_table {path}: not a CSV file with the columns label (from 0) and name, such as the classes.csv "
            f"that datasets/imagenet.py writes ({reason(e)})"
        ) from None
