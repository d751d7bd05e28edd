"""Small layers and functions that the networks are made of."""

import math
from contextlib import nullcontext

import torch as th
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .errors import InputError, choose

NUM_GROUPS = 32


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x):
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in float32 whatever the input's precision, and returns the input's."""

    MOST = 1024  # samples at once with their own parameters: beyond twice that, their groups are too many for CUDA

    def forward(self, x, scale=None, shift=None, silu=False):
        """norm(x) for x [N, C, ...]; or, with `silu`, silu(norm(x) * (1 + scale) + shift) as one operation.

        :param scale, shift: adaptive group norm's (ADM, section 3.1), [N, C]; or None, both.
        """
        if scale is not None and len(x) > self.MOST:
            parts = zip(*(v.split(self.MOST) for v in (x, scale, shift)))
            return th.cat([self(*part, silu) for part in parts])
        weight, bias = self.weight, self.bias
        if scale is not None:  # norm(x) * (1 + scale) + shift is a norm of which each sample has its own parameters
            weight, bias = weight * (1 + scale), th.addcmul(shift, bias, 1 + scale)
        if not silu:
            return _norm(x, weight, bias, self.num_groups, self.eps)
        compiling = th.compiler.is_compiling()  # compilers choose themselves what to keep
        if self.training and th.is_grad_enabled() and len(x) and not compiling:
            return _NormSiLU.apply(x, weight, bias, self.num_groups, self.eps)
        return _norm_silu(x, weight, bias, self.num_groups, self.eps)


def _norm(x, *parameters):
    return th.group_norm(*_as_one_norm(x, *parameters)).view(x.shape).type(x.dtype)


def _norm_silu(x, *parameters):
    return F.silu(_norm(x, *parameters), inplace=not (th.is_grad_enabled() or th.jit.is_tracing()))


def _as_one_norm(x, weight, bias, groups, eps):
    """torch's arguments for a group norm with weight and bias [C], or [N, C]: then N samples are one of N * C."""
    if x.dtype != th.bfloat16 or x.device.type != "cpu":  # whose kernel takes bfloat16 beside float32 parameters
        x = x.float()
    if weight.ndim == 2 and not len(x):
        weight = bias = None  # for nothing
    elif weight.ndim == 2:
        x, weight, bias, groups = x.reshape(1, -1, *x.shape[2:]), weight.flatten(), bias.flatten(), len(x) * groups
    return x.contiguous(), groups, weight, bias, eps


class _NormSiLU(th.autograd.Function):
    """_norm_silu that keeps x alone for the backward pass, which computes the norm again.

    What is not kept takes half of a residual block's memory, and little work.
    """

    generate_vmap_rule = True
    forward = staticmethod(_norm_silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.constants = inputs
        ctx.save_for_backward(x, weight, bias)
        ctx.again = None

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[:3]
        if th.is_grad_enabled():  # for a gradient of the gradient: autograd knows how
            inputs = [v.view_as(v) for v in ctx.saved_tensors]  # none of which is made of another
            wanted = [v for v, need in zip(inputs, needed) if need]
            found = iter(th.autograd.grad(_norm_silu(*inputs, *ctx.constants), wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None
        (inputs, u, sizes, h, mean, rstd), ctx.again = _norm_again(ctx), None
        grad = grad.reshape(h.shape).type(h.dtype)
        grad = th.ops.aten.silu_backward.grad_input(grad, h, grad_input=h)
        found = th.ops.aten.native_group_norm_backward(grad, u, mean, rstd, inputs[1].flatten(), *sizes, needed)
        found = (d.view(v.shape).type(v.dtype) if need else None for d, v, need in zip(found, inputs, needed))
        return *found, None, None


def _norm_again(ctx):
    """Of a _NormSiLU: its inputs, the norm's input and sizes, and its output, means and inverse deviations."""
    if ctx.again is None:
        inputs = ctx.saved_tensors
        u, groups, weight, bias, eps = _as_one_norm(*inputs, *ctx.constants)
        sizes = len(u), u.shape[1], u[0, 0].numel(), groups
        ctx.again = inputs, u, sizes, *th.native_group_norm(u, weight, bias, *sizes, eps)
    return ctx.again


def without_keeping(x):
    """A context in which layers that read x, the output of a norm with SiLU, do not keep it in training either.

    x must live as long as the context: another tensor could take its place in memory, and would be taken for it.
    """
    plain = type(x) is th.Tensor and not th.compiler.is_compiling()
    if not plain or not isinstance(x.grad_fn, _NormSiLU._backward_cls):
        return nullcontext()
    maker, address, size = x.grad_fn, x.data_ptr(), x.numel()  # rather than x, which the hooks would keep

    def pack(saved):
        same = saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous()
        return (saved.shape, saved.dtype) if same else saved

    def unpack(packed):
        if isinstance(packed, th.Tensor):
            return packed
        shape, dtype = packed
        return F.silu(_norm_again(maker)[3]).view(shape).type(dtype)

    return th.autograd.graph.saved_tensors_hooks(pack, unpack)


class NormFirst(nn.Sequential):
    """A group norm, a SiLU and further layers, whose first two run as one operation; a part of them runs as it is."""

    def forward(self, x, scale=None, shift=None, resample=nn.Identity(), checkpointed=False):
        """
        :param scale, shift: see GroupNorm32.
        :param resample: a layer to put before the third.
        :param checkpointed: whether all this is computed again in the backward pass, by torch's own hooks.
        """
        first, *rest = self
        if not isinstance(first, GroupNorm32):
            return super().forward(x)
        h = x = resample(first(x, scale, shift, silu=True))
        with nullcontext() if checkpointed else without_keeping(h):
            for layer in rest[1:]:
                x = layer(x)
        return x


def conv_nd(dims, *args, **kwargs):
    """A 1D, 2D or 3D convolution."""
    return choose("number of dimensions", dims, {1: Conv1d, 2: Conv2d, 3: nn.Conv3d})(*args, **kwargs)


class Conv2d(nn.Conv2d):
    """A 2D convolution. On a CPU its results depend neither on the batch that an image is in, nor on threads."""

    def forward(self, x):
        return onednn_conv(self, x, self.weight) if x.ndim == 4 and suits_onednn(self, x) else super().forward(x)


class Conv1d(nn.Conv1d):
    """A 1D convolution. On a CPU its results depend neither on the batch that a sequence is in, nor on threads."""

    def forward(self, x):
        if x.ndim != 3 or not suits_onednn(self, x):
            return super().forward(x)
        return onednn_conv(self, x[:, :, None], self.weight[:, :, None]).squeeze(2)


class Linear(nn.Linear):
    """A fully connected layer. On a CPU, out of training, its results depend neither on the batch nor on threads."""

    def forward(self, x):
        if self.training or x.ndim != 2 or not suits_onednn(self, x):
            return super().forward(x)
        return onednn_conv(self, x[:, :, None, None], self.weight[:, :, None, None]).flatten(1)


def suits_onednn(layer, x):
    """Whether to call oneDNN's convolution rather than let torch choose, which calls others for few images.

    In bfloat16 torch always chooses oneDNN.
    """
    return (
        not th.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == th.float32
        and type(x) is th.Tensor  # rather than one that stands for another, as in tracing
        and th.backends.mkldnn.is_available()
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and not isinstance(getattr(layer, "padding", None), str)
        and not th.is_autocast_enabled("cpu")
    )


def onednn_conv(layer, x, weight):
    """oneDNN's convolution of x [N, C, H, W] with a layer's options; a sequence has H = 1, a vector W = 1 too."""
    defaults = (("padding", 0), ("stride", 1), ("dilation", 1))
    options = [[neutral, neutral, *getattr(layer, name, ())][-2:] for name, neutral in defaults]
    return th.mkldnn_convolution(x, weight, layer.bias, *options, getattr(layer, "groups", 1))


def _onednn_conv_flops(x_shape, w_shape, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


# torch's counter knows convolutions by the name that they have before torch chooses a kernel.
if th.ops.aten.mkldnn_convolution not in flop_registry:
    register_flop_formula(th.ops.aten.mkldnn_convolution)(_onednn_conv_flops)


def avg_pool_nd(dims, *args, **kwargs):
    """A 1D, 2D or 3D average pool."""
    return choose("number of dimensions", dims, {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d})(*args, **kwargs)


def adaptive_avg_pool_nd(dims, output_size):
    """A 1D, 2D or 3D average pool to a fixed output size."""
    pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    return choose("number of dimensions", dims, pools)(output_size)


def linear(*args, **kwargs):
    """A fully connected layer."""
    return Linear(*args, **kwargs)


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
    targets = list(target_params)
    th._foreach_lerp_(targets, [s.type(t.dtype) for t, s in zip(targets, source_params)], 1 - rate)


@th.no_grad()
def copy_tensors(targets, sources):
    """Copy each of `sources` into its counterpart of `targets`, converting it to that one's dtype."""
    # One dtype at a time: on CUDA, torch 2.6 writes all targets as if they had the first one's.
    for dtype in {t.dtype for t in targets}:
        pairs = [(t.detach(), s) for t, s in zip(targets, sources) if t.dtype == dtype]
        th._foreach_copy_(*map(list, zip(*pairs)))


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
