"""List the images in a folder and their classes. Rank 0 reads the folder and broadcasts the list."""

import csv
import io
import os
import posixpath
import re

from . import dist_util, files, logger
from .errors import InputError, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
CLASS_NUMBER = re.compile("[0-9]{1,6}")
RESOURCE_FORK = "._"  # the prefix of the files in which macOS stores the metadata of other files

# Listing


def list_images(data_dir):
    """Return the sorted paths of all images in a folder and its subfolders. Every rank must call this function.

    :param data_dir: a folder or a blob URL.
    :raises InputError: if the folder does not exist or contains no images.
    """
    return dist_util.from_rank_0(lambda: _find_images(data_dir))


def _find_images(data_dir):
    if not data_dir:
        raise InputError("--data_dir is missing: give a folder of images")
    try:
        if not files.is_dir(data_dir):
            raise InputError(f"--data_dir {data_dir}: {'not a folder' if files.exists(data_dir) else 'no such folder'}")
        paths = _list_image_files_recursively(data_dir)
    except files.READ_ERRORS as e:
        raise InputError(f"--data_dir {data_dir}: cannot list {getattr(e, 'filename', 'it')} ({reason(e)})") from None
    if not paths:
        looked_for = f"{', '.join(EXTENSIONS)}, also in subfolders"
        raise InputError(f"--data_dir {data_dir}: no image in it (looked for {looked_for})")
    return paths


def _list_image_files_recursively(data_dir):
    """Return the sorted paths of all images in a folder and its subfolders. A single rank may call this function."""
    return list(logger.progress_bar(iterable=_walk(data_dir), desc="listing images", unit=" images", delay=1))


def _walk(folder, parents=()):
    """Yield the paths of the images in a folder and its subfolders, in the sorted order of the names in each folder.

    :param parents: the real paths of the folders above this folder. Links to these folders are not followed.
    """
    parents = (*parents, os.path.realpath(folder))
    for name in files.list_dir(folder):
        path = files.join(folder, name)
        if _is_image(name):
            yield path
        elif files.is_dir(path) and os.path.realpath(path) not in parents:
            yield from _walk(path, parents)


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith(RESOURCE_FORK)


# Classes


def image_classes(data_dir, paths, labels="name"):
    """Return the class name of each image, and all class names in the order of their labels. Every rank must call it.

    Class names are sorted as strings.

    :param data_dir: the folder that list_images was called with.
    :param paths: the paths that list_images returned.
    :param labels: "name" for the file name up to the first underscore, "folder" for the name of the folder that
        contains the file, or the path of a CSV file. The lines of the CSV file are path,label, with paths relative to
        data_dir. The first line may be a header. If all labels in the CSV file are whole numbers, number i is label i.
    """
    if labels.lower().endswith(".csv"):
        return dist_util.from_rank_0(lambda: _classes_from_csv(labels, [_relative(p, data_dir) for p in paths]))
    if labels == "name":
        classes = [_class_of_name(path) for path in paths]
    elif labels == "folder":
        classes = [_class_of_folder(path, data_dir) for path in paths]
    else:
        raise InputError(f"--labels {labels}: give name, folder, or the path of a CSV file with lines path,label")
    return classes, sorted(set(classes))


def number_classes(paths, classes, names, num_classes=None):
    """Return the label of each image, which is the index of its class in `names`.

    :param paths: the paths of the images, for error messages.
    :param classes: the class name of each image.
    :param num_classes: the number of classes of the model.
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
    """Return the path of an image relative to the folder that was listed, with forward slashes."""
    return path[len(files.join(data_dir, "x")) - 1 :].replace(os.sep, "/")


# Labels from a CSV file


def _classes_from_csv(labels, paths):
    """Return the result of image_classes for a CSV file of labels.

    :param paths: the paths of the images, relative to --data_dir.
    """
    by_path = _read_csv(labels)
    if all(map(CLASS_NUMBER.fullmatch, by_path.values())):
        by_path = {path: str(int(label)) for path, label in by_path.items()}
        names = [str(i) for i in range(1 + max(map(int, by_path.values()), default=-1))]
    else:
        names = sorted(set(by_path.values()))
    missing = [path for path in paths if path not in by_path]
    if missing:
        raise InputError(
            f"--labels {labels}: no label for {len(missing)} of {len(paths)} images: add lines such as "
            f"{missing[0]},LABEL or remove these images from --data_dir"
        )
    return [by_path[path] for path in paths], names


def _read_csv(labels):
    """Read a CSV file of labels: {path of an image relative to --data_dir: label as a string}."""
    by_path = {}
    try:
        with files.open_file(labels) as f:
            rows = csv.reader(io.TextIOWrapper(f, "utf-8-sig", newline=""))
            for row in filter(None, rows):
                if len(row) != 2 or not all(cell.strip() for cell in row):
                    raise InputError(f"--labels {labels}: line {rows.line_num} is not path,label")
                path = posixpath.normpath(row[0])
                if _is_image(posixpath.basename(path)):  # skips a header line
                    by_path[path] = row[1].strip()
    except (UnicodeDecodeError, csv.Error, *files.READ_ERRORS) as e:
        raise InputError(f"--labels {labels}: cannot read it as CSV in UTF-8 ({reason(e)})") from None
    return by_path
