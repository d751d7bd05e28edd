"""Helpers for tests: recorded data, deterministic weights and inputs, exact denoisers, and small networks."""

import gzip
import json
import math
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion import dist_util
from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.classifier_util import ClassifierTrainLoop
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_util import TrainLoop

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"

# The test tensors are small: a second thread costs more time than it saves, especially on busy cores.
th.set_num_threads(1)


def load_json(name):
    """Load a JSON file from tests/data, plain or gzipped."""
    path = DATA / name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())


def randn(seed, *shape):
    """Return standard normal float32 numbers that depend only on the seed and the shape."""
    return th.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def fill_by_name(module):
    """Set every parameter to values that depend only on its name and shape, and return the module in eval mode.

    Two implementations whose parameters have the same names and shapes then have the same weights. Rows of weight
    matrices have a norm of about 1, normalisation scales are close to 1, and no parameter stays zero.
    """
    values = {}
    for name, old in module.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        new = rng.standard_normal(tuple(old.shape)).astype(np.float32)
        if old.ndim > 1:
            new *= 1 / np.sqrt(math.prod(old.shape[1:]))
        elif name.endswith("weight"):
            new = 1 + 0.1 * new
        else:
            new *= 0.1
        values[name] = th.from_numpy(new).to(old.dtype)
    module.load_state_dict(values)
    return module.eval()


def relative_error(got, want):
    """Return norm(got - want) / norm(want), with L2 norms in float64."""
    got, want = (th.as_tensor(x).detach().double() for x in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def assert_near(got, want, tolerance):
    """Check that tensors agree within `tolerance` times the largest absolute value, or times 1 if that is smaller."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        g, w = g.detach().double(), w.detach().double()
        error, size = float((g - w).abs().max()), float(w.abs().max())
        assert error <= tolerance * max(size, 1), (i, error, size)


def per_sample(t, like):
    """Reshape t [N] to broadcast over `like` [N, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


@contextmanager
def quick_half_convolutions(monkeypatch):
    """Compute float16 convolutions in float32 and round the result, like the CPU kernel but many times faster.

    Like the kernel, the replacement requires the input, the weight and the bias to have the same dtype.
    """

    def quick(convolve):
        def convolution(x, weight, bias=None, *args, **kwargs):
            if x.dtype != th.float16:
                return convolve(x, weight, bias, *args, **kwargs)
            assert weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
            bias = None if bias is None else bias.float()
            return convolve(x.float(), weight.float(), bias, *args, **kwargs).half()

        return convolution

    with monkeypatch.context() as patch:
        for name in ("conv1d", "conv2d"):
            patch.setattr(F, name, quick(getattr(F, name)))
        yield


# Data distributions with a closed-form denoiser

EPSILON, START_X, PREVIOUS_X = ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X
LEARNED, LEARNED_RANGE = ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE
FIXED_SMALL, FIXED_LARGE = ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE
SIGMAS = 5
T_ALL = th.arange(250)


def process(steps=250, mean=EPSILON, var=FIXED_LARGE, loss=LossType.MSE, schedule="linear", **kwargs):
    betas = gd.get_named_beta_schedule(schedule, steps)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss, **kwargs)


class Tables:
    """Coefficients of the diffusion process at timesteps t, in float64, computed from betas and broadcast over x."""

    def __init__(self, betas, t, x):
        betas = th.as_tensor(np.array(betas))
        alpha_bar = th.cumprod(1 - betas, dim=0)
        alpha_bar_prev = th.cat([th.ones(1, dtype=th.float64), alpha_bar[:-1]])
        self.beta, self.alpha_bar, self.alpha_bar_prev = (
            per_sample(table[t], x) for table in (betas, alpha_bar, alpha_bar_prev)
        )
        self.alpha = 1 - self.beta
        self.signal, self.noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()


class GaussianData:
    """Data whose channels are independent and distributed as N(mean, std^2), with closed-form posteriors."""

    def __init__(self, mean, std):
        self.mean, self.variance = (th.tensor(v, dtype=th.float64).reshape(1, -1, 1, 1) for v in (mean, std))
        self.variance = self.variance**2

    def marginal(self, alpha_bar):
        """Return the mean and the variance of x_t."""
        return alpha_bar.sqrt() * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def posterior(self, x, tables):
        """Return the mean and the variance of x_start given x_t."""
        mean, variance = self.marginal(tables.alpha_bar)
        slope = tables.signal * self.variance / variance
        return self.mean + slope * (x - mean), self.variance * (1 - tables.alpha_bar) / variance

    def reverse_variance(self, tables):
        """Return the variance of x_{t-1} given x_t, by Bayes' rule from the marginal of x_{t-1}."""
        _, before = self.marginal(tables.alpha_bar_prev)
        return before * tables.beta / (tables.alpha * before + tables.beta)

    def denoised(self, x, tables):
        return self.posterior(x, tables)[0]

    def sample(self, n, seed=0):
        return (self.mean + self.variance.sqrt() * randn(seed, n, self.mean.shape[1], 1, 1)).float()


def exact_model(data, diffusion, betas=None):
    """Return the optimal model for `data`, with the output parameterisation that `diffusion` expects.

    :param betas: betas of the process that numbers the model's timesteps (default: diffusion.betas).
    """
    betas = diffusion.betas if betas is None else betas

    def model(x, t):
        tables, x = Tables(betas, t, x), x.double()
        x_start = data.denoised(x, tables)
        if diffusion.model_mean_type == START_X:
            output = x_start
        elif diffusion.model_mean_type == EPSILON:
            output = (x - tables.signal * x_start) / tables.noise
        else:  # E[x_{t-1} | x_t]: the posterior mean is linear in x_start
            denominator = 1 - tables.alpha_bar
            output = (
                tables.beta * tables.alpha_bar_prev.sqrt() / denominator * x_start
                + (1 - tables.alpha_bar_prev) * tables.alpha.sqrt() / denominator * x
            )
        if diffusion.model_var_type == LEARNED:
            output = th.cat([output, data.reverse_variance(tables).log().expand(x.shape)], dim=1)
        elif diffusion.model_var_type == LEARNED_RANGE:
            output = th.cat([output, th.zeros_like(x)], dim=1)
        return output.float()

    return model


def assert_moments(samples, mean, variance, bias=0.0, relative_bias=0.0):
    """Check that samples [N] have this mean and variance, within five standard errors plus an allowed bias.

    :param bias: allowed bias of the mean, in standard deviations.
    :param relative_bias: allowed bias of the variance, as a fraction of the variance.
    """
    samples, n = samples.double().flatten(), samples.numel()
    std = math.sqrt(variance)
    assert abs(samples.mean() - mean) < SIGMAS * std / math.sqrt(n) + bias * std
    # Estimate the standard error of the variance from the fourth central moment of the samples.
    fourth = ((samples - samples.mean()) ** 4).mean()
    error = math.sqrt((fourth - samples.var() ** 2) / n)
    assert abs(samples.var() - variance) < SIGMAS * error + relative_bias * variance


def assert_mean(values, want, allowance):
    """Check that the mean of `values` is `want`, within five standard errors plus `allowance`."""
    values = values.double()
    assert abs(float(values.mean()) - want) < SIGMAS * float(values.std()) / math.sqrt(len(values)) + allowance


def bits(x):
    return x / math.log(2)


# Small networks

SMALL = dict(
    image_size=16, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2),
)  # fmt: skip


def input_for(options, batch=2):
    """Return x, timesteps and model keyword arguments for a network built with these options."""
    size = options["image_size"] or 8
    size = list(size) if isinstance(size, tuple) else [size] * 2
    size = {1: size[:1], 2: size, 3: [3, *size]}[options.get("dims", 2)]
    labels = dict(y=th.arange(batch) % options["num_classes"]) if options.get("num_classes") else {}
    return randn(7, batch, options["in_channels"], *size), th.linspace(1.5, 900, batch), labels


def refused(build, *words):
    """Check that `build` raises InputError with a one-line message that contains all the words."""
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


# Small training runs


def new_model(**options):
    """Return a small UNet, with every weight random, and its diffusion process."""
    options = {**dict(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2,
                      attention_resolutions="8"), **options}  # fmt: skip
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **options})
    randomize(model)
    return model, diffusion


def randomize(model, seed=0):
    g = th.Generator().manual_seed(seed)
    with th.no_grad():
        for p in model.parameters():
            p.copy_(th.randn(p.shape, generator=g) * (0.05 if p.ndim > 1 else 0.3))


def batch_of(count, seed=1):
    g = th.Generator().manual_seed(seed)
    return th.rand(count, 3, 8, 8, generator=g) * 2 - 1


def endless(*batches, seconds=0.0):
    """Yield the batches in an endless cycle, as training data, with a delay of `seconds` before each batch."""
    while True:
        for batch in batches or [batch_of(6)]:
            time.sleep(seconds)
            yield batch, {}


def new_loop(model, diffusion, kind=TrainLoop, **options):
    options = {**dict(data=None, batch_size=6, microbatch=-1, lr=1e-3, log_interval=1, save_interval=100,
                      resume_checkpoint=""), **options}  # fmt: skip
    if kind is not ClassifierTrainLoop:
        options.setdefault("ema_rate", "0.9")
    return kind(model=model, diffusion=diffusion, **options)


def as_rank(monkeypatch, rank, num_ranks):
    """Make dist_util report this rank and this number of ranks."""
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: num_ranks)


def copies(params):
    return [p.detach().clone() for p in params]
