"""Steering a diffusion model with a classifier's gradient (ADM, section 4)."""

import torch as th
import torch.nn.functional as F


def classifier_cond_fn(classifier, scale=1.0):
    """Build the `cond_fn` that samplers take: scale * grad_x log p(y | x_t, t).

    The classifier is put in evaluation mode and its parameters are frozen, so that the only gradient computed is the
    one with respect to x.

    :param classifier: maps (x_t [N, C, ...], t [N]) to logits [N, num_classes]. A function will do.
    :param scale: the gradient's factor, s in ADM's algorithms 1 and 2.
    :return: a function of (x [N, C, ...], t [N], y [N] int64) that gives a gradient of x's shape. It ignores other
        keyword arguments, which are the model's.
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
    """Guide in a part of the process only (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).

    :param first, last: the part, as shares of the process's time: 0 is where images are clean, 1 where all is noise.
    :param num_timesteps: of the process that the model was trained on; 1000 if it shows rescaled timesteps.
    :return: a cond_fn that is zero, and costs nothing, where t / num_timesteps lies outside.
    """

    def limited(x, t, **kwargs):
        if first <= float(t[0]) / num_timesteps <= last:  # all of a batch have the same t
            return cond_fn(x, t, **kwargs)
        return th.zeros_like(x)

    return limited


def route_labels(model, class_cond):
    """Adapt `model` to labels that are meant for the classifier too: they reach the model only with `class_cond`.

    :param model: a UNet: (x, t, y) -> output where it is class-conditional, (x, t) -> output where it is not.
    :return: a function of (x, t, y).
    """

    def model_fn(x, t, y=None, **kwargs):
        return model(x, t, y=y, **kwargs) if class_cond else model(x, t, **kwargs)

    return model_fn
