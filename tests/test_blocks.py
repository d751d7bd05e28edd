"""Layers, residual blocks and attention against plain formulas, and in half precision."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import SMALL, fill_by_name, input_for, randn, relative_error

from guided_diffusion.nn import (
    GroupNorm32,
    SiLU,
    adaptive_avg_pool_nd,
    avg_pool_nd,
    conv_nd,
    linear,
    mean_flat,
    scale_module,
    timestep_embedding,
    update_ema,
    zero_module,
)
from guided_diffusion.unet import (
    AttentionBlock,
    Downsample,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    SuperResModel,
    UNetModel,
    Upsample,
)

HALVES = {"fp16": th.float16, "bf16": th.bfloat16}


# Layers


@pytest.mark.parametrize("dim, options", [(32, {}), (33, {}), (32, {"max_period": 100})])
def test_timestep_embedding(dim, options):
    t = th.tensor([0.0, 1.0, 37.5, 999.0])
    frequencies = float(options.get("max_period", 10000)) ** (-np.arange(16) / 16)
    angles = t.double().numpy()[:, None] * frequencies
    want = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, dim - 32))], axis=1)
    got = timestep_embedding(t, dim, **options)
    assert got.shape == (4, dim) and got.dtype == th.float32
    # angles of up to 999 radians have a rounding error of 3e-5 in float32
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)
    assert th.equal(timestep_embedding(th.tensor([0, 1, 999]), dim, **options), got[[0, 1, 3]])


def test_small_layers():
    x = randn(0, 2, 6, 5)
    th.testing.assert_close(SiLU()(x), x / (1 + th.exp(-x)))
    th.testing.assert_close(mean_flat(x), x.reshape(2, -1).sum(1) / 30)
    assert linear(5, 3)(x).shape == (2, 6, 3)
    layer = linear(5, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    assert scale_module(layer, 0.5) is layer
    assert all(th.equal(p, 0.5 * b) for p, b in zip(layer.parameters(), before))
    assert zero_module(layer) is layer
    assert not layer(x).any()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_in_all_dimensions(dims):
    x = randn(dims, 2, 3, *[4] * dims)
    assert conv_nd(dims, 3, 5, 3, padding=1)(x).shape == (2, 5, *[4] * dims)
    means = x.unfold(2, 2, 2).mean(-1)
    for axis in range(3, 2 + dims):
        means = means.unfold(axis, 2, 2).mean(-1)
    th.testing.assert_close(avg_pool_nd(dims, kernel_size=2, stride=2)(x), means)
    th.testing.assert_close(adaptive_avg_pool_nd(dims, 1)(x).flatten(1), x.flatten(2).mean(2))


def test_moving_average():
    target, source = [th.tensor([1.0, 2.0]), th.tensor(3.0)], [th.tensor([5.0, 6.0]), th.tensor(7.0)]
    update_ema(target, source, rate=0.75)
    th.testing.assert_close(target, [th.tensor([2.0, 3.0]), th.tensor(4.0)])
    update_ema(target, iter(source))  # the default rate is 0.99
    th.testing.assert_close(target[1], th.tensor(4.03))


@pytest.mark.parametrize("average, weights", [("float32", "float16"), ("float32", "float64"), ("bfloat16", "float32")])
def test_moving_average_of_weights_of_another_precision(average, weights):
    target = [th.full((3,), 8.0, dtype=getattr(th, average))]
    update_ema(target, [th.zeros(3, dtype=getattr(th, weights))], rate=0.75)
    assert target[0].dtype == getattr(th, average) and (target[0] == 6).all()


def doubled(x, dims):
    """x with each element repeated along its spatial axes, except a video's first axis."""
    for axis in range(-min(dims, 2), 0):
        x = x.repeat_interleave(2, dim=axis)
    return x


def halved(x, dims):
    """x with pairs of neighbours averaged along its spatial axes, except a video's first axis."""
    for axis in range(-min(dims, 2), 0):
        pairs = x.unflatten(axis, (-1, 2))
        x = pairs.mean(dim=axis)
    return x


@pytest.mark.parametrize("dims, size", [(1, (6,)), (2, (6, 4)), (3, (3, 6, 4))])
def test_resampling(dims, size):
    # With dims=3, the first axis is not resampled, so its length may be odd.
    x = randn(0, 2, 32, *size)
    th.testing.assert_close(Upsample(32, False, dims)(x), doubled(x, dims))
    th.testing.assert_close(Downsample(32, False, dims)(x), halved(x, dims))
    up, down = fill_by_name(Upsample(32, True, dims, 48)), fill_by_name(Downsample(32, True, dims, 48))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    th.testing.assert_close(up(x), convolve(doubled(x, dims), up.conv.weight, up.conv.bias, padding=1))
    full = convolve(x, down.op.weight, down.op.bias, padding=1)
    kept = (slice(None), slice(None), *[slice(None)] * (dims == 3), *[slice(None, None, 2)] * min(dims, 2))
    th.testing.assert_close(down(x), full[kept])


def plain_group_norm(x, norm):
    return F.group_norm(x, 32, norm.weight, norm.bias, eps=1e-5)


@pytest.mark.parametrize("film", [True, False], ids=["scale_shift", "additive"])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}], ids=["same", "up", "down"])
@pytest.mark.parametrize("out_channels, use_conv", [(32, False), (64, False), (64, True)])
def test_residual_block(film, resample, out_channels, use_conv):
    block = ResBlock(32, 16, 0.0, out_channels, use_conv, use_scale_shift_norm=film, **resample)
    x, emb = randn(0, 2, 32, 8, 6), randn(1, 2, 16)

    def change(x):
        return doubled(x, 2) if "up" in resample else halved(x, 2) if "down" in resample else x

    if out_channels == 32:
        th.testing.assert_close(block(x, emb), change(x))  # a new block only resamples, as its last convolution is zero
    fill_by_name(block)
    first, second = block.in_layers[2], block.out_layers[3]
    h = F.conv2d(change(F.silu(plain_group_norm(x, block.in_layers[0]))), first.weight, first.bias, padding=1)
    condition = F.linear(F.silu(emb), block.emb_layers[1].weight, block.emb_layers[1].bias)
    if film:
        h = plain_group_norm(h, block.out_layers[0])
        scale, shift = condition[:, :out_channels], condition[:, out_channels:]
        h = h * (1 + scale.reshape(2, -1, 1, 1)) + shift.reshape(2, -1, 1, 1)
    else:
        h = plain_group_norm(h + condition.reshape(2, -1, 1, 1), block.out_layers[0])
    h = F.conv2d(F.silu(h), second.weight, second.bias, padding=1)
    skip = change(x)
    if out_channels != 32:
        weight, bias = block.skip_connection.weight, block.skip_connection.bias
        assert weight.shape[2:] == ((3, 3) if use_conv else (1, 1))
        skip = F.conv2d(skip, weight, bias, padding=1 if use_conv else 0)
    th.testing.assert_close(block(x, emb), skip + h, rtol=1e-4, atol=1e-5)


def test_forward_hooks_on_in_layers_and_out_layers_are_called():
    """Feature extraction code from other projects registers hooks on in_layers and out_layers of a ResBlock."""
    model, seen = UNetModel(**SMALL), []
    block = model.middle_block[0]
    block.in_layers.register_forward_hook(lambda *_: seen.append("in"))
    block.out_layers.register_forward_hook(lambda *_: seen.append("out"))
    x, t, _ = input_for(SMALL)
    model(x, t)
    assert seen == ["in", "out"]


# Attention


def plain_attention(q, k, v):
    """softmax(Q K^T / sqrt(C)) V for one head: q, k, v [C, T] -> [C, T]."""
    scores = q.T @ k / math.sqrt(q.shape[0])
    return (scores.softmax(dim=-1) @ v.T).T


def plain_multi_head(qkv, heads, new_order):
    """Multi-head attention, computed one head at a time: [heads * 3 * C, T] -> [heads * C, T]."""
    width = qkv.shape[0] // (3 * heads)
    results = []
    for head in range(heads):
        if new_order:  # channels in the order: queries of all heads, keys of all heads, values of all heads
            starts = [(part * heads + head) * width for part in range(3)]
        else:  # channels in the order: queries, keys and values of head 0, of head 1, ...
            starts = [(head * 3 + part) * width for part in range(3)]
        results.append(plain_attention(*(qkv[start : start + width] for start in starts)))
    return th.cat(results)


@pytest.mark.parametrize("order, new", [(QKVAttention, True), (QKVAttentionLegacy, False)])
@pytest.mark.parametrize("heads, length", [(1, 5), (4, 16), (2, 77)])
@pytest.mark.parametrize("size", [1.0, 6.0], ids=["smooth", "peaked"])
def test_attention(order, new, heads, length, size):
    qkv = size * randn(heads, 2, 3 * 16 * heads, length).double()
    want = th.stack([plain_multi_head(sample, heads, new) for sample in qkv])
    assert relative_error(order(heads)(qkv), want) < 1e-12
    assert relative_error(order(heads)(qkv.float()), want) < 1e-5


def test_attention_block():
    block = AttentionBlock(64, num_heads=2)
    x = randn(0, 2, 64, 3, 5)
    assert th.equal(block(x), x)  # a new attention block is the identity
    fill_by_name(block)
    qkv = F.conv1d(plain_group_norm(x.flatten(2), block.norm), block.qkv.weight, block.qkv.bias)
    h = th.stack([plain_multi_head(sample, 2, new_order=False) for sample in qkv])
    h = F.conv1d(h, block.proj_out.weight, block.proj_out.bias).reshape(x.shape)
    th.testing.assert_close(block(x), x + h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_runs_in_a_fused_kernel(new_order):
    # A fused kernel does not store the T x T attention weights. PyTorch selects a fused kernel only if each head's
    # channels are contiguous in memory.
    block = AttentionBlock(64, num_heads=2, use_new_attention_order=new_order)
    with th.profiler.profile() as profile, th.no_grad():
        block(th.randn(1, 64, 16, 16))
    names = {event.name for event in profile.events()}
    assert any("flash_attention" in name for name in names), names
    assert not any("attention_math" in name for name in names)


# Half precision


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("attention", [QKVAttention, QKVAttentionLegacy])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["smooth", "peaked"])
def test_attention_in_half_precision(dtype, attention, size):
    # At size 30, attention scores reach 1e5, which overflows float16, so scores and softmax must be in float32.
    qkv = (size * randn(0, 2, 3 * 2 * 64, 100)).to(dtype)
    output = attention(2)(qkv)
    assert output.dtype == dtype
    assert relative_error(output, attention(2)(qkv.float())) < 5e-3


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_group_norm_in_half_precision(dtype):
    # The sums of squares of these inputs overflow float16.
    x = (1000 + 300 * randn(0, 2, 64, 16, 16)).to(dtype)
    norm = fill_by_name(GroupNorm32(32, 64))
    output = norm(x)
    assert output.dtype == dtype
    assert relative_error(output, norm(x.float())) < 5e-3


@pytest.mark.parametrize("half", HALVES)
def test_embedding_stays_in_single_precision(half):
    model = fill_by_name(UNetModel(**SMALL, num_classes=4))
    x, _, labels = input_for(dict(SMALL, num_classes=4))
    t = th.tensor([998.0, 999.0])  # two timesteps that are distinct in float16 and equal in bfloat16
    seen = []
    model.middle_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with th.no_grad():
        model(x, t, **labels)
        getattr(model, f"convert_to_{half}")()
        model(x, t, **labels)
    assert seen[1].dtype == th.float32
    assert relative_error(seen[1], seen[0]) < 1e-6


NETWORKS = {
    "unet": lambda **kw: UNetModel(**SMALL, num_head_channels=32, use_scale_shift_norm=True, num_classes=4, **kw),
    "unet, additive": lambda **kw: UNetModel(**SMALL, resblock_updown=True, num_classes=4, **kw),
    "unet, 1D": lambda **kw: UNetModel(**SMALL, dims=1, num_classes=4, **kw),
    "upsampler": lambda **kw: SuperResModel(**SMALL, num_classes=4, **kw),
    **{
        f"classifier, {pool}": lambda pool=pool, **kw: EncoderUNetModel(**SMALL, num_head_channels=32, pool=pool, **kw)
        for pool in ("adaptive", "attention", "spatial", "spatial_v2")
    },
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_torso_in_half_precision(half, name):
    options = dict(SMALL, dims=1 if "1D" in name else 2, num_classes=None if "classifier" in name else 4)
    x, t, kwargs = input_for(options)
    if name == "upsampler":
        kwargs["low_res"] = randn(3, 2, 3, 4, 4)
    model = fill_by_name(NETWORKS[name]())
    built_half = fill_by_name(NETWORKS[name](**{f"use_{half}": True}))
    assert model.dtype == th.float32 and built_half.dtype == HALVES[half]
    with th.no_grad():
        reference = model(x, t, **kwargs)
        before = {key: p.clone() for key, p in model.named_parameters()}
        for network in (model, built_half):
            getattr(network, f"convert_to_{half}")()
            for key, p in network.named_parameters():
                torso = key.startswith(("input_blocks", "middle_block", "output_blocks"))
                # Only the convolutions of the torso are converted to half precision.
                assert p.dtype == (HALVES[half] if torso and is_convolution(network, key) else th.float32), key
        output = model(x, t, **kwargs)
        assert th.equal(built_half(x, t, **kwargs), output)
        assert output.dtype == th.float32 and output.isfinite().all()
        # bfloat16 has three mantissa bits fewer than float16, so its tolerance is 8 times larger
        assert relative_error(output, reference) < (5e-3 if half == "fp16" else 4e-2)
        assert not th.equal(output, reference)  # the output shows rounding to half precision
        model.convert_to_fp32()
        assert all(p.dtype == th.float32 for p in model.parameters())
        # After the conversion back to float32, weights have a relative error of up to 2^-11 (fp16) or 2^-8 (bf16).
        for key, p in model.named_parameters():
            assert ((p - before[key]).abs() <= before[key].abs() * 2.0 ** (-11 if half == "fp16" else -8) + 1e-7).all()
        assert relative_error(model(x, t, **kwargs), reference) < (5e-3 if half == "fp16" else 4e-2)


def is_convolution(network, key):
    return isinstance(network.get_submodule(key.rpartition(".")[0]), (th.nn.Conv1d, th.nn.Conv2d, th.nn.Conv3d))


@pytest.mark.parametrize("half", HALVES)
def test_gradients_in_half_precision(half):
    model = fill_by_name(UNetModel(**SMALL, use_checkpoint=True))
    x, t, _ = input_for(SMALL)
    x.requires_grad_(True)
    (want,) = th.autograd.grad(model(x, t).square().mean(), x)
    getattr(model, f"convert_to_{half}")()
    loss = model(x, t).square().mean()
    scale = 1024.0  # prevents underflow of small gradients in float16
    (got,) = th.autograd.grad(scale * loss, x)
    assert relative_error(got / scale, want) < (1e-2 if half == "fp16" else 8e-2)
