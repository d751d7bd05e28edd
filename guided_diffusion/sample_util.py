"""Making many samples over all ranks: repeatably, restartably, into one .npz and a picture.

Sample i's label and noise are a function of (seed, i) alone, whatever rank and batch it falls into.
"""

import math
from itertools import islice

import numpy as np
import torch as th
from PIL import Image

from . import checkpoint_util, dist_util, files, logger
from .compile_util import CompiledNetwork
from .errors import InputError, check_at_least
from .guidance import classifier_cond_fn, limit_guidance
from .logger import progress_bar
from .random_util import SampleNoise, random_labels
from .sample_store import DAMAGED, NpzArray, SampleStore
from .script_util import parse_numbers

GRID = 64  # how many samples the picture shows
UPSAMPLING = 1  # the noise stream of upsamplers: not the noise that their small images were made of


def sampling_flags():
    """The flags that all sampling scripts share, with their defaults."""
    return dict(
        clip_denoised=True,
        use_ddim=False,
        model_path="",
        preset="",
        models_dir="models",
        log_dir="",
        seed=0,
        compile=False,
        **output_flags(),
    )


def output_flags():
    """The flags that sample_job takes as they are, with their defaults."""
    return dict(num_samples=10000, batch_size=16, save_images="", progress_grid=False)


def class_flags():
    """The flags by which scripts choose labels, with their defaults."""
    return dict(classes="", class_table="")


def guidance_flags():
    """The flags of guidance, with their defaults."""
    return dict(classifier_scale=1.0, guidance_interval="")


def guide(classifier, diffusion, classifier_scale, guidance_interval=""):
    """The cond_fn that the flags of guidance stand for; None at scale 0, where the classifier need not run.

    :param guidance_interval: "a,b" guides only from a to b of the process, where 0 is its clean end, 1 its noisy one.
    """
    if not abs(classifier_scale) < float(np.finfo(np.float32).max):
        raise InputError(f"--classifier_scale {classifier_scale}: must be finite")
    ends = parse_numbers("guidance_interval", guidance_interval, float)
    if ends and (len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1):
        raise InputError(f"--guidance_interval {guidance_interval}: give two numbers from 0 to 1, such as 0.2,0.8")
    cond_fn = classifier_cond_fn(classifier, classifier_scale) if classifier_scale else None
    if not ends or cond_fn is None:
        return cond_fn
    return limit_guidance(cond_fn, *ends, 1000 if diffusion.rescale_timesteps else diffusion.original_num_steps)


def prepare_network(model, path, use_fp16=False, use_bf16=False, compile_for=0):
    """Load weights into a network and prepare it for sampling on this rank's device.

    :param use_fp16, use_bf16: reduce the torso's precision.
    :param compile_for: compile it for batches of this size; 0 does not compile.
    """
    checkpoint_util.load_weights(model, path)
    model.to(dist_util.dev(), memory_format=th.channels_last).eval().requires_grad_(False)
    if use_fp16:
        model.convert_to_fp16()
    elif use_bf16:
        model.convert_to_bf16()
    return CompiledNetwork(model, compile_for) if compile_for else model


def choose_labels(classes, num_samples, num_classes, seed, names=None):
    """The label of every sample: int64 [num_samples]; None where num_classes is None, for a model without labels.

    :param classes: "" draws uniformly; "balanced" makes as many of each class as can be; "207,360" takes turns among
        those; so does a list of names, or of numbers from a .txt (a number a line) or .npy file.
    :param names: the names of the classes in the order of their labels, if they are known. A name may be one of several
        with commas between them, as ImageNet's are.
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
        if part.lstrip("-").isdecimal():  # a number is a label, also where classes have numbers for names
            numbers[part.lower()] = int(part)
        if part.lower() not in numbers:
            known = f"its classes are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else (
                "the names of the classes are not known, as there is no config.json with them: give numbers"
            )  # fmt: skip
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
            raise ValueError
        return chosen.tolist()
    except OSError as e:
        raise InputError(f"--classes {path}: cannot be read ({e.strerror})") from None
    except (ValueError, EOFError):
        raise InputError(f"--classes {path}: a list of class numbers is expected, one a line") from None


class BatchSampler:
    """Makes batches of samples, of which sample i is a function of (seed, i) alone.

    :param model: called as model(x, t, **conditions).
    :param shape: (C, H, W) of a sample.
    :param conditions: gives, for a range of samples, the keyword arguments of model and cond_fn: tensors [n, ...].
    :param cond_fn, use_ddim, clip_denoised: see GaussianDiffusion's sampling loops.
    :param stream: see SampleNoise.
    """

    def __init__(self, diffusion, model, shape, seed, conditions=None, cond_fn=None, use_ddim=False,
                 clip_denoised=True, stream=0):  # fmt: skip
        self.diffusion, self.model, self.shape, self.seed, self.stream = diffusion, model, tuple(shape), seed, stream
        self.conditions = conditions or (lambda indices: {})
        self.options = dict(cond_fn=cond_fn, clip_denoised=clip_denoised)
        self.loop = diffusion.ddim_sample_loop_progressive if use_ddim else diffusion.p_sample_loop_progressive
        self.num_steps = diffusion.num_timesteps

    def steps(self, indices):
        """Sample a range of indices step by step: yields the loop's dicts, the last with the finished "sample"."""
        noise = SampleNoise(self.seed, indices, dist_util.dev(), self.stream)
        return self.loop(
            self.model,
            (len(indices), *self.shape),
            noise=noise.randn(*self.shape),
            model_kwargs={k: v.to(dist_util.dev()) for k, v in self.conditions(indices).items()},
            randn_like=noise.randn_like,
            **self.options,
        )


def by_index(labels):
    """Labels [N] as the `conditions` of a BatchSampler: {"y": those of a range}; without labels none."""
    return lambda indices: {} if labels is None else {"y": labels[indices.start : indices.stop]}


class BaseSamples:
    """The small images that an upsampler works on, from an .npz: image i mod M of M becomes sample i.

    :param path: the .npz: arr_0 uint8 [M, size, size, in_channels], and arr_1 labels [M] if any.
    :param class_cond: whether the upsampler needs the labels.
    :raises InputError: for a file of something else.
    """

    def __init__(self, path, size, in_channels, num_classes, class_cond):
        self.images, self.labels = _open_samples(path)
        wanted = (size, size, in_channels)
        if self.images.dtype != np.uint8:
            raise InputError(f"--base_samples {path}: images of {self.images.dtype}; uint8 from 0 to 255 is expected")
        if self.images.shape[1:] != wanted or not len(self.images):
            raise InputError(
                f"--base_samples {path}: its images are {'x'.join(map(str, self.images.shape))}, but the upsampler "
                f"takes Nx{'x'.join(map(str, wanted))} (--small_size {size})"
            )
        if self.labels is None and class_cond:
            raise InputError(f"--base_samples {path}: no labels (arr_1) in it, but the upsampler is class-conditional")
        if self.labels is not None and class_cond and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise InputError(f"--base_samples {path}: labels outside the upsampler's 0..{num_classes - 1}")

    def labels_of(self, num_samples):
        """The labels of samples 0, 1, ...: int64 [num_samples]; None if there are none."""
        return None if self.labels is None else th.from_numpy(self.labels[np.arange(num_samples) % len(self.images)])

    def conditions(self, indices):
        """Of a range of samples: low_res [n, C, size, size] float32 in [-1, 1], and the labels y [n] if any."""
        places = np.arange(indices.start, indices.stop) % len(self.images)
        low_res = th.from_numpy(self.images[places]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"low_res": low_res, **({} if self.labels is None else {"y": th.from_numpy(self.labels[places])})}


def _open_samples(path):
    if not path:
        raise InputError("--base_samples is missing: give an .npz of small images")
    if not files.exists(path):
        raise InputError(f"--base_samples {path}: no such file")
    try:
        images = NpzArray(path, "arr_0")
        if len(images.shape) != 4:
            raise ValueError
    except DAMAGED:
        raise InputError(f"--base_samples {path}: not an .npz with images [N, H, W, C] as arr_0") from None
    try:
        labels = NpzArray(path, "arr_1")[:]
    except KeyError:
        return images, None
    except DAMAGED:
        raise InputError(f"--base_samples {path}: its labels (arr_1) cannot be read") from None
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise InputError(f"--base_samples {path}: arr_1, {found}, is not a label for each image")
    return images, labels.astype(np.int64)


def sample_job(sampler, job, num_samples, batch_size, labels=None, rows_by_class=False, save_images="",
               progress_grid=False, folder=None):  # fmt: skip
    """Make what is missing of a job's samples on all ranks, and in the end one .npz and a picture. All ranks call it.

    Batches of `batch_size` are dealt to the ranks in turn; each is kept on the disk as soon as it is done, so that the
    same job, started again on any number of ranks, makes only what is missing.

    :param job: what decides the images, a dict of plain values: the run's folder may hold no other job's.
    :param labels: int64 [num_samples] to be saved with the images, or None.
    :param rows_by_class: let the picture have a row for each class.
    :param save_images: a folder to write each sample to, as a PNG of its own.
    :param progress_grid: also draw how the first samples came about.
    :param folder: where the samples go; by default the run's folder.
    :return: the path of the .npz.
    """
    check_at_least(1, num_samples=num_samples, batch_size=batch_size)
    size = (num_samples, *sampler.shape[1:], sampler.shape[0])
    store = SampleStore(folder or logger.get_dir(), size, job, None if labels is None else labels.numpy())
    gaps, store.finished = dist_util.from_rank_0(lambda: (store.open(), store.finished))
    batches = _in_batches(gaps, batch_size)
    done = num_samples - sum(map(len, batches))
    if done:
        logger.log(f"{done} of {num_samples} samples are there already")
    if save_images:
        save_each(save_images, store)
    if progress_grid and not (batches and batches[0].start == 0):
        logger.log("no new progress grid, as the first samples are there already")

    def make(indices, advance):
        strip = Strip(f"{store.stem}_progress.png") if progress_grid and indices.start == 0 else None
        images = _make(sampler, indices, strip, advance)
        if save_images:
            save_pngs(save_images, images.cpu().numpy(), indices.start, store.labels)
        return images

    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    with _progress(num_samples, done) as bar:
        for first in range(0, len(batches), world_size):
            round_of = batches[first : first + world_size]
            share = sum(map(len, round_of)) / sampler.num_steps
            batch, mistake = th.zeros(0, *size[1:], dtype=th.uint8, device=dist_util.dev()), None
            try:
                if rank < len(round_of):
                    batch = make(round_of[rank], lambda step, share=share: _advance(bar, share, step))
            except InputError as e:  # all ranks end, but first what the others have made is kept
                mistake = str(e)
            for indices, images in zip(round_of, dist_util.all_gather_uneven(batch)):
                if len(images):
                    dist_util.from_rank_0(lambda i=indices, x=images: store.write(i.start, x.cpu().numpy()))
                    done += len(images)
            if mistakes := list(filter(None, dist_util.gather_objects(mistake))):
                raise InputError(mistakes[0])
            bar.update(done - bar.n)  # whole samples again
    return dist_util.from_rank_0(lambda: _finish(store, rows_by_class))


def _in_batches(gaps, batch_size):
    """Part what is missing, a list of (start, stop), into ranges that lie between multiples of batch_size.

    So after a kill the batches are those that they would have been, and their images the same to the last bit.
    """
    batches = []
    for start, stop in gaps:
        edges = [start, *range((start // batch_size + 1) * batch_size, stop, batch_size), stop]
        batches += [range(a, b) for a, b in zip(edges, edges[1:])]
    return batches


def _make(sampler, indices, strip, advance):
    for step, out in enumerate(sampler.steps(indices), start=1):
        if strip is not None:
            strip.see(out["pred_xstart"], step, sampler.num_steps)
        advance(f"{step}/{sampler.num_steps}")
    return to_uint8(out["sample"], indices.start)


def _progress(total, done):
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return progress_bar(total=total, initial=done, desc="sampling", unit="sample", bar_format=bar_format)


def _advance(bar, share, step):
    bar.set_postfix_str(f"step {step}", refresh=False)
    bar.update(min(share, bar.total - bar.n))


def _finish(store, rows_by_class):
    """Rank 0: the picture and the .npz; then the shards may go."""
    path, picture = f"{store.stem}.npz", f"{store.stem}.png"
    if not store.finished:
        logger.log(f"{path} is complete")
        return path
    chosen = grid_indices(store.shape[0], store.labels if rows_by_class else None)
    with store.explained(picture):
        save_grid(picture, store.images(chosen), store.labels[chosen] if rows_by_class else None)
    store.assemble()
    store.remove_shards()
    logger.log(f"wrote {path} and .png")
    return path


def save_each(folder, store):
    """Write the samples that are there already, dealt to the ranks, as save_pngs does. All ranks call it."""
    for start, read in islice(store.parts(), dist_util.get_rank(), None, dist_util.get_world_size()):
        save_pngs(folder, read(), start, store.labels)
    dist_util.barrier()  # rank 0 may be about to remove what another still reads


def save_pngs(folder, images, start, labels=None):
    """Write samples start, start + 1, ... as INDEX.png, or as LABEL_INDEX.png, which makes a folder to train on.

    :param images: uint8 [n, H, W, C].
    :param labels: those of all samples, if any.
    """
    with files.disk_errors(folder, "the samples that are done are kept"):
        files.make_dirs(folder)
        for index, image in enumerate(images, start):
            prefix = "" if labels is None else f"{labels[index]}_"
            with files.write_atomically(files.join(folder, f"{prefix}{index:06d}.png"), sync=False) as f:
                _picture(image).save(f, format="PNG")


def to_uint8(sample, start=0):
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C].

    :param start: the index of the first, for errors.
    """
    bad = ~sample.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise InputError(
            f"sample {start + int(bad.nonzero()[0])} is not finite: the model's weights or precision are at fault (try "
            f"--use_fp16 False)"
        )
    return ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


# Pictures


class Strip:
    """A picture of how samples come about: a row for each, with what the model thinks of x_start along the steps."""

    def __init__(self, path, rows=8, columns=10):
        self.path, self.rows, self.columns = path, rows, columns
        self.seen = []

    def see(self, pred_xstart, step, num_steps):
        """Note the prediction at a step, 1 to num_steps, if it is one of those to show; after the last, write."""
        wanted = {round(1 + i * (num_steps - 1) / (self.columns - 1)) for i in range(self.columns)}
        if step in wanted:
            self.seen.append(to_uint8(pred_xstart[: self.rows].float().nan_to_num()).cpu().numpy())
        if step == num_steps:
            rows = np.stack(self.seen, axis=1)
            with files.disk_errors(self.path, "the samples that are done are kept"):
                save_grid(self.path, rows.reshape(-1, *rows.shape[2:]), columns=len(self.seen), rows=self.rows)


def grid_indices(num_samples, labels=None, columns=10):
    """The samples to show: the first 64; or, of up to 16 classes, the first of each."""
    classes = [] if labels is None else np.unique(labels)
    if not 1 < len(classes) <= 16:
        return np.arange(min(num_samples, GRID))
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:columns] for c in classes]))


def save_grid(path, images, labels=None, columns=None, rows=16):
    """Write images [N, H, W, C] as one PNG: a row for each class where there are labels of few classes, else a square.

    Images under 64 pixels are enlarged by a whole factor, so that one can see them.

    :param columns: how many images a row has; by default as many as make a square, and at most 16.
    """
    classes = [] if labels is None else sorted(set(labels.tolist()))
    if 1 < len(classes) <= rows:
        by_class = [images[labels == c][: columns or 16] for c in classes]
        columns = max(map(len, by_class))
    else:
        columns = columns or min(16, math.ceil(math.sqrt(len(images))))
        by_class = [images[i : i + columns] for i in range(0, min(len(images), columns * rows), columns)]
    height, width, channels = images.shape[1:]
    gap = 1
    canvas = np.full((len(by_class) * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for r, row in enumerate(by_class):
        for c, image in enumerate(row):
            y, x = r * (height + gap), c * (width + gap)
            canvas[y : y + height, x : x + width] = image
    picture = _picture(canvas)
    factor = max(1, 64 // min(height, width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    with files.write_atomically(path) as f:
        picture.save(f, format="PNG")


def _picture(image):
    """An array [H, W, C] as a picture."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
