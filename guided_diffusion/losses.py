"""Divergences and likelihoods of diagonal Gaussians, in nats."""

import math

import torch as th


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    Arguments broadcast; each may be a tensor or a number, and at least one is a tensor.
    """
    tensor = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, th.Tensor)), None)
    if tensor is None:
        raise TypeError("normal_kl: at least one argument must be a tensor")
    logvar1, logvar2 = (x if isinstance(x, th.Tensor) else th.as_tensor(x).to(tensor) for x in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1.0 + th.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """The standard normal's distribution function, by the tanh approximation (Page 1977; off by at most 2e-4)."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Log-probability, in nats, of 8-bit images under a Gaussian integrated over each grey level's bin (DDPM, eq. 13).

    :param x: images in [-1, 1], where neighbouring grey levels are 2/255 apart. The outermost bins reach to infinity.
    :param means: the Gaussian's means, of x's shape.
    :param log_scales: the logarithms of its standard deviations, of x's shape.
    :return: of x's shape.
    """
    centered, inv_std = x - means, th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    probability = th.where(x < -0.999, cdf_upper, th.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower))
    return th.log(probability.clamp(min=1e-12))
