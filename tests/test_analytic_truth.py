"""Samplers and the likelihood bound on Gaussians and Gaussian mixtures, whose moments and entropy are known exactly."""

import math

import pytest
import torch as th
from helpers import (
    EPSILON,
    FIXED_LARGE,
    FIXED_SMALL,
    LEARNED,
    LEARNED_RANGE,
    SIGMAS,
    START_X,
    T_ALL,
    GaussianData,
    Tables,
    assert_mean,
    assert_moments,
    bits,
    exact_model,
    per_sample,
    process,
    randn,
    relative_error,
)

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType

# For data from a Gaussian or a mixture of two Gaussians, E[x_start | x_t] has a closed form. In these tests, the closed
# form replaces the network. Samplers must then recover the data's distribution, and the likelihood bound must equal the
# data's entropy, up to two errors. The Monte Carlo error may be up to five standard errors. The discretisation error is
# inversely proportional to the number of steps: each test states a bound, and tests without Monte Carlo also check that
# doubling the number of steps halves the error.


class MixtureData:
    """One-channel data from a mixture of two Gaussians, with the exact denoiser E[x_start | x_t]."""

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


# Exact moments of sampling chains for Gaussian data, without Monte Carlo


def affine_moments(step, mean, variance, steps):
    """Propagate the mean and variance [1, C, 1, 1] of x_T through a sampler with steps affine in x and the noise.

    :param step: a function of (x [3, C, 1, 1], t [3], randn_like) that returns x_{t-1}. Three probes per step determine
        the affine map.
    :return: the mean and variance of the samples.
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
    """The mean and variance of a sampler's samples, with the exact model of `data` and x_T from `target`'s marginal."""
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
    """Check that an error is at most bound / steps and roughly halves when the number of steps doubles.

    :param find_error: a function of the number of steps that returns a tensor of errors.
    """
    coarse, fine = find_error(steps), find_error(2 * steps)
    assert coarse.abs().max() < bound / steps
    assert (fine.abs() < 0.65 * coarse.abs() + 1e-4).all()
    assert coarse.abs().max() > 1e-3  # large enough to show whether the error halves


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_moments_of_the_data(name):
    def error(steps):
        mean, variance = moments(name, steps, DATA)
        assert ((mean - DATA.mean).abs() < 1e-5).all()  # the mean has no discretisation error
        return variance / DATA.variance - 1

    # The channel with the smallest standard deviation, 0.2, needs the most steps and determines the bound.
    assert_first_order(error, 150, bound=30)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_sampling_with_the_exact_reverse_variance_has_no_discretisation_error(schedule):
    # The last step adds no noise and returns E[x_start | x_0], so the variance of the samples is the data's variance
    # minus the posterior variance of x_start given x_0.
    _, variance = moments("ddpm, learned" if schedule == "linear" else "ddpm, cosine", 100, DATA)
    betas = gd.get_named_beta_schedule(schedule, 100)
    _, left = DATA.posterior(th.zeros(1), Tables(betas, th.zeros(1, dtype=th.long), DATA.mean))
    th.testing.assert_close(variance, DATA.variance - left, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_samples_have_the_moments_of_the_posterior(name):
    # Guidance conditions on a noisy observation of x_start: 0.8, with noise of standard deviation 0.6. Both
    # p(observation | x_t) and the posterior are then Gaussian.
    data, noise_variance, observed = GaussianData([0.5, -0.3, 0.0], [0.5, 0.3, 1.2]), 0.6**2, 0.8
    target = GaussianData([0, 0, 0], [1, 1, 1])
    target.variance = 1 / (1 / data.variance + 1 / noise_variance)
    target.mean = target.variance * (data.mean / data.variance + observed / noise_variance)
    assert ((target.mean - data.mean).abs() > 0.2 * data.variance.sqrt()).all()  # guidance must shift the mean

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


# Monte Carlo moments of samples

N = 40_000
STEPS = 200
# Allowed relative bias of the samples' variance, for data with a standard deviation of at least 0.4. The bias is
# inversely proportional to the number of steps (see test_samples_have_the_moments_of_the_data).
BIASES = {"ddpm, large": 6 / STEPS, "ddpm, small": 20 / STEPS, "ddim": 10 / STEPS}


# The components' means are 4 and 5 standard deviations from 0, so the sign of a sample identifies its component: about
# one sample in 30,000 has the wrong sign.
MIXTURE = MixtureData([0.3, 0.7], [-2.0, 2.0], [0.5, 0.4])


@pytest.mark.parametrize("name", BIASES)
def test_samples_of_a_mixture_have_its_moments(name):
    """The samplers draw their noise from torch's global generator."""
    options, method, kwargs = SAMPLERS[name]
    diffusion = process(STEPS, **options)
    sample, model = getattr(diffusion, f"{method}_loop"), exact_model(MIXTURE, diffusion)
    th.manual_seed(1)
    samples = sample(model, (N, 1, 1, 1), clip_denoised=False, device="cpu", **kwargs)
    assert samples.shape == (N, 1, 1, 1) and samples.dtype == th.float32
    samples = samples.flatten()
    share = float((samples > 0).double().mean())
    assert abs(share - 0.7) < SIGMAS * math.sqrt(0.21 / N) + 2 / STEPS  # the components have the right weights
    for mean, std, chosen in zip(MIXTURE.means, MIXTURE.stds, (samples < 0, samples > 0)):
        assert_moments(samples[chosen], float(mean), float(std) ** 2, bias=5 / STEPS, relative_bias=BIASES[name])


# DDIM with eta = 1, and the reverse DDIM ODE


def test_ddim_with_eta_1_is_ddpm():
    # With eta = 1, a DDIM step has the mean and variance of the DDPM posterior (DDIM paper, section 4.1).
    diffusion, x, noise = process(var=FIXED_SMALL), randn(0, 250, 3, 2, 2), randn(1, 250, 3, 2, 2)
    model = exact_model(DATA, diffusion)
    posterior_variance = per_sample(th.tensor(diffusion.posterior_variance), x)

    def ddim(z):
        return diffusion.ddim_sample(model, x, T_ALL, clip_denoised=False, eta=1.0, randn_like=lambda x: z)["sample"]

    variance = ((ddim(th.ones_like(x)) - ddim(th.zeros_like(x))).double()) ** 2
    assert ((variance - posterior_variance).abs() < 1e-4 * posterior_variance + 1e-9).all()
    ddpm = diffusion.p_sample(model, x, T_ALL, clip_denoised=False, randn_like=lambda x: noise)["sample"]
    assert relative_error(ddim(noise), ddpm) < 1e-5


def test_reverse_ddim_inverts_ddim():
    # The exact ODE preserves (x - mean) / std of the marginal at all noise levels.
    data = GaussianData([0.5, -0.3], [0.5, 0.8])
    x_start = data.sample(32)
    place = (x_start - data.mean) / data.variance.sqrt()

    def error(steps):
        diffusion = process(steps)
        model = exact_model(data, diffusion)
        noise = diffusion.ddim_reverse_sample_loop(model, x_start, clip_denoised=False)
        mean, variance = data.marginal(th.tensor(diffusion.alphas_cumprod[-1]))
        noise_error = (noise - mean) / variance.sqrt() - place
        back = diffusion.ddim_sample_loop(model, x_start.shape, noise=noise, clip_denoised=False)
        return th.stack([noise_error.abs().max(), (back - x_start).abs().max()])

    assert_first_order(error, 200, bound=12)


# The likelihood bound


def gaussian_bpd(data):
    """Entropy in bits per dimension of data rounded to bins of width 2/255: differential entropy - log(bin width)."""
    entropy = 0.5 * th.log(2 * math.pi * math.e * data.variance)
    return float(bits((entropy - math.log(2 / 255)).mean()))


BOUND_DATA = GaussianData([0.0, 0.1], [0.2, 0.15])  # -1 and 1 are more than five standard deviations from the means


def bound_of(var, n):
    """Return a process of 250 steps and the result of its calc_bpd_loop on n samples with the exact model."""
    diffusion = process(250, var=var)
    generator = th.Generator().manual_seed(0)
    return diffusion, diffusion.calc_bpd_loop(
        exact_model(BOUND_DATA, diffusion), BOUND_DATA.sample(n), clip_denoised=False,
        randn_like=lambda x: th.randn(x.shape, generator=generator),
    )  # fmt: skip


def test_the_bound_equals_the_entropy():
    # With the exact reverse process, the bound's terms add up to the data's entropy plus KL(q(x_T) || N(0, 1)). The
    # divergence is below alpha_bar_T / 2 = 2e-5 nats. The last step's decoder has variance beta_0 = 4e-4, so a bin is
    # 0.4 standard deviations wide. Integrating the decoder's density over a bin, instead of multiplying the density by
    # the bin's width, changes the mean log-likelihood by terms of fourth order, about 0.4^4 / 24^2. The tanh
    # approximation of the normal CDF is off by up to 2e-4. A tolerance of 0.005 bits covers all these errors.
    n = 40_000
    _, out = bound_of(LEARNED, n)
    assert out["total_bpd"].shape == (n,)
    assert out["total_bpd"].std() / math.sqrt(n) < 0.007
    assert_mean(out["total_bpd"], gaussian_bpd(BOUND_DATA), 0.005)


@pytest.mark.parametrize("var", [FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE])
def test_other_variances_raise_the_bound_by_their_kl_divergence(var):
    # The means are exact, so each step adds KL(N(0, exact variance) || N(0, model's variance)) to the bound. At t=0,
    # this formula approximates the decoder's probability of a bin by the decoder's density times the bin's width.
    n = 4000
    diffusion, out = bound_of(var, n)
    x = BOUND_DATA.mean.expand(250, -1, -1, -1)
    exact = BOUND_DATA.reverse_variance(Tables(diffusion.betas, T_ALL, x))
    taken = diffusion.p_mean_variance(exact_model(BOUND_DATA, diffusion), x.float(), T_ALL)["variance"].double()
    if var == FIXED_SMALL:
        taken[0] = diffusion.posterior_variance[1]  # replaces the variance 0, which has no likelihood
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
    # The exact denoiser's mean squared error is the variance of x_start given x_t. Columns run from the last timestep
    # to the first.
    tables = Tables(diffusion.betas, T_ALL.flip(0), BOUND_DATA.mean.expand(250, -1, -1, -1))
    _, left = BOUND_DATA.posterior(BOUND_DATA.mean, tables)
    left = left.mean(dim=(1, 2, 3))
    signal_to_noise = ((tables.signal / tables.noise) ** 2).flatten()
    # Relative error of a mean of squares of 4000 Gaussians (if one of the two channels dominates): sqrt(2 / 4000).
    # The tolerance is six sigma, because 250 timesteps are tested.
    allowed = 6 * math.sqrt(2 / n)
    assert ((out["xstart_mse"].double().mean(0) / left - 1).abs() < allowed).all()
    assert ((out["mse"].double().mean(0) / (left * signal_to_noise) - 1).abs() < allowed).all()


def test_prior_term_of_the_bound():
    # The process stops early, so that q(x_T | x_start) differs from N(0, 1) and the prior term is not negligible.
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


def test_the_training_loss_equals_the_term_of_the_bound():
    diffusion, x_start = process(40, var=LEARNED, loss=LossType.KL), BOUND_DATA.sample(5)
    model = exact_model(BOUND_DATA, diffusion)
    noise = randn(1, *x_start.shape)
    bound = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False, randn_like=lambda x: noise)
    for i in (0, 1, 20, 39):
        terms = diffusion.training_losses(model, x_start, th.full((5,), i), noise=noise)
        th.testing.assert_close(bound["vb"][:, 39 - i], terms["loss"])
