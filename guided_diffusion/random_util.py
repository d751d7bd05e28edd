"""Random numbers for each sample and each training image that do not depend on ranks and batch sizes."""

import numpy as np
import torch as th

from . import dist_util
from .errors import InputError


class SampleNoise:
    """Draws noise for a batch of samples. The noise of sample i is a function of (seed, i) alone.

    :param seed: the seed of the run.
    :param indices: the indices of the samples in the run.
    :param device: the device that draws the noise. CPUs and GPUs draw different numbers.
    :param stream: selects an independent stream of noise for the same samples, for example for an upsampler.
    """

    def __init__(self, seed, indices, device="cpu", stream=0):
        check_seed(seed)
        self.device = th.device(device)
        key = (stream,) if stream else ()
        self.generators = [th.Generator(self.device).manual_seed(_mix(seed, i, *key)) for i in indices]

    def randn(self, *shape):
        """Standard normal noise [len(indices), *shape]."""
        return th.stack([th.randn(shape, generator=g, device=self.device) for g in self.generators])

    def randn_like(self, x):
        """Standard normal noise of the shape and dtype of a batch of these samples."""
        return self.randn(*x.shape[1:]).to(x.dtype)


class TrainingRandomness:
    """Draws the random numbers of training as functions of (seed, step, position in the global batch).

    Image j on rank r has the position j * (number of ranks) + r in the global batch, as in ImageStream. Timesteps and
    noise therefore do not depend on how the batch is split into ranks and microbatches. For dropout, each step seeds
    torch's global generator, with a different seed on each rank.

    :param seed: the seed of the run. If the seed is negative, numpy's and torch's global generators draw all numbers.
    :param for_dropout: whether to seed torch's global generator for dropout.
    """

    def __init__(self, seed, for_dropout=True):
        self.seed = seed
        self.for_dropout = for_dropout

    def start_step(self, step, batch_size, sampler):
        """Draw the timesteps of a training step from a ScheduleSampler, for `batch_size` images on each rank."""
        rank, num_ranks = dist_util.get_rank(), dist_util.get_world_size()
        global_batch = batch_size * num_ranks
        before = np.random.get_state()  # schedule samplers draw from numpy's global generator
        if self.seed >= 0:
            np.random.seed(_mix(self.seed, 1, step) % 2**32)  # the same on all ranks: each draws for the global batch
        timesteps, factors = sampler.sample(global_batch, dist_util.dev())
        if self.seed >= 0:
            np.random.set_state(before)
            if self.for_dropout:
                th.manual_seed(_mix(self.seed, 0, step, rank))
        self.timesteps, self.factors = timesteps[rank::num_ranks], factors[rank::num_ranks]
        self.positions = range(step * global_batch + rank, (step + 1) * global_batch, num_ranks)  # in the sequence
        self.used = 0

    def draw(self, x):
        """Return the timesteps [N], loss factors [N] and standard normal noise of the step's next N images `x`."""
        part = slice(self.used, self.used + len(x))
        self.used += len(x)
        if self.seed >= 0:
            noise = SampleNoise(self.seed, self.positions[part], x.device).randn_like(x)
        else:
            noise = th.randn_like(x)
        return self.timesteps[part], self.factors[part], noise


def random_labels(seed, indices, num_classes):
    """Draw uniform labels, int64 [len(indices)]. The label of sample i is a function of (seed, i)."""
    check_seed(seed)
    return th.tensor([np.random.default_rng([seed, i, 1]).integers(num_classes) for i in indices])


def check_seed(seed):
    """Raise InputError for a negative seed, which samples cannot have."""
    if seed < 0:
        raise InputError(f"--seed {seed}: the seed of samples starts from 0")


def seed_everything(seed):
    """Seed numpy's and torch's global generators, with a different seed on each rank."""
    mixed = _mix(seed, dist_util.get_rank())
    np.random.seed(mixed % 2**32)
    th.manual_seed(mixed)


def _mix(*numbers):
    # Hash the numbers, because generators with neighbouring seeds can draw similar numbers at first.
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
