"""Previews: grids of samples during training. All grids use the same noise, so that they show the model's progress."""

from contextlib import contextmanager

import numpy as np

from . import dist_util, files, logger
from .pictures import save_grid, to_uint8
from .random_util import random_labels
from .respace import SpacedDiffusion, space_timesteps
from .sample_job import BatchSampler
from .solvers import SAMPLERS


def average_is_ready(rate, steps):
    """Return whether a moving average has seen at least 3 / (1 - rate) steps.

    Before, the initial weights still make up more than exp(-3) = 5 % of the average, and samples from it are noise.
    """
    return rate < 1 and steps >= round(3 / (1 - rate))


@contextmanager
def evaluating(model, state_dict):
    """Within a `with` block, put a model into evaluation mode and give it the weights in `state_dict`."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state_dict)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(own)
        model.train()


class Preview:
    """Writes grids of samples made by DDIM in few steps, with the same noise and labels each time.

    :param diffusion: the process that the model is trained on.
    :param shape: (C, H, W) of a sample.
    :param num_classes: the number of classes if the model is class-conditional. `random_labels` then draws the labels.
    :param conditions: further keyword arguments of the model, tensors [count, ...].
    :param count: the number of samples.
    :param steps: the number of timesteps to visit.
    :param batch_size: samples that pass through the network at once, on each rank.
    """

    def __init__(self, diffusion, shape, num_classes=None, conditions=None, count=16, steps=25, batch_size=16, seed=0):
        original_steps = getattr(diffusion, "original_num_steps", diffusion.num_timesteps)
        if steps < diffusion.num_timesteps == original_steps:  # not a subset already
            names = ("betas", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
            options = {name: getattr(diffusion, name) for name in names}
            diffusion = SpacedDiffusion(space_timesteps(diffusion.num_timesteps, [steps]), **options)
        self.diffusion = diffusion
        self.shape = tuple(shape)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.conditions = dict(conditions or {})
        if num_classes is not None:
            self.conditions.setdefault("y", random_labels(seed, range(count), num_classes))

    def write(self, model, step, weights):
        """Sample with `model` and write preview/STEP_WEIGHTS.png to the run's folder, from rank 0.

        Every rank must call this method, because the ranks share the sampling.

        :param weights: the name of the model's weights, such as "ema_0.9999".
        :return: the path of the picture.
        """
        mine = range(dist_util.get_rank(), self.count, dist_util.get_world_size())
        images = {}
        for start in range(0, len(mine), self.batch_size):
            indices = mine[start : start + self.batch_size]
            images.update(zip(indices, self._sample(model, indices).cpu().numpy()))
        by_index = {i: image for of_rank in dist_util.gather_objects(images) for i, image in of_rank.items()}
        folder = files.join(logger.get_dir(), "preview")
        path = files.join(folder, f"{step:06d}_{weights}.png")
        if dist_util.get_rank() == 0:
            files.make_dirs(folder)
            save_grid(path, np.stack([by_index[i] for i in range(self.count)]))
        return path

    def _sample(self, model, indices):
        conditions = {name: values[list(indices)] for name, values in self.conditions.items()}
        sampler = BatchSampler(
            self.diffusion, model, self.shape, self.seed, lambda _: conditions, sampler=SAMPLERS["ddim"]
        )
        *_, last = sampler.steps(indices)
        return to_uint8(last["sample"].nan_to_num())  # NaN from a diverging network becomes grey
