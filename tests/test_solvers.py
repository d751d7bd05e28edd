"""Fast samplers: comparison with public implementations, order of convergence, moments of the samples, options."""

import math

import numpy as np
import pytest
import torch as th
from helpers import DATA, GaussianData, Tables, assert_moments, exact_model, process, randn, refused, relative_error
from test_analytic_truth import MixtureData

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.solvers import SAMPLERS, thresholding

SOLVERS = ["plms", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
SHAPE = (2, 3, 8, 8)


# Samples of public implementations, in data/samplers.npz, for the model and the cond_fns that follow


class Toy(th.nn.Module):
    num_classes = 7

    def forward(self, x, t, y=None):
        t = t.float().view(-1, 1, 1, 1) / 1000
        out = th.tanh(x * (1 + t)) * 0.7 + 0.1 * th.sin(5 * x + t)
        return out if y is None else out + 0.01 * y.float().view(-1, 1, 1, 1)


def cond_fn(x, t, y=None):
    return 0.3 * th.cos(x) * (1 + t.float().view(-1, 1, 1, 1) / 1000)


def cond_fn_with_grad(x, t, out, y=None):
    loss = ((out["pred_xstart"] - 0.2) ** 2).sum()
    return -th.autograd.grad(loss, x)[0]


def golden_noise(seed):
    return th.from_numpy(np.random.RandomState(seed).randn(*SHAPE)).float()


def golden_options(case):
    """The sampling loop and options of an array named "SCHEDULE/SAMPLER/plain" or "SCHEDULE/LOOP_loop/OPTION"."""
    schedule, sampler, option = case.split("/")
    spacing = {"linear12": ("linear", "12"), "cosine20": ("cosine", "ddim20")}[schedule]
    flags = dict(steps=1000, noise_schedule=spacing[0], timestep_respacing=spacing[1])
    options = dict(noise=golden_noise(1), device="cpu", model_kwargs={"y": th.tensor([1, 4])})
    if option in ("plain", "guided"):
        options["cond_fn"] = cond_fn if option == "guided" else None
    else:
        image = golden_noise(2).clamp(-1, 1)
        options |= {
            "skip": dict(skip_timesteps=4),
            "init": dict(skip_timesteps=5, init_image=image),
            "init0": dict(init_image=image),
            "grad": dict(cond_fn=cond_fn_with_grad, cond_fn_with_grad=True),
            "random": dict(randomize_class=True),
        }[option]
    return flags, sampler, options


with np.load(DATA / "samplers.npz") as archive:
    GOLDEN = dict(archive)


@pytest.mark.parametrize("case", GOLDEN)
def test_samples_match_public_implementations(case):
    flags, sampler, options = golden_options(case)
    th.manual_seed(3)
    if sampler in SAMPLERS:
        diffusion = create_gaussian_diffusion(**flags, predict_xstart=True)
        *_, last = SAMPLERS[sampler](diffusion, Toy(), SHAPE, clip_denoised=False, **options)
        sample = last["sample"]
    elif sampler.startswith("plms") and sampler[4:].isdigit():
        sample = create_gaussian_diffusion(**flags).plms_sample_loop(Toy(), SHAPE, order=int(sampler[4:]), **options)
    else:
        sample = getattr(create_gaussian_diffusion(**flags), sampler.replace("_", "_sample_"))(Toy(), SHAPE, **options)
    assert not sample.requires_grad
    assert relative_error(sample, th.from_numpy(GOLDEN[case])) < 1e-5


# The probability flow of a one-dimensional mixture preserves quantiles, which gives its exact solution in closed form


class QuantileMixture(MixtureData):
    def cdf(self, x, alpha_bar):
        std = (alpha_bar * self.stds**2 + 1 - alpha_bar).sqrt()
        return (self.weights * th.special.ndtr((x[:, None] - math.sqrt(alpha_bar) * self.means) / std)).sum(dim=1)

    def quantile(self, q, alpha_bar):
        low, high = th.full_like(q, -10.0), th.full_like(q, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha_bar) < q
            low, high = th.where(below, middle, low), th.where(below, high, middle)
        return middle


MIXTURE = QuantileMixture([0.3, 0.4, 0.3], [-1.0, 0.0, 1.0], [0.5, 0.5, 0.5])
BETAS = gd.get_named_beta_schedule("linear", 1000)


def error(name, spacing, **options):
    """The RMS distance between the samples of a sampler and the exact solutions that start from the same x_T."""
    diffusion = create_gaussian_diffusion(timestep_respacing=spacing)
    exact = exact_model(MIXTURE, diffusion, betas=BETAS)
    q = (th.arange(200, dtype=th.float64) + 0.5) / 200
    noise = MIXTURE.quantile(q, diffusion.alphas_cumprod[-1]).float().reshape(-1, 1, 1, 1)
    *_, last = SAMPLERS[name](diffusion, exact, noise.shape, noise=noise, clip_denoised=False, **options)
    x_0 = MIXTURE.quantile(q, diffusion.alphas_cumprod[0]).reshape(-1, 1, 1, 1)
    # Samplers return pred_xstart of the last step, so the exact solution is denoised as well.
    truth = MIXTURE.denoised(x_0, Tables(BETAS, th.zeros(len(q), dtype=th.long), x_0))
    return float((last["sample"] - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    "name, least, most", [("ddim", 0.9, 1.3), ("plms", 1.6, 3), ("dpmpp_2m", 1.6, 3), ("unipc", 1.6, 3)]
)
def test_samplers_have_the_expected_order_of_convergence(name, least, most):
    counts = (10, 14, 20, 28, 40)
    errors = [error(name, str(count)) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert least < slope < most and errors[0] < 0.2, (slope, errors)


def test_quadratic_timestep_spacing_is_more_accurate_with_few_steps():
    for name in ("dpmpp_2m", "unipc"):
        assert error(name, "quad8") < error("ddim", "25")


def test_samples_of_the_sde_solver_have_the_moments_of_the_data():
    data, diffusion = GaussianData([0.5, -0.3], [0.5, 0.8]), process(100)
    th.manual_seed(0)
    model = exact_model(data, diffusion)
    *_, last = SAMPLERS["dpmpp_2m_sde"](diffusion, model, (40_000, 2, 1, 1), clip_denoised=False, device="cpu")
    for channel in range(2):
        mean, variance = float(data.mean[0, channel]), float(data.variance[0, channel])
        assert_moments(last["sample"][:, channel], mean, variance, bias=0.01, relative_bias=0.02)


# Options


def network(x, t, **_):
    return 0.5 * x


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_one_step_for_each_timestep(name):
    diffusion, calls = create_gaussian_diffusion(timestep_respacing="6"), []

    def model(x, t, y):
        calls.append(t.tolist())
        return 0.5 * x

    noise = randn(0, 2, 3, 4, 4)
    outputs = list(SAMPLERS[name](diffusion, model, noise.shape, noise=noise, model_kwargs={"y": 3}))
    assert len(outputs) == 6 and all(out.keys() >= {"sample", "pred_xstart"} for out in outputs)
    visited = [[t, t] for t in reversed(diffusion.timestep_map)]
    assert calls == (visited[:2] + visited[1:] if name == "plms" else visited)
    assert (outputs[-1]["sample"] == outputs[-1]["pred_xstart"]).all()
    assert all(out["sample"].shape == noise.shape for out in outputs)


def strong(x, t, **_):
    return th.full_like(x, 50.0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("spacing", ["25", "250"])
def test_solvers_limit_guided_predictions_where_alpha_bar_is_nearly_0(name, spacing):
    """On a cosine schedule, strongly guided DDIM diverges at the last timestep; the solvers must not diverge."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing=spacing)
    noise = randn(0, 2, 3, 4, 4)
    for threshold in (None, "dynamic"):
        outputs = list(
            SAMPLERS[name](diffusion, network, noise.shape, noise=noise, cond_fn=strong, threshold=threshold)
        )
        assert max(float(out["sample"].abs().max()) for out in outputs) < 10
    with pytest.warns(UserWarning, match="--sampler unipc"):
        explodes = list(SAMPLERS["ddim"](diffusion, network, noise.shape, noise=noise, cond_fn=strong))
    assert max(float(out["sample"].abs().max()) for out in explodes) > 100
    limited = list(SAMPLERS["ddim"](diffusion, network, noise.shape, noise=noise, cond_fn=strong, threshold="static"))
    assert max(float(out["sample"].abs().max()) for out in limited) < 10


def test_static_and_dynamic_thresholding():
    x = randn(1, 3, 3, 8, 8)
    x[1] *= 4
    x[2] *= 0.1
    assert (thresholding("static")(x) == x.clamp(-1, 1)).all()
    for threshold, quantile in (("dynamic", 0.995), ("0.9", 0.9), (1, 1.0)):
        s = np.quantile(x.flatten(1).abs().numpy(), quantile, axis=1).clip(1).reshape(-1, 1, 1, 1)
        want = np.clip(x.numpy(), -s, s) / s
        np.testing.assert_allclose(thresholding(threshold)(x).numpy(), want, atol=1e-6)
    assert (thresholding("dynamic")(x)[2] == x[2]).all()
    for threshold in ("fast", "0", "1.5", "-1", "nan"):
        refused(lambda t=threshold: thresholding(t), f"--threshold {threshold}", "static", "dynamic")


@pytest.mark.parametrize("name", SAMPLERS)
def test_unknown_options_are_refused_when_the_sampler_is_called(name):
    diffusion = create_gaussian_diffusion(timestep_respacing="5")
    with pytest.raises(TypeError, match=f"{name}|p_sample|ddim_sample"):
        SAMPLERS[name](diffusion, network, (1, 1, 2, 2), device="cpu", speed=3)
    if name != "ddim":
        with pytest.raises(TypeError, match="eta"):
            SAMPLERS[name](diffusion, network, (1, 1, 2, 2), device="cpu", eta=0.5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_single_timestep_is_refused(name):
    diffusion = create_gaussian_diffusion(timestep_respacing="1")
    refused(lambda: list(SAMPLERS[name](diffusion, network, (1, 1, 2, 2), device="cpu")), "at least 2 timesteps")
    refused(lambda: diffusion.plms_sample(network, th.zeros(1, 1), th.tensor([0]), order=5), "order", "1, 2, 3, 4")


# Options of the sampling loops in public notebooks


def test_transformation_percent_gives_the_timesteps_of_transformation_fn():
    diffusion = create_gaussian_diffusion(timestep_respacing="10")
    for loop in ("ddim_sample_loop_progressive", "plms_sample_loop_progressive"):
        before = []
        for _ in getattr(diffusion, loop)(
            network, (1, 1, 2, 2), device="cpu", transformation_fn=lambda x: before.append(len(before)) or x + 1,
            transformation_percent=[0.1, 0.55, 2.0],
        ):  # fmt: skip
            before.append("step")
        # transformation_fn is called before timesteps 9 and 4.
        assert before.index(0) == 0 and before.count("step") == 10 and len(before) == 12
        assert [i for i, v in enumerate(before) if v != "step"] == [0, 6]


def test_skip_timesteps_out_of_range_is_refused():
    diffusion = create_gaussian_diffusion(timestep_respacing="5")
    for skip in (-1, 5):
        refused(
            lambda s=skip: diffusion.p_sample_loop(network, (1, 1), device="cpu", skip_timesteps=s), "skip_timesteps"
        )


def test_cond_fn_with_grad_receives_timesteps_of_the_shortened_process():
    diffusion = create_gaussian_diffusion(timestep_respacing="5", rescale_timesteps=True)
    assert isinstance(diffusion, SpacedDiffusion)
    for loop in ("p_sample_loop", "ddim_sample_loop", "plms_sample_loop"):
        seen = []

        def gradient(x, t, out):
            seen.append(t.tolist())
            assert x.requires_grad and out.keys() == {"mean", "variance", "log_variance", "pred_xstart"}
            return th.autograd.grad(out["pred_xstart"].sum(), x)[0]

        getattr(diffusion, loop)(network, (1, 2), device="cpu", cond_fn=gradient, cond_fn_with_grad=True)
        assert sorted({t for (t,) in seen}, reverse=True) == [4, 3, 2, 1, 0]
