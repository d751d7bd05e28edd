"""Steering a diffusion model with a classifier's gradient (ADM, section 4), or with a second diffusion model."""

import torch as th
import torch.nn.functional as F


def classifier_cond_fn(classifier, scale=1.0):
    """Build the samplers' `cond_fn`: scale * grad_x log p(y | x_t, t).

    If the classifier is a module, it is put in evaluation mode and its parameters are frozen. Only the gradient with
    respect to x is computed.

    :param classifier: a module or function from (x_t [N, C, ...], t [N]) to logits [N, num_classes].
    :param scale: the factor of the gradient, s in ADM, algorithms 1 and 2.
    :return: a function of (x [N, C, ...], t [N], y [N] int64) that returns a gradient of the shape of x. The function
        ignores other keyword arguments, which are meant for the model.
    """
    if isinstance(classifier, th.nn.Module):
        classifier.eval().requires_grad_(False)

    def cond_fn(x, t, y=None, **_):
        if y is None:
            raise TypeError("classifier guidance needs labels: pass model_kwargs={'y': labels} to the sampler")
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            log_prob = -F.cross_entropy(classifier(x, t).float(), y.view(-1), reduction="sum")
            (gradient,) = th.autograd.grad(log_prob, x)
        return scale * gradient

    return cond_fn


def limit_guidance(cond_fn, first, last, num_timesteps):
    """Limit guidance to an interval (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).

    :param first, last: the ends of the interval, as fractions of the process: 0 is the clean end, 1 the noisy end.
    :param num_timesteps: the number of timesteps of the process that the model was trained on, or 1000 if timesteps are
        rescaled.
    :return: a cond_fn that returns zeros if t / num_timesteps is outside the interval, without calling `cond_fn`.
    """

    def limited(x, t, **kwargs):
        if first <= float(t[0]) / num_timesteps <= last:  # samplers use the same t for the whole batch
            return cond_fn(x, t, **kwargs)
        return th.zeros_like(x)

    return limited


def guide_by_model(model, guide, scale, interval=None):
    """Guide a model by a second model. The result predicts g + scale * (eps - g), where g is the guide's prediction.

    With an unconditional model as guide, this is classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). With
    a worse version of the model as guide, it is autoguidance (Karras et al. 2024, arXiv 2406.02507).

    :param model: a function of (x [N, C, ...], t, **kwargs) that returns [N, C or 2C, ...]: a prediction of eps or
        x_start, and perhaps the values of a learned variance, which guidance does not change.
    :param guide: a function like `model`, of a network that predicts the same quantity on the same schedule.
    :param scale: the scale of guidance. At scale 1, `model` is returned and the guide is never called.
    :param interval: (first, last, num_timesteps), which limit guidance to a part of the process; see limit_guidance.
    """
    if scale == 1:
        return model

    def guided(x, t, **kwargs):
        output = model(x, t, **kwargs)
        if interval is not None and not interval[0] <= float(t[0]) / interval[2] <= interval[1]:
            return output
        channels = x.shape[1]
        eps, g = output[:, :channels], guide(x, t, **kwargs)[:, :channels]
        return th.cat([g + scale * (eps - g), output[:, channels:]], dim=1)

    return guided


def route_labels(model, class_cond):
    """Wrap a model such that it accepts labels y, and passes them to the model only if `class_cond` is set.

    The labels in model_kwargs can then be meant for a cond_fn alone.

    :param model: a UNet: (x, t, y) -> output if it is class-conditional, and otherwise (x, t) -> output.
    :return: a function of (x, t, y).
    """

    def model_fn(x, t, y=None, **kwargs):
        return model(x, t, y=y, **kwargs) if class_cond else model(x, t, **kwargs)

    return model_fn
