"""The Gaussian diffusion process: noising, denoising steps, samplers, training losses and the likelihood bound.

Names follow the papers: x_start is the data, x_t the data noised up to timestep t (counted from 0), eps the noise.
"DDPM" is Ho et al. 2020 (arXiv 2006.11239), "Improved DDPM" Nichol & Dhariwal 2021 (2102.09672), "DDIM" Song et al.
2020 (2010.02502), "ADM" Dhariwal & Nichol 2021 (2105.05233).

From top to bottom: schedules, what a process is parameterised by, GaussianDiffusion: its tables, the forward process,
the model's view of the reverse process, steps, loops, training and likelihood.
"""

import enum
import math
from functools import partial

import numpy as np
import torch as th

from .errors import InputError, choose
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """The betas of a schedule, "linear" (DDPM) or "cosine" (Improved DDPM, eq. 17): float64 [num_diffusion_timesteps].

    Both are defined for any number of timesteps, such that their limit for many is the same process.
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
    :param max_beta: an upper limit on each beta, which keeps the last ones from being singular.
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
    """What the variance of a denoising step is. A model with a learned one has twice the data's channels."""

    LEARNED = enum.auto()  # the model gives its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's given x_start: the lower bound
    FIXED_LARGE = enum.auto()  # beta_t: the upper bound
    LEARNED_RANGE = enum.auto()  # the model interpolates between the two (Improved DDPM, eq. 15)


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # the mean squared error; for a learned variance also the bound, which is its only teacher
    RESCALED_MSE = enum.auto()  # the same, with the bound scaled by T / 1000
    KL = enum.auto()  # the variational bound: one of its T terms
    RESCALED_KL = enum.auto()  # the same, scaled by T: an estimate of their sum

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


LEARNED_VARIANCES = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class GaussianDiffusion:
    """A diffusion process and all that training and sampling do with it.

    The tables (`betas`, `alphas_cumprod`, ...) are float64 numpy arrays [num_timesteps].

    In all methods, x, x_start and x_t are [N, C, ...] float32 and t is [N] int64 in 0..num_timesteps-1. A model is
    called as model(x_t, timesteps, **model_kwargs), a cond_fn likewise.

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

        # q(x_t | x_start) and what inverts it
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self._one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_start), DDPM eq. 6 and 7. Its variance at t = 0 is zero: the log takes that of t = 1 there.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_log_variance_clipped = self._log_but_first(self.posterior_variance)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        self._log_betas = np.log(betas)
        if model_var_type == ModelVarType.FIXED_LARGE:
            # beta_t, but for t = 0, where the decoder's likelihood is better with the posterior's variance of t = 1
            self._fixed_variance = np.append(self.posterior_variance[1:2], betas[1:]) if len(betas) > 1 else betas
            self._fixed_log_variance = np.log(self._fixed_variance)
        elif model_var_type == ModelVarType.FIXED_SMALL:
            self._fixed_variance = self.posterior_variance
            self._fixed_log_variance = self.posterior_log_variance_clipped
        self._middle_log_variance = (self._log_betas + self.posterior_log_variance_clipped) / 2
        self._half_log_range = (self._log_betas - self.posterior_log_variance_clipped) / 2
        self._posterior_deviation = np.sqrt(self.posterior_variance)  # DDIM's sigma at eta = 1
        self._one_minus_alphas_cumprod_prev = 1.0 - self.alphas_cumprod_prev
        self._sqrt_alphas_cumprod_prev = np.sqrt(self.alphas_cumprod_prev)
        self._sqrt_one_minus_alphas_cumprod_prev = np.sqrt(self._one_minus_alphas_cumprod_prev)
        self._noisy = (np.arange(len(betas)) > 0).astype(np.float64)  # the last step's noise would only blur the image
        self._device_tables = {}
        self._looked_up = None, None, None, None
        tables = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        self._table_names = {name: place for place, name in enumerate(tables)}

    def _log_but_first(self, variance):
        return np.log(np.append(variance[1], variance[1:])) if len(variance) > 1 else np.log(self.betas)

    def _at(self, name, t, like):
        """The entries t of the table `name` as float32, shaped to broadcast over `like`.

        All tables are kept as one on each device they were asked for on, so that a step copies nothing from the host;
        and what they hold at t is looked up once for all, however many of them a step asks for.
        """
        last, version, ndim, entries = self._looked_up
        if last is not t or version != t._version or ndim != like.ndim:  # t may have been overwritten in place
            entries = self._entries(t, like.ndim)
            if not t.is_inference():  # of those nobody counts versions
                self._looked_up = t, t._version, like.ndim, entries
        return entries[self._table_names[name]]

    def _entries(self, t, ndim):
        """The entries t of all tables: float32 [tables, N, 1, ...]."""
        sources = [getattr(self, name) for name in self._table_names]
        cached, table = self._device_tables.get(t.device, ((), None))
        if table is None or any(a is not b for a, b in zip(cached, sources)):
            table = th.as_tensor(np.stack(sources), dtype=th.float32, device=t.device)
            self._device_tables[t.device] = sources, table
        return table[:, t].reshape(len(sources), -1, *[1] * (ndim - 1))

    def model_timesteps(self, t):
        """What a model or cond_fn is shown for the process's timesteps t. Every call of either goes through here."""
        return self._rescale(t, self.num_timesteps)

    def _rescale(self, t, num_timesteps):
        return t.float() * (1000.0 / num_timesteps) if self.rescale_timesteps else t

    # The forward process

    def q_mean_variance(self, x_start, t):
        """The mean, variance and log-variance of q(x_t | x_start) (DDPM, eq. 4), each of x_start's shape."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape)
        variance = self._at("_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start, t, noise=None):
        """Noise the data up to timestep t: a draw from q(x_t | x_start).

        :param noise: the standard normal noise to use; drawn from torch's generator by default.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for data of shape {tuple(x_start.shape)}")
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """The mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_start) (DDPM, eq. 6 and 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start of shape {tuple(x_start.shape)} for x_t of shape {tuple(x_t.shape)}")
        mean = self._posterior_mean(x_start, x_t, t)
        variance = self._at("posterior_variance", t, x_t).expand(x_t.shape)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape)
        return mean, variance, log_variance

    def _posterior_mean(self, x_start, x_t, t):
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start
        return mean.addcmul_(self._at("posterior_mean_coef2", t, x_t), x_t)

    # The model's view of the reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Apply the model: p(x_{t-1} | x_t), and its prediction of x_start.

        :param clip_denoised: clip the prediction of x_start to [-1, 1].
        :param denoised_fn: a function applied to the prediction of x_start, before clipping.
        :param model_kwargs: keyword arguments for the model, such as labels y.
        :return: a dict of "mean", "variance", "log_variance" and "pred_xstart", each of x's shape.
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self._interpret(output, x, t, clip_denoised, denoised_fn)

    def _interpret(self, output, x, t, clip_denoised=True, denoised_fn=None):
        """Read the model's output for x_t as p_mean_variance describes."""
        output, variance, log_variance = self._split_variance(output, x, t)

        def process(pred_xstart):
            if denoised_fn is not None:
                pred_xstart = denoised_fn(pred_xstart)
            return pred_xstart.clamp(-1, 1) if clip_denoised else pred_xstart

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = process(self._predict_xstart_from_xprev(x, t, output))
            mean = output
        else:
            if self.model_mean_type == ModelMeanType.EPSILON:
                output = self._predict_xstart_from_eps(x, t, output)
            pred_xstart = process(output)
            mean = self._posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _split_variance(self, output, x, t):
        """Part the model's output into the prediction proper and the step's variance and log-variance."""
        learned = self.model_var_type in LEARNED_VARIANCES
        channels = x.shape[1] * (2 if learned else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"the model gave {tuple(output.shape)} for x of shape {tuple(x.shape)}, where {channels} channels were "
                f"expected: learn_sigma must be what the model was built with"
            )
        if not learned:
            variance, log_variance = self._at("_fixed_variance", t, x), self._at("_fixed_log_variance", t, x)
            return output, variance.expand(x.shape), log_variance.expand(x.shape)

        output, log_variance = output.split(x.shape[1], dim=1)
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            # The model's -1 is the lower bound, the posterior's, and its 1 the upper, beta_t.
            middle, half_range = self._at("_middle_log_variance", t, x), self._at("_half_log_range", t, x)
            log_variance = th.addcmul(middle, half_range, log_variance)
        return output, th.exp(log_variance), log_variance

    def _predict_xstart_from_eps(self, x_t, t, eps):
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled.addcmul_(self._at("sqrt_recipm1_alphas_cumprod", t, x_t), eps, value=-1)

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # The posterior's mean, solved for x_start.
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDPM step: shift its mean by variance * gradient (ADM, algorithm 1).

        :param cond_fn: gives the gradient of log p(y | x_t) with respect to x_t.
        :param p_mean_var: what p_mean_variance returned.
        :return: the new mean.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Guide a DDIM step: eps becomes eps - sqrt(1 - alpha_bar) * gradient (ADM, algorithm 2).

        :return: p_mean_var with a new "pred_xstart" and "mean".
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": self._posterior_mean(pred_xstart, x, t)}

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

        :param cond_fn: gives the gradient of log p(y | x_t), for guidance.
        :param randn_like: gives standard normal noise of a tensor's shape.
        :return: a dict of "sample" and "pred_xstart".
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        deviation = self._at("_noisy", t, x) * out["variance"].sqrt()
        return {"sample": mean.addcmul(deviation, noise), "pred_xstart": out["pred_xstart"]}

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
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        # Derived from pred_xstart, since clipping and denoised_fn may have changed it.
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        noise = randn_like(x)  # with eta = 0 too, so that the generator's later numbers don't depend on eta
        mean = self._at("_sqrt_alphas_cumprod_prev", t, x) * out["pred_xstart"]
        if eta == 0:
            sample = mean.addcmul(self._at("_sqrt_one_minus_alphas_cumprod_prev", t, x), eps)
        else:
            # At t = 0, where alphas_cumprod_prev is 1, sigma is 0 and the sample is pred_xstart.
            sigma = eta * self._at("_posterior_deviation", t, x)
            remaining = (self._at("_one_minus_alphas_cumprod_prev", t, x) - sigma**2).clamp(min=0)
            sample = mean.addcmul(remaining.sqrt(), eps).addcmul(sigma, noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """A DDIM step backwards, x_t to x_{t+1}: encodes data into noise (DDIM, eq. 14). Only for eta = 0."""
        if eta != 0.0:
            raise ValueError("reverse DDIM is the deterministic path's: eta must be 0")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self._at("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * th.sqrt(alpha_bar_next) + th.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # Loops

    def p_sample_loop(
        self,
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
        """Sample by DDPM, from noise to data: [N, C, ...]. The arguments are p_sample_loop_progressive's."""
        return _last_sample(
            self.p_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, **step_options
            )
        )

    def p_sample_loop_progressive(
        self,
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
        """Sample by DDPM, yielding what each step returns.

        :param shape: (N, C, ...) of the samples.
        :param noise: x_T, of that shape; drawn from torch's generator by default.
        :param clip_denoised, denoised_fn, model_kwargs: see p_mean_variance.
        :param cond_fn: see p_sample.
        :param device: where to sample; by default the noise's device, else that of the model's parameters.
        :param progress: show a progress bar.
        :param step_options: more keyword arguments of the step, such as randn_like.
        """
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            **step_options,
        )
        yield from self._loop(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        **step_options,
    ):
        """Sample by DDIM, from noise to data: [N, C, ...]. The arguments are p_sample_loop_progressive's, and eta."""
        return _last_sample(
            self.ddim_sample_loop_progressive(
                model,
                shape,
                noise,
                clip_denoised,
                denoised_fn,
                cond_fn,
                model_kwargs,
                device,
                progress,
                eta,
                **step_options,
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        **step_options,
    ):
        """Sample by DDIM, yielding what each step returns. The arguments are p_sample_loop_progressive's, and eta."""
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            **step_options,
        )
        yield from self._loop(step, model, shape, noise, device, progress)

    def _loop(self, step, model, shape, noise, device, progress):
        """Apply step(x, t) at every timestep from the last to the first, and yield what it returns."""
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = th.randn(*shape, device=device) if noise is None else noise
        timesteps = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            timesteps = tqdm(timesteps, desc="sampling")
        for i in timesteps:
            with th.no_grad():
                out = step(x, th.full((shape[0],), i, device=device))
            yield out
            x = out["sample"]

    # Training and likelihood

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The training losses of a batch, each sample at its own timestep.

        :param noise: the noise to use; drawn from torch's generator by default.
        :return: a dict of tensors [N]: "loss", and where it has several terms those too ("mse", "vb").
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))

        if self.loss_type.is_vb():
            loss = self._vb_terms(self._interpret(output, x_t, t, clip_denoised=False), x_start, x_t, t)
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        terms = {}
        if self.model_var_type in LEARNED_VARIANCES:
            output, values = output.split(x_t.shape[1], dim=1)
            # The hybrid loss (Improved DDPM, section 3.1): the bound teaches the variance and leaves the mean alone.
            frozen = self._interpret(th.cat([output.detach(), values], dim=1), x_t, t, clip_denoised=False)
            terms["vb"] = self._vb_terms(frozen, x_start, x_t, t)
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {
            ModelMeanType.PREVIOUS_X: lambda: self._posterior_mean(x_start, x_t, t),
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.EPSILON: lambda: noise,
        }[self.model_mean_type]()
        if output.shape != target.shape:
            raise ValueError(
                f"the model gave {tuple(output.shape)} where {tuple(target.shape)} was expected: learn_sigma must be "
                f"what the model was built with"
            )
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms(self, p_mean_var, x_start, x_t, t):
        """One term of the variational bound for each sample, in bits a dimension: [N].

        KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)); at t = 0 the negative log-likelihood of the 8-bit image.
        """
        mean, log_variance = p_mean_var["mean"], p_mean_var["log_variance"]
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2.0)
        nll = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        return th.where(t == 0, mean_flat(nll) / math.log(2.0), kl)

    def _prior_bpd(self, x_start):
        """The bound's constant term, KL(q(x_T | x_start) || N(0, 1)), in bits a dimension: [N]."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @th.no_grad()
    def calc_bpd_loop(
        self, model, x_start, clip_denoised=True, model_kwargs=None, progress=False, randn_like=th.randn_like
    ):
        """The whole variational bound on -log p(x_start), in bits a dimension (DDPM, eq. 5).

        :return: a dict of "total_bpd" and "prior_bpd" [N], and for every timestep from the last to the first "vb",
            "xstart_mse" and "mse" (of eps) [N, num_timesteps].
        """
        timesteps = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            timesteps = tqdm(timesteps, desc="likelihood")
        terms = {"vb": [], "xstart_mse": [], "mse": []}
        for i in timesteps:
            t = th.full((x_start.shape[0],), i, device=x_start.device)
            noise = randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["vb"].append(self._vb_terms(out, x_start, x_t, t))
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: th.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}


def _last_sample(steps):
    for out in steps:
        pass
    return out["sample"]


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """Look up `arr` (a 1D numpy array) at `timesteps` [N]: float32, expanded to broadcast_shape (N, ...)."""
    res = th.from_numpy(np.asarray(arr)).to(device=timesteps.device)[timesteps].float()
    return res.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
