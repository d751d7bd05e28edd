"""From image files to batches: decoding, crops, sharding over ranks."""

import atexit
import copy
import math
import multiprocessing
import random
import signal
import warnings
import weakref
from collections import Counter

import numpy as np
import torch as th
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from . import dist_util, files, logger
from .errors import InputError, check_at_least, choose, end_quietly
from .image_listing import (
    _list_image_files_recursively,  # noqa: F401  part of the original's interface
    image_classes,
    list_images,
    number_classes,
)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# How to turn an image upright, by its EXIF orientation; and where Pillow keeps what may tell it.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_workers = weakref.WeakSet()

EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def data_flags():
    """The flags of training scripts that load_data takes as they are, with their defaults."""
    return dict(data_dir="", labels="name", random_flip=True, num_workers=1, skip_bad_images=False)


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
    labels="name",
    skip_bad_images=False,
):
    """An endless iterator over batches of this rank's share of a folder of images. Every rank must call it.

    :param data_dir: a folder, or a blob URL, searched recursively.
    :param batch_size: images a batch, on each rank.
    :param image_size: the side that images are cropped to.
    :param class_cond: give labels.
    :param deterministic: go through the images in a fixed order, without random crops and flips.
    :param random_crop: crop at random instead of at the centre.
    :param random_flip: mirror half of the images.
    :param num_classes: how many classes the model has; more in the data are refused.
    :param classes: the names of the classes, in the order of their labels; by default the data's own.
    :param channels: 1 for grey images, 3 for RGB.
    :param num_workers: processes that decode; 0 decodes in this one.
    :param seed: decides order, crops and flips; by default, or if negative, another number for each job.
    :param labels: "name", "folder" or a CSV file's path: see image_listing.image_classes.
    :param skip_bad_images: put other images in the place of those that cannot be read, instead of ending the run.
    :return: an ImageStream: pairs of images [batch_size, channels, image_size, image_size] float32 in [-1, 1], and a
        dict that holds, with class_cond, the labels "y" [batch_size] int64.
    :raises InputError: for a folder that is missing, has no images or too few for a batch, or labels that don't fit.
    """
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, num_workers=num_workers)
    dataset, classes = image_dataset(
        data_dir,
        image_size,
        class_cond=class_cond,
        random_crop=random_crop and not deterministic,
        random_flip=random_flip and not deterministic,
        num_classes=num_classes,
        classes=classes,
        channels=channels,
        labels=labels,
    )
    num_ranks = dist_util.get_world_size()
    if len(dataset) < batch_size * num_ranks:
        raise InputError(
            f"--data_dir {data_dir}: {len(dataset)} images on {num_ranks} ranks leave {len(dataset) // num_ranks} for "
            f"a rank, fewer than a batch: lower --batch_size {batch_size} or give more images"
        )
    return ImageStream(
        dataset,
        batch_size,
        shuffle=not deterministic,
        num_workers=num_workers,
        seed=seed if seed is not None and seed >= 0 else None,
        classes=classes,
        skip_bad_images=skip_bad_images,
    )


def image_dataset(data_dir, image_size, *, class_cond=False, random_crop=False, random_flip=False, num_classes=None,
                  classes=None, channels=3, labels="name"):  # fmt: skip
    """All images of a folder, and the names of their classes or None. Every rank must call it. See load_data."""
    if image_size < 1:
        raise InputError(f"the image size {image_size} must be at least 1")
    paths, numbers = list_images(data_dir), None
    if class_cond:
        names, own_classes = image_classes(data_dir, paths, labels)
        classes = classes or own_classes
        numbers = number_classes(paths, names, classes, num_classes)
    dataset = ImageDataset(
        image_size, paths, classes=numbers, random_crop=random_crop, random_flip=random_flip, channels=channels
    )
    return dataset, classes if class_cond else None


def each_once(dataset, batch_size, num_workers=0, count=None, skip_bad_images=False):
    """Go once through the images of a dataset that fall to this rank, which are every so manieth.

    :param count: of all images, take the first so many.
    :return: an iterator of (their indices, images [n, ...], dict of labels [n]).
    """
    ranks = dist_util.get_world_size()
    mine = range(dist_util.get_rank(), min(len(dataset), count or len(dataset)), ranks)
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    loader = DataLoader(
        _RunItems(dataset, 0, skip_bad_images),
        batch_sampler=[[(i, i) for i in part] for part in parts],
        num_workers=num_workers,
        collate_fn=_collate,
        generator=th.Generator(),
        worker_init_fn=_leave_signals_to_the_rank,
    )
    for part, (batch, _, _) in zip(parts, _started(loader)):
        if isinstance(batch, InputError):
            raise InputError(str(batch))
        yield part, *batch


def fixed_images(dataset, count, skip_bad_images=False):
    """`count` images spread over a dataset, without random crops and flips, and their labels: (tensor, dict)."""
    dataset = copy.copy(dataset)
    dataset.random_crop = dataset.random_flip = False
    items = _RunItems(dataset, 0, skip_bad_images)
    batch, _, _ = _collate([items[i * len(dataset) // count, 0] for i in range(count)])
    if isinstance(batch, InputError):
        raise batch
    return batch


def _leave_signals_to_the_rank(worker):
    """What a terminal or a cluster sends to all processes at once must not end the workers before their rank.

    So at its exit the rank must kill them: Python would ask with a SIGTERM, and wait.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _started(loader):
    """The loader's iterator; its worker processes will not outlive this one."""
    before = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    except OSError as e:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        end_quietly()  # the loader, half made, would complain
        raise InputError(f"--num_workers {loader.num_workers}: cannot start them ({e.strerror}): use fewer") from None
    if not _workers:
        atexit.register(_kill_workers)
    _workers.update(getattr(batches, "_workers", []))
    return batches


def _kill_workers():
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take this for an accident
    for worker in alive:
        worker.kill()


class ImageStream:
    """Endless batches from a dataset, in an order that is a function of (seed, step, position in the global batch).

    The images of step s are numbers s * G to s * G + G - 1 in a sequence of shuffles, where G is the global batch;
    image j of rank r's batch is number j * (number of ranks) + r of those. So each epoch sees every image once, but for
    a last partial batch, and neither ranks nor workers change what a step sees.

    :param dataset: has `get(index, rng)`, which raises InputError for what cannot be read, and a length.
    :param batch_size: on each rank.
    :param seed: None takes a number of the job's own.
    :param classes: the names of the classes in the order of their labels, None without labels; for others to read.
    :param skip_bad_images: what cannot be read is replaced by the next image of the dataset that can.
    """

    def __init__(
        self, dataset, batch_size, *, shuffle=True, num_workers=1, seed=None, classes=None, skip_bad_images=False
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.seed = dist_util.job_seed() if seed is None else seed
        self.classes = classes
        self.skip_bad_images = skip_bad_images
        self.rank, self.num_ranks = dist_util.get_rank(), dist_util.get_world_size()
        self.step = 0
        self._batches = None
        self._counts, self._warned_of = Counter(), set()

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            loader = DataLoader(
                _RunItems(self.dataset, self.seed, self.skip_bad_images),
                batch_sampler=_schedule(
                    self.step, len(self.dataset), self.batch_size, self.rank, self.num_ranks, self.shuffle, self.seed
                ),
                num_workers=self.num_workers,
                collate_fn=_collate,
                pin_memory=th.cuda.is_available(),
                generator=th.Generator(),  # not the global one: others count on what that gives next
                worker_init_fn=_leave_signals_to_the_rank,
            )
            self._batches = _started(loader)
        batch, skipped, turned = next(self._batches)
        if isinstance(batch, InputError):
            raise InputError(str(batch))  # a new one: its traceback keeps the loader from being freed
        self._counts.update(skipped_images=len(skipped), turned_images=turned)
        for reason in skipped:
            if reason not in self._warned_of:
                self._warned_of.add(reason)
                logger.warn(f"skipped: {reason}")
        self.step += 1
        return batch

    def counts(self):
        """What has happened on this rank so far, where it is more than nothing: a dict.

        skipped_images counts unreadable images passed over, turned_images those turned upright as EXIF says.
        """
        return dict(+self._counts)

    def state_dict(self):
        """Where the stream is, the same on every rank."""
        return {"seed": self.seed, "step": self.step, "global_batch": self.batch_size * self.num_ranks}

    def load_state_dict(self, state_dict):
        """Go on from where another stream was, on as many ranks or others.

        With another global batch it goes on in the same epoch, with the first batch of images that were not seen.
        """
        self.seed, self.step = state_dict["seed"], state_dict["step"]
        before, now = state_dict["global_batch"], self.batch_size * self.num_ranks
        if before != now:
            logger.log(f"the global batch is {now} images now; it was {before}")
            epoch, steps = divmod(self.step, max(1, len(self.dataset) // before))
            steps_per_epoch = len(self.dataset) // now
            self.step = epoch * steps_per_epoch + min(-(-steps * before // now), steps_per_epoch)
        self._batches = None

    def close(self):
        """End the worker processes."""
        self._batches = None


def _schedule(step, length, batch_size, rank, num_ranks, shuffle, seed):
    """From a step on, which images a rank takes at each: a list of (index, number in the whole run).

    It knows nothing of the stream: in a cycle of references, workers would outlive their stream, and end late.
    """
    global_batch = batch_size * num_ranks
    steps_per_epoch = length // global_batch
    while True:
        epoch, start = divmod(step, steps_per_epoch)
        order = np.arange(length)
        if shuffle:
            np.random.default_rng([seed, epoch]).shuffle(order)
        for i in range(start, steps_per_epoch):
            mine = range(i * global_batch + rank, (i + 1) * global_batch, num_ranks)
            offset = (step - i) * global_batch
            yield [(int(order[n]), offset + n) for n in mine]
            step += 1


class _RunItems(Dataset):
    """The images of a run, each with crops and flips of its own; what cannot be read is passed over or handed on.

    Items are a triple: the dataset's item, or an InputError; why images before it in the dataset were passed over, a
    list; and how many were turned. A worker process that raised errors would bury the message in its traceback.
    """

    def __init__(self, dataset, seed, skip_bad):
        self.dataset = dataset
        self.seed = seed
        self.skip_bad = skip_bad

    def __getitem__(self, item):
        index, number = item
        turned, skipped = self._turned(), []
        for i in range(len(self.dataset) if self.skip_bad else 1):
            try:
                rng = random.Random(f"{self.seed}.{number}")
                item = self.dataset.get((index + i) % len(self.dataset), rng)
                return item, skipped, self._turned() - turned
            except InputError as e:
                skipped.append(str(e))
        advice = "nor can any other" if self.skip_bad else "repair or remove it; training has --skip_bad_images True"
        return InputError(f"{skipped[0]}: {advice}"), [], 0

    def _turned(self):
        return getattr(self.dataset, "turned", 0)


def _collate(triples):
    items, skipped, turned = zip(*triples)
    error = next((item for item in items if isinstance(item, InputError)), None)
    batch = error if error is not None else th.utils.data.default_collate(items)
    return batch, sum(skipped, []), sum(turned)


class ImageDataset(Dataset):
    """Images cropped to a square, and their labels.

    :param resolution: the square's side.
    :param image_paths: all images; this dataset takes every num_shards-th, from the shard-th on.
    :param classes: all labels, in the order of image_paths.
    :param channels: 1 for grey images, 3 for RGB.
    :ivar turned: how many images were turned upright, as EXIF says, in this process.

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
        self.turned = 0
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
        arr = arr.reshape(self.resolution, self.resolution, -1)
        arr = arr.transpose(2, 0, 1).astype(np.float32, order="C")
        arr /= 127.5
        arr -= 1
        return arr, {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}

    def _read(self, path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about metadata that nobody reads
                with files.open_file(path) as f, Image.open(f) as image:
                    image.load()
                    turn = _turn_upright(image)
                    image = _to_mode(image, self.mode)
        except MemoryError:
            raise
        except Exception as e:  # what decoders make of a damaged file is hard to foresee
            raise InputError(f"{path}: cannot read this image ({_reason(e)})") from None
        if turn is None:
            return image
        self.turned += 1
        return image.transpose(turn)


def _reason(error):
    """What went wrong, without the path that the system's messages repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged"
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__} {text}".rstrip()


def _turn_upright(image):
    """How to transpose a loaded image so that it is upright, by its EXIF orientation; None for most.

    What EXIF says is advice: where it is damaged, the image stays as it is.
    """
    if not EXIF_KEYS & image.info.keys():
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:
        return None


def _to_mode(image, mode):
    """Convert a loaded image. 16 bits of grey lose the lower 8, as those of colours do: Pillow would clip them."""
    image.info.pop("transparency", None)  # it changes no pixel here, but can make Pillow warn, or fail
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, whose range is open: save it with 8 bits")
    return image if image.mode == mode else image.convert(mode)


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
