"""Respacing: space_timesteps selects timesteps, and SpacedDiffusion visits only the selected timesteps."""

import numpy as np
import pytest
import torch as th
from helpers import EPSILON, FIXED_LARGE, process, randn, refused

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import LossType
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion


@pytest.mark.parametrize(
    "counts", [[250], [1000], [1], [2], [10, 10, 15, 20], [90, 60, 60, 20, 20], [3, 1, 333], [5, 0, 2]], ids=str
)
def test_each_section_gets_its_number_of_evenly_spaced_timesteps(counts):
    steps = sorted(space_timesteps(1000, counts))
    assert space_timesteps(1000, ",".join(map(str, counts))) == set(steps)
    assert len(steps) == sum(counts)
    sections = np.array_split(np.arange(1000), len(counts))  # the first sections get the remainder
    for section, count in zip(sections, counts):
        taken = [step for step in steps if section[0] <= step <= section[-1]]
        assert len(taken) == count
        assert count == 0 or taken[0] == section[0]
        if count > 1:
            assert taken[-1] == section[-1]
            strides = np.diff(taken)
            assert strides.max() - strides.min() <= 2  # strides are equal, except for rounding


@pytest.mark.parametrize(
    "total, count, stride", [(1000, 25, 40), (1000, 250, 4), (1000, 1000, 1), (1000, 1, 1000), (100, 34, 3)]
)
def test_ddim_spacing_has_one_stride(total, count, stride):
    assert space_timesteps(total, f"ddim{count}") == set(range(0, total, stride))


def test_impossible_spacings_are_refused():
    # ddim300 is impossible: of 1000 timesteps, stride 3 keeps 334 and stride 4 keeps 250.
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
        refused(lambda s=spacing: space_timesteps(1000, s), "--timestep_respacing", *words)
    refused(lambda: create_gaussian_diffusion(timestep_respacing="0,0"), "--timestep_respacing 0,0", "no timestep")


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


def test_spaced_process_refuses_timesteps_out_of_range():
    betas = gd.get_named_beta_schedule("linear", 100)
    for steps in ([], [100], [-1, 5]):
        with pytest.raises(InputError, match="99"):
            SpacedDiffusion(
                steps, betas=betas, model_mean_type=EPSILON, model_var_type=FIXED_LARGE, loss_type=LossType.MSE
            )


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("is_spaced", [False, True])
def test_model_and_cond_fn_get_the_original_timesteps(rescale, is_spaced):
    if is_spaced:
        diffusion = spaced(rescale_timesteps=rescale)
        shown = th.tensor(sorted(space_timesteps(100, "7,5")))
    else:
        diffusion, shown = process(100, rescale_timesteps=rescale), th.arange(100)
    if rescale:
        shown = shown * (1000 / 100)  # scaled from the 100 original timesteps to 1000
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
