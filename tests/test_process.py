"""The diffusion process against what is known exactly: data whose denoiser, classifier and entropy are formulas.

For data from a Gaussian, or a mixture of two, E[x_start | x_t] is a formula. With it in the place of a network,
samplers must recover the data's distribution and the bound must come to the data's entropy, up to two errors. One is of
Monte Carlo: tests compute the standard error and allow five. The other is of the finite number of steps, which is of
first order: tests state a bound, and where there is no Monte Carlo error check that it halves when the steps double.
"""

import itertools
import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import fill_by_name, per_sample, randn, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import classifier_cond_fn, route_labels
from guided_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import EncoderUNetModel

EPSILON, START_X, PREVIOUS_X = ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X
LEARNED, LEARNED_RANGE = ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE
FIXED_SMALL, FIXED_LARGE = ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE
SIGMAS = 5


def process(steps=250, mean=EPSILON, var=FIXED_LARGE, loss=LossType.MSE, schedule="linear", **kwargs):
    betas = gd.get_named_beta_schedule(schedule, steps)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss, **kwargs)


class Tables:
    """The process in float64, derived here from betas alone, at timesteps shaped to broadcast over x."""

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
    """Data with independent channels N(mean, std^2), and what follows for its noised versions."""

    def __init__(self, mean, std):
        self.mean, self.variance = (th.tensor(v, dtype=th.float64).reshape(1, -1, 1, 1) for v in (mean, std))
        self.variance = self.variance**2

    def marginal(self, alpha_bar):
        """Mean and variance of x_t."""
        return alpha_bar.sqrt() * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def posterior(self, x, tables):
        """Mean and variance of x_start given x_t."""
        mean, variance = self.marginal(tables.alpha_bar)
        slope = tables.signal * self.variance / variance
        return self.mean + slope * (x - mean), self.variance * (1 - tables.alpha_bar) / variance

    def reverse_variance(self, tables):
        """The variance of x_{t-1} given x_t, by Bayes' rule from the marginal of x_{t-1}."""
        _, before = self.marginal(tables.alpha_bar_prev)
        return before * tables.beta / (tables.alpha * before + tables.beta)

    def denoised(self, x, tables):
        return self.posterior(x, tables)[0]

    def sample(self, n, seed=0):
        return (self.mean + self.variance.sqrt() * randn(seed, n, self.mean.shape[1], 1, 1)).float()


class MixtureData:
    """Data of one channel from two Gaussians, and what follows for its noised versions."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (th.tensor(v, dtype=th.float64) for v in (weights, means, stds))

    def log_joint(self, x, tables):
        """log p(component, x_t): [N, 2]."""
        alpha_bar = tables.alpha_bar.reshape(-1, 1)
        variance = alpha_bar * self.stds**2 + 1 - alpha_bar
        squares = (x.reshape(-1, 1).double() - alpha_bar.sqrt() * self.means) ** 2
        return self.weights.log() - 0.5 * (squares / variance + variance.log())

    def denoised(self, x, tables):
        alpha_bar = tables.alpha_bar.reshape(-1, 1)
        slope = alpha_bar.sqrt() * self.stds**2 / (alpha_bar * self.stds**2 + 1 - alpha_bar)
        each = self.means + slope * (x.reshape(-1, 1) - alpha_bar.sqrt() * self.means)
        return (self.log_joint(x, tables).softmax(dim=1) * each).sum(1).reshape(x.shape)


def exact_model(data, diffusion, betas=None):
    """The network that would be perfect for `data`, in the form that `diffusion` reads.

    :param betas: of the process whose timesteps the model is shown.
    """
    betas = diffusion.betas if betas is None else betas

    def model(x, t):
        tables, x = Tables(betas, t, x), x.double()
        x_start = data.denoised(x, tables)
        if diffusion.model_mean_type == START_X:
            output = x_start
        elif diffusion.model_mean_type == EPSILON:
            output = (x - tables.signal * x_start) / tables.noise
        else:  # E[x_{t-1} | x_t]: the expectation of the posterior's mean, which is linear in x_start
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
    """Check samples [N] against a distribution's mean and variance within five standard errors and stated biases.

    :param bias: what the mean may be off by, in standard deviations.
    :param relative_bias: what the variance may be off by, as a share of it.
    """
    samples, n = samples.double().flatten(), samples.numel()
    std = math.sqrt(variance)
    assert abs(samples.mean() - mean) < SIGMAS * std / math.sqrt(n) + bias * std
    # The standard error of the variance from the samples' own fourth moment
    fourth = ((samples - samples.mean()) ** 4).mean()
    error = math.sqrt((fourth - samples.var() ** 2) / n)
    assert abs(samples.var() - variance) < SIGMAS * error + relative_bias * variance


# Sampling: the moments of a chain for Gaussian data, without Monte Carlo


def affine_moments(step, mean, variance, steps):
    """Push a mean and a variance [1, C, 1, 1] of x_T through a sampler whose steps are affine in x and in their noise.

    :param step: a function of (x [3, C, 1, 1], t [3], randn_like) to x_{t-1}. Three probes give the map.
    :return: mean and variance of the samples.
    """
    probe = th.zeros(3, mean.shape[1], 1, 1)
    probe[1] = 1
    noise = th.zeros_like(probe)
    noise[2] = 1
    for i in reversed(range(steps)):
        base, moved, noisy = step(probe, th.full((3,), i), lambda x: noise).double()
        mean = base + (moved - base) * mean
        variance = (moved - base) ** 2 * variance + (noisy - base) ** 2
    return mean, variance


DATA = GaussianData([0.5, -0.3, 0.0], [0.5, 0.2, 1.2])
SAMPLERS = {
    "ddpm, learned": (dict(var=LEARNED), "p_sample", {}),
    "ddpm, small": (dict(var=FIXED_SMALL), "p_sample", {}),
    "ddpm, large": (dict(var=FIXED_LARGE), "p_sample", {}),
    "ddpm, range": (dict(var=LEARNED_RANGE), "p_sample", {}),
    "ddpm, x_start": (dict(var=FIXED_LARGE, mean=START_X), "p_sample", {}),
    "ddpm, cosine": (dict(var=LEARNED, schedule="cosine"), "p_sample", {}),
    "ddim": (dict(), "ddim_sample", dict(eta=0.0)),
    "ddim, cosine": (dict(schedule="cosine"), "ddim_sample", dict(eta=0.0)),
    "ddim, half": (dict(), "ddim_sample", dict(eta=0.5)),
    "ddim, full": (dict(), "ddim_sample", dict(eta=1.0)),
}


def moments(name, steps, data, cond_fn=None, target=None):
    """The moments of a sampler's samples, with the exact model of `data` and the right x_T for data from `target`."""
    options, method, kwargs = SAMPLERS[name]
    diffusion = process(steps, **options)
    model = exact_model(data, diffusion)

    def step(x, t, randn_like):
        out = getattr(diffusion, method)(
            model, x, t, clip_denoised=False, cond_fn=cond_fn and cond_fn(diffusion), randn_like=randn_like, **kwargs
        )
        return out["sample"]

    start = (target or data).marginal(th.tensor(diffusion.alphas_cumprod[-1]))
    return affine_moments(step, *start, steps)


def assert_first_order(find_error, steps, bound):
    """Check that an error is at most bound / steps, and halves, roughly, when the steps double.

    :param find_error: a function of the number of steps to a tensor of errors.
    """
    coarse, fine = find_error(steps), find_error(2 * steps)
    assert coarse.abs().max() < bound / steps
    assert (fine.abs() < 0.65 * coarse.abs() + 1e-4).all()
    assert coarse.abs().max() > 1e-3  # large enough to see it halve


@pytest.mark.parametrize("name", SAMPLERS)
def test_chain_has_the_datas_moments(name):
    def error(steps):
        mean, variance = moments(name, steps, DATA)
        assert ((mean - DATA.mean).abs() < 1e-5).all()  # every step is exact in the mean
        return variance / DATA.variance - 1

    # The tightest channel, of standard deviation 0.2, needs the finest steps.
    assert_first_order(error, 150, bound=30)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_chain_with_the_exact_variance_is_exact(schedule):
    # But for the last step, which adds no noise: its output is E[x_start | x_0], whose variance is the data's less that
    # which is left of it given x_0.
    _, variance = moments("ddpm, learned" if schedule == "linear" else "ddpm, cosine", 100, DATA)
    betas = gd.get_named_beta_schedule(schedule, 100)
    _, left = DATA.posterior(th.zeros(1), Tables(betas, th.zeros(1, dtype=th.long), DATA.mean))
    th.testing.assert_close(variance, DATA.variance - left, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_chain_has_the_posteriors_moments(name):
    # x_start was observed as 0.8, with noise of standard deviation 0.6: p(observation | x_t) and the posterior are
    # Gaussian.
    data, noise_variance, observed = GaussianData([0.5, -0.3, 0.0], [0.5, 0.3, 1.2]), 0.6**2, 0.8
    target = GaussianData([0, 0, 0], [1, 1, 1])
    target.variance = 1 / (1 / data.variance + 1 / noise_variance)
    target.mean = target.variance * (data.mean / data.variance + observed / noise_variance)
    assert ((target.mean - data.mean).abs() > 0.2 * data.variance.sqrt()).all()  # guidance has much to do

    def cond_fn(diffusion):
        def gradient(x, t):
            tables = Tables(diffusion.betas, t, x)
            expected, left = data.posterior(x.double(), tables)
            slope = tables.signal * data.variance / data.marginal(tables.alpha_bar)[1]
            return ((observed - expected) * slope / (left + noise_variance)).float()

        return gradient

    def error(steps):
        mean, variance = moments(name, steps, data, cond_fn, target)
        return th.cat([(mean - target.mean) / target.variance.sqrt(), variance / target.variance - 1])

    assert_first_order(error, 150, bound=30)


# Sampling, by Monte Carlo

N = 40_000
STEPS = 200
# The relative bias of the variance, for standard deviations of 0.4 and more: it falls with the steps, as seen above.
BIASES = {"ddpm, learned": 2 / STEPS, "ddpm, large": 6 / STEPS, "ddpm, small": 20 / STEPS, "ddim": 10 / STEPS}
MIXTURE_SAMPLERS = ["ddpm, large", "ddpm, small", "ddim"]  # a mixture's exact reverse variance is no number


def draw(name, data, shape, seed, **kwargs):
    """Sample with the exact model of `data`, from torch's own noise."""
    options, method, step_kwargs = SAMPLERS[name]
    diffusion = process(STEPS, **options)
    exact = exact_model(data, diffusion)
    th.manual_seed(seed)
    samples = getattr(diffusion, f"{method}_loop")(
        lambda x, t, y=None: exact(x, t), shape, clip_denoised=False, device="cpu", **step_kwargs, **kwargs
    )
    assert samples.shape == shape and samples.dtype == th.float32
    return samples


@pytest.mark.parametrize("name", BIASES)
def test_samples_of_a_gaussian(name):
    data = GaussianData([0.5, -0.3], [0.5, 0.8])
    samples = draw(name, data, (N, 2, 1, 1), seed=0)
    for channel in range(2):
        mean, variance = float(data.mean[0, channel]), float(data.variance[0, channel])
        # x_T starts from N(0, 1) rather than from what is left of the data, which DDIM carries through to the mean:
        # sqrt(alpha_bar_T) = 0.7% of it.
        assert_moments(samples[:, channel], mean, variance, bias=0.01 * abs(mean), relative_bias=BIASES[name])
    correlation = np.corrcoef(samples.flatten(1).T.numpy())[0, 1]
    assert abs(correlation) < SIGMAS / math.sqrt(N)  # channels stay independent


# Four and five standard deviations from the boundary at 0: one sample in 30,000 is on the wrong side of it.
MIXTURE = MixtureData([0.3, 0.7], [-2.0, 2.0], [0.5, 0.4])


@pytest.mark.parametrize("name", MIXTURE_SAMPLERS)
def test_samples_of_a_mixture(name):
    samples = draw(name, MIXTURE, (N, 1, 1, 1), seed=1).flatten()
    share = float((samples > 0).double().mean())
    assert abs(share - 0.7) < SIGMAS * math.sqrt(0.21 / N) + 2 / STEPS  # as many of each component as the data has
    for mean, std, chosen in zip(MIXTURE.means, MIXTURE.stds, (samples < 0, samples > 0)):
        assert_moments(samples[chosen], float(mean), float(std) ** 2, bias=5 / STEPS, relative_bias=BIASES[name])


@pytest.mark.parametrize("name", MIXTURE_SAMPLERS)
def test_guidance_by_the_exact_classifier(name):
    # At scale 1 the samples are those of p(x | y): all of the chosen component, whatever the mixture's weights.
    betas = process(STEPS).betas
    cond_fn = classifier_cond_fn(lambda x, t: MIXTURE.log_joint(x, Tables(betas, t, x)), scale=1.0)
    y = th.arange(N) % 2
    samples = draw(name, MIXTURE, (N, 1, 1, 1), seed=2, cond_fn=cond_fn, model_kwargs=dict(y=y)).flatten()
    wrong = (samples > 0) != (y == 1)
    assert wrong.double().mean() < 1e-3
    for label, (mean, std) in enumerate(zip(MIXTURE.means, MIXTURE.stds)):
        chosen = samples[(y == label) & ~wrong]
        assert_moments(chosen, float(mean), float(std) ** 2, bias=5 / STEPS, relative_bias=BIASES[name])


# Single steps


T_ALL = th.arange(250)


def test_q_sample_and_its_moments():
    diffusion, x = process(), randn(0, 250, 3, 2, 2)
    tables, noise = Tables(diffusion.betas, T_ALL, x), randn(1, 250, 3, 2, 2)
    want = tables.signal * x.double() + tables.noise * noise.double()
    assert relative_error(diffusion.q_sample(x, T_ALL, noise=noise), want) < 1e-6
    mean, variance, log_variance = diffusion.q_mean_variance(x, T_ALL)
    assert relative_error(mean, tables.signal * x) < 1e-6
    assert relative_error(variance, (tables.noise**2).expand(x.shape)) < 1e-6
    assert relative_error(log_variance, (tables.noise**2).log().expand(x.shape)) < 1e-6
    assert mean.shape == variance.shape == log_variance.shape == x.shape
    th.manual_seed(0)
    n = 10_000
    drawn = diffusion.q_sample(th.full((n, 1), 0.5), th.full((n,), 100))
    assert_moments(drawn, float(0.5 * tables.signal[100, 0, 0, 0]), float(tables.noise[100, 0, 0, 0] ** 2))
    with pytest.raises(ValueError, match="noise"):
        diffusion.q_sample(x, T_ALL, noise=noise[:, :1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_posterior_is_bayes_rule(schedule):
    # q(x_{t-1} | x_t, x_start) is the product of N(x_t; sqrt(alpha) x_{t-1}, beta) and q(x_{t-1} | x_start).
    diffusion = process(schedule=schedule)
    t = T_ALL[1:]
    x_start, x_t = randn(0, 249, 3, 2, 2), randn(1, 249, 3, 2, 2)
    tables = Tables(diffusion.betas, t, x_start)
    precision = tables.alpha / tables.beta + 1 / (1 - tables.alpha_bar_prev)
    before = 1 - tables.alpha_bar_prev
    want = tables.alpha.sqrt() / tables.beta * x_t + tables.alpha_bar_prev.sqrt() / before * x_start
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    assert relative_error(mean, want / precision) < 1e-6
    assert relative_error(variance, (1 / precision).expand(x_t.shape)) < 1e-6
    assert relative_error(log_variance, -precision.log().expand(x_t.shape)) < 1e-6
    # At t = 0 it is x_start itself; the log takes the next step's variance, so as to be finite.
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start[:1], x_t[:1], th.tensor([0]))
    th.testing.assert_close(mean, x_start[:1])
    assert not variance.any()
    assert relative_error(log_variance, -precision[:1].log().expand(1, 3, 2, 2)) < 1e-6


def test_parametrisations_agree():
    # One exact denoiser, told in three ways.
    x, data = randn(0, 250, 3, 2, 2), GaussianData([0.5, -0.3, 0.0], [0.5, 0.2, 1.2])
    outs = {}
    for mean in ModelMeanType:
        diffusion = process(mean=mean)
        outs[mean] = diffusion.p_mean_variance(exact_model(data, diffusion), x, T_ALL, clip_denoised=False)
        assert set(outs[mean]) == {"mean", "variance", "log_variance", "pred_xstart"}
        assert all(value.shape == x.shape for value in outs[mean].values())
    tables = Tables(diffusion.betas, T_ALL, x)
    want = data.denoised(x.double(), tables)
    # float32 keeps a model's output to 1e-7 or so, which reading x_start from it multiplies by these factors.
    factors = {
        START_X: 1.0,
        EPSILON: 1 / tables.signal,
        PREVIOUS_X: (1 - tables.alpha_bar) / (tables.beta * tables.alpha_bar_prev.sqrt()),
    }
    for mean, out in outs.items():
        assert ((out["pred_xstart"] - want).abs() < 2e-6 * factors[mean] + 2e-6).all()
        th.testing.assert_close(out["mean"], outs[START_X]["mean"], rtol=1e-5, atol=2e-6)
        assert th.equal(out["variance"], outs[START_X]["variance"])
        assert th.equal(out["log_variance"], outs[START_X]["log_variance"])


def test_fixed_and_learned_variances():
    x, t = randn(0, 249, 2, 1, 1), T_ALL[1:]
    tables = Tables(process().betas, t, x)
    upper = tables.beta.expand(x.shape)
    lower = (tables.beta * (1 - tables.alpha_bar_prev) / (1 - tables.alpha_bar)).expand(x.shape)

    def variance(var, values=None):
        diffusion = process(var=var)
        out = diffusion.p_mean_variance(lambda x, t: x if values is None else th.cat([x, values], dim=1), x, t)
        assert relative_error(out["log_variance"].exp(), out["variance"]) < 1e-5
        return out["variance"]

    ones = th.ones_like(x)
    assert relative_error(variance(FIXED_LARGE), upper) < 1e-5
    assert relative_error(variance(FIXED_SMALL), lower) < 1e-5
    assert relative_error(variance(LEARNED, -3 * ones), math.exp(-3) * ones) < 1e-5
    # The range is walked in the logarithm.
    for value, want in [(1, upper), (-1, lower), (0, (upper * lower).sqrt()), (0.5, upper**0.75 * lower**0.25)]:
        assert relative_error(variance(LEARNED_RANGE, value * ones), want) < 1e-5


def test_ddim_with_full_noise_is_ddpm():
    # eta = 1 has the posterior's mean and variance (DDIM, section 4.1).
    diffusion, x, noise = process(var=FIXED_SMALL), randn(0, 250, 3, 2, 2), randn(1, 250, 3, 2, 2)
    model = exact_model(DATA, diffusion)
    posterior_variance = per_sample(th.tensor(diffusion.posterior_variance), x)

    def ddim(z):
        return diffusion.ddim_sample(model, x, T_ALL, clip_denoised=False, eta=1.0, randn_like=lambda x: z)["sample"]

    variance = ((ddim(th.ones_like(x)) - ddim(th.zeros_like(x))).double()) ** 2
    assert ((variance - posterior_variance).abs() < 1e-4 * posterior_variance + 1e-9).all()
    ddpm = diffusion.p_sample(model, x, T_ALL, clip_denoised=False, randn_like=lambda x: noise)["sample"]
    assert relative_error(ddim(noise), ddpm) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_ddim_step(eta):
    # DDIM, equations 12 and 16
    diffusion, x, noise = process(), randn(0, 250, 3, 2, 2), randn(1, 250, 3, 2, 2)
    tables = Tables(diffusion.betas, T_ALL, x)
    eps = 0.4 * randn(2, 250, 3, 2, 2)
    x_start = (x.double() - tables.noise * eps) / tables.signal
    sigma = (
        eta
        * ((1 - tables.alpha_bar_prev) / (1 - tables.alpha_bar) * (1 - tables.alpha_bar / tables.alpha_bar_prev)).sqrt()
    )
    want = tables.alpha_bar_prev.sqrt() * x_start + (1 - tables.alpha_bar_prev - sigma**2).sqrt() * eps + sigma * noise
    out = diffusion.ddim_sample(lambda x, t: eps, x, T_ALL, clip_denoised=False, eta=eta, randn_like=lambda x: noise)
    assert relative_error(out["sample"], want) < 1e-5
    assert relative_error(out["pred_xstart"], x_start) < 1e-5


def test_last_step_adds_no_noise():
    diffusion = process(mean=START_X)
    for step in (diffusion.p_sample, diffusion.ddim_sample):
        options = {} if step == diffusion.p_sample else dict(eta=1.0)
        out = step(lambda x, t: 0.3 * x, randn(0, 2, 1, 1, 1), th.tensor([0, 0]), **options)
        th.testing.assert_close(out["sample"], out["pred_xstart"])
        both = [step(lambda x, t: 0.3 * x, randn(0, 2, 1, 1, 1), th.tensor([1, 1]), **options)["sample"] for _ in "ab"]
        assert not th.equal(*both)


# There and back again


def encode(diffusion, model, x):
    for i in range(diffusion.num_timesteps - 1):
        t = th.full((len(x),), i)
        x = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    return x


def test_reverse_ddim_inverts_ddim():
    # Exactly, the path keeps a sample's place in standard deviations of the marginal, at all noise levels.
    data = GaussianData([0.5, -0.3], [0.5, 0.8])
    x_start = data.sample(32)
    place = (x_start - data.mean) / data.variance.sqrt()

    def error(steps):
        diffusion = process(steps)
        model = exact_model(data, diffusion)
        noise = encode(diffusion, model, x_start)
        mean, variance = data.marginal(th.tensor(diffusion.alphas_cumprod[-1]))
        noise_error = (noise - mean) / variance.sqrt() - place
        back = diffusion.ddim_sample_loop(model, x_start.shape, noise=noise, clip_denoised=False)
        return th.stack([noise_error.abs().max(), (back - x_start).abs().max()])

    assert_first_order(error, 200, bound=12)


def test_reverse_ddim_is_deterministic():
    diffusion, x, t = process(), randn(0, 2, 1, 1, 1), th.tensor([3, 200])
    with pytest.raises(ValueError, match="eta"):
        diffusion.ddim_reverse_sample(lambda x, t: x, x, t, eta=0.5)
    once, again = (diffusion.ddim_reverse_sample(lambda x, t: x, x, t)["sample"] for _ in "ab")
    assert th.equal(once, again)


# Loops

LOOPS = ["p_sample_loop", "ddim_sample_loop"]


@pytest.mark.parametrize("loop", LOOPS)
def test_progressive_loop(loop):
    diffusion = process(30)
    model = exact_model(GaussianData([0.1], [0.3]), diffusion)
    th.manual_seed(3)
    items = list(getattr(diffusion, f"{loop}_progressive")(model, (2, 1, 4, 4), device="cpu"))
    assert len(items) == 30
    assert all(set(item) >= {"sample", "pred_xstart"} for item in items)
    assert all(item["sample"].shape == item["pred_xstart"].shape == (2, 1, 4, 4) for item in items)
    th.manual_seed(3)
    samples = getattr(diffusion, loop)(model, (2, 1, 4, 4), device="cpu")
    assert th.equal(items[-1]["sample"], samples)
    assert not th.equal(items[-2]["sample"], samples)
    assert not samples.requires_grad


@pytest.mark.parametrize("loop", LOOPS)
def test_loop_visits_every_timestep_from_the_last(loop):
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    getattr(process(30), loop)(model, (2, 1), device="cpu")
    assert th.equal(th.stack(seen), th.arange(29, -1, -1)[:, None].expand(30, 2))


@pytest.mark.parametrize("loop", LOOPS)
def test_noise_is_whats_given(loop):
    # x_T and every step's noise can be given: then nothing else is random.
    diffusion = process(30)
    model = exact_model(GaussianData([0.1], [0.3]), diffusion)
    noise, asked = randn(0, 2, 1, 4, 4), []

    def randn_like(x):
        asked.append(x)
        return randn(len(asked), *x.shape)

    def sample(noise):
        asked.clear()
        return getattr(diffusion, loop)(model, (2, 1, 4, 4), noise=noise, randn_like=randn_like)

    state = th.random.get_rng_state()
    before = noise.clone()
    samples = sample(noise)
    assert len(asked) == 30
    assert th.equal(noise, before)
    assert th.equal(sample(noise), samples)
    assert th.equal(th.random.get_rng_state(), state)
    assert not th.equal(sample(-noise), samples)
    if loop == "p_sample_loop":
        # A chain that is all noise: x_{t-1} = mean + sigma z, with the mean's part of z known
        ones = diffusion.p_sample_loop(model, (2, 1, 4, 4), noise=noise, randn_like=th.ones_like)
        assert (ones > diffusion.p_sample_loop(model, (2, 1, 4, 4), noise=noise, randn_like=th.zeros_like)).all()


def test_device_is_the_models():
    class Model(th.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    assert process(25).p_sample_loop(Model(4, 4), (2, 4)).shape == (2, 4)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mean", [EPSILON, START_X])
def test_predictions_are_processed_then_clipped(loop, mean):
    diffusion, noise = process(30, mean=mean), 2 * randn(0, 2, 1, 4, 4)

    def run(**kwargs):
        progressive = getattr(diffusion, f"{loop}_progressive")
        items = list(progressive(lambda x, t: 1.5 - x, noise.shape, noise=noise, **kwargs))
        return [item["pred_xstart"] for item in items], items[-1]["sample"]

    free, _ = run(clip_denoised=False)
    clipped, _ = run()  # clipping is the default
    assert free[0].abs().max() > 1
    assert th.equal(clipped[0], free[0].clamp(-1, 1))
    assert all(x.abs().max() <= 1 for x in clipped)

    # With a prediction that is always 0.3, the last step gives it.
    predictions, sample = run(denoised_fn=lambda x: th.full_like(x, 0.3))
    assert all(th.equal(x, th.full_like(x, 0.3)) for x in predictions)
    th.testing.assert_close(sample, th.full_like(sample, 0.3))
    # Clipping comes after denoised_fn.
    predictions, sample = run(denoised_fn=lambda x: th.full_like(x, 5.0))
    assert all(th.equal(x, th.ones_like(x)) for x in predictions)
    predictions, _ = run(denoised_fn=lambda x: th.full_like(x, 5.0), clip_denoised=False)
    assert all(th.equal(x, th.full_like(x, 5.0)) for x in predictions)


@pytest.mark.parametrize("loop", LOOPS)
def test_cond_fn_without_model_kwargs(loop):
    diffusion, asked = process(30), []

    def cond_fn(x, t):
        asked.append(t)
        return th.zeros_like(x)

    noise = randn(0, 2, 1, 4, 4)
    options = dict(noise=noise, randn_like=th.zeros_like, model_kwargs=None)
    guided = getattr(diffusion, loop)(lambda x, t: x, noise.shape, cond_fn=cond_fn, **options)
    assert len(asked) == 30
    plain = getattr(diffusion, loop)(lambda x, t: x, noise.shape, **options)
    th.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-4)  # a gradient of zero changes nothing but rounding


@pytest.mark.parametrize("loop", LOOPS)
def test_model_kwargs_reach_model_and_cond_fn(loop):
    y, seen = th.tensor([4, 5]), []

    def network(x, t, y):
        seen.append(y)
        return x

    getattr(process(25), loop)(
        network, (2, 1), device="cpu", cond_fn=lambda x, t, y: network(x, t, y), model_kwargs=dict(y=y)
    )
    assert len(seen) == 50 and all(value is y for value in seen)


def test_guidance_formulas():
    diffusion, t = process(mean=START_X), th.arange(1, 250)
    x, x_start, gradient = (randn(seed, 249, 2, 1, 1) for seed in (0, 1, 2))
    tables = Tables(diffusion.betas, t, x)
    out = diffusion.p_mean_variance(lambda x, t: x_start, x, t, clip_denoised=False)
    # ADM, algorithm 1: the mean moves by variance * gradient
    mean = diffusion.condition_mean(lambda x, t: gradient, out, x, t)
    assert relative_error(mean, out["mean"].double() + tables.beta * gradient) < 1e-6
    # ADM, algorithm 2: eps becomes eps - sqrt(1 - alpha_bar) * gradient
    eps = (x - tables.signal * x_start) / tables.noise - tables.noise * gradient
    new = diffusion.condition_score(lambda x, t: gradient, out, x, t)
    want = (x - tables.noise * eps) / tables.signal
    assert relative_error(new["pred_xstart"], want) < 1e-5
    posterior_mean, _, _ = diffusion.q_posterior_mean_variance(want.float(), x, t)
    assert relative_error(new["mean"], posterior_mean) < 1e-5
    assert th.equal(out["pred_xstart"], x_start)  # the caller's dict stays as it was


def test_model_of_the_wrong_width_is_named():
    x, t = randn(0, 2, 3, 4, 4), th.tensor([0, 1])
    with pytest.raises(ValueError, match=r"6 channels"):
        process(var=LEARNED_RANGE).p_mean_variance(lambda x, t: x, x, t)
    with pytest.raises(ValueError, match=r"3 channels"):
        process().p_mean_variance(lambda x, t: th.cat([x, x], dim=1), x, t)
    with pytest.raises(ValueError, match="learn_sigma"):
        process().training_losses(lambda x, t: th.cat([x, x], dim=1), x, t)


# The likelihood bound


def bits(x):
    return x / math.log(2)


def gaussian_bpd(data):
    """The entropy of data in bits a dimension, when rounded to bins of 2/255: differential entropy less log(bin)."""
    entropy = 0.5 * th.log(2 * math.pi * math.e * data.variance)
    return float(bits((entropy - math.log(2 / 255)).mean()))


BOUND_DATA = GaussianData([0.0, 0.1], [0.2, 0.15])  # over five standard deviations from the outermost grey levels


def bound_of(var, n):
    """calc_bpd_loop with the exact model, over 250 steps: the process and its result."""
    diffusion = process(250, var=var)
    generator = th.Generator().manual_seed(0)
    return diffusion, diffusion.calc_bpd_loop(
        exact_model(BOUND_DATA, diffusion), BOUND_DATA.sample(n), clip_denoised=False,
        randn_like=lambda x: th.randn(x.shape, generator=generator),
    )  # fmt: skip


def assert_mean(values, want, allowance):
    """Check that values average to `want` within five standard errors and an allowance."""
    values = values.double()
    assert abs(float(values.mean()) - want) < SIGMAS * float(values.std()) / math.sqrt(len(values)) + allowance


def test_bound_is_the_entropy():
    # With the exact reverse process the bound's terms telescope to the data's entropy and KL(q(x_T) || N(0, 1)), which
    # is under alpha_bar_T / 2 = 2e-5 nats. The bin is 0.4 standard deviations of the last step's decoder (whose
    # variance is beta_0 = 4e-4): integrating over it rather than multiplying by its width changes the mean of the log
    # by terms of fourth order, 0.4^4 / 24^2 or so, and the tanh approximation is a distribution off by up to 2e-4.
    # Half a hundredth of a bit is room for all that.
    n = 40_000
    _, out = bound_of(LEARNED, n)
    assert out["total_bpd"].shape == (n,)
    assert out["total_bpd"].std() / math.sqrt(n) < 0.007
    assert_mean(out["total_bpd"], gaussian_bpd(BOUND_DATA), 0.005)


@pytest.mark.parametrize("var", [FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE])
def test_other_variances_cost_their_divergence(var):
    # The means are exact, so each step costs KL(N(0, exact variance) || N(0, the step's)) more. That holds at t = 0 to
    # the error of taking the decoder's density for its bins, as above, with a decoder down to half as wide.
    n = 4000
    diffusion, out = bound_of(var, n)
    x = BOUND_DATA.mean.expand(250, -1, -1, -1)
    exact = BOUND_DATA.reverse_variance(Tables(diffusion.betas, T_ALL, x))
    taken = diffusion.p_mean_variance(exact_model(BOUND_DATA, diffusion), x.float(), T_ALL)["variance"].double()
    if var == FIXED_SMALL:
        taken[0] = diffusion.posterior_variance[1]  # the likelihood takes this in the place of zero
    ratio = exact / taken
    excess = float(bits(0.5 * (ratio - 1 - ratio.log())).mean(dim=(1, 2, 3)).sum())
    assert excess > 0.1
    assert_mean(out["total_bpd"], gaussian_bpd(BOUND_DATA) + excess, 0.03)


def test_terms_of_the_bound():
    n = 4000
    diffusion, out = bound_of(LEARNED, n)
    assert set(out) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    assert out["vb"].shape == out["xstart_mse"].shape == out["mse"].shape == (n, 250)
    assert relative_error(out["total_bpd"], out["vb"].double().sum(1) + out["prior_bpd"]) < 1e-5
    # From the last timestep to the first: the errors of the exact denoiser are the variance of x_start given x_t.
    tables = Tables(diffusion.betas, T_ALL.flip(0), BOUND_DATA.mean.expand(250, -1, -1, -1))
    _, left = BOUND_DATA.posterior(BOUND_DATA.mean, tables)
    left = left.mean(dim=(1, 2, 3))
    signal_to_noise = ((tables.signal / tables.noise) ** 2).flatten()
    # The mean of squares of 2 * 4000 Gaussians, at most one channel's worth of which counts; six sigma for 250 tests
    allowed = 6 * math.sqrt(2 / n)
    assert ((out["xstart_mse"].double().mean(0) / left - 1).abs() < allowed).all()
    assert ((out["mse"].double().mean(0) / (left * signal_to_noise) - 1).abs() < allowed).all()


def test_prior_term_of_the_bound():
    # KL(q(x_T | x_start) || N(0, 1)), of a process that ends with half of the signal left
    betas = gd.get_named_beta_schedule("linear", 250)[:90]
    diffusion = GaussianDiffusion(
        betas=betas, model_mean_type=EPSILON, model_var_type=FIXED_LARGE, loss_type=LossType.KL
    )
    x = randn(0, 5, 3, 2, 2)
    alpha_bar = th.tensor(diffusion.alphas_cumprod[-1])
    q = th.distributions.Normal(alpha_bar.sqrt() * x.double(), (1 - alpha_bar).sqrt())
    standard = th.distributions.Normal(th.zeros((), dtype=th.float64), 1.0)
    want = bits(th.distributions.kl_divergence(q, standard)).flatten(1).mean(1)
    assert want.min() > 0.01
    assert relative_error(diffusion.calc_bpd_loop(lambda x, t: x, x)["prior_bpd"], want) < 1e-5


# Training losses


def test_every_combination_trains():
    x, t, noise = randn(0, 6, 3, 4, 4).clamp(-1, 1), th.tensor([0, 1, 5, 100, 248, 249]), randn(1, 6, 3, 4, 4)
    for mean, var, loss in itertools.product(ModelMeanType, ModelVarType, LossType):
        channels = 6 if var in (LEARNED, LEARNED_RANGE) else 3
        output = (0.1 * randn(2, 6, channels, 4, 4)).requires_grad_(True)
        terms = process(mean=mean, var=var, loss=loss).training_losses(lambda x, t: output, x, t, noise=noise)
        expected = {"loss"} if loss.is_vb() else {"loss", "mse"} | ({"vb"} if channels == 6 else set())
        assert set(terms) == expected, (mean, var, loss)
        assert all(value.shape == (6,) and value.isfinite().all() for value in terms.values()), (mean, var, loss)
        terms["loss"].sum().backward()
        assert output.grad.isfinite().all(), (mean, var, loss)
        assert output.grad[:, :3].flatten(1).any(dim=1).all(), (mean, var, loss)


@pytest.mark.parametrize("mean", ModelMeanType)
def test_perfect_predictions_cost_nothing(mean):
    diffusion = process(mean=mean)
    x_start, noise = randn(0, 250, 3, 2, 2), randn(1, 250, 3, 2, 2)
    x_t = diffusion.q_sample(x_start, T_ALL, noise=noise)
    answer = {
        EPSILON: noise, START_X: x_start, PREVIOUS_X: diffusion.q_posterior_mean_variance(x_start, x_t, T_ALL)[0]
    }[mean]  # fmt: skip
    terms = diffusion.training_losses(lambda x, t: answer, x_start, T_ALL, noise=noise)
    assert terms["loss"].max() < 1e-10
    terms = diffusion.training_losses(lambda x, t: answer + 0.5, x_start, T_ALL, noise=noise)
    th.testing.assert_close(terms["mse"], th.full((250,), 0.25))


def test_model_sees_the_noised_data():
    diffusion, seen = process(), []
    x_start, noise, t = randn(0, 2, 1, 2, 2), randn(1, 2, 1, 2, 2), th.tensor([3, 240])

    def model(x, t, y):
        seen.append((x, t, y))
        return x

    y = th.tensor([1, 2])
    diffusion.training_losses(model, x_start, t, model_kwargs=dict(y=y), noise=noise)
    ((x, shown, label),) = seen
    assert th.equal(x, diffusion.q_sample(x_start, t, noise=noise)) and th.equal(shown, t) and label is y
    th.manual_seed(0)
    first = diffusion.training_losses(lambda x, t: x, x_start, t)["loss"]
    th.manual_seed(0)
    assert th.equal(diffusion.training_losses(lambda x, t: x, x_start, t)["loss"], first)
    assert not th.equal(diffusion.training_losses(lambda x, t: x, x_start, t)["loss"], first)  # noise is drawn


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE])
@pytest.mark.parametrize("var", [LEARNED, LEARNED_RANGE])
def test_the_bound_leaves_the_mean_alone(loss, var):
    # The hybrid loss: the mean learns from the squared error only, the variance from the bound only.
    x_start, noise, t = randn(0, 4, 3, 4, 4).clamp(-1, 1), randn(1, 4, 3, 4, 4), th.tensor([0, 1, 100, 249])
    mean = randn(2, 4, 3, 4, 4).requires_grad_(True)
    values = randn(3, 4, 3, 4, 4).requires_grad_(True)
    terms = process(var=var, loss=loss).training_losses(
        lambda x, t: th.cat([mean, values], dim=1), x_start, t, noise=noise
    )

    def gradients(term):
        return th.autograd.grad(terms[term].sum(), (mean, values), retain_graph=True, materialize_grads=True)

    of_mean, of_values = gradients("loss")
    # d/dm of the mean over 48 elements of (noise - m)^2
    th.testing.assert_close(of_mean, 2 * (mean.detach() - noise) / 48)
    assert th.equal(of_mean, gradients("mse")[0])
    assert not gradients("mse")[1].any()
    assert not gradients("vb")[0].any()
    assert th.equal(of_values, gradients("vb")[1])
    assert of_values.flatten(1).any(dim=1).all()


def test_bound_gradient_of_the_variance():
    # KL's derivative with respect to the model's log-variance v is (1 - (true variance + distance^2) / exp(v)) / 2.
    diffusion, t = process(var=LEARNED), th.tensor([1, 100, 249])
    x_start, noise = randn(0, 3, 3, 4, 4), randn(1, 3, 3, 4, 4)
    prediction, log_variance = randn(2, 3, 3, 4, 4), (randn(3, 3, 3, 4, 4) - 4).requires_grad_(True)
    terms = diffusion.training_losses(lambda x, t: th.cat([prediction, log_variance], dim=1), x_start, t, noise=noise)
    (got,) = th.autograd.grad(terms["vb"].sum(), log_variance)
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    mean, variance, _ = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    tables = Tables(diffusion.betas, t, x_t)
    model_mean, _, _ = diffusion.q_posterior_mean_variance(
        ((x_t - tables.noise * prediction) / tables.signal).float(), x_t, t
    )
    want = 0.5 * (1 - (variance + (mean - model_mean) ** 2) / log_variance.detach().exp()) / 48
    assert relative_error(got, bits(want)) < 1e-4


@pytest.mark.parametrize("steps", [50, 250, 1000])
def test_rescaled_losses(steps):
    x_start, noise = randn(0, 4, 3, 4, 4).clamp(-1, 1), randn(1, 4, 3, 4, 4)
    t = th.tensor([0, 1, steps // 2, steps - 1])
    output = 0.3 * randn(2, 4, 6, 4, 4)

    def losses(loss):
        diffusion = process(steps, var=LEARNED_RANGE, loss=loss)
        return diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)

    mse, rescaled = losses(LossType.MSE), losses(LossType.RESCALED_MSE)
    kl, rescaled_kl = losses(LossType.KL), losses(LossType.RESCALED_KL)
    # One term stands for the sum over all steps, and in the hybrid loss a thousandth of it is taken.
    th.testing.assert_close(rescaled_kl["loss"], kl["loss"] * steps)
    th.testing.assert_close(rescaled["vb"], mse["vb"] * steps / 1000)
    th.testing.assert_close(mse["vb"], kl["loss"])
    assert th.equal(rescaled["mse"], mse["mse"])
    for terms in (mse, rescaled):
        th.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_training_loss_is_the_bounds_term():
    diffusion, x_start = process(40, var=LEARNED, loss=LossType.KL), BOUND_DATA.sample(5)
    model = exact_model(BOUND_DATA, diffusion)
    noise = randn(1, *x_start.shape)
    bound = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False, randn_like=lambda x: noise)
    for i in (0, 1, 20, 39):
        terms = diffusion.training_losses(model, x_start, th.full((5,), i), noise=noise)
        th.testing.assert_close(bound["vb"][:, 39 - i], terms["loss"])


# Schedules and respacing


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_linear_schedule(steps):
    betas = gd.get_named_beta_schedule("linear", steps)
    assert betas.dtype == np.float64 and betas.shape == (steps,)
    np.testing.assert_allclose(betas[[0, -1]] * steps, [0.1, 20.0])
    np.testing.assert_allclose(np.diff(betas), betas[1] - betas[0])


def test_cosine_schedule():
    betas = gd.get_named_beta_schedule("cosine", 1000)
    time = np.arange(1001) / 1000
    wave = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    # but for the last, whose beta would be 1
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (wave / wave[0])[1:-1], rtol=1e-9)
    assert betas[-1] == 0.999
    assert gd.betas_for_alpha_bar(10, lambda t: 1 - t, max_beta=0.6).max() == 0.6


@pytest.mark.parametrize("schedule, steps", [("linear", 1000), ("cosine", 4000)])
def test_small_variances_of_q_are_exact(schedule, steps):
    # 1 - alphas_cumprod near 1: subtracting in float32 loses three digits of the first timesteps' variance.
    diffusion = process(steps, schedule=schedule)
    x, t = th.zeros(3, 1, 1, 1), th.tensor([0, 1, 2])
    _, variance, log_variance = diffusion.q_mean_variance(x, t)
    want = 1 - np.cumprod(1 - gd.get_named_beta_schedule(schedule, steps))[:3]
    np.testing.assert_allclose(variance.flatten().double().numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(log_variance.exp().flatten().double().numpy(), want, rtol=1e-5)


def test_bad_betas_are_refused():
    for betas in ([], [0.1, 1.1], [0.0, 0.1], [[0.1]], [0.1, float("nan")]):
        with pytest.raises(InputError):
            GaussianDiffusion(betas=betas, model_mean_type=EPSILON, model_var_type=FIXED_LARGE, loss_type=LossType.MSE)


@pytest.mark.parametrize("schedule, steps", [("linear", 20), ("linear", 21), ("cosine", 1), ("cosine", 2)])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_shortest_schedules_sample_or_are_refused(schedule, steps, loop):
    # A last beta of exactly 1 leaves no signal in x_T: no x_start can be read from it, and samples would be NaN.
    try:
        diffusion = create_gaussian_diffusion(steps=steps, noise_schedule=schedule)
    except InputError as e:
        assert str(steps) in str(e) and steps < 21
    else:
        samples = getattr(diffusion, loop)(lambda x, t: 0.9 * x, (4, 1, 2, 2), device="cpu")
        assert samples.isfinite().all()


@pytest.mark.parametrize(
    "counts",
    [[250], [1000], [1], [2], [10, 10, 15, 20], [90, 60, 60, 20, 20], [3, 1, 333], [5, 0, 2]],
    ids=str,
)
def test_spacing_takes_its_share_of_each_section(counts):
    steps = sorted(space_timesteps(1000, counts))
    assert space_timesteps(1000, ",".join(map(str, counts))) == set(steps)
    assert len(steps) == sum(counts)
    sections = np.array_split(np.arange(1000), len(counts))  # the first ones take what does not divide
    for section, count in zip(sections, counts):
        taken = [step for step in steps if section[0] <= step <= section[-1]]
        assert len(taken) == count
        assert count == 0 or taken[0] == section[0]
        if count > 1:
            assert taken[-1] == section[-1]
            strides = np.diff(taken)
            assert strides.max() - strides.min() <= 2  # even, up to rounding both ends


@pytest.mark.parametrize(
    "total, count, stride", [(1000, 25, 40), (1000, 250, 4), (1000, 1000, 1), (1000, 1, 1000), (100, 34, 3)]
)
def test_ddim_spacing_has_one_stride(total, count, stride):
    assert space_timesteps(total, f"ddim{count}") == set(range(0, total, stride))


def test_impossible_spacings():
    # Strides 3 and 4 give 334 and 250 of 1000 steps, and none gives a number between.
    for spacing, words in [
        ("ddim300", ["ddim300", "1000", "ddim334"]),
        ("ddim260", ["ddim260", "1000", "ddim250"]),
        ("ddim2000", ["ddim2000", "1000", "ddim1000"]),
        ("ddim0", ["ddim0"]),
        ("ddimfast", ["ddimfast"]),
        ("2000", ["2000", "1000"]),
        ("10,300,10,10", ["300", "section 2", "250"]),
        ("-5", ["-5"]),
        ("fast", ["fast"]),
        ("", ["''"]),
    ]:
        with pytest.raises(InputError) as caught:
            space_timesteps(1000, spacing)
        assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(InputError):
        create_gaussian_diffusion(timestep_respacing="0,0")


def spaced(steps="7,5", total=100, **kwargs):
    betas = gd.get_named_beta_schedule("linear", total)
    options = dict(model_mean_type=EPSILON, model_var_type=FIXED_LARGE, loss_type=LossType.MSE)
    return SpacedDiffusion(use_timesteps=space_timesteps(total, steps), betas=betas, **{**options, **kwargs})


@pytest.mark.parametrize("steps", ["100", "7,5", "ddim10", "1"])
def test_spaced_process_keeps_the_noise_levels(steps):
    diffusion, whole = spaced(steps), process(100)
    kept = sorted(space_timesteps(100, steps))
    assert diffusion.num_timesteps == len(kept) and diffusion.original_num_steps == 100
    assert diffusion.timestep_map == kept and diffusion.use_timesteps == set(kept)
    np.testing.assert_allclose(diffusion.alphas_cumprod, whole.alphas_cumprod[kept], rtol=1e-12)
    if steps == "100":
        np.testing.assert_allclose(diffusion.betas, whole.betas, rtol=1e-9)


def test_spaced_process_refuses_foreign_timesteps():
    betas = gd.get_named_beta_schedule("linear", 100)
    for steps in ([], [100], [-1, 5]):
        with pytest.raises(InputError, match="99"):
            SpacedDiffusion(
                steps, betas=betas, model_mean_type=EPSILON, model_var_type=FIXED_LARGE, loss_type=LossType.MSE
            )


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("is_spaced", [False, True])
def test_what_model_and_cond_fn_see(rescale, is_spaced):
    if is_spaced:
        diffusion = spaced(rescale_timesteps=rescale)
        shown = th.tensor(sorted(space_timesteps(100, "7,5")))
    else:
        diffusion, shown = process(100, rescale_timesteps=rescale), th.arange(100)
    if rescale:
        shown = shown * (1000 / 100)  # as if the original process had 1000 steps, whatever is visited of it
    seen = []

    def model(x, t, y):
        seen.append(t)
        assert t.is_floating_point() == rescale
        return x

    x, t, kwargs = randn(0, 3, 1, 2, 2), th.tensor([0, 4, 11]), dict(y=th.arange(3))
    out = dict(mean=x, variance=x, pred_xstart=x)
    for call in [
        lambda: diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs),
        lambda: diffusion.p_sample(model, x, t, cond_fn=model, model_kwargs=kwargs),
        lambda: diffusion.ddim_sample(model, x, t, cond_fn=model, model_kwargs=kwargs),
        lambda: diffusion.ddim_reverse_sample(model, x, t, model_kwargs=kwargs),
        lambda: diffusion.condition_mean(model, out, x, t, model_kwargs=kwargs),
        lambda: diffusion.condition_score(model, out, x, t, model_kwargs=kwargs),
        lambda: diffusion.training_losses(model, x, t, model_kwargs=kwargs),
    ]:
        seen.clear()
        call()
        assert seen and all(th.equal(times, shown[t]) for times in seen)
    for loop, calls in [
        (lambda: diffusion.p_sample_loop(model, x.shape, x, cond_fn=model, model_kwargs=kwargs), 2),
        (lambda: diffusion.ddim_sample_loop(model, x.shape, x, cond_fn=model, model_kwargs=kwargs), 2),
        (lambda: diffusion.calc_bpd_loop(model, x, model_kwargs=kwargs), 1),
    ]:
        seen.clear()
        loop()
        assert th.equal(th.stack(seen), shown.flip(0).repeat_interleave(calls)[:, None].expand(-1, 3))


def test_spaced_ddim_follows_the_path():
    # Of 1000 steps 100 are visited, and the model speaks of the original's: the path is still the exact one.
    data = GaussianData([0.5, -0.3], [0.5, 0.8])
    diffusion = spaced("100", total=1000)
    model = exact_model(data, diffusion, betas=gd.get_named_beta_schedule("linear", 1000))
    place = randn(0, 64, 2, 1, 1)
    mean, variance = data.marginal(th.tensor(diffusion.alphas_cumprod[-1]))
    samples = diffusion.ddim_sample_loop(
        model, place.shape, noise=(mean + variance.sqrt() * place).float(), clip_denoised=False
    )
    error = (samples - data.mean) / data.variance.sqrt() - place
    assert error.abs().max() < 12 / 100


def test_factory():
    diffusion = create_gaussian_diffusion(steps=100, timestep_respacing="ddim10", learn_sigma=True, use_kl=True)
    assert diffusion.num_timesteps == 10
    assert (diffusion.model_var_type, diffusion.loss_type) == (LEARNED_RANGE, LossType.RESCALED_KL)
    diffusion = create_gaussian_diffusion(steps=100, sigma_small=True, predict_xstart=True, rescale_learned_sigmas=True)
    assert (diffusion.model_var_type, diffusion.model_mean_type) == (FIXED_SMALL, START_X)
    assert diffusion.loss_type == LossType.RESCALED_MSE and diffusion.num_timesteps == 100
    diffusion = create_gaussian_diffusion(steps=100, rescale_timesteps=True)
    assert (diffusion.model_var_type, diffusion.model_mean_type) == (FIXED_LARGE, EPSILON)
    assert diffusion.loss_type == LossType.MSE and diffusion.rescale_timesteps


# Guidance by a classifier


class SmoothClassifier(th.nn.Module):
    """A small classifier in float64."""

    def __init__(self):
        super().__init__()
        self.layers = th.nn.Sequential(th.nn.Linear(13, 16), th.nn.Tanh(), th.nn.Linear(16, 5)).double()
        fill_by_name(self)

    def forward(self, x, t):
        return self.layers(th.cat([x.flatten(1), t[:, None].double() / 1000], dim=1))


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_gradient_equals_finite_differences(scale):
    classifier = SmoothClassifier()
    x, t, y = randn(0, 3, 3, 2, 2).double(), th.tensor([0, 10, 999]), th.tensor([0, 4, 2])
    step = 1e-5
    want = th.zeros_like(x)
    for index in np.ndindex(*x.shape):
        shift = th.zeros_like(x)
        shift[index] = step
        up, down = (classifier(x + s, t).log_softmax(1)[index[0], y[index[0]]] for s in (shift, -shift))
        want[index] = scale * (up - down) / (2 * step)
    gradient = classifier_cond_fn(classifier, scale)(x, t, y=y)
    # Logits are taken to float32, which keeps the gradient to 1e-6 or so.
    assert relative_error(gradient, want) < 1e-5
    assert not gradient.requires_grad


def encoder():
    return fill_by_name(EncoderUNetModel(
        image_size=16, in_channels=3, model_channels=32, out_channels=4, num_res_blocks=1, attention_resolutions=(4,),
        channel_mult=(1, 1, 2), num_head_channels=32, dropout=0.5, resblock_updown=True, pool="attention",
    ))  # fmt: skip


def test_guidance_leaves_the_classifier_alone():
    classifier = encoder().train()
    before = {name: p.clone() for name, p in classifier.state_dict().items()}
    cond_fn = classifier_cond_fn(classifier)
    x, t, y = randn(0, 2, 3, 16, 16), th.tensor([3, 700]), th.tensor([0, 3])
    with th.no_grad():  # as in the loops
        first, second = cond_fn(x, t, y=y, other="the model's"), cond_fn(x, t, y)
    assert th.equal(first, second)  # dropout is off
    assert first.shape == x.shape and first.any()
    assert x.grad is None and not x.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    assert all(th.equal(p, before[name]) for name, p in classifier.state_dict().items())
    # Samples do not mix: a sample's gradient is that of its own label.
    assert th.equal(cond_fn(x, t, th.tensor([0, 1]))[0], first[0])
    assert not th.equal(cond_fn(x, t, th.tensor([0, 1]))[1], first[1])
    with pytest.raises(TypeError, match="labels"):
        cond_fn(x, t)


class FlopCounter(TorchDispatchMode):
    """Counts the floating point operations of a block. (torch's own counter fails on autograd.grad of an input.)"""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(function):
    with FlopCounter() as counter:
        function()
    return counter.total


def test_guidance_costs_no_weight_gradients():
    classifier, x, t, y = encoder(), randn(0, 2, 3, 16, 16), th.tensor([3, 700]), th.tensor([0, 3])
    forward = flops(lambda: classifier(x, t))
    trained = flops(lambda: F.cross_entropy(classifier(x.clone().requires_grad_(True), t), y).backward())
    assert trained > 2.8 * forward  # the gradients of input and weights cost as much as the forward pass each
    guided = flops(lambda: classifier_cond_fn(classifier)(x, t, y))
    assert 1.5 * forward < guided < 2.15 * forward


def test_labels_are_routed():
    x, t, y = randn(0, 2, 1, 2, 2), th.tensor([0, 1]), th.tensor([5, 6])

    def network(x, t, **kwargs):
        return kwargs

    assert route_labels(network, True)(x, t, y=y) == dict(y=y)
    assert route_labels(network, False)(x, t, y=y) == {}
    assert route_labels(network, False)(x, t, y=y, low_res=3) == dict(low_res=3)


# Divergences and likelihoods


def test_normal_kl():
    mean1, log_variance1, mean2, log_variance2 = (randn(seed, 5, 7) for seed in range(4))

    def normal(mean, log_variance):
        return th.distributions.Normal(mean.double(), (0.5 * log_variance.double()).exp())

    want = th.distributions.kl_divergence(normal(mean1, log_variance1), normal(mean2, log_variance2))
    assert relative_error(normal_kl(mean1, log_variance1, mean2, log_variance2), want) < 1e-6
    standard = th.distributions.Normal(th.zeros((), dtype=th.float64), 1.0)
    want = th.distributions.kl_divergence(normal(mean1, log_variance1), standard)
    assert relative_error(normal_kl(mean1, log_variance1, 0.0, 0.0), want) < 1e-6
    want = th.distributions.kl_divergence(standard, normal(mean1, log_variance1))
    assert relative_error(normal_kl(0.0, 0.0, mean1, log_variance1), want) < 1e-6
    assert normal_kl(mean1[:, :1], log_variance1, mean2[:1], log_variance2).shape == (5, 7)
    assert normal_kl(mean1, log_variance1, mean1, log_variance1).abs().max() < 1e-6
    with pytest.raises(TypeError):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_normal_distribution_function():
    x = th.linspace(-6, 6, 1001)
    want = th.distributions.Normal(0.0, 1.0).cdf(x)
    assert (approx_standard_normal_cdf(x) - want).abs().max() < 2e-4  # Page's approximation


GREYS = th.arange(256) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -2.0, 0.0, 1.0])
def test_grey_levels_share_all_probability(mean, log_scale):
    logs = discretized_gaussian_log_likelihood(
        GREYS, means=th.full((256,), mean), log_scales=th.full((256,), log_scale)
    )
    assert logs.shape == (256,)
    # Neighbours share an edge that float32 puts in two places 1e-7 apart; over the smallest scale that is 1e-4.
    assert abs(float(logs.double().exp().sum()) - 1) < 2e-4
    # Each is the Gaussian's mass between half-way points, the outermost ones' to infinity.
    edges = th.cat([th.tensor([-math.inf]), (GREYS[1:] + GREYS[:-1]) / 2, th.tensor([math.inf])]).double()
    below = th.distributions.Normal(mean, math.exp(log_scale)).cdf(edges)
    assert (logs.double().exp() - below.diff()).abs().max() < 4e-4


# Timestep samplers


@pytest.fixture(params=[8])
def eight_steps(request):
    return create_gaussian_diffusion(steps=request.param, noise_schedule="cosine")


def test_uniform_sampler(eight_steps):
    sampler = create_named_schedule_sampler("uniform", eight_steps)
    weights = sampler.weights()
    assert weights.shape == (8,) and np.ptp(weights) == 0
    np.random.seed(0)
    n = 20_000
    t, factors = sampler.sample(n, "cpu")
    assert t.dtype == th.int64 and factors.dtype == th.float32 and t.shape == factors.shape == (n,)
    assert th.equal(factors, th.ones(n))
    counts = th.bincount(t, minlength=8)
    assert len(counts) == 8
    assert ((counts - n / 8).abs() < SIGMAS * math.sqrt(n / 8 * 7 / 8)).all()


def warmed_up(diffusion, losses):
    """A loss-aware sampler that has seen the losses [T, 10], oldest first."""
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    for column in losses.T:
        sampler.update_with_all_losses(list(range(len(losses))), column.tolist())
    return sampler


def test_loss_aware_weights(eight_steps):
    rng = np.random.default_rng(0)
    losses = rng.random((8, 10)) * np.arange(1, 9)[:, None]
    sampler = create_named_schedule_sampler("loss-second-moment", eight_steps)
    for count, column in enumerate(losses.T):
        assert np.ptp(sampler.weights()) == 0, count  # until all timesteps have ten losses, all weigh alike
        sampler.update_with_all_losses(list(range(8)), column.tolist())

    def expected(losses):
        roots = np.sqrt((losses**2).mean(1))
        return 0.999 * roots / roots.sum() + 0.001 / 8

    np.testing.assert_allclose(sampler.weights(), expected(losses))
    # Then the latest ten of each count.
    for loss in (5.0, 6.0):
        sampler.update_with_all_losses([2], [loss])
    losses[2] = [*losses[2, 2:], 5.0, 6.0]
    np.testing.assert_allclose(sampler.weights(), expected(losses))
    # A timestep without loss is still drawn now and then.
    idle = warmed_up(eight_steps, np.concatenate([np.zeros((1, 10)), losses[1:]]))
    np.testing.assert_allclose(idle.weights()[0] / idle.weights().sum(), 0.001 / 8)


def test_loss_aware_sampling_is_unbiased(eight_steps):
    losses = np.random.default_rng(0).random((8, 10)) * np.arange(1, 9)[:, None]
    sampler = warmed_up(eight_steps, losses)
    p = sampler.weights() / sampler.weights().sum()
    n = 20_000
    t, factors = sampler.sample(n, "cpu", rng=np.random.default_rng(1))
    counts = th.bincount(t, minlength=8).double().numpy()
    assert (np.abs(counts - n * p) < SIGMAS * np.sqrt(n * p * (1 - p))).all()
    # p * factor is the uniform distribution, so that a weighted mean has the uniform mean for its expectation ...
    np.testing.assert_allclose(p[t] * factors.numpy(), 1 / 8, rtol=1e-6)
    values = th.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0])
    assert_mean(factors * values[t], float(values.mean()), 0)
    # ... and for the losses it was made for, less variance: that is what it is for.
    typical = th.tensor(np.sqrt((losses**2).mean(1)))
    assert (factors * typical[t]).var() < 0.05 * typical.var()


def test_samplers_take_their_randomness_from_where_they_are_told(eight_steps):
    sampler = create_named_schedule_sampler("uniform", eight_steps)
    draws = [sampler.sample(32, "cpu", rng=np.random.RandomState(5))[0] for _ in "ab"]
    assert th.equal(*draws)
    np.random.seed(5)
    assert th.equal(sampler.sample(32, "cpu")[0], draws[0])


def test_local_losses_are_all_losses_on_one_rank(eight_steps):
    local, told = (create_named_schedule_sampler("loss-second-moment", eight_steps) for _ in "ab")
    rng = np.random.default_rng(0)
    for _ in range(12):
        losses = rng.random(8)
        local.update_with_local_losses(th.arange(8), th.tensor(losses).requires_grad_(True))
        told.update_with_all_losses(list(range(8)), losses.tolist())
    assert np.ptp(told.weights()) > 0
    np.testing.assert_array_equal(local.weights(), told.weights())


def test_unknown_samplers_are_refused(eight_steps):
    with pytest.raises(InputError, match="uniform, loss-second-moment"):
        create_named_schedule_sampler("importance", eight_steps)
