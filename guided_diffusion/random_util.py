"""Randomness that belongs to a sample, whichever rank and batch it falls into."""

import random

import numpy as np
import torch as th

from . import dist_util
from .errors import InputError


class SampleNoise:
    """The random numbers of a batch of samples: each sample's are a function of (seed, its index) alone.

    :param seed: the run's seed.
    :param indices: the samples' indices in the run.
    :param device: where noise is drawn; other kinds of device give other numbers.
    """

    def __init__(self, seed, indices, device="cpu"):
        check_seed(seed)
        self.device = th.device(device)
        self.generators = [th.Generator(self.device).manual_seed(_mix(seed, i)) for i in indices]

    def randn(self, *shape):
        """Standard normal noise [len(indices), *shape]."""
        return th.stack([th.randn(shape, generator=g, device=self.device) for g in self.generators])

    def randn_like(self, x):
        """Standard normal noise of the shape and dtype of a batch of these samples."""
        return self.randn(*x.shape[1:]).to(x.dtype)


def random_labels(seed, indices, num_classes):
    """A uniform label for each sample, a function of (seed, its index) alone: int64 [len(indices)]."""
    check_seed(seed)
    return th.tensor([np.random.default_rng([seed, i, 1]).integers(num_classes) for i in indices])


def check_seed(seed):
    """Refuse a seed that samples cannot have."""
    if seed < 0:
        raise InputError(f"--seed {seed}: the seed of samples starts from 0")


def seed_everything(seed):
    """Seed the global generators of this rank, differently on each; a negative seed leaves them unseeded."""
    if seed >= 0:
        mixed = _mix(seed, dist_util.get_rank())
        random.seed(mixed)
        np.random.seed(mixed % 2**32)
        th.manual_seed(mixed)


def _mix(seed, index):
    # Generators with neighbouring seeds can be alike at first: hash the pair.
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
