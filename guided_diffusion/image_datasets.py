"""From image files to batches: listing, labels, crops, sharding over ranks."""

import math
import os
import random

import numpy as np
import torch as th
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from . import dist_util, files
from .errors import InputError, choose

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    random_crop=False,
    random_flip=True,
    num_classes=None,
    classes=None,
    channels=3,
    num_workers=1,
    seed=None,
):
    """An endless iterator over batches of this rank's share of a folder of images.

    :param data_dir: a folder, or a blob URL, searched recursively.
    :param batch_size: images a batch, on each rank.
    :param image_size: the side that images are cropped to.
    :param class_cond: give labels: a file's class is its name up to the first underscore.
    :param deterministic: go through the images in a fixed order, without random crops and flips.
    :param random_crop: crop at random instead of at the centre.
    :param random_flip: mirror half of the images.
    :param num_classes: how many classes the model has; more in the folder are refused.
    :param classes: the names of the classes, in the order of their labels; by default the folder's, sorted.
    :param channels: 1 for grey images, 3 for RGB.
    :param num_workers: processes that decode; 0 decodes in this one.
    :param seed: decides order, crops and flips; by default another number for each job.
    :return: an ImageStream: pairs of images [batch_size, channels, image_size, image_size] float32 in [-1, 1], and a
        dict that holds, with class_cond, the labels "y" [batch_size] int64.
    :raises InputError: for a folder that is missing, has no images or too few for a batch, or labels that don't fit.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: at least 1 is needed")
    if num_workers < 0 or image_size < 1:
        raise InputError(f"--num_workers {num_workers} must be at least 0, and the image size {image_size} at least 1")
    paths = _list_images(data_dir)
    labels = class_labels(paths, classes or class_names(data_dir, paths), num_classes) if class_cond else None
    num_ranks = dist_util.get_world_size()
    if len(paths) < batch_size * num_ranks:
        raise InputError(
            f"--data_dir {data_dir}: {len(paths)} images over {num_ranks} ranks leave {len(paths) // num_ranks} for a "
            f"rank, fewer than a batch: lower --batch_size {batch_size} or give more images"
        )
    dataset = ImageDataset(
        image_size,
        paths,
        classes=labels,
        random_crop=random_crop and not deterministic,
        random_flip=random_flip and not deterministic,
        channels=channels,
    )
    return ImageStream(dataset, batch_size, shuffle=not deterministic, num_workers=num_workers, seed=seed)


class ImageStream:
    """Endless batches from a dataset, in an order that is a function of (seed, step, position in the global batch).

    The images of step s are numbers s * G to s * G + G - 1 in a sequence of shuffles, where G is the global batch;
    image j of rank r's batch is number j * (number of ranks) + r of those. So each epoch sees every image once, but for
    a last partial batch, and neither ranks nor workers change what a step sees.

    :param dataset: has `get(index, rng)` and a length.
    :param batch_size: on each rank.
    :param seed: None takes a number of the job's own.
    """

    def __init__(self, dataset, batch_size, *, shuffle=True, num_workers=1, seed=None):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.seed = dist_util.job_seed() if seed is None else seed
        self.rank, self.num_ranks = dist_util.get_rank(), dist_util.get_world_size()
        self.step = 0
        self._batches = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            loader = DataLoader(
                _OwnRandomness(self.dataset, self.seed),
                batch_sampler=self._schedule(self.step),
                num_workers=self.num_workers,
                collate_fn=_collate,
                pin_memory=th.cuda.is_available(),
                generator=th.Generator(),  # not the global one: others count on what that gives next
            )
            self._batches = iter(loader)
        batch = next(self._batches)
        if isinstance(batch, InputError):
            raise InputError(str(batch))  # a new one: its traceback keeps the loader from being freed
        self.step += 1
        return batch

    def _schedule(self, step):
        """For each step, which images this rank takes: a list of (index, number in the whole run)."""
        global_batch = self.batch_size * self.num_ranks
        steps_per_epoch = len(self.dataset) // global_batch
        while True:
            epoch, start = divmod(step, steps_per_epoch)
            order = np.arange(len(self.dataset))
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            for i in range(start, steps_per_epoch):
                mine = range(i * global_batch + self.rank, (i + 1) * global_batch, self.num_ranks)
                offset = (step - i) * global_batch
                yield [(int(order[n]), offset + n) for n in mine]
                step += 1

    def state_dict(self):
        """Where the stream is, the same on every rank."""
        return {"seed": self.seed, "step": self.step, "global_batch": self.batch_size * self.num_ranks}

    def load_state_dict(self, state_dict):
        """Go on from where another stream was, on as many ranks or others, with the same global batch."""
        if state_dict["global_batch"] != self.batch_size * self.num_ranks:
            raise InputError(
                f"--batch_size {self.batch_size} on {self.num_ranks} ranks is a global batch of "
                f"{self.batch_size * self.num_ranks}, but the run to resume had {state_dict['global_batch']}"
            )
        self.seed, self.step = state_dict["seed"], state_dict["step"]
        self._batches = None

    def close(self):
        """End the worker processes."""
        self._batches = None


class _OwnRandomness(Dataset):
    """Gives each image of a run crops and flips of its own, and hands errors over as items.

    A worker process that raised them would bury the message in its traceback.
    """

    def __init__(self, dataset, seed):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, item):
        index, number = item
        try:
            return self.dataset.get(index, random.Random(f"{self.seed}.{number}"))
        except InputError as e:
            return e


def _collate(items):
    error = next((item for item in items if isinstance(item, InputError)), None)
    return error if error is not None else th.utils.data.default_collate(items)


def _list_images(data_dir):
    if not data_dir:
        raise InputError("--data_dir is missing: give a folder of images")
    if not files.is_dir(data_dir):
        raise InputError(f"--data_dir {data_dir}: {'not a folder' if files.exists(data_dir) else 'no such folder'}")
    paths = _list_image_files_recursively(data_dir)
    if not paths:
        raise InputError(
            f"--data_dir {data_dir}: no image in it (looked for {', '.join(EXTENSIONS)}, also in subfolders)"
        )
    return paths


def _list_image_files_recursively(data_dir):
    """The paths of all images in a folder and those below it, folder by folder in sorted order."""
    results = []
    for name in files.list_dir(data_dir):
        path = files.join(data_dir, name)
        if "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS:
            results.append(path)
        elif files.is_dir(path):
            results.extend(_list_image_files_recursively(path))
    return results


def class_names(data_dir, paths=None):
    """The names of the classes in a folder of files such as cat_0001.png, sorted.

    :param paths: the folder's images, where they are at hand.
    """
    return sorted({_class_name(path) for path in (_list_images(data_dir) if paths is None else paths)})


def class_labels(paths, names, num_classes=None):
    """The label of each path: the index of its class among `names`.

    :param num_classes: how many labels the model has.
    """
    if num_classes is not None and len(names) > num_classes:
        raise InputError(
            f"{len(names)} classes in the file names ({', '.join(names[:3])}, ...), but --num_classes is {num_classes}"
            f": labels from {num_classes} on would be outside the model's range"
        )
    number = {name: i for i, name in enumerate(names)}
    stranger = next((path for path in paths if _class_name(path) not in number), None)
    if stranger is not None:
        raise InputError(f"{stranger}: its class {_class_name(stranger)} is none of the training data's")
    return [number[_class_name(path)] for path in paths]


def _class_name(path):
    name, underscore, _ = os.path.basename(path).partition("_")
    if not underscore:
        raise InputError(f"{path}: no class label in its name: labels need names such as LABEL_REST.png")
    return name


class ImageDataset(Dataset):
    """Images cropped to a square, and their labels.

    :param resolution: the square's side.
    :param image_paths: all images; this dataset takes every num_shards-th, from the shard-th on.
    :param classes: all labels, in the order of image_paths.
    :param channels: 1 for grey images, 3 for RGB.

    Items are an array [channels, resolution, resolution] float32 in [-1, 1], and a dict that holds the label "y" where
    there are classes.
    """

    def __init__(
        self,
        resolution,
        image_paths,
        classes=None,
        shard=0,
        num_shards=1,
        random_crop=False,
        random_flip=True,
        channels=3,
    ):
        super().__init__()
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.mode = choose("number of image channels (--in_channels)", channels, MODES)

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        return self.get(idx, random)

    def get(self, idx, rng):
        """The item idx, with its random crop and flip drawn from `rng`: a random.Random, or the module `random`."""
        image = self._read(self.local_images[idx])
        if self.random_crop:
            arr = random_crop_arr(image, self.resolution, rng=rng)
        else:
            arr = center_crop_arr(image, self.resolution)
        if self.random_flip and rng.random() < 0.5:
            arr = arr[:, ::-1]
        arr = arr.reshape(self.resolution, self.resolution, -1).astype(np.float32) / 127.5 - 1
        labels = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return np.ascontiguousarray(arr.transpose(2, 0, 1)), labels

    def _read(self, path):
        try:
            with files.open_file(path) as f, Image.open(f) as image:
                return image.convert(self.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            if isinstance(e, UnidentifiedImageError):
                reason = "not an image, or damaged"
            raise InputError(f"{path}: cannot read this image ({reason}): repair or remove it") from None


def center_crop_arr(pil_image, image_size):
    """Shrink an image until its shorter side is image_size and take the middle: uint8 [image_size, image_size(, C)]."""
    arr = np.array(_shrink(pil_image, image_size))
    y, x = ((side - image_size) // 2 for side in arr.shape[:2])
    return arr[y : y + image_size, x : x + image_size]


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0, rng=random):
    """Shrink an image and take a random square of it: uint8 [image_size, image_size(, C)].

    :param min_crop_frac, max_crop_frac: the range of the crop's side over the image's shorter side.
    :param rng: where randomness comes from: a random.Random, or the module `random`.
    """
    shorter = rng.randrange(math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac) + 1)
    arr = np.array(_shrink(pil_image, shorter))
    y, x = (rng.randrange(side - image_size + 1) for side in arr.shape[:2])
    return arr[y : y + image_size, x : x + image_size]


def _shrink(image, shorter):
    """Resize an image so that its shorter side is `shorter`: by halves with a box filter, then bicubic.

    The halving keeps strong reductions from aliasing.
    """
    while min(*image.size) >= 2 * shorter:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = shorter / min(*image.size)
    return image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
