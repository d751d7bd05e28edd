"""Samplers that need few evaluations of the model. SAMPLERS maps the names of all samplers to functions.

A sampler takes (diffusion, model, shape, *, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress,
randn_like) and its own options. For each timestep i of the process, from the last to the first, it yields a dict of
"sample", which is x_{i-1}, and "pred_xstart". T timesteps take T evaluations of the model; PLMS takes one more. The
last sample equals the last prediction of x_start.

    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="12")
    for out in SAMPLERS["unipc"](diffusion, model, (16, 3, 64, 64), device="cuda"):
        pass
    images = out["sample"]

Notation of the solvers: x_i = alpha_i x_start + sigma_i eps, lambda_i = log(alpha_i / sigma_i), and x0 is the
prediction of x_start. The solvers apply guidance as DDIM does (ADM, algorithm 2). The transition from timestep 1 to 0
is of first order, because lambda changes so much there that a second-order step overshoots.
"""

from functools import wraps
from math import exp, expm1, sqrt
from types import SimpleNamespace

import numpy as np
import torch as th

from .errors import InputError
from .sampling_loops import progress_bar


def thresholding(threshold):
    """Return a function that limits a prediction of x_start [N, C, ...].

    :param threshold: "static" clips to [-1, 1]. "dynamic" clips each sample to [-s, s] and divides it by s, where s is
        the 0.995 quantile of its absolute values, but at least 1 (Saharia et al. 2022, arXiv 2205.11487, section 2.3).
        A number in (0, 1] is dynamic thresholding with this quantile.
    :raises InputError: for any other threshold.
    """
    if threshold == "static":
        return lambda x_start: x_start.clamp(-1, 1)
    try:
        quantile = 0.995 if threshold == "dynamic" else float(threshold)
    except ValueError:
        quantile = None
    if quantile is None or not 0 < quantile <= 1:
        raise InputError(f"--threshold {threshold}: give static, dynamic, or a quantile above 0 and up to 1")

    def limit(x_start):
        values = x_start.flatten(1).abs().float()
        s = values.quantile(quantile, dim=1).clamp(min=1).to(x_start.dtype)
        s = s.reshape(-1, *[1] * (x_start.ndim - 1))
        return x_start.clamp(-s, s) / s

    return limit


def _limits(clip_denoised, threshold, default="static"):
    """Return the arguments of guided_mean_variance that limit predictions.

    :param default: the threshold that replaces an empty one if clip_denoised is set.
    """
    threshold = threshold or (default if clip_denoised else None)
    if not threshold:
        return {"clip_denoised": clip_denoised}
    return {"clip_denoised": clip_denoised and threshold == "static", "threshold_fn": thresholding(threshold)}


# The process's own loops


def ddpm(diffusion, model, shape, **options):
    """Ancestral sampling, by diffusion.p_sample_loop_progressive."""
    return diffusion.p_sample_loop_progressive(model, shape, **options)


def ddim(diffusion, model, shape, *, clip_denoised=True, threshold=None, **options):
    """DDIM, by diffusion.ddim_sample_loop_progressive. Without a threshold, guided predictions are not limited."""
    limits = _limits(clip_denoised, threshold, default=None)
    return diffusion.ddim_sample_loop_progressive(model, shape, **limits, **options)


def plms(diffusion, model, shape, *, clip_denoised=True, threshold=None, randn_like=None, **options):
    """PLMS, by diffusion.plms_sample_loop_progressive. Guided predictions are limited as in the solvers."""
    return diffusion.plms_sample_loop_progressive(model, shape, **_limits(clip_denoised, threshold), **options)


# Solvers


def _solver(steps):
    """Make a sampler from a generator function steps(x, denoise, process, **options).

    :param steps: yields (x_{i-1}, x0) for each i in process.timesteps. denoise(x, i) returns the guided and limited x0
        at timestep i. process.alpha, process.sigma and process.lambda_ are lists indexed by timestep.
    """

    @wraps(steps)
    def sampler(
        diffusion, model, shape, *, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, randn_like=th.randn_like, threshold=None, **options,
    ):  # fmt: skip
        if diffusion.num_timesteps < 2:
            raise InputError(f"--timestep_respacing: the sampler {steps.__name__} needs at least 2 timesteps")
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        limits = _limits(clip_denoised, threshold)

        def denoise(x, i):
            t = th.full((shape[0],), i, device=device)
            with th.no_grad():
                _, out = diffusion.guided_mean_variance(
                    model, x, t, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, **limits
                )
            return out["pred_xstart"]

        x = th.randn(*shape, device=device) if noise is None else noise
        alpha, sigma = np.sqrt(diffusion.alphas_cumprod), np.sqrt(1 - diffusion.alphas_cumprod)
        process = SimpleNamespace(
            timesteps=progress_bar(range(diffusion.num_timesteps)[::-1], "sampling", progress),
            alpha=alpha.tolist(),
            sigma=sigma.tolist(),
            lambda_=np.log(alpha / sigma).tolist(),
            randn_like=randn_like,
        )
        return ({"sample": x, "pred_xstart": x0} for x, x0 in steps(x, denoise, process, **options))

    del sampler.__wrapped__  # inspect.signature shows the sampler's arguments, not those of `steps`
    return sampler


@_solver
def dpmpp_2m(x, denoise, process):
    """DPM-Solver++(2M), of second order (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    alpha, sigma, lambda_ = process.alpha, process.sigma, process.lambda_
    x0_before = None
    for i in process.timesteps:
        x0 = denoise(x, i)
        if i == 0:
            x = x0
        else:
            h = lambda_[i - 1] - lambda_[i]
            d = _extrapolate(x0, x0_before, lambda_, i)
            x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * expm1(-h) * d
        yield x, x0
        x0_before = x0


@_solver
def dpmpp_2m_sde(x, denoise, process):
    """SDE-DPM-Solver++(2M), of second order, with fresh noise in each step (Lu et al. 2022, section 5)."""
    alpha, sigma, lambda_ = process.alpha, process.sigma, process.lambda_
    x0_before = None
    for i in process.timesteps:
        x0 = denoise(x, i)
        if i == 0:
            x = x0
        else:
            h = lambda_[i - 1] - lambda_[i]
            d = _extrapolate(x0, x0_before, lambda_, i)
            x = sigma[i - 1] / sigma[i] * exp(-h) * x - alpha[i - 1] * expm1(-2 * h) * d
            x = x + sigma[i - 1] * sqrt(-expm1(-2 * h)) * process.randn_like(x)
        yield x, x0
        x0_before = x0


def _extrapolate(x0, x0_before, lambda_, i):
    """Extrapolate x0 to the middle of the step from i to i - 1 (D in DPM-Solver++(2M)), except in the outer steps."""
    if x0_before is None or i == 1:
        return x0
    h, h_before = lambda_[i - 1] - lambda_[i], lambda_[i] - lambda_[i + 1]
    return x0 + h / (2 * h_before) * (x0 - x0_before)


@_solver
def unipc(x, denoise, process):
    """UniPC of order 2 with B(h) = exp(-h) - 1, predicting x_start (Zhao et al. 2023, arXiv 2302.04867).

    Each evaluation of the model corrects the previous step and predicts the next step.
    """
    alpha, sigma, lambda_ = process.alpha, process.sigma, process.lambda_
    x0, x0_before = denoise(x, len(alpha) - 1), None
    for i in process.timesteps:
        if i == 0:
            yield x0, x0
            return
        h = lambda_[i - 1] - lambda_[i]
        b = expm1(-h)
        base = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * b * x0
        if x0_before is None:
            d1, rho_1, rho_2 = 0, 0, 1 / 2
        else:
            r = (lambda_[i + 1] - lambda_[i]) / h
            d1 = (x0_before - x0) / r
            phi_1 = b / -h - 1
            phi_2 = phi_1 / -h - 1 / 2
            rho_1 = (phi_1 / b - 2 * phi_2 / b) / (1 - r)  # rho solves rho_1 + rho_2 = phi_1 / b
            rho_2 = phi_1 / b - rho_1  # and r rho_1 + rho_2 = 2 phi_2 / b
        x = base - alpha[i - 1] * b * d1 / 2 if i > 1 else base
        yield x, x0
        x0, x0_before = denoise(x, i - 1), x0
        x = base - alpha[i - 1] * b * (rho_1 * d1 + rho_2 * (x0 - x0_before))


SAMPLERS = {f.__name__: f for f in (ddpm, ddim, plms, dpmpp_2m, dpmpp_2m_sde, unipc)}
