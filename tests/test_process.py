"""The diffusion process: schedules, single steps, parametrisations and sampling loops."""

import warnings

import numpy as np
import pytest
import torch as th
from helpers import (
    EPSILON,
    FIXED_LARGE,
    LEARNED_RANGE,
    PREVIOUS_X,
    START_X,
    T_ALL,
    GaussianData,
    Tables,
    assert_moments,
    exact_model,
    process,
    randn,
    relative_error,
)

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType
from guided_diffusion.script_util import create_gaussian_diffusion

# Schedules


def test_max_beta_limits_a_schedule():
    assert gd.betas_for_alpha_bar(10, lambda t: 1 - t, max_beta=0.6).max() == 0.6


@pytest.mark.parametrize("schedule, steps", [("linear", 1000), ("cosine", 4000)])
def test_small_variances_of_q_are_exact(schedule, steps):
    # At the first timesteps, alphas_cumprod is close to 1, so 1 - alphas_cumprod in float32 would lose three digits.
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
def test_very_short_schedules_give_finite_samples_or_are_refused(schedule, steps, loop):
    # If the last beta is exactly 1, x_T contains no signal, so x_start cannot be predicted and samples would be NaN.
    try:
        diffusion = create_gaussian_diffusion(steps=steps, noise_schedule=schedule)
    except InputError as e:
        assert str(steps) in str(e) and steps < 21
    else:
        samples = getattr(diffusion, loop)(lambda x, t: 0.9 * x, (4, 1, 2, 2), device="cpu")
        assert samples.isfinite().all()


# Single steps


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
def test_the_posterior_follows_from_bayes_rule(schedule):
    # q(x_{t-1} | x_t, x_start) is proportional to N(x_t; sqrt(alpha) x_{t-1}, beta) * q(x_{t-1} | x_start).
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
    # At t=0 the posterior variance is 0. At t=0 the log variance is that of t=1, which is finite.
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start[:1], x_t[:1], th.tensor([0]))
    th.testing.assert_close(mean, x_start[:1])
    assert not variance.any()
    assert relative_error(log_variance, -precision[:1].log().expand(1, 3, 2, 2)) < 1e-6


def test_parametrisations_agree():
    # The same exact denoiser, expressed as each of the three types of model output
    x, data = randn(0, 250, 3, 2, 2), GaussianData([0.5, -0.3, 0.0], [0.5, 0.2, 1.2])
    outs = {}
    for mean in ModelMeanType:
        diffusion = process(mean=mean)
        outs[mean] = diffusion.p_mean_variance(exact_model(data, diffusion), x, T_ALL, clip_denoised=False)
        assert set(outs[mean]) == {"mean", "variance", "log_variance", "pred_xstart"}
        assert all(value.shape == x.shape for value in outs[mean].values())
    tables = Tables(diffusion.betas, T_ALL, x)
    want = data.denoised(x.double(), tables)
    # A model's output has a rounding error of about 1e-7 in float32. Computing x_start from the output multiplies the
    # error by these factors.
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


def test_reverse_ddim_refuses_a_nonzero_eta():
    with pytest.raises(ValueError, match="eta"):
        process().ddim_reverse_sample(lambda x, t: x, randn(0, 2, 1, 1, 1), th.tensor([3, 200]), eta=0.5)


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.KL])
def test_a_model_with_the_wrong_number_of_output_channels_is_refused(loss):
    x, t = randn(0, 2, 3, 4, 4), th.tensor([0, 1])
    learned, fixed = process(var=LEARNED_RANGE, loss=loss), process(loss=loss)
    for call in (learned.training_losses, lambda model, x, t: learned.p_sample(model, x, t)):
        with pytest.raises(ValueError, match="6 channels.*learn_sigma"):
            call(lambda x, t: x, x, t)
    for call in (fixed.training_losses, fixed.p_mean_variance):
        with pytest.raises(ValueError, match="3 channels.*learn_sigma"):
            call(lambda x, t: th.cat([x, x], dim=1), x, t)


# Sampling loops

LOOPS = ["p_sample_loop", "ddim_sample_loop"]


@pytest.mark.parametrize("loop", LOOPS)
def test_samples_depend_only_on_the_given_noise(loop):
    # With x_T given as `noise` and each step's noise given by `randn_like`, sampling is deterministic.
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
        # Each step adds sigma * z to the mean, with z from randn_like, so a larger z gives larger samples.
        ones = diffusion.p_sample_loop(model, (2, 1, 4, 4), noise=noise, randn_like=th.ones_like)
        assert (ones > diffusion.p_sample_loop(model, (2, 1, 4, 4), noise=noise, randn_like=th.zeros_like)).all()


def test_the_default_device_is_the_model_s():
    class Model(th.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    assert process(25).p_sample_loop(Model(4, 4), (2, 4)).shape == (2, 4)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mean", [EPSILON, START_X])
def test_predictions_of_x_start_are_processed_by_denoised_fn_and_then_clipped(loop, mean):
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

    # If the predicted x_start is always 0.3, the sample is 0.3, too.
    predictions, sample = run(denoised_fn=lambda x: th.full_like(x, 0.3))
    assert all(th.equal(x, th.full_like(x, 0.3)) for x in predictions)
    th.testing.assert_close(sample, th.full_like(sample, 0.3))
    # Clipping comes after denoised_fn.
    predictions, sample = run(denoised_fn=lambda x: th.full_like(x, 5.0))
    assert all(th.equal(x, th.ones_like(x)) for x in predictions)
    predictions, _ = run(denoised_fn=lambda x: th.full_like(x, 5.0), clip_denoised=False)
    assert all(th.equal(x, th.full_like(x, 5.0)) for x in predictions)


@pytest.mark.parametrize("loop", LOOPS)
def test_cond_fn_is_called_without_model_kwargs(loop):
    diffusion, asked = process(30), []

    def cond_fn(x, t):
        asked.append(t)
        return th.zeros_like(x)

    noise = randn(0, 2, 1, 4, 4)
    options = dict(noise=noise, randn_like=th.zeros_like, model_kwargs=None)
    guided = getattr(diffusion, loop)(lambda x, t: x, noise.shape, cond_fn=cond_fn, **options)
    assert len(asked) == 30
    plain = getattr(diffusion, loop)(lambda x, t: x, noise.shape, **options)
    th.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-4)  # a zero gradient only changes rounding


@pytest.mark.parametrize("schedule, respacing, warned", [
    ("cosine", "25", True), ("cosine", "250", True), ("cosine", "", True), ("cosine", "ddim25", False),
    ("cosine", "ddim250", False), ("linear", "25", False), ("linear", "ddim25", False), ("linear", "", False),
])  # fmt: skip
def test_guided_ddim_from_pure_noise_warns_once(schedule, respacing, warned):
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=respacing)

    def sample(loop, cond_fn):
        for _ in zip(range(3), getattr(diffusion, loop)(lambda x, t: x, (1, 1, 2, 2), cond_fn=cond_fn, device="cpu")):
            pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        sample("p_sample_loop_progressive", lambda x, t: x)
        sample("ddim_sample_loop_progressive", None)
        assert not caught
        for _ in range(2):
            sample("ddim_sample_loop_progressive", lambda x, t: x)
    assert len(caught) == warned
    assert all("--timestep_respacing ddim" in str(w.message) for w in caught)
