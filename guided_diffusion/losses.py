"""Divergences and likelihoods of diagonal Gaussians, in nats."""

import math

import torch as th


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    The arguments are broadcast. Each is a tensor or a number, and at least one must be a tensor.
    """
    tensor = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, th.Tensor)), None)
    if tensor is None:
        raise TypeError("normal_kl: at least one argument must be a tensor")
    logvar1, logvar2 = (x if isinstance(x, th.Tensor) else th.as_tensor(x).to(tensor) for x in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1.0 + th.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """The standard normal distribution function by a tanh approximation (Page 1977), with an error below 2e-4."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """The log-probability of 8-bit images, in nats, under a Gaussian integrated over the bin of each grey level (DDPM,
    eq. 13).

    :param x: images in [-1, 1], where neighbouring grey levels are 2/255 apart. The outermost bins extend to infinity.
    :param means: the means of the Gaussian, of the shape of x.
    :param log_scales: the logarithms of the standard deviations of the Gaussian, of the shape of x.
    :return: a tensor of the shape of x.
    """
    centered, inv_std = x - means, th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    probability = th.where(x < -0.999, cdf_upper, th.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower))
    return th.log(probability.clamp(min=1e-12))
