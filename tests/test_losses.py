"""Training losses, and the KL divergences and likelihoods that they consist of."""

import itertools
import math

import pytest
import torch as th
from helpers import (
    EPSILON,
    LEARNED,
    LEARNED_RANGE,
    PREVIOUS_X,
    START_X,
    T_ALL,
    Tables,
    bits,
    process,
    randn,
    relative_error,
)

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl

# Training losses


def test_every_combination_of_mean_variance_and_loss_types_gives_finite_gradients():
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
def test_the_loss_of_perfect_predictions_is_zero(mean):
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
    assert not th.equal(diffusion.training_losses(lambda x, t: x, x_start, t)["loss"], first)  # random noise


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE])
@pytest.mark.parametrize("var", [LEARNED, LEARNED_RANGE])
def test_the_bound_has_no_gradient_with_respect_to_the_mean(loss, var):
    # Hybrid loss: the squared error alone trains the mean, and the variational bound alone trains the variance.
    x_start, noise, t = randn(0, 4, 3, 4, 4).clamp(-1, 1), randn(1, 4, 3, 4, 4), th.tensor([0, 1, 100, 249])
    mean = randn(2, 4, 3, 4, 4).requires_grad_(True)
    values = randn(3, 4, 3, 4, 4).requires_grad_(True)
    terms = process(var=var, loss=loss).training_losses(
        lambda x, t: th.cat([mean, values], dim=1), x_start, t, noise=noise
    )

    def gradients(term):
        return th.autograd.grad(terms[term].sum(), (mean, values), retain_graph=True, materialize_grads=True)

    of_mean, of_values = gradients("loss")
    # Derivative with respect to m of (noise - m)^2, averaged over the 48 elements of an image
    th.testing.assert_close(of_mean, 2 * (mean.detach() - noise) / 48)
    assert th.equal(of_mean, gradients("mse")[0])
    assert not gradients("mse")[1].any()
    assert not gradients("vb")[0].any()
    assert th.equal(of_values, gradients("vb")[1])
    assert of_values.flatten(1).any(dim=1).all()


def test_gradient_of_the_bound_with_respect_to_the_log_variance():
    # With the model's log variance v, dKL/dv = (1 - (true variance + (difference of means)^2) / exp(v)) / 2.
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
    # Rescaling multiplies the bound's term by the number of steps, and in the hybrid loss also by 1 / 1000.
    th.testing.assert_close(rescaled_kl["loss"], kl["loss"] * steps)
    th.testing.assert_close(rescaled["vb"], mse["vb"] * steps / 1000)
    th.testing.assert_close(mse["vb"], kl["loss"])
    assert th.equal(rescaled["mse"], mse["mse"])
    for terms in (mse, rescaled):
        th.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


# Divergences and likelihoods


def test_normal_kl_matches_torch():
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


def test_approx_standard_normal_cdf():
    x = th.linspace(-6, 6, 1001)
    want = th.distributions.Normal(0.0, 1.0).cdf(x)
    assert (approx_standard_normal_cdf(x) - want).abs().max() < 2e-4  # error of the approximation


GREYS = th.arange(256) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -2.0, 0.0, 1.0])
def test_the_probabilities_of_all_grey_levels_sum_to_1(mean, log_scale):
    logs = discretized_gaussian_log_likelihood(
        GREYS, means=th.full((256,), mean), log_scales=th.full((256,), log_scale)
    )
    assert logs.shape == (256,)
    # In float32, the common edge of two neighbouring bins is computed with a difference of 1e-7, which is 1e-4 standard
    # deviations at the smallest scale.
    assert abs(float(logs.double().exp().sum()) - 1) < 2e-4
    # A grey level's bin ends half-way to its neighbours. The outermost bins extend to infinity.
    edges = th.cat([th.tensor([-math.inf]), (GREYS[1:] + GREYS[:-1]) / 2, th.tensor([math.inf])]).double()
    below = th.distributions.Normal(mean, math.exp(log_scale)).cdf(edges)
    assert (logs.double().exp() - below.diff()).abs().max() < 4e-4
