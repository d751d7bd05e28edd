"""Small layers and functions that the networks are made of."""

import math

import torch as th
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from .errors import InputError, choose

NUM_GROUPS = 32


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x):
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in float32 whatever the input's precision, and returns the input's."""

    def forward(self, x):
        if x.dtype == th.bfloat16 and x.device.type == "cpu":  # its kernel takes half-precision input as it is
            return super().forward(x)
        return super().forward(x.float()).type(x.dtype)


def conv_nd(dims, *args, **kwargs):
    """A 1D, 2D or 3D convolution."""
    return choose("number of dimensions", dims, {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d})(*args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    """A 1D, 2D or 3D average pool."""
    return choose("number of dimensions", dims, {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d})(*args, **kwargs)


def adaptive_avg_pool_nd(dims, output_size):
    """A 1D, 2D or 3D average pool to a fixed output size."""
    pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    return choose("number of dimensions", dims, pools)(output_size)


def linear(*args, **kwargs):
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


def normalization(channels):
    """The normalisation used throughout: group norm with 32 groups.

    :raises InputError: when the channels cannot be split into 32 groups.
    """
    if channels % NUM_GROUPS:
        raise InputError(
            f"{channels} channels cannot be split into the {NUM_GROUPS} groups of group norm: choose num_channels and "
            f"channel_mult (or classifier_width) so that every level's width is a multiple of {NUM_GROUPS}"
        )
    return GroupNorm32(NUM_GROUPS, channels)


def zero_module(module):
    """Set every parameter of `module` to zero, and return it: a residual branch that starts as the identity."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module, scale):
    """Multiply every parameter of `module` by `scale`, and return it."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def mean_flat(tensor):
    """The mean over all but the first dimension: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding of timesteps ("Attention Is All You Need", section 3.5, cosines first).

    :param timesteps: [N], one a sample; may be fractional.
    :param dim: width of the embedding.
    :param max_period: the lowest frequency is about 1 / max_period.
    :return: [N, dim] float32.
    """
    half = dim // 2
    freqs = th.exp(-math.log(max_period) * th.arange(half, dtype=th.float32, device=timesteps.device) / half)
    args = timesteps[:, None].float() * freqs[None]
    embedding = th.cat([th.cos(args), th.sin(args)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


@th.no_grad()
def update_ema(target_params, source_params, rate=0.99):
    """Move `target_params` towards `source_params` in place: target = rate * target + (1 - rate) * source."""
    target_params, source_params = list(target_params), list(source_params)
    th._foreach_mul_(target_params, rate)
    th._foreach_add_(target_params, source_params, alpha=1 - rate)


def checkpoint(func, inputs, params, flag):
    """Call `func(*inputs)`; with `flag`, keep none of its activations and compute them again in the backward pass.

    :param params: the parameters that `func` uses. torch finds them by itself; others pass them, so they are accepted.
    """
    if flag:
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def convert_convs(module, dtype):
    """Cast the convolutions among `module` and its children to `dtype`. Norms and linear layers stay in float32."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            m.to(dtype)
