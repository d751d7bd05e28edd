"""What a training run tells those who watch it: its losses by noise level, its pace, and pictures."""

import datetime
import sys
import time
from contextlib import contextmanager

import torch as th

from . import dist_util, files, logger
from .pictures import save_grid, to_uint8
from .random_util import SampleNoise, random_labels
from .respace import SpacedDiffusion, space_timesteps


def log_loss_dict(diffusion, ts, losses):
    """Log the mean of each loss, and its mean by quartile of the timesteps (NAME_q0 has the least noise).

    :param ts: timesteps [N].
    :param losses: a dict of tensors [N].
    """
    quartiles = [int(4 * t / diffusion.num_timesteps) for t in ts.tolist()]
    for key, values in losses.items():
        values = values.detach().tolist()
        for quartile, value in zip(quartiles, values):
            logger.logkv_mean(key, value)
            logger.logkv_mean(f"{key}_q{quartile}", value)


class Pace:
    """How fast a run goes, in the time since it was last asked."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self):
        """Count a block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def metrics(self, images_per_step, steps_left=None):
        """The metrics of a log line, of the `steps` counted since the last one.

        :param images_per_step: over all ranks.
        :param steps_left: until the run's end, where it has one.
        :return: steps_per_s; images_per_s over all ranks; data_wait, the share of the time that this rank waited for
            data; memory_mb, the most that this process has had: on its GPU, or without one altogether; and eta.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rate = self.steps / seconds
        found = {
            "steps_per_s": rate,
            "images_per_s": rate * images_per_step,
            "data_wait": self.waited / seconds,
            "memory_mb": peak_memory_mb(),
        }
        if steps_left is not None and rate > 0:
            found["eta"] = str(datetime.timedelta(seconds=round(steps_left / rate)))
        self._restart()
        return found


def peak_memory_mb():
    """The most memory this process has had, in MiB: on its GPU, or without a GPU its resident set."""
    if th.cuda.is_available():
        return th.cuda.max_memory_allocated() / 2**20
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _with_fewer_steps(diffusion, steps):
    """The same process, visiting that many of its timesteps; as it is, if it has no more or visits a subset already."""
    if diffusion.num_timesteps <= max(steps, getattr(diffusion, "original_num_steps", steps) - 1):
        return diffusion
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion.num_timesteps, [steps]),
        betas=diffusion.betas,
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
    )


class Preview:
    """Grids of samples from a model in training: always of the same noise and labels, so that one sees it learn.

    They are DDIM samples with few steps, `preview/NNNNNN.png` in the run's folder.

    :param diffusion: the process that is trained.
    :param shape: (C, H, W) of a sample.
    :param num_classes: of a class-conditional model; its samples get the labels of `random_labels`.
    :param conditions: more model keyword arguments, tensors [count, ...].
    :param count: the number of samples.
    :param steps: timesteps to visit.
    :param batch_size: samples that pass through the network at once, on each rank.
    """

    def __init__(self, diffusion, shape, num_classes=None, conditions=None, count=16, steps=25, batch_size=16, seed=0):
        self.diffusion = _with_fewer_steps(diffusion, steps)
        self.shape = tuple(shape)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.conditions = dict(conditions or {})
        if num_classes is not None:
            self.conditions.setdefault("y", random_labels(seed, range(count), num_classes))

    def write(self, model, step):
        """Sample with `model` and write the grid. Every rank must call it: they share the work."""
        mine = range(dist_util.get_rank(), self.count, dist_util.get_world_size())
        images = [self._sample(model, mine[i : i + self.batch_size]) for i in range(0, len(mine), self.batch_size)]
        nothing = th.zeros(0, *self.shape[1:], self.shape[0], dtype=th.uint8, device=dist_util.dev())
        by_rank = dist_util.all_gather_uneven(th.cat([nothing, *images]))
        if dist_util.get_rank() == 0:
            grid = th.stack([by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(self.count)]).cpu().numpy()
            folder = files.join(logger.get_dir(), "preview")
            files.make_dirs(folder)
            save_grid(files.join(folder, f"{step:06d}.png"), grid)

    @th.no_grad()
    def _sample(self, model, indices):
        device = dist_util.dev()
        noise = SampleNoise(self.seed, indices, device)
        steps = self.diffusion.ddim_sample_loop_progressive(
            model,
            (len(indices), *self.shape),
            noise=noise.randn(*self.shape),
            model_kwargs={name: values[list(indices)].to(device) for name, values in self.conditions.items()},
            device=device,
            randn_like=noise.randn_like,
        )
        *_, last = steps
        return to_uint8(last["sample"].nan_to_num())  # grey, where a network in trouble gives no number
