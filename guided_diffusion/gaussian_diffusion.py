"""The Gaussian diffusion process: noising, denoising steps, samplers, training losses and the variational bound.

Names follow the papers: x_start is the data, x_t is the data noised to timestep t (counted from 0), and eps is the
noise. Docstrings cite five papers: "DDPM" is Ho et al. 2020 (arXiv 2006.11239), "Improved DDPM" is Nichol & Dhariwal
2021 (arXiv 2102.09672), "DDIM" is Song et al. 2020 (arXiv 2010.02502), "ADM" is Dhariwal & Nichol 2021 (arXiv
2105.05233), and "PLMS" is Liu et al. 2022 (arXiv 2202.09778).

The file defines noise schedules, enums for the parameterisation of a process, and the class GaussianDiffusion with its
tables, forward process, reverse process, sampling steps, sampling loops, training losses and likelihood.
"""

import enum
import functools
import math
import warnings

import numpy as np
import torch as th

from .errors import InputError, choose
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .sampling_loops import last_of, progress_bar, progressive_loop


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Return the betas of the "linear" (DDPM) or "cosine" (Improved DDPM, eq. 17) schedule: float64 [num_timesteps].

    Betas are scaled to the number of timesteps, so that a schedule approximates one continuous process at any number.
    """
    return choose("--noise_schedule", schedule_name, SCHEDULES)(num_diffusion_timesteps)


def _linear_betas(num_diffusion_timesteps):
    scale = 1000 / num_diffusion_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)


def _cosine_betas(num_diffusion_timesteps):
    return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


SCHEDULES = {"linear": _linear_betas, "cosine": _cosine_betas}


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Return the betas of a continuous noise schedule at discrete timesteps.

    :param alpha_bar: a function of time in [0, 1] that returns the cumulative product of (1 - beta).
    :param max_beta: an upper limit on each beta, which prevents a singularity at the last timesteps.
    :return: float64 [num_diffusion_timesteps].
    """
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)])


class ModelMeanType(enum.Enum):
    """The quantity that the model predicts."""

    PREVIOUS_X = enum.auto()  # x_{t-1}
    START_X = enum.auto()  # x_start
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """The variance of a denoising step. With a learned variance, the model outputs twice the channels of the data."""

    LEARNED = enum.auto()  # the model predicts the log-variance
    FIXED_SMALL = enum.auto()  # the lower bound: the variance of the posterior q(x_{t-1} | x_t, x_start)
    FIXED_LARGE = enum.auto()  # the upper bound: beta_t
    LEARNED_RANGE = enum.auto()  # the model interpolates between the lower and upper bounds (Improved DDPM, eq. 15)


class LossType(enum.Enum):
    """The loss that training minimises."""

    MSE = enum.auto()  # mean squared error; plus the variational bound, which trains a learned variance
    RESCALED_MSE = enum.auto()  # MSE, with the variational bound scaled by num_timesteps / 1000
    KL = enum.auto()  # the variational bound's term at the sampled timestep
    RESCALED_KL = enum.auto()  # KL times num_timesteps: an estimate of the whole variational bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


LEARNED_VARIANCES = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

# Adams-Bashforth weights of PLMS by the number of eps predictions, the newest prediction first.
PLMS_WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class GaussianDiffusion:
    """A diffusion process, with methods for training, sampling and likelihood.

    The tables (`betas`, `alphas_cumprod`, ...) are read-only float64 numpy arrays [num_timesteps]. To change a table,
    assign a new array.

    In all methods x, x_start and x_t are float tensors [N, C, ...]. Timesteps t are int64 tensors in
    0..num_timesteps-1, of shape [N], or of shape [1] if all samples have the same timestep. A model is called as
    model(x_t, timesteps, **model_kwargs), and a cond_fn as cond_fn(x_t, timesteps, **model_kwargs).

    :param betas: a 1D array with a beta in (0, 1] for each timestep, ordered from the data to the noise.
    :param rescale_timesteps: pass float timesteps, scaled to 0..1000, to the model.
    """

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

        self.betas = betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise InputError("betas must be a non-empty 1D array of numbers in (0, 1]")
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # Coefficients of q(x_t | x_start), and of x_start as a function of x_t and eps.
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_start), DDPM eq. 6 and 7. At t=0 the variance is 0, so the log-variance of t=1 is used.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        variance = np.append(self.posterior_variance[1], self.posterior_variance[1:]) if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(variance)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        self._device_tables = {}

    def __getstate__(self):
        """Return the attributes to copy or pickle, without the cached float32 tables."""
        return {**vars(self), "_device_tables": {}}

    def _at(self, name, t, x):
        """Return the entries of the table `name` at timesteps t, as float32, shaped to broadcast over x."""
        array = getattr(self, name)
        source, table = self._device_tables.get((name, t.device), (None, None))
        if source is not array:  # the table is not cached, or has been replaced
            array.flags.writeable = False
            with th.inference_mode(False):  # training cannot use tensors made in inference mode
                table = th.as_tensor(np.float32(array), device=t.device)
            self._device_tables[name, t.device] = array, table
        return table[t].reshape(-1, *[1] * (x.ndim - 1))

    def _scale_timesteps(self, t):
        """Return the timesteps that a model or cond_fn gets for t. SpacedDiffusion instead maps t in _wrap_model."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def model_timesteps(self, t):
        """Return the timesteps that a model is called with for t. Code that calls models itself needs this method."""
        return self._scale_timesteps(t)

    # The forward process

    def q_mean_variance(self, x_start, t):
        """Return the mean, variance and log-variance of q(x_t | x_start) (DDPM, eq. 4), each of x_start's shape."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2  # more precise than 1 - alphas_cumprod
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand(x_start.shape), log_variance.expand(x_start.shape)

    def q_sample(self, x_start, t, noise=None):
        """Noise the data to timestep t, that is, draw a sample from q(x_t | x_start).

        :param noise: standard normal noise of x_start's shape. By default the noise is drawn from torch's generator.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but x_start has shape {tuple(x_start.shape)}")
        alpha = self._at("sqrt_alphas_cumprod", t, x_start)
        sigma = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return alpha * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Return the mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_start) (DDPM, eq. 6 and 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start has shape {tuple(x_start.shape)}, but x_t has shape {tuple(x_t.shape)}")
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t).expand(x_t.shape)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape)
        return mean, variance, log_variance

    # The reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Apply the model to x, and return p(x_{t-1} | x_t) and the prediction of x_start.

        :param clip_denoised: clip the prediction of x_start to [-1, 1].
        :param denoised_fn: a function applied to the prediction of x_start, before clipping.
        :param model_kwargs: keyword arguments for the model, such as labels y.
        :return: a dict of "mean", "variance", "log_variance" and "pred_xstart", each of x's shape.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        self._check_output(output, x)
        output, *variance_values = output.split(x.shape[1], dim=1)
        variance, log_variance = self._variance(x, t, *variance_values)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x, t, output)
        elif self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, output)
        else:
            pred_xstart = output
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _check_output(self, output, x):
        channels = x.shape[1] * (2 if self.model_var_type in LEARNED_VARIANCES else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"the model returned {tuple(output.shape)} for x of shape {tuple(x.shape)}, but {channels} channels "
                f"were expected: learn_sigma must have the value that the model was built with"
            )

    def _variance(self, x, t, values=None):
        """Return the variance and log-variance of a step, of x's shape. `values` is the model's output for them."""
        if self.model_var_type == ModelVarType.LEARNED:
            return values.exp(), values
        lower = self._at("posterior_log_variance_clipped", t, x)
        upper = self._at("betas", t, x).log()
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            fraction = (values + 1) / 2
            log_variance = fraction * upper + (1 - fraction) * lower
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            variance = self._at("posterior_variance", t, x)
            return variance.expand(x.shape), lower.expand(x.shape)
        else:
            # The variance is beta_t, except at t=0, where posterior_variance[1] gives a better likelihood.
            first = (t == 0).reshape(lower.shape)
            log_variance = th.where(first, lower, upper).expand(x.shape)
        return log_variance.exp(), log_variance

    def _predict_xstart_from_eps(self, x_t, t, eps):
        scaled_eps = self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        return self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - scaled_eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # Solve the equation of the mean of q(x_{t-1} | x_t, x_start) for x_start.
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        difference = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart
        return difference / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDPM step by shifting its mean by variance * gradient (ADM, algorithm 1).

        :param cond_fn: a function that returns the gradient of log p(y | x_t) with respect to x_t.
        :param p_mean_var: the dict that p_mean_variance returned.
        :return: the guided mean.
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_mean_with_grad(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Variant of condition_mean that calls cond_fn(x, t, p_mean_var, **model_kwargs), t in 0..num_timesteps-1."""
        gradient = cond_fn(x, t, p_mean_var, **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDIM step by replacing eps with eps - sqrt(1 - alpha_bar) * gradient (ADM, algorithm 2).

        :return: a copy of p_mean_var with guided "pred_xstart" and "mean".
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._shift_score(gradient, p_mean_var, x, t)

    def condition_score_with_grad(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Variant of condition_score that calls cond_fn(x, t, p_mean_var, **model_kwargs), t in 0..num_timesteps-1."""
        return self._shift_score(cond_fn(x, t, p_mean_var, **(model_kwargs or {})), p_mean_var, x, t)

    def _shift_score(self, gradient, p_mean_var, x, t):
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def guided_mean_variance(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        cond_fn_with_grad=False, threshold_fn=None,
    ):  # fmt: skip
        """Call p_mean_variance and guide its result by condition_score, for samplers of the probability flow.

        :param cond_fn_with_grad: call cond_fn(x, t, out, **model_kwargs), with t in 0..num_timesteps-1. `out` is the
            dict that p_mean_variance returned, with gradients recorded with respect to x.
        :param threshold_fn: a function applied to the guided prediction of x_start; see `solvers.thresholding`.
        :return: two dicts in the format of p_mean_variance: before and after guidance.
        """
        condition = self.condition_score
        if cond_fn_with_grad:
            x, condition = x.detach().requires_grad_(), self.condition_score_with_grad
        with th.set_grad_enabled(cond_fn_with_grad or th.is_grad_enabled()):
            out = guided = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            if cond_fn is not None:
                guided = condition(cond_fn, out, x, t, model_kwargs=model_kwargs)
        if cond_fn_with_grad:
            out, guided = _detached(out), _detached(guided)
        if threshold_fn is not None:
            guided = {**guided, "pred_xstart": threshold_fn(guided["pred_xstart"])}
        return out, guided

    # Steps

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        randn_like=th.randn_like, cond_fn_with_grad=False,
    ):  # fmt: skip
        """Take a DDPM step: draw x_{t-1} given x_t (DDPM, algorithm 2; with guidance: ADM, algorithm 1).

        :param cond_fn: a function that returns the gradient of log p(y | x_t) with respect to x_t, for guidance.
        :param randn_like: a function that returns standard normal noise of a tensor's shape.
        :param cond_fn_with_grad: see guided_mean_variance.
        :return: a dict with x_{t-1} as "sample", and "pred_xstart".
        """
        condition = self.condition_mean
        if cond_fn_with_grad:
            x, condition = x.detach().requires_grad_(), self.condition_mean_with_grad
        with th.set_grad_enabled(cond_fn_with_grad or th.is_grad_enabled()):
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            noise = randn_like(x)
            mean = out["mean"]
            if cond_fn is not None:
                mean = condition(cond_fn, out, x, t, model_kwargs=model_kwargs)
        nonzero = (t != 0).reshape(-1, *[1] * (x.ndim - 1))  # no noise in the last step, t=0
        sample = mean + nonzero * th.exp(0.5 * out["log_variance"]) * noise
        result = {"sample": sample, "pred_xstart": out["pred_xstart"]}
        return _detached(result) if cond_fn_with_grad else result

    p_sample_with_grad = functools.partialmethod(p_sample, cond_fn_with_grad=True)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0,
        randn_like=th.randn_like, cond_fn_with_grad=False, threshold_fn=None,
    ):  # fmt: skip
        """Take a DDIM step to x_{t-1}, with noise scaled by eta (DDIM, eq. 12 and 16; with guidance: ADM, algorithm 2).

        :param eta: 0 makes the step deterministic; 1 uses the posterior variance, as DDPM does.
        :param cond_fn_with_grad, threshold_fn: see guided_mean_variance.
        :return: a dict with x_{t-1} as "sample", and "pred_xstart".
        """
        _, out = self.guided_mean_variance(
            model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, cond_fn_with_grad, threshold_fn
        )
        # Compute eps from pred_xstart, because clipping and denoised_fn may have changed pred_xstart.
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_prev = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * self._at("posterior_variance", t, x).sqrt()
        noise = randn_like(x)  # drawn even if eta is 0, so that later random numbers do not depend on eta
        sample = (
            alpha_bar_prev.sqrt() * out["pred_xstart"]
            + (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps
            + sigma * noise
        )
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    ddim_sample_with_grad = functools.partialmethod(ddim_sample, cond_fn_with_grad=True)

    def plms_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        cond_fn_with_grad=False, order=2, old_out=None, threshold_fn=None,
    ):  # fmt: skip
        """Take a PLMS step: a DDIM step whose eps is extrapolated from earlier steps (PLMS, eq. 12). Guided as DDIM.

        The first step has no earlier steps. It averages eps over its two ends, which takes two model evaluations.

        :param order: the number of eps predictions to combine, 1 to 4. Order 1 is DDIM.
        :param old_out: the dict that the previous step returned, or None in the first step.
        :param cond_fn_with_grad, threshold_fn: see guided_mean_variance.
        :return: a dict with x_{t-1} as "sample", "pred_xstart" (without guidance) and "old_eps", a list of the eps
            predictions, newest first.
        :raises InputError: if order is not in 1..4, or if order is above 1 and the process has a single timestep.
        """
        choose("order", order, PLMS_WEIGHTS)
        if order > 1 and self.num_timesteps < 2:
            raise InputError(f"PLMS of order {order} needs at least 2 timesteps: use more, or order 1")
        alpha_bar_prev = self._at("alphas_cumprod_prev", t, x)

        def predict_eps(x, t):
            out, guided = self.guided_mean_variance(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, cond_fn_with_grad, threshold_fn
            )
            return out, guided, self._predict_eps_from_xstart(x, t, guided["pred_xstart"])

        def ddim_step(pred_xstart, eps):
            return alpha_bar_prev.sqrt() * pred_xstart + (1 - alpha_bar_prev).sqrt() * eps

        out, guided, eps = predict_eps(x, t)
        all_eps = [eps, *(old_out["old_eps"] if old_out is not None else [])][:order]
        if order > 1 and old_out is None:
            _, _, next_eps = predict_eps(ddim_step(guided["pred_xstart"], eps), t - 1)
            mean_eps = (eps + next_eps) / 2
        else:
            mean_eps = sum(weight * e for weight, e in zip(PLMS_WEIGHTS[len(all_eps)], all_eps))
        sample = ddim_step(self._predict_xstart_from_eps(x, t, mean_eps), mean_eps)
        last = (t == 0).reshape(-1, *[1] * (x.ndim - 1))
        sample = th.where(last, guided["pred_xstart"], sample)
        return {"sample": sample, "pred_xstart": out["pred_xstart"], "old_eps": all_eps}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """Take a reverse DDIM step from x_t to x_{t+1}, to encode data as noise (DDIM, eq. 14). eta must be 0."""
        if eta != 0.0:
            raise ValueError("reverse DDIM follows the deterministic path: eta must be 0")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self._at("alphas_cumprod_next", t, x)
        sample = alpha_bar_next.sqrt() * out["pred_xstart"] + (1 - alpha_bar_next).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # Loops

    p_sample_loop_progressive = progressive_loop("p_sample")
    p_sample_loop = last_of(p_sample_loop_progressive)
    ddim_sample_loop_progressive = progressive_loop("ddim_sample", eta=0.0)
    ddim_sample_loop = last_of(ddim_sample_loop_progressive)
    plms_sample_loop_progressive = progressive_loop("plms_sample", after="cond_fn_with_grad", order=2)
    plms_sample_loop = last_of(plms_sample_loop_progressive)

    def ddim_reverse_sample_loop_progressive(
        self, model, x_start, clip_denoised=True, denoised_fn=None, model_kwargs=None, progress=False, eta=0.0
    ):
        """Encode data as noise by reverse DDIM. Yield the dict that ddim_reverse_sample returns for each step.

        The last "sample" is x_T, the noise from which ddim_sample_loop reconstructs x_start up to discretisation error.

        :raises InputError: if the process has a single timestep.
        """
        if self.num_timesteps < 2:
            raise InputError("reverse DDIM needs a process with at least 2 timesteps")
        x = x_start
        for i in progress_bar(range(self.num_timesteps - 1), "encoding", progress):
            t = th.full((len(x),), i, device=x.device)
            with th.no_grad():
                out = self.ddim_reverse_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)
            yield out
            x = out["sample"]

    ddim_reverse_sample_loop = last_of(ddim_reverse_sample_loop_progressive)

    def _warn_of_guidance_in_pure_noise(self):
        # Guidance shifts the prediction of x_start in proportion to 1 / sqrt(alpha_bar), and a DDIM step multiplies the
        # prediction by sqrt(alpha_bar_prev). On a linear schedule these two factors nearly cancel.
        alpha_bar, alpha_bar_prev = self.alphas_cumprod[-1], self.alphas_cumprod_prev[-1]
        if alpha_bar < 1e-4 and alpha_bar_prev > 100 * alpha_bar:
            warnings.warn(
                f"guided DDIM starts at a timestep whose alphas_cumprod is {alpha_bar:.1e}: the guided prediction of "
                f"x_start explodes there and the samples will be noise. Use --timestep_respacing ddimN (such as "
                f"ddim25), which leaves out the last timestep, or a sampler that clips the guided prediction, such as "
                f"--sampler unipc"
            )

    # Training and likelihood

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Return the training losses of a batch in which each sample has its own timestep.

        :param noise: standard normal noise of x_start's shape. By default the noise is drawn from torch's generator.
        :return: a dict of tensors [N]: "loss" and, unless the loss is the variational bound alone, its terms "mse" and,
            for a learned variance, "vb".
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)

        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        self._check_output(output, x_t)
        terms = {}
        if self.model_var_type in LEARNED_VARIANCES:
            output, values = output.split(x_t.shape[1], dim=1)
            # The hybrid loss (Improved DDPM, section 3.1): the variational bound trains the variance, not the mean.
            frozen = th.cat([output.detach(), values], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_, **__: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            target, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        else:
            target = noise if self.model_mean_type == ModelMeanType.EPSILON else x_start
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """Return the variational bound's term at timestep t for each sample, in bits per dimension.

        For t > 0 the term is KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)). At t=0 the term is the negative
        log-likelihood of the 8-bit image.

        :return: a dict with the term as "output" [N], and "pred_xstart" of x_start's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        nll = mean_flat(
            -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        )
        return {"output": th.where(t == 0, nll, kl) / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """Return the variational bound's constant term, KL(q(x_T | x_start) || N(0, I)), in bits per dimension: [N]."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @th.no_grad()
    def calc_bpd_loop(
        self, model, x_start, clip_denoised=True, model_kwargs=None, progress=False, randn_like=th.randn_like
    ):
        """Return the variational bound on -log p(x_start), in bits per dimension (DDPM, eq. 5), and its terms.

        :return: a dict with "total_bpd" and "prior_bpd" [N], and with "vb", "xstart_mse" and "mse" (the error of eps)
            [N, num_timesteps]. Timesteps are ordered from the last to the first.
        """
        terms = {"vb": [], "xstart_mse": [], "mse": []}
        for i in progress_bar(range(self.num_timesteps)[::-1], "likelihood", progress):
            t = th.full((x_start.shape[0],), i, device=x_start.device)
            noise = randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["vb"].append(out["output"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: th.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}


def _detached(tensors):
    return {name: v.detach() for name, v in tensors.items()}


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """Return the entries of `arr`, a 1D numpy array, at `timesteps` [N], as float32 expanded to broadcast_shape."""
    res = th.tensor(np.asarray(arr), device=timesteps.device)[timesteps].float()
    return res.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
