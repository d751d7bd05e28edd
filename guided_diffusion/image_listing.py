"""Which images a folder holds, and their classes.

Rank 0 looks and tells the others, so that all ranks agree and a shared disk is asked once. What a big local folder
holds is remembered from run to run in the user's cache folder.
"""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import sys
import time
import zlib

from . import dist_util, files, logger
from .errors import InputError

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp")
CACHE_FROM = 10_000  # images; fewer are listed in a moment
CACHE_VERSION = 1
SETTLED_NS = 2 * 10**9  # a folder that changed more recently may change again within one tick of its clock
WHOLE_NUMBER = re.compile("[0-9]{1,6}")

# Listing


def list_images(data_dir):
    """The paths of all images in a folder and those below it, folder by folder in sorted order.

    Every rank must call it.

    :param data_dir: a folder, or a blob URL.
    """
    return dist_util.from_rank_0(lambda: _list_images(data_dir))


def _list_images(data_dir):
    if not data_dir:
        raise InputError("--data_dir is missing: give a folder of images")
    try:
        if not files.is_dir(data_dir):
            raise InputError(f"--data_dir {data_dir}: {'not a folder' if files.exists(data_dir) else 'no such folder'}")
        paths = _list_with_cache(data_dir)
    except files.read_errors(data_dir) as e:
        raise InputError(f"--data_dir {data_dir}: cannot list it ({_one_line(e)})") from None
    if not paths:
        raise InputError(
            f"--data_dir {data_dir}: no image in it (looked for {', '.join(EXTENSIONS)}, also in subfolders)"
        )
    return paths


def _list_image_files_recursively(data_dir):
    """The paths of all images in a folder and those below it, folder by folder in sorted order."""
    return _Walk(data_dir).paths


def _list_with_cache(data_dir):
    cache = _cache_path(data_dir)
    known = _read_cache(cache)
    walk = _Walk(data_dir, known)
    if known:
        anew = f"; {walk.scanned} of {len(walk.folders)} folders listed anew" if walk.scanned else ""
        logger.log(f"{len(walk.paths)} images in {data_dir}, by the listing kept in {cache}{anew}")
    if cache and len(walk.paths) >= CACHE_FROM and walk.folders != known:
        _write_cache(cache, data_dir, walk.folders)
    return walk.paths


class _Walk:
    """Goes through a folder and those below it.

    :param known: the `folders` of an earlier walk: local folders that are unchanged since are not listed again.
    :ivar paths: the images' paths.
    :ivar folders: for each folder, by its path relative to data_dir, a list: its stamp, the names of the images in it,
        and the names of what may be folders.
    :ivar scanned: how many folders were listed.
    """

    def __init__(self, data_dir, known=None):
        self.known = known or {}
        self.paths, self.folders, self.scanned = [], {}, 0
        with logger.progress_bar(desc="listing images", unit=" images", delay=1) as self.bar:
            self._visit(data_dir, "", ())

    def _visit(self, folder, relative, above):
        """List a folder. `above` identifies those it lies in: a link to one of them would never end."""
        stamp = identity = None
        if not files.is_url(folder):
            found = _stat_folder(folder)
            if found is None:
                return
            stamp, identity = _stamp(found), (found.st_dev, found.st_ino)
            if identity in above:
                logger.warn(f"{folder}: not followed: a link to a folder that it lies in")
                return
        _, images, folders = self.folders[relative] = self._contents(folder, relative, stamp)
        start = files.join(folder, "x")[:-1]
        branches = set(folders)
        for name in sorted(images + folders):
            if name in branches:
                self._visit(start + name, f"{relative}{name}/", (*above, identity))
            else:
                self.paths.append(start + name)

    def _contents(self, folder, relative, stamp):
        entry = self.known.get(relative)
        if entry is not None and stamp is not None and entry[0] == stamp:
            self.bar.update(len(entry[1]))
            return entry
        self.scanned += 1
        images, folders = [], []
        for name, may_be_folder in files.scan_dir(folder):
            if _is_image(name):
                images.append(name)
                self.bar.update()
            elif may_be_folder():
                folders.append(name)
        return [stamp, sorted(images), sorted(folders)]


def _is_image(name):
    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def _stat_folder(path):
    """What the system knows of a folder; None where there is none: links may lead anywhere, or nowhere."""
    try:
        found = os.stat(path)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return found if stat.S_ISDIR(found.st_mode) else None


def _stamp(found):
    """What differs once something has been added to a folder or taken out of it; None while that is not certain."""
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED_NS:
        return None
    return f"{found.st_mtime_ns} {found.st_ctime_ns}"


def _one_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# The cache


def _cache_path(data_dir):
    """Where the listing of a local folder is kept: None for URLs, and for users without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if files.is_url(data_dir) or not os.path.isabs(home):
        return None
    name = hashlib.sha256(os.fsencode(os.path.abspath(data_dir))).hexdigest()[:32]
    return os.path.join(home, "guided_diffusion", "listings", name + ".json.gz")


def _read_cache(path):
    """The folders of an earlier walk; none where there is no such file, or a damaged one."""
    if path is None or not os.path.exists(path):
        return {}
    try:
        with gzip.open(path, "rt", encoding="ascii") as f:
            record = json.load(f)
        version, folders = record["version"], record["folders"]
        if version == CACHE_VERSION and all(map(_is_entry, folders.values())):
            return folders
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    logger.log(f"the kept listing {path} is damaged or of another version: listing anew")
    return {}


def _is_entry(entry):
    stamp, images, folders = entry
    names = isinstance(images, list) and isinstance(folders, list) and all(isinstance(n, str) for n in images + folders)
    return names and (stamp is None or isinstance(stamp, str))


def _write_cache(path, data_dir, folders):
    record = {"version": CACHE_VERSION, "folder": os.path.abspath(data_dir), "folders": folders}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with files.write_atomically(path) as f:
            f.write(gzip.compress(json.dumps(record).encode("ascii"), 1))
    except OSError:  # a full disk or a home that cannot be written costs the next run a listing, no more
        pass


# Classes


def check_labels(labels):
    """Refuse a --labels that is neither a kind of labels nor a CSV file's path."""
    if labels not in CLASS_OF and not _is_csv(labels):
        raise InputError(
            f"--labels {labels}: give {', '.join(CLASS_OF)}, or the path of a CSV file with lines path,label"
        )


def image_classes(data_dir, paths, labels="name"):
    """The class of each image, by name, and all classes in the order of their labels. Every rank must call it.

    :param labels: "name": a file's class is its name up to the first underscore. "folder": the name of the folder it
        lies in. Or the path of a CSV file with lines path,label, where path is relative to data_dir; a header, whatever
        its words, is passed over. Classes are numbered in the order of their names as strings; but whole numbers in a
        CSV file are the labels themselves.
    """
    check_labels(labels)
    if _is_csv(labels):
        return dist_util.from_rank_0(lambda: _classes_by_csv(labels, data_dir, paths))
    classes = [CLASS_OF[labels](path, data_dir) for path in paths]
    return classes, sorted(set(classes))


def class_names(data_dir, paths=None, labels="name"):
    """The names of the classes in a folder of images, in the order of their labels. Every rank must call it.

    :param paths: the folder's images, where they are at hand.
    :param labels: where the classes are read from: see image_classes.
    """
    return image_classes(data_dir, list_images(data_dir) if paths is None else paths, labels)[1]


def class_labels(paths, names, num_classes=None):
    """The label of each path by its file name: the index of its class among `names`.

    :param num_classes: how many labels the model has.
    """
    return number_classes(paths, [_class_in_name(path) for path in paths], names, num_classes)


def number_classes(paths, classes, names, num_classes=None):
    """The label of each image: the index of its class among `names`.

    :param classes: the images' classes, by name.
    :param num_classes: how many labels the model has.
    """
    if num_classes is not None and len(names) > num_classes:
        raise InputError(
            f"{len(names)} classes in the data ({', '.join(names[:3])}, ...), but --num_classes is {num_classes}"
            f": labels from {num_classes} on would be outside the model's range"
        )
    number = {name: i for i, name in enumerate(names)}
    stranger = next((i for i, name in enumerate(classes) if name not in number), None)
    if stranger is not None:
        raise InputError(f"{paths[stranger]}: its class {classes[stranger]} is none of the training data's")
    return [number[name] for name in classes]


def _class_in_name(path, data_dir=None):
    name, underscore, _ = os.path.basename(path).partition("_")
    if not underscore:
        raise InputError(
            f"{path}: no class label in its name: labels need names such as LABEL_REST.png, or another --labels"
        )
    return name


def _class_of_folder(path, data_dir):
    folder = posixpath.dirname(_relative(path, data_dir))
    if not folder:
        raise InputError(f"{path}: in no class's folder: with --labels folder, all images lie in folders of --data_dir")
    return posixpath.basename(folder)


CLASS_OF = {"name": _class_in_name, "folder": _class_of_folder}


def _relative(path, data_dir):
    """An image's path relative to the folder it was found in, with forward slashes."""
    return path[len(files.join(data_dir, "x")) - 1 :].replace(os.sep, "/")


# Labels from a CSV file


def _is_csv(labels):
    return labels.lower().endswith(".csv")


def _classes_by_csv(labels, data_dir, paths):
    by_path = _read_csv(labels)
    if all(map(WHOLE_NUMBER.fullmatch, by_path.values())):
        by_path = {path: str(int(label)) for path, label in by_path.items()}
        names = [str(i) for i in range(1 + max(map(int, by_path.values()), default=-1))]
    else:
        names = sorted(set(by_path.values()))
    wanted = [_relative(path, data_dir) for path in paths]
    missing = [path for path in wanted if path not in by_path]
    if missing:
        raise InputError(
            f"--labels {labels}: no label for {len(missing)} of {len(paths)} images, the first of them {missing[0]}: "
            f"add lines such as {missing[0]},LABEL or take these images out of --data_dir"
        )
    if len(by_path) > len(wanted):
        stray = next(path for path in by_path.keys() - set(wanted))
        logger.warn(
            f"--labels {labels}: {len(by_path) - len(wanted)} of {len(by_path)} lines name no image in {data_dir}, "
            f"such as {stray}"
        )
    return [by_path[path] for path in wanted], names


def _read_csv(labels):
    """The class of each image by its path relative to the data's folder."""
    try:
        with files.open_file(labels) as f:
            rows = csv.reader(io.StringIO(f.read().decode("utf-8-sig"), newline=""))
        by_path, first_of_kind = {}, {}
        for i, row in enumerate(filter(None, rows)):
            if len(row) != 2 or not all(cell.strip() for cell in row):
                raise InputError(f"--labels {labels}: line {rows.line_num} is not path,label")
            # A header can name no image of any folder. The line of an image that is merely gone keeps its class.
            if i == 0 and not _is_image(row[0].strip()):
                continue
            path, label = posixpath.normpath(row[0]), sys.intern(row[1].strip())
            if by_path.setdefault(path, label) != label:
                raise InputError(f"--labels {labels}: line {rows.line_num}: {path} has another label further up")
            first_of_kind.setdefault(label.isascii() and label.isdigit(), (rows.line_num, label))
        _check_one_kind(labels, first_of_kind)
        return by_path
    except FileNotFoundError:
        raise InputError(f"--labels {labels}: no such file") from None
    except (UnicodeDecodeError, csv.Error, *files.read_errors(labels)) as e:
        raise InputError(f"--labels {labels}: cannot read it as CSV in UTF-8 ({_one_line(e)})") from None


def _check_one_kind(labels, first_of_kind):
    """Refuse whole numbers among words: one word more or less would give all the numbers another meaning.

    :param first_of_kind: the line and the label of the first whole number (True) and the first word (False).
    """
    if len(first_of_kind) == 2:
        (line, number), (word_line, word) = first_of_kind[True], first_of_kind[False]
        raise InputError(
            f"--labels {labels}: line {word_line}: the label {word} is no whole number, but line {line}'s, {number}, "
            f"is: make all labels whole numbers, or none"
        )
