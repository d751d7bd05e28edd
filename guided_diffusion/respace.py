"""Diffusion processes that visit a subset of the timesteps that a model was trained on."""

from functools import wraps

import numpy as np
import torch as th

from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps, section_counts):
    """Select timesteps of an original process.

    :param num_timesteps: the number of timesteps of the original process.
    :param section_counts: the number of timesteps to select from each of several equal sections of the process: a list
        of numbers, or a string such as "10,10,15,20", which selects 10 timesteps of the first quarter and 20 of the
        last. "ddimN" selects N timesteps with a fixed integer stride, as the DDIM paper does. "quadN" selects N
        quadratically spaced timesteps from 0 to the last, denser at the clean end (DDIM, appendix D.2).
    :return: a set of timesteps.
    :raises InputError: if a section has too few timesteps, or if no integer stride gives N timesteps.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided_timesteps(num_timesteps, section_counts)
        if section_counts.startswith("quad"):
            return _quadratic_timesteps(num_timesteps, section_counts)
        try:
            section_counts = [int(x) for x in section_counts.split(",")]
        except ValueError:
            raise InputError(
                f"unknown spacing --timestep_respacing {section_counts!r}: give a count such as 250, one count per "
                f"section such as 10,10,15,20, ddimN such as ddim25, or quadN such as quad15"
            ) from None
    section_size, surplus = divmod(num_timesteps, len(section_counts))
    start, steps = 0, set()
    for i, count in enumerate(section_counts):
        size = section_size + (i < surplus)
        if not 0 <= count <= size:
            raise InputError(
                f"--timestep_respacing {','.join(map(str, section_counts))}: cannot take {count} timesteps from "
                f"section {i + 1}, which has {size} of the process's {num_timesteps}"
            )
        # Adding stride by stride and rounding halves to even give the same timesteps as the original code.
        stride = (size - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            position += stride
        start += size
    if not steps:
        raise InputError(f"--timestep_respacing {','.join(map(str, section_counts))}: takes no timestep at all")
    return steps


def _strided_timesteps(num_timesteps, spacing):
    """Select every k-th timestep for a spacing "ddimN", with the smallest k that gives exactly N timesteps."""
    count = _parse_count(spacing)
    by_count = {}
    for stride in range(1, num_timesteps + 1):
        by_count.setdefault(len(range(0, num_timesteps, stride)), stride)
    if count not in by_count:
        nearest = min(by_count, key=lambda n: (abs(n - count), n))
        raise InputError(
            f"--timestep_respacing {spacing}: no integer stride takes exactly {count} of {num_timesteps} timesteps; "
            f"the nearest that works is ddim{nearest}"
        )
    return set(range(0, num_timesteps, by_count[count]))


def _quadratic_timesteps(num_timesteps, spacing):
    """Select N timesteps for a spacing "quadN". If rounding makes two timesteps equal, the later one is increased."""
    count = _parse_count(spacing)
    if count > num_timesteps:
        raise InputError(f"--timestep_respacing {spacing}: the process has only {num_timesteps} timesteps")
    steps = np.round(np.linspace(0, np.sqrt(num_timesteps - 1), count) ** 2).astype(int)
    ranks = np.arange(count)
    return set((np.maximum.accumulate(steps - ranks) + ranks).tolist())


def _parse_count(spacing):
    """Parse the number N in "ddimN" or "quadN"."""
    kind, count = spacing[:4], spacing[4:]
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"unknown spacing --timestep_respacing {spacing!r}: {kind}N needs a number, such as {kind}25")
    return int(count)


class SpacedDiffusion(GaussianDiffusion):
    """A process that visits some timesteps of an original process, with the same alphas_cumprod at these timesteps.

    Models and cond_fns are called with the timesteps of the original process.

    :param use_timesteps: the timesteps of the original process to visit.
    :param kwargs: the arguments of GaussianDiffusion for the original process.
    """

    def __init__(self, use_timesteps, **kwargs):
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < self.original_num_steps:
            raise InputError(f"timesteps to keep must be a subset of 0..{self.original_num_steps - 1}")

        alphas_cumprod = np.cumprod(1.0 - np.asarray(kwargs["betas"], dtype=np.float64))[self.timestep_map]
        kwargs["betas"] = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(**kwargs)

    @wraps(GaussianDiffusion.p_mean_variance)
    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    @wraps(GaussianDiffusion.training_losses)
    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    @wraps(GaussianDiffusion.condition_mean)
    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    @wraps(GaussianDiffusion.condition_score)
    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def model_timesteps(self, t):
        return self._wrap_model(lambda x, timesteps: timesteps)(None, self._scale_timesteps(t))

    def _wrap_model(self, model):
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t):
        return t  # _WrappedModel scales the timesteps


class _WrappedModel:
    """Calls a model or cond_fn with the original timesteps, which it maps from those of a SpacedDiffusion."""

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x, ts, **kwargs):
        ts = th.tensor(self.timestep_map, device=ts.device)[ts]
        if self.rescale_timesteps:
            ts = ts.float() * (1000.0 / self.original_num_steps)
        return self.model(x, ts, **kwargs)
