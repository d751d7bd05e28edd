"""The images in a folder and their classes. Rank 0 reads the folder and tells the other ranks."""

import csv
import io
import os
import posixpath
import re

from . import dist_util, files, logger
from .errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
CLASS_NUMBER = re.compile("[0-9]{1,6}")
RESOURCE_FORK = "._"  # macOS stores a file's metadata beside it, under its name with this prefix

# Listing


def list_images(data_dir):
    """The paths of all images in a folder and its subfolders, in sorted order. Every rank must call it.

    :param data_dir: a folder or a blob URL.
    :raises InputError: if there is no such folder, or no image in it.
    """
    return dist_util.from_rank_0(lambda: _find_images(data_dir))


def _find_images(data_dir):
    if not data_dir:
        raise InputError("--data_dir is missing: give a folder of images")
    try:
        if not files.is_dir(data_dir):
            raise InputError(f"--data_dir {data_dir}: {'not a folder' if files.exists(data_dir) else 'no such folder'}")
        paths = _list_image_files_recursively(data_dir)
    except files.read_errors(data_dir) as e:
        raise InputError(f"--data_dir {data_dir}: cannot list it ({_first_line(e)})") from None
    if not paths:
        raise InputError(
            f"--data_dir {data_dir}: no image in it (looked for {', '.join(EXTENSIONS)}, also in subfolders)"
        )
    return paths


def _list_image_files_recursively(data_dir):
    """The paths of all images in a folder and its subfolders, in sorted order. Not a collective."""
    return list(logger.progress_bar(iterable=_walk(data_dir), desc="listing images", unit=" images", delay=1))


def _walk(folder, parents=()):
    """Yield the paths of the images in a folder and its subfolders. A subfolder is listed where its name sorts.

    :param parents: the real paths of the folders above, to detect links that lead back to one of them.
    """
    if os.path.islink(folder) and not os.path.isdir(folder):
        return
    real_path = os.path.realpath(folder)
    if real_path in parents:
        logger.warn(f"{folder}: skipped, because it links to a folder that contains it")
        return
    for name, may_be_folder in files.scan_dir(folder):
        path = files.join(folder, name)
        if _is_image(name):
            yield path
        elif may_be_folder:
            yield from _walk(path, (*parents, real_path))


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith(RESOURCE_FORK)


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# Classes


def image_classes(data_dir, paths, labels="name"):
    """The class name of each image, and all class names in the order of their labels. Every rank must call it.

    Class names are sorted as strings.

    :param data_dir: the folder that list_images was called with.
    :param paths: the paths that list_images returned.
    :param labels: "name": the class is the file name up to the first underscore. "folder": the class is the name of
        the folder that contains the file. The path of a CSV file: its lines are path,label, with paths relative to
        data_dir; the first line may be a header. If all labels in the CSV file are whole numbers, number i is label i.
    """
    if _is_csv(labels):
        return dist_util.from_rank_0(lambda: _classes_from_csv(labels, [_relative(p, data_dir) for p in paths]))
    if labels == "name":
        classes = [_class_of_name(path) for path in paths]
    elif labels == "folder":
        classes = [_class_of_folder(path, data_dir) for path in paths]
    else:
        raise InputError(f"--labels {labels}: give name, folder, or the path of a CSV file with lines path,label")
    return classes, sorted(set(classes))


def number_classes(paths, classes, names, num_classes=None):
    """The label of each image: the index of its class in `names`.

    :param paths: the images' paths, for messages.
    :param classes: the class name of each image.
    :param num_classes: the number of labels that the model has.
    """
    if num_classes is not None and len(names) > num_classes:
        raise InputError(
            f"--num_classes {num_classes}: the data have {len(names)} classes ({', '.join(names[:3])}, ...); use "
            f"{len(names)} or more"
        )
    label_of = {name: i for i, name in enumerate(names)}
    for path, name in zip(paths, classes):
        if name not in label_of:
            raise InputError(f"{path}: its class {name} is not one of the {len(names)} classes of the training data")
    return [label_of[name] for name in classes]


def _class_of_name(path):
    name, underscore, _ = os.path.basename(path).partition("_")
    if not underscore:
        raise InputError(
            f"{path}: no class label in its name: name files LABEL_REST.png, or give --labels folder or a CSV file"
        )
    return name


def _class_of_folder(path, data_dir):
    folder = posixpath.dirname(_relative(path, data_dir))
    if not folder:
        raise InputError(f"{path}: not in a class's folder: --labels folder needs all images in folders of --data_dir")
    return posixpath.basename(folder)


def _relative(path, data_dir):
    """An image's path relative to the folder that was listed, with forward slashes."""
    return path[len(files.join(data_dir, "x")) - 1 :].replace(os.sep, "/")


# Labels from a CSV file


def _is_csv(labels):
    return labels.lower().endswith(".csv")


def _classes_from_csv(labels, paths):
    """What image_classes returns, given the images' relative paths."""
    by_path = _read_csv(labels)
    if all(map(CLASS_NUMBER.fullmatch, by_path.values())):
        by_path = {path: str(int(label)) for path, label in by_path.items()}
        names = [str(i) for i in range(1 + max(map(int, by_path.values()), default=-1))]
    else:
        names = sorted(set(by_path.values()))
    missing = [path for path in paths if path not in by_path]
    if missing:
        raise InputError(
            f"--labels {labels}: no label for {len(missing)} of {len(paths)} images, the first of them {missing[0]}: "
            f"add lines such as {missing[0]},LABEL or remove these images from --data_dir"
        )
    unused = by_path.keys() - set(paths)
    if unused:
        logger.warn(
            f"--labels {labels}: {len(unused)} of {len(by_path)} lines name images that --data_dir lacks, such as "
            f"{min(unused)}"
        )
    return [by_path[path] for path in paths], names


def _read_csv(labels):
    """The label of each image, as a string, by its path relative to --data_dir."""
    try:
        with files.open_file(labels) as f:
            rows = csv.reader(io.StringIO(f.read().decode("utf-8-sig"), newline=""))
        return _labels_by_path(rows, f"--labels {labels}")
    except FileNotFoundError:
        raise InputError(f"--labels {labels}: no such file") from None
    except (UnicodeDecodeError, csv.Error, *files.read_errors(labels)) as e:
        raise InputError(f"--labels {labels}: cannot read it as CSV in UTF-8 ({_first_line(e)})") from None


def _labels_by_path(rows, source):
    """Check the rows of a CSV file.

    :param source: the start of error messages.
    """
    by_path, first_of_kind = {}, {}  # first_of_kind: a line and its label, by whether that is a whole number
    for i, row in enumerate(filter(None, rows)):
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise InputError(f"{source}: line {rows.line_num} is not path,label")
        path, label = posixpath.normpath(row[0]), row[1].strip()
        name = posixpath.basename(path).strip()
        if (i == 0 and not _is_image(name)) or name.startswith(RESOURCE_FORK):  # a header, or not an image
            continue
        if by_path.setdefault(path, label) != label:
            raise InputError(f"{source}: line {rows.line_num}: {path} has another label in an earlier line")
        first_of_kind.setdefault(label.isascii() and label.isdigit(), (rows.line_num, label))
    if len(first_of_kind) == 2:  # one word added or removed would change the meaning of all numbers
        (line, number), (word_line, word) = first_of_kind[True], first_of_kind[False]
        raise InputError(
            f"{source}: line {word_line}: the label {word} is not a whole number, but the one in line {line}, "
            f"{number}, is: make all labels whole numbers, or none"
        )
    return by_path
