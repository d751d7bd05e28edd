"""Batches of images from a folder: labels, random crops and flips, sharding over ranks, worker processes."""

import atexit
import copy
import itertools
import multiprocessing
import random
import secrets
import signal
import time
from collections import Counter

import numpy as np
import torch as th
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from . import dist_util, logger
from .errors import InputError, check_at_least, choose
from .image_decoding import MODES, center_crop_arr, random_crop_arr, read_image
from .image_listing import (
    _list_image_files_recursively,  # noqa: F401  part of the original's interface
    image_classes,
    list_images,
    number_classes,
)


def data_flags():
    """Return the flags of training scripts that are arguments of load_data, with their defaults."""
    return dict(data_dir="", labels="name", random_flip=True, num_workers=1, skip_bad_images=False)


def load_data(
    *, data_dir, batch_size, image_size, class_cond=False, deterministic=False, random_crop=False, random_flip=True,
    num_workers=1, seed=None, skip_bad_images=False, **dataset_options,
):  # fmt: skip
    """Return an endless iterator over batches of this rank's share of a folder of images. Every rank must call
    load_data.

    :param data_dir: a folder, or a blob URL, searched recursively.
    :param batch_size: the number of images in a batch, on each rank.
    :param image_size: the side of the square that images are cropped to.
    :param class_cond: return labels.
    :param deterministic: keep the images in the order of their paths, without random crops and flips.
    :param random_crop: crop at random instead of at the centre.
    :param random_flip: mirror half of the images.
    :param num_workers: the number of processes that decode images; 0 decodes in this process.
    :param seed: the seed of the order, crops and flips. None or a negative number draws a seed for the job.
    :param skip_bad_images: replace images that cannot be read by other images instead of raising an error.
    :param dataset_options: labels, classes, num_classes and channels; see image_dataset.
    :return: an ImageStream. It yields images [batch_size, channels, image_size, image_size] float32 in [-1, 1], and a
        dict, which contains the labels "y" [batch_size] int64 if class_cond is set.
    :raises InputError: if the folder is missing, has too few images for a batch, or has images without a valid label.
    """
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, num_workers=num_workers)
    random_crop, random_flip = random_crop and not deterministic, random_flip and not deterministic
    dataset, classes = image_dataset(
        data_dir, image_size, class_cond, random_crop=random_crop, random_flip=random_flip, **dataset_options
    )
    num_ranks = dist_util.get_world_size()
    if len(dataset) < batch_size * num_ranks:
        raise InputError(
            f"--batch_size {batch_size}: a batch on each of {num_ranks} ranks takes {batch_size * num_ranks} images, "
            f"but {data_dir} has {len(dataset)}; use a smaller batch or more images"
        )
    seed = dist_util.broadcast_object(secrets.randbits(48)) if seed is None or seed < 0 else seed
    reading = dict(num_workers=num_workers, skip_bad_images=skip_bad_images)
    return ImageStream(dataset, batch_size, seed=seed, shuffle=not deterministic, classes=classes, **reading)


def image_dataset(
    data_dir, image_size, class_cond=False, labels="name", classes=None, num_classes=None, random_flip=False, **options
):
    """Return a dataset of all images in a folder. Every rank must call this function.

    :param labels: "name", "folder" or the path of a CSV file; see image_listing.image_classes.
    :param classes: the class names in the order of their labels. The default is the sorted names found in the data.
    :param num_classes: the number of classes of the model. Data with more classes raise InputError.
    :param random_flip: mirror half of the images.
    :param options: random_crop and channels; see ImageDataset.
    :return: an ImageDataset and the class names, which are None if class_cond is not set.
    """
    check_at_least(1, image_size=image_size)
    paths, numbers = list_images(data_dir), None
    if class_cond:
        class_of_each, own_classes = image_classes(data_dir, paths, labels)
        classes = classes or own_classes
        numbers = number_classes(paths, class_of_each, classes, num_classes)
    dataset = ImageDataset(image_size, paths, classes=numbers, random_flip=random_flip, **options)
    return dataset, classes if class_cond else None


class ImageDataset(Dataset):
    """Images cropped to squares, with their labels.

    An item is an array [channels, resolution, resolution] float32 in [-1, 1] and a dict, which contains the label "y"
    if the dataset has labels.

    :param resolution: the side of the square.
    :param image_paths: the paths of all images.
    :param classes: the labels of all images, or None.
    :param shard: the index of the first image. The dataset contains every num_shards-th image from there on.
    :param channels: 1 for grey images, 3 for RGB, 4 for RGBA.
    """

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1,
                 random_crop=False, random_flip=True, channels=3):  # fmt: skip
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
        """Return item idx. `rng`, a random.Random or the module `random`, draws the random crop and flip."""
        image = read_image(self.local_images[idx], self.mode)
        if self.random_crop:
            arr = random_crop_arr(image, self.resolution, rng=rng)
        else:
            arr = center_crop_arr(image, self.resolution)
        if self.random_flip and rng.random() < 0.5:
            arr = arr[:, ::-1]
        arr = arr.reshape(self.resolution, self.resolution, -1)  # the array of a grey image has no channel axis
        arr = arr.transpose(2, 0, 1).astype(np.float32, order="C")
        arr /= 127.5  # in place, because new arrays take a tenth of the time for large images
        arr -= 1
        return arr, {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}


class ImageStream:
    """An endless iterator over batches of this rank's share of a dataset.

    The images of a job form one sequence, which is a function of the seed. Each epoch is a new permutation of the
    dataset, and the crop and flip of an image are functions of (seed, position in the sequence). A step uses the next
    batch_size * num_ranks positions, of which each rank reads every num_ranks-th. The images of a step therefore do not
    depend on the number of ranks or workers.

    :param dataset: an ImageDataset, or another object with a length and a method get(index, rng).
    :param batch_size: the number of images in a batch, on each rank.
    :param seed: the seed of the job, which must be equal on all ranks.
    :param shuffle: False keeps the order of the dataset in each epoch.
    :param classes: the class names in the order of their labels. They are kept as an attribute for callers.
    :param skip_bad_images: replace an image that cannot be read by the next readable image of the dataset.
    :ivar position: the position in the sequence of the first image of the next global batch.
    """

    def __init__(self, dataset, batch_size, *, seed, shuffle=True, num_workers=1, classes=None, skip_bad_images=False):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.classes = classes
        self.reading = dict(num_workers=num_workers, skip_bad_images=skip_bad_images)
        self.rank, self.num_ranks = dist_util.get_rank(), dist_util.get_world_size()
        self.global_batch = batch_size * self.num_ranks
        self.position = 0
        self._batches = None
        self._skipped = Counter()  # the number of skipped images by error message

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            seed = self.seed if self.shuffle else None
            order = infinite_order(len(self.dataset), self.position + self.rank, self.num_ranks, seed)
            self._batches = _read_batches(self.dataset, order, self.batch_size, seed=self.seed, **self.reading)
        batch, problems = next(self._batches)
        for problem in problems:
            if problem not in self._skipped:
                logger.warn(f"skipped: {problem}")
            self._skipped[problem] += 1
        self.position += self.global_batch
        return batch

    def counts(self):
        """Return the metrics of this rank: {"skipped_images": n}, or an empty dict if no image was skipped."""
        return {"skipped_images": self._skipped.total()} if self._skipped else {}

    def state_dict(self):
        """Return the state to save in a checkpoint, which is equal on all ranks."""
        return {"seed": self.seed, "position": self.position, "global_batch": self.global_batch}

    def load_state_dict(self, state):
        """Continue at the position of a saved stream, on any number of ranks and with any batch size."""
        saved_batch = state["global_batch"]
        if saved_batch != self.global_batch:
            logger.log(f"the global batch is {self.global_batch} images now; it was {saved_batch}")
        self.seed = state["seed"]
        self.position = state["position"] if "position" in state else state["step"] * saved_batch  # older files
        self.close()

    def close(self):
        """End the worker processes. Reading the next batch starts new workers."""
        self._batches = None


def infinite_order(length, position, stride=1, seed=None):
    """Yield (index, position) endlessly, for every stride-th position in a sequence of permutations of range(length).

    :param position: the first position to yield.
    :param seed: the seed of the permutations. None repeats range(length) without permuting it.
    """
    epoch, order = None, np.arange(length)
    for position in itertools.count(position, stride):
        if seed is not None and position // length != epoch:
            epoch = position // length
            order = np.random.default_rng([seed, epoch]).permutation(length)
        yield int(order[position % length]), position


def each_once(dataset, batch_size, num_workers=0, count=None, skip_bad_images=False):
    """Iterate once over this rank's share of a dataset: every world_size-th image.

    :param count: use only the first `count` images of the dataset.
    :return: an iterator over (indices of the images, images [n, ...], dict of labels [n]).
    """
    mine = range(dist_util.get_rank(), min(len(dataset), count or len(dataset)), dist_util.get_world_size())
    reading = dict(num_workers=num_workers, skip_bad_images=skip_bad_images)
    batches = _read_batches(dataset, [(i, i) for i in mine], batch_size, **reading)
    for start, (batch, _) in zip(range(0, len(mine), batch_size), batches):
        yield mine[start : start + batch_size], *batch


def fixed_images(dataset, count, skip_bad_images=False):
    """Return `count` evenly spread images of a dataset without random crops and flips, and a dict of their labels."""
    dataset = copy.copy(dataset)
    dataset.random_crop = dataset.random_flip = False
    chosen = [(i * len(dataset) // count, 0) for i in range(count)]
    batch, _ = next(_read_batches(dataset, chosen, count, skip_bad_images=skip_bad_images))
    return batch


# Worker processes


def _read_batches(dataset, order, batch_size, *, seed=0, num_workers=0, skip_bad_images=False):
    """Yield (batch, list of the error messages of skipped images).

    :param order: an iterable of (index, position) of the images to read.
    :raises InputError: if an image cannot be read. With skip_bad_images, only if no image can be read.
    """
    loader = DataLoader(
        _Batches(dataset, seed, skip_bad_images),
        sampler=BatchSampler(order, batch_size, drop_last=False),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=th.cuda.is_available(),
        generator=th.Generator(),  # by default, DataLoader draws from the global generator
        worker_init_fn=_ignore_signals,
    )
    try:
        for batch, problems in loader:
            if batch is None:
                advice = "repair or remove it; training has --skip_bad_images True"
                raise InputError(f"{problems[0]}: {'nor can any other' if skip_bad_images else advice}")
            yield batch, problems
    except (EOFError, ConnectionError, FileNotFoundError):
        # A worker died while it sent a batch. Wait for the SIGCHLD handler of torch, whose error names the worker.
        time.sleep(1)
        raise


class _Batches(Dataset):
    """Reads batches given by lists of (index, position). A batch is None if an image cannot be read.

    Error messages are returned with the batch, because DataLoader would add the worker's traceback to an exception.
    """

    def __init__(self, dataset, seed, skip_bad_images):
        self.dataset = dataset
        self.seed = seed
        self.attempts = len(dataset) if skip_bad_images else 1

    def __getitem__(self, keys):
        items, problems = [], []
        for index, position in keys:
            for i in range(index, index + self.attempts):
                try:
                    items.append(self.dataset.get(i % len(self.dataset), random.Random(f"{self.seed}.{position}")))
                    break
                except InputError as e:
                    problems.append(str(e))
            else:
                return None, problems
        return default_collate(items), problems


def _ignore_signals(worker):
    """Make a worker process ignore the signals that end a job.

    Terminals and clusters send these signals to all processes of a job, but the main process needs its workers until it
    has saved a checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers():
    """Kill the workers, because they ignore the SIGTERM of multiprocessing's own exit handler, which waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of torch would report killed workers as an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
