"""Small layers and functions that the networks are made of."""

import math

import torch as th
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from .errors import InputError, choose

NUM_GROUPS = 32
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x):
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in the dtype of its weights and returns a tensor of the input's dtype.

    When a network is converted to half precision, the weights of its norms stay in float32.
    """

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def conv_nd(dims, *args, **kwargs):
    """A 1D, 2D or 3D convolution."""
    return choose("number of dimensions", dims, dict(enumerate(CONVOLUTIONS, 1)))(*args, **kwargs)


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
    """The networks' normalization: group norm with 32 groups.

    :raises InputError: if the number of channels is not a multiple of 32.
    """
    if channels % NUM_GROUPS:
        raise InputError(
            f"{channels} channels cannot be split into the {NUM_GROUPS} groups of group norm: choose num_channels and "
            f"channel_mult (or classifier_width) so that every level's width is a multiple of {NUM_GROUPS}"
        )
    return GroupNorm32(NUM_GROUPS, channels)


def zero_module(module):
    """Set all parameters of `module` to zero and return the module.

    A residual block whose branch ends in a zeroed module is the identity at the start of training.
    """
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module, scale):
    """Multiply all parameters of `module` by `scale` and return the module."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def mean_flat(tensor):
    """The mean over all but the first dimension: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding of timesteps ("Attention Is All You Need", section 3.5), with the cosines first.

    :param timesteps: [N], integers or floats. Fractional timesteps are allowed.
    :param dim: the width of the embedding.
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
    """Update an exponential moving average in place: target = rate * target + (1 - rate) * source."""
    for target, source in zip(target_params, source_params):
        target.lerp_(source.to(target.dtype), 1 - rate)


def checkpoint(func, inputs, params, flag):
    """Return `func(*inputs)`. If `flag` is set, the backward pass recomputes the activations of `func`.

    :param params: ignored, because torch finds the parameters that `func` uses. Existing callers pass this argument.
    """
    if flag:
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def convert_convs(module, dtype):
    """Cast the convolutions in `module` to `dtype`. Norms and linear layers keep their dtype."""
    for m in module.modules():
        if isinstance(m, CONVOLUTIONS):
            m.to(dtype)


def as_weights_of(module, x, default=None):
    """Return x in the dtype of the module's floating-point weights.

    :param default: the dtype for a module without floating-point weights, such as a quantized layer or a replica made
        by DataParallel. The default is the dtype of x.
    """
    return x.to(next((p.dtype for p in module.parameters() if p.is_floating_point()), default or x.dtype))
