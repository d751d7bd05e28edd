"""Timestep samplers: their distributions and the importance weights that keep the loss unbiased."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from helpers import SIGMAS, assert_mean

from guided_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_gaussian_diffusion


@pytest.fixture(params=[8])
def eight_steps(request):
    return create_gaussian_diffusion(steps=request.param, noise_schedule="cosine")


def test_uniform_sampler_draws_all_timesteps_equally_often(eight_steps):
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
    """Return a loss-aware sampler that was updated with losses [T, 10], oldest first."""
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    for column in losses.T:
        sampler.update_with_all_losses(list(range(len(losses))), column.tolist())
    return sampler


def test_loss_aware_weights_follow_the_second_moment_of_recent_losses(eight_steps):
    rng = np.random.default_rng(0)
    losses = rng.random((8, 10)) * np.arange(1, 9)[:, None]
    sampler = create_named_schedule_sampler("loss-second-moment", eight_steps)
    for count, column in enumerate(losses.T):
        assert np.ptp(sampler.weights()) == 0, count  # uniform until each timestep has ten losses
        sampler.update_with_all_losses(list(range(8)), column.tolist())

    def expected(losses):
        roots = np.sqrt((losses**2).mean(1))
        return 0.999 * roots / roots.sum() + 0.001 / 8

    np.testing.assert_allclose(sampler.weights(), expected(losses))
    # After the warm-up, the weights depend on the latest ten losses of each timestep.
    for loss in (5.0, 6.0):
        sampler.update_with_all_losses([2], [loss])
    losses[2] = [*losses[2, 2:], 5.0, 6.0]
    np.testing.assert_allclose(sampler.weights(), expected(losses))
    # A timestep whose losses are all zero keeps a small probability.
    idle = warmed_up(eight_steps, np.concatenate([np.zeros((1, 10)), losses[1:]]))
    np.testing.assert_allclose(idle.weights()[0] / idle.weights().sum(), 0.001 / 8)


def test_loss_aware_sampling_is_unbiased(eight_steps):
    losses = np.random.default_rng(0).random((8, 10)) * np.arange(1, 9)[:, None]
    sampler = warmed_up(eight_steps, losses)
    p = sampler.weights() / sampler.weights().sum()
    n = 20_000
    np.random.seed(1)
    t, factors = sampler.sample(n, "cpu")
    counts = th.bincount(t, minlength=8).double().numpy()
    assert (np.abs(counts - n * p) < SIGMAS * np.sqrt(n * p * (1 - p))).all()
    # p * factor is the uniform distribution, so the weighted mean is an unbiased estimate of the uniform mean.
    np.testing.assert_allclose(p[t] * factors.numpy(), 1 / 8, rtol=1e-6)
    values = th.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0])
    assert_mean(factors * values[t], float(values.mean()), 0)
    # For losses like the recorded ones, importance sampling reduces the variance.
    typical = th.tensor(np.sqrt((losses**2).mean(1)))
    assert (factors * typical[t]).var() < 0.05 * typical.var()


def test_local_losses_equal_all_losses_on_one_rank(eight_steps):
    local, told = (create_named_schedule_sampler("loss-second-moment", eight_steps) for _ in "ab")
    rng = np.random.default_rng(0)
    for _ in range(12):
        losses = rng.random(8)
        local.update_with_local_losses(th.arange(8), th.tensor(losses).requires_grad_(True))
        told.update_with_all_losses(list(range(8)), losses.tolist())
    assert np.ptp(told.weights()) > 0
    np.testing.assert_array_equal(local.weights(), told.weights())


def test_losses_of_another_process_are_ignored(eight_steps):
    state = LossSecondMomentResampler(eight_steps).state_dict()
    other = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4))
    other.load_state_dict(state)
    assert other.weights().shape == (4,)
