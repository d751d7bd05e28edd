"""The Gaussian diffusion process: noising, denoising steps, samplers, training losses and the likelihood bound.

Names follow the papers: x_start is the data, x_t the data noised to timestep t (counted from 0), eps the noise.
"DDPM" is Ho et al. 2020 (arXiv 2006.11239), "Improved DDPM" Nichol & Dhariwal 2021 (2102.09672), "DDIM" Song et al.
2020 (2010.02502), "ADM" Dhariwal & Nichol 2021 (2105.05233).

From top to bottom: schedules, the choices that parameterise a process, sampling loops, GaussianDiffusion: its tables,
the forward process, the model's view of the reverse process, steps, loops, training and likelihood.
"""

import enum
import functools
import inspect
import math
import warnings

import numpy as np
import torch as th

from .errors import InputError, choose
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """The betas of the schedule "linear" (DDPM) or "cosine" (Improved DDPM, eq. 17): float64 [num_diffusion_timesteps].

    Both are scaled to the number of timesteps: for many timesteps they approach the same continuous process.
    """
    return choose("--noise_schedule", schedule_name, SCHEDULES)(num_diffusion_timesteps)


def _linear_betas(num_diffusion_timesteps):
    scale = 1000 / num_diffusion_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)


def _cosine_betas(num_diffusion_timesteps):
    return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


SCHEDULES = {"linear": _linear_betas, "cosine": _cosine_betas}


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Discretise a continuous schedule.

    :param alpha_bar: the cumulative product of (1 - beta) as a function of time in [0, 1].
    :param max_beta: an upper limit on each beta, so that the last ones are not singular.
    :return: float64 [num_diffusion_timesteps].
    """
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)])


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # x_{t-1}
    START_X = enum.auto()  # x_start
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """The variance of a denoising step. If it is learned, the model's output has twice the data's channels."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # the variance of the posterior given x_start: the lower bound
    FIXED_LARGE = enum.auto()  # beta_t: the upper bound
    LEARNED_RANGE = enum.auto()  # the model interpolates between the two (Improved DDPM, eq. 15)


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # mean squared error; for a learned variance plus the variational bound, which alone trains it
    RESCALED_MSE = enum.auto()  # the same, with the bound scaled by T / 1000
    KL = enum.auto()  # one of the T terms of the variational bound
    RESCALED_KL = enum.auto()  # the same, scaled by T: an estimate of the whole bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


LEARNED_VARIANCES = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


# Sampling loops: their signature is written once, in _sample


def _sample(
    self,
    step,
    model,
    shape,
    noise=None,
    clip_denoised=True,
    denoised_fn=None,
    cond_fn=None,
    model_kwargs=None,
    device=None,
    progress=False,
    **step_options,
):
    """Sample from noise to data, yielding the dict of "sample" and "pred_xstart" that each step returns.

    :param shape: (N, C, ...) of the samples.
    :param noise: x_T, of that shape; by default drawn from torch's generator.
    :param clip_denoised, denoised_fn, model_kwargs: see p_mean_variance.
    :param cond_fn: returns the gradient of log p(y | x_t), for guidance.
    :param device: where to sample; by default the noise's device, else that of the model's parameters.
    :param progress: show a progress bar.
    :param step_options: more keyword arguments of the step, such as randn_like.
    """
    if device is None:
        device = noise.device if noise is not None else next(model.parameters()).device
    x = th.randn(*shape, device=device) if noise is None else noise
    options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, **step_options}
    for i in _countdown(self.num_timesteps, "sampling", progress):
        t = th.full((shape[0],), i, device=device)
        with th.no_grad():
            out = step(model, x, t, model_kwargs=model_kwargs, **options)
        yield out
        x = out["sample"]


def _countdown(num_timesteps, what, progress):
    """All timesteps from the last to the first, with a progress bar if asked for."""
    timesteps = range(num_timesteps)[::-1]
    if not progress:
        return timesteps
    from tqdm.auto import tqdm

    return tqdm(timesteps, desc=what)


def _progressive_loop(step, **options):
    """Make the method STEP_loop_progressive: _sample with the method named `step`.

    :param options: the step's own options and their defaults, which follow _sample's parameters.
    """
    name = f"{step}_loop_progressive"
    self, _, *shared, more = inspect.signature(_sample).parameters.values()
    own = [inspect.Parameter(o, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=options[o]) for o in options]
    signature = inspect.Signature([self, *shared, *own, more])

    def loop(self, *args, **kwargs):
        step_method = getattr(self, step)
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
            step_options = arguments.pop("step_options", {})
            inspect.signature(step_method).bind_partial(**step_options)
        except TypeError as e:
            raise TypeError(f"{name}: {e}") from None
        if step == "ddim_sample" and arguments.get("cond_fn") is not None:
            self._warn_of_guidance_in_pure_noise()
        return _sample(step=step_method, **arguments, **step_options)

    loop.__name__, loop.__qualname__ = name, f"GaussianDiffusion.{name}"
    loop.__doc__, loop.__signature__ = _sample.__doc__, signature
    return loop


def _last_of(progressive):
    """Make the method that returns the last sample, [N, C, ...], of a progressive loop. Its arguments are the same."""

    @functools.wraps(progressive)
    def loop(self, *args, **kwargs):
        for out in getattr(self, progressive.__name__)(*args, **kwargs):
            pass
        return out["sample"]

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__qualname__ = f"GaussianDiffusion.{loop.__name__}"
    loop.__doc__ = f"The last sample, [N, C, ...], of {progressive.__name__}, whose arguments it takes."
    return loop


class GaussianDiffusion:
    """A diffusion process, with everything that training and sampling do with it.

    The tables (`betas`, `alphas_cumprod`, ...) are read-only float64 numpy arrays [num_timesteps]. To change one,
    assign another array.

    In all methods x, x_start and x_t are [N, C, ...] floats, and t is int64 in 0..num_timesteps-1: [N], or [1] for all
    samples. A model is called as model(x_t, timesteps, **model_kwargs), and a cond_fn likewise.

    :param betas: a 1D array with one beta in (0, 1] for each timestep, from the data to the noise.
    :param rescale_timesteps: show the model timesteps scaled to 0..1000, as floats.
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

        # q(x_t | x_start) and its inverse
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_start), DDPM eq. 6 and 7. The variance at t=0 is 0: its logarithm there is that of t=1.
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
        """The attributes for a copy or pickle, without the tables' float32 copies."""
        return {**vars(self), "_device_tables": {}}

    def _at(self, name, t, x):
        """The entries t of the table `name`: float32, shaped to broadcast over x."""
        array = getattr(self, name)
        source, table = self._device_tables.get((name, t.device), (None, None))
        if source is not array:  # looked up for the first time, or replaced since
            array.flags.writeable = False
            with th.inference_mode(False):  # training cannot use tensors made in inference mode
                table = th.as_tensor(np.float32(array), device=t.device)
            self._device_tables[name, t.device] = array, table
        return table[t].reshape(-1, *[1] * (x.ndim - 1))

    def _scale_timesteps(self, t):
        """The timesteps that a model or cond_fn is shown for t. SpacedDiffusion maps them instead, by _wrap_model."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def model_timesteps(self, t):
        """The timesteps that sampling and training show a model for t. For training a classifier outside this class."""
        return self._scale_timesteps(t)

    # The forward process

    def q_mean_variance(self, x_start, t):
        """The mean, variance and log-variance of q(x_t | x_start) (DDPM, eq. 4), each of x_start's shape."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2  # more digits than 1 - alphas_cumprod
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand(x_start.shape), log_variance.expand(x_start.shape)

    def q_sample(self, x_start, t, noise=None):
        """Noise the data to timestep t: a draw from q(x_t | x_start).

        :param noise: standard normal noise of x_start's shape; by default drawn from torch's generator.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for data of shape {tuple(x_start.shape)}")
        alpha = self._at("sqrt_alphas_cumprod", t, x_start)
        sigma = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return alpha * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """The mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_start) (DDPM, eq. 6 and 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start of shape {tuple(x_start.shape)} for x_t of shape {tuple(x_t.shape)}")
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t).expand(x_t.shape)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape)
        return mean, variance, log_variance

    # The model's view of the reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Apply the model: p(x_{t-1} | x_t), and its prediction of x_start.

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
                f"the model returned {tuple(output.shape)} for x of shape {tuple(x.shape)}, where {channels} channels "
                f"were expected: learn_sigma must have the value that the model was built with"
            )

    def _variance(self, x, t, values=None):
        """The variance and log-variance of a step, of x's shape, from the model's `values` if they are learned."""
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
            # beta_t, except at t=0, where the posterior's variance at t=1 gives a better likelihood.
            first = (t == 0).reshape(lower.shape)
            log_variance = th.where(first, lower, upper).expand(x.shape)
        return log_variance.exp(), log_variance

    def _predict_xstart_from_eps(self, x_t, t, eps):
        scaled_eps = self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        return self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - scaled_eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # The posterior's mean, solved for x_start.
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        difference = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart
        return difference / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDPM step: shift its mean by variance * gradient (ADM, algorithm 1).

        :param cond_fn: returns the gradient of log p(y | x_t) with respect to x_t.
        :param p_mean_var: the dict that p_mean_variance returned.
        :return: the new mean.
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDIM step: eps becomes eps - sqrt(1 - alpha_bar) * gradient (ADM, algorithm 2).

        :return: p_mean_var with a new "pred_xstart" and "mean".
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # Steps

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        randn_like=th.randn_like,
    ):
        """A DDPM step: draw x_{t-1} (DDPM, algorithm 2; guided: ADM, algorithm 1).

        :param cond_fn: returns the gradient of log p(y | x_t), for guidance.
        :param randn_like: returns standard normal noise of a tensor's shape.
        :return: a dict of "sample" and "pred_xstart".
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        nonzero = (t != 0).reshape(-1, *[1] * (x.ndim - 1))  # no noise in the last step
        sample = mean + nonzero * th.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        eta=0.0,
        randn_like=th.randn_like,
    ):
        """A DDIM step: x_{t-1} with noise scaled by eta (DDIM, eq. 12 and 16; guided: ADM, algorithm 2).

        :param eta: 0 is deterministic; 1 has the posterior's variance, as DDPM.
        :return: a dict of "sample" and "pred_xstart".
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        # Computed from pred_xstart, which clipping and denoised_fn may have changed.
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_prev = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * self._at("posterior_variance", t, x).sqrt()
        noise = randn_like(x)  # drawn at eta=0 too, so that the generator's later numbers do not depend on eta
        sample = (
            alpha_bar_prev.sqrt() * out["pred_xstart"]
            + (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps
            + sigma * noise
        )
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """A DDIM step backwards, from x_t to x_{t+1}: encodes data as noise (DDIM, eq. 14). Only for eta=0."""
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

    p_sample_loop_progressive = _progressive_loop("p_sample")
    p_sample_loop = _last_of(p_sample_loop_progressive)
    ddim_sample_loop_progressive = _progressive_loop("ddim_sample", eta=0.0)
    ddim_sample_loop = _last_of(ddim_sample_loop_progressive)

    def _warn_of_guidance_in_pure_noise(self):
        # The guided prediction of x_start is off by guidance / sqrt(alpha_bar); the step takes sqrt(alpha_bar_prev) of
        # it. On a linear schedule the two nearly cancel.
        alpha_bar, alpha_bar_prev = self.alphas_cumprod[-1], self.alphas_cumprod_prev[-1]
        if alpha_bar < 1e-4 and alpha_bar_prev > 100 * alpha_bar:
            warnings.warn(
                f"guided DDIM starts at a timestep whose alphas_cumprod is {alpha_bar:.1e}: the guided prediction of "
                f"x_start explodes there and the samples will be noise. Use --timestep_respacing ddimN (such as "
                f"ddim25), which leaves out the last timestep, or sample by DDPM (--use_ddim False)"
            )

    # Training and likelihood

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The training losses of a batch, each sample at its own timestep.

        :param noise: the noise to use; by default drawn from torch's generator.
        :return: a dict of tensors [N]: "loss", and its terms "mse" and "vb" if it has both.
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
            # The hybrid loss (Improved DDPM, section 3.1): the bound trains the variance and not the mean.
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
        """One term of the variational bound for each sample, in bits per dimension.

        KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)); at t=0 the negative log-likelihood of the 8-bit image.

        :return: a dict of "output" [N], and "pred_xstart" of x_start's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        nll = mean_flat(
            -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        )
        return {"output": th.where(t == 0, nll, kl) / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """The bound's constant term, KL(q(x_T | x_start) || N(0, 1)), in bits per dimension: [N]."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @th.no_grad()
    def calc_bpd_loop(
        self, model, x_start, clip_denoised=True, model_kwargs=None, progress=False, randn_like=th.randn_like
    ):
        """The whole variational bound on -log p(x_start), in bits per dimension (DDPM, eq. 5).

        :return: a dict of "total_bpd" and "prior_bpd" [N], and for every timestep from the last to the first "vb",
            "xstart_mse" and "mse" (of eps) [N, num_timesteps].
        """
        terms = {"vb": [], "xstart_mse": [], "mse": []}
        for i in _countdown(self.num_timesteps, "likelihood", progress):
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


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """Look up `arr` (a 1D numpy array) at `timesteps` [N]: float32, expanded to broadcast_shape (N, ...)."""
    res = th.tensor(np.asarray(arr), device=timesteps.device)[timesteps].float()
    return res.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
