"""Sampling jobs: all ranks make samples, which become one .npz file and a picture. A killed job can be continued.

The label and noise of sample i are functions of (seed, i). They do not depend on ranks and batch sizes.
"""

import numpy as np
import torch as th

from . import dist_util, files, logger
from .errors import InputError, check_at_least
from .logger import progress_bar
from .npz_arrays import DAMAGED, NpzArray
from .pictures import Strip, grid_indices, save_grid, save_pngs, to_uint8
from .random_util import SampleNoise
from .sample_shards import SampleStore
from .solvers import SAMPLERS

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
UPSAMPLING = 1  # the noise stream of upsamplers, which differs from that of the small images


class BatchSampler:
    """Makes batches of samples. Sample i is a function of (seed, i).

    :param diffusion: the diffusion process.
    :param model: called as model(x, t, **conditions).
    :param shape: the shape (C, H, W) of a sample.
    :param conditions: the labels [N] of all samples, which are passed as y. Or a function from a range of samples to a
        dict of tensors [n, ...], the keyword arguments of model and cond_fn. Or None.
    :param cond_fn: the guidance function of the sampling loops of GaussianDiffusion, or None.
    :param sampler: a function of solvers.SAMPLERS, or a functools.partial of such a function with its options.
    :param stream: the noise stream; see SampleNoise.
    """

    def __init__(self, diffusion, model, shape, seed, conditions=None, cond_fn=None, sampler=SAMPLERS["ddpm"],
                 stream=0):  # fmt: skip
        self.diffusion, self.model, self.shape, self.seed, self.stream = diffusion, model, tuple(shape), seed, stream
        self.conditions, self.cond_fn, self.sampler = conditions, cond_fn, sampler
        self.num_steps = diffusion.num_timesteps

    def steps(self, indices):
        """Make the samples whose indices are in a range. Yield the dict of each step."""
        noise = SampleNoise(self.seed, indices, dist_util.dev(), self.stream)
        return self.sampler(
            self.diffusion,
            self.model,
            (len(indices), *self.shape),
            noise=noise.randn(*self.shape),
            cond_fn=self.cond_fn,
            model_kwargs={name: v.to(dist_util.dev()) for name, v in self._conditions(indices).items()},
            randn_like=noise.randn_like,
        )

    def _conditions(self, indices):
        if self.conditions is None:
            return {}
        if callable(self.conditions):
            return self.conditions(indices)
        return {"y": self.conditions[indices.start : indices.stop]}


class BaseSamples:
    """The small images for an upsampler, from an .npz file of M images. Sample i is made from image i mod M.

    :param path: the .npz file: images as arr_0, uint8 [M, H, W, in_channels], and perhaps labels [M] as arr_1.
    :param size: (H, W) of the small images.
    :param class_cond: whether the upsampler needs labels.
    :raises InputError: if the images or labels do not fit the upsampler.
    """

    def __init__(self, path, size, in_channels, num_classes, class_cond):
        self.images, self.labels = _open_samples(path)
        wanted = (*size, in_channels)
        if self.images.dtype != np.uint8:
            raise InputError(f"--base_samples {path}: images of {self.images.dtype}; uint8 from 0 to 255 is expected")
        if self.images.shape[1:] != wanted or not len(self.images):
            raise InputError(
                f"--base_samples {path}: its images are {'x'.join(map(str, self.images.shape))}, but the upsampler "
                f"takes Nx{'x'.join(map(str, wanted))} (--small_size and --sample_size)"
            )
        if self.labels is None and class_cond:
            raise InputError(f"--base_samples {path}: no labels (arr_1) in it, but the upsampler is class-conditional")
        if self.labels is not None and class_cond and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise InputError(f"--base_samples {path}: labels outside the upsampler's 0..{num_classes - 1}")

    def labels_of(self, num_samples):
        """Return the labels of the first `num_samples` samples, int64, or None if the file has no labels."""
        return None if self.labels is None else th.from_numpy(self.labels[np.arange(num_samples) % len(self.images)])

    def conditions(self, indices):
        """Return model arguments for a range of samples: low_res [n, C, H, W] in [-1, 1], and perhaps labels y [n]."""
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
    """Make the missing samples of a job, and then one .npz file and a picture. Every rank must call this function.

    Each rank writes a batch to the folder as soon as it is finished. A job that is started again makes only the missing
    samples, on any number of ranks.

    :param sampler: a BatchSampler.
    :param job: the settings that determine the images, as a dict of plain values. A folder holds samples of one job.
    :param labels: the labels to save with the images, int64 [num_samples], or None.
    :param rows_by_class: draw the picture with one row for each class.
    :param save_images: a folder for a PNG of each sample, or "".
    :param progress_grid: also draw the sampling process of the first samples.
    :param folder: the folder for the samples. The default is the run folder.
    :return: the path of the .npz file.
    """
    check_at_least(1, num_samples=num_samples, batch_size=batch_size)
    size = (num_samples, *sampler.shape[1:], sampler.shape[0])
    store = SampleStore(folder or logger.get_dir(), size, job, None if labels is None else labels.numpy())
    batches = _in_batches(dist_util.from_rank_0(store.open), batch_size)
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    done = num_samples - sum(map(len, batches))
    if done:
        logger.log(f"{done} of {num_samples} samples exist already")
    if save_images:
        for start, images, rows in store.parts():
            if start // batch_size % world_size == rank:
                save_pngs(save_images, images[rows], start, store.labels)

    mine = batches[rank::world_size]
    with progress_bar(total=num_samples, initial=done, desc="sampling", unit="sample", bar_format=BAR_FORMAT) as bar:
        for indices in mine:
            strip = Strip(f"{store.stem}_progress.png") if progress_grid and indices.start == 0 else None
            for step, out in enumerate(sampler.steps(indices), start=1):
                if strip is not None:
                    strip.see(out["pred_xstart"], step, sampler.num_steps)
                bar.set_postfix_str(f"step {step}/{sampler.num_steps}", refresh=False)
                share = len(indices) / sum(map(len, mine)) / sampler.num_steps  # assume equal progress on all ranks
                bar.update(min((num_samples - done) * share, num_samples - bar.n))
            images = to_uint8(out["sample"], indices.start).cpu().numpy()
            store.write(indices.start, images)
            if save_images:
                save_pngs(save_images, images, indices.start, store.labels)
    dist_util.wait_for_all()
    if rank == 0:
        _finish(store, rows_by_class)
    dist_util.wait_for_all()
    return store.path


def _in_batches(gaps, batch_size):
    """Split the missing samples, a list of (start, stop), into batches at multiples of batch_size.

    A killed job that is continued then has the same batches as an undisturbed job.
    """
    batches = []
    for start, stop in gaps:
        edges = [start, *range((start // batch_size + 1) * batch_size, stop, batch_size), stop]
        batches += [range(a, b) for a, b in zip(edges, edges[1:])]
    return batches


def _finish(store, rows_by_class):
    """Write the .npz file and the picture, and remove the shards. Only rank 0 calls this function."""
    picture = f"{store.stem}.png"
    if files.exists(store.path):
        logger.log(f"{store.path} is complete")
    else:
        if gaps := store.missing():
            raise InputError(
                f"{store.shards}: samples {gaps[0][0]} to {gaps[0][1] - 1} are not there, although every rank has "
                f"written its own: give a --log_dir that all nodes share, and run this again"
            )
        if files.exists(picture):
            files.remove(picture)  # the picture of an earlier job whose .npz is gone
        store.assemble()
        store.remove_shards()
        logger.log(f"wrote {store.path}")
    if not files.exists(picture):
        chosen = grid_indices(store.shape[0], store.labels if rows_by_class else None)
        with store.explained(picture):
            images = NpzArray(store.path, "arr_0")[chosen]
            save_grid(picture, images, store.labels[chosen] if rows_by_class else None)
