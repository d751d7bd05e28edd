"""Random numbers that belong to a sample or a training image, whichever rank and batch it falls into."""

import inspect
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
    :param stream: another number gives other noise to the same samples, such as an upsampler's.
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


class GlobalRandomness:
    """Training's random numbers from numpy's and torch's global generators, in the order the original drew them."""

    def start_step(self, step, batch_size):
        """Prepare for a step of `batch_size` images on this rank."""

    def timesteps(self, sampler, count, device):
        """Timesteps and loss factors for the step's next `count` images: see ScheduleSampler.sample."""
        return sampler.sample(count, device)

    def randn_like(self, x):
        """Standard normal noise for the step's next len(x) images."""
        return th.randn_like(x)


class SeededRandomness:
    """Training's random numbers as functions of (seed, step, position in the global batch) alone.

    Image j of rank r's batch has position j * (number of ranks) + r, as in ImageStream: timesteps and noise do not
    depend on how a batch is split into ranks and microbatches. Dropout draws from torch's generator, which every step
    seeds anew for each rank: it repeats with the same split.

    :param for_dropout: False leaves torch's generator alone.
    """

    def __init__(self, seed, for_dropout=True):
        self.seed = seed
        self.for_dropout = for_dropout
        self.rank, self.num_ranks = dist_util.get_rank(), dist_util.get_world_size()

    def start_step(self, step, batch_size):
        self.step, self.global_batch = step, batch_size * self.num_ranks
        self.drawn = None
        self.first = self.first_noise = 0
        if self.for_dropout:
            th.manual_seed(_mix(self.seed, 0, step, self.rank))

    def timesteps(self, sampler, count, device):
        if self.drawn is None:  # of the global batch, the same on every rank
            drawn = _sample_timesteps(sampler, self.global_batch, device, [self.seed, 1, self.step])
            self.drawn = [v[self.rank :: self.num_ranks] for v in drawn]
        part = slice(self.first, self.first + count)
        self.first += count
        return tuple(v[part] for v in self.drawn)

    def randn_like(self, x):
        start = self.step * self.global_batch + self.rank
        positions = range(self.first_noise, self.first_noise + len(x))
        self.first_noise += len(x)
        return SampleNoise(self.seed, [start + j * self.num_ranks for j in positions], x.device).randn_like(x)


def _sample_timesteps(sampler, count, device, key):
    """Sample by a key. Others' samplers may draw from numpy's global generator, as the original's did."""
    if "rng" in inspect.signature(sampler.sample).parameters:
        return sampler.sample(count, device, rng=np.random.default_rng(key))
    before = np.random.get_state()
    np.random.seed(_mix(*key) % 2**32)
    try:
        return sampler.sample(count, device)
    finally:
        np.random.set_state(before)


def training_randomness(seed):
    """Where training's random numbers come from: a negative seed leaves them to the global generators."""
    return SeededRandomness(seed) if seed >= 0 else GlobalRandomness()


def generator_states():
    """The states of this rank's global generators, as tensors and lists of numbers."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    states = {
        "torch": th.get_rng_state(),
        "numpy": [name, th.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if th.cuda.is_available():
        states["cuda"] = th.cuda.get_rng_state()
    return states


def restore_generators(states):
    """Undo what happened to the global generators since generator_states()."""
    th.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and th.cuda.is_available():
        th.cuda.set_rng_state(states["cuda"])


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


def _mix(*numbers):
    # Generators with neighbouring seeds can be alike at first: hash the numbers.
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
