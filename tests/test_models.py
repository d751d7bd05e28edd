"""The networks: the released models' parameters, every option, and what layers compute, against plain formulas."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import fill_by_name, load_json, randn, relative_error

from guided_diffusion import script_util
from guided_diffusion.errors import InputError
from guided_diffusion.nn import (
    GroupNorm32,
    SiLU,
    adaptive_avg_pool_nd,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    mean_flat,
    normalization,
    scale_module,
    timestep_embedding,
    update_ema,
    zero_module,
)
from guided_diffusion.presets import PRESETS, get_preset
from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool2d,
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


# The released models

RELEASED = load_json("released_models.json.gz")


def build_preset(name):
    """A released model without its weights' memory."""
    with th.device("meta"):
        return PRESETS[name].create()[0]


def test_presets_are_the_released_models():
    assert PRESETS.keys() == RELEASED.keys()
    assert len(PRESETS) == 15


@pytest.mark.parametrize("name", RELEASED)
def test_preset_has_the_released_flags(name):
    preset, released = get_preset(name), RELEASED[name]
    assert preset.kind == released["kind"]
    assert preset.file_name == f"{name}.pt"
    defaults = {
        "diffusion": script_util.model_and_diffusion_defaults,
        "upsampler": script_util.sr_model_and_diffusion_defaults,
        "classifier": script_util.classifier_and_diffusion_defaults,
    }[released["kind"]]()
    expected = {**defaults, **released["flags"]}
    if name == "64x64_classifier":  # its flags leave the process out; it was trained on the 64x64 model's
        expected["noise_schedule"] = RELEASED["64x64_diffusion"]["flags"]["noise_schedule"]
    assert preset.all_flags() == expected


@pytest.mark.parametrize("name", RELEASED)
def test_released_parameters(name):
    model, released = build_preset(name), RELEASED[name]
    shapes = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert shapes == released["state_dict"]  # names, order and shapes
    assert sum(p.numel() for p in model.parameters()) == released["parameters"]
    # An optimiser's state counts parameters in this order, and there is nothing else in a checkpoint.
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in released["state_dict"]]

    checkpoint = {key: th.empty(shape, device="meta") for key, shape in released["state_dict"]}
    model.load_state_dict(checkpoint, strict=True, assign=True)
    assert all(p.shape == checkpoint[key].shape for key, p in model.named_parameters())
    key, shape = released["state_dict"][0]
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        model.load_state_dict({**checkpoint, key: th.empty([shape[0] + 1, *shape[1:]], device="meta")}, assign=True)


@pytest.mark.parametrize("name", RELEASED)
def test_released_attention(name):
    # Neither the number of heads nor the order of channels shows in the shapes.
    flags = PRESETS[name].all_flags()
    blocks = [m for m in build_preset(name).modules() if isinstance(m, AttentionBlock)]
    assert blocks
    for block in blocks:
        if RELEASED[name]["kind"] == "classifier":
            assert block.num_heads == block.channels // 64
        elif flags["num_head_channels"] != -1:
            assert block.num_heads == block.channels // flags["num_head_channels"]
        else:
            assert block.num_heads == flags["num_heads"] == 4
        assert block.attention.n_heads == block.num_heads
        new_order = name == "64x64_diffusion"
        assert isinstance(block.attention, QKVAttention if new_order else QKVAttentionLegacy)


def test_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match="256x256_diffusion_uncond"):
        get_preset("256x256")


# Layers


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding(dim):
    t = th.tensor([0.0, 1.0, 37.5, 999.0])
    frequencies = 10000.0 ** (-np.arange(16) / 16)
    angles = t.double().numpy()[:, None] * frequencies
    want = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, dim - 32))], axis=1)
    got = timestep_embedding(t, dim)
    assert got.shape == (4, dim) and got.dtype == th.float32
    # float32 keeps angles up to 999 to 3e-5
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)
    assert th.equal(timestep_embedding(th.tensor([0, 1, 999]), dim), timestep_embedding(t[[0, 1, 3]], dim))


def test_timestep_embedding_max_period():
    got = timestep_embedding(th.tensor([2.0]), 4, max_period=100)
    want = [math.cos(2), math.cos(2 / 10), math.sin(2), math.sin(2 / 10)]
    np.testing.assert_allclose(got[0].numpy(), want, atol=1e-6)


def test_group_norm():
    norm = fill_by_name(normalization(64))
    x = 3 + 5 * randn(0, 2, 64, 6, 7)
    groups = x.double().reshape(2, 32, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    want = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    want = want * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert relative_error(norm(x), want) < 1e-6


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
    update_ema(target, iter(source))  # 0.99 unless said
    th.testing.assert_close(target[1], th.tensor(4.03))


def doubled(x, dims):
    """x with every element of its last axes (two, in three dimensions) repeated."""
    for axis in range(-min(dims, 2), 0):
        x = x.repeat_interleave(2, dim=axis)
    return x


def halved(x, dims):
    """x with neighbours of its last axes (two, in three dimensions) averaged."""
    for axis in range(-min(dims, 2), 0):
        pairs = x.unflatten(axis, (-1, 2))
        x = pairs.mean(dim=axis)
    return x


@pytest.mark.parametrize("dims, size", [(1, (6,)), (2, (6, 4)), (3, (3, 6, 4))])
def test_resampling(dims, size):
    # Videos keep their first axis, whose length may be odd.
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
        th.testing.assert_close(block(x, emb), change(x))  # a new block is the identity, but for the resampling
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


# Attention


def plain_attention(q, k, v):
    """softmax(Q K^T / sqrt(C)) V for one head: q, k, v [C, T] -> [C, T]."""
    scores = q.T @ k / math.sqrt(q.shape[0])
    return (scores.softmax(dim=-1) @ v.T).T


def plain_multi_head(qkv, heads, new_order):
    """[heads * 3 * C, T] -> [heads * C, T], head by head."""
    width = qkv.shape[0] // (3 * heads)
    results = []
    for head in range(heads):
        if new_order:  # all queries, all keys, all values
            starts = [(part * heads + head) * width for part in range(3)]
        else:  # each head's queries, keys and values
            starts = [(head * 3 + part) * width for part in range(3)]
        results.append(plain_attention(*(qkv[start : start + width] for start in starts)))
    return th.cat(results)


def to_new_order(channels, heads):
    """The permutation of a legacy projection's 3 * channels outputs that the new order reads as the same heads."""
    return th.arange(3 * channels).reshape(heads, 3, channels // heads).transpose(0, 1).flatten()


@pytest.mark.parametrize("order, new", [(QKVAttention, True), (QKVAttentionLegacy, False)])
@pytest.mark.parametrize("heads, length", [(1, 5), (4, 16), (2, 77)])
@pytest.mark.parametrize("size", [1.0, 6.0], ids=["smooth", "peaked"])
def test_attention(order, new, heads, length, size):
    qkv = size * randn(heads, 2, 3 * 16 * heads, length).double()
    want = th.stack([plain_multi_head(sample, heads, new) for sample in qkv])
    assert relative_error(order(heads)(qkv), want) < 1e-12
    assert relative_error(order(heads)(qkv.float()), want) < 1e-5


def test_attention_gradient():
    qkv = randn(0, 1, 3 * 2 * 4, 5).double().requires_grad_(True)
    assert th.autograd.gradcheck(QKVAttention(2), (qkv,))
    assert th.autograd.gradcheck(QKVAttentionLegacy(2), (qkv,))


def test_attention_block():
    block = AttentionBlock(64, num_heads=2)
    x = randn(0, 2, 64, 3, 5)
    assert th.equal(block(x), x)  # a new block is the identity
    fill_by_name(block)
    qkv = F.conv1d(plain_group_norm(x.flatten(2), block.norm), block.qkv.weight, block.qkv.bias)
    h = th.stack([plain_multi_head(sample, 2, new_order=False) for sample in qkv])
    h = F.conv1d(h, block.proj_out.weight, block.proj_out.bias).reshape(x.shape)
    th.testing.assert_close(block(x), x + h, rtol=1e-4, atol=1e-5)


def test_orders_are_one_function_up_to_a_permutation():
    options = dict(SMALL, num_head_channels=16)
    legacy = fill_by_name(UNetModel(**options))
    new = UNetModel(**options, use_new_attention_order=True).eval()
    weights = legacy.state_dict()
    for key, value in weights.items():
        if ".qkv." in key:
            channels = value.shape[0] // 3
            weights[key] = value[to_new_order(channels, channels // 16)]
    new.load_state_dict(weights)
    x, t = randn(0, 2, 3, 16, 16), th.tensor([3, 700])
    th.testing.assert_close(new(x, t), legacy(x, t), rtol=1e-4, atol=1e-5)
    new.load_state_dict(legacy.state_dict())
    assert relative_error(new(x, t), legacy(x, t)) > 1e-2  # without the permutation it is another function


def test_attention_pool():
    pool = fill_by_name(AttentionPool2d(4, 64, 32, 10))
    x = randn(0, 3, 64, 4, 4)
    tokens = x.flatten(2)
    tokens = th.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + pool.positional_embedding
    qkv = F.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias)
    h = th.stack([plain_multi_head(sample, 2, new_order=True) for sample in qkv])
    want = F.conv1d(h, pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
    th.testing.assert_close(pool(x), want, rtol=1e-4, atol=1e-5)
    assert AttentionPool2d(4, 64, 32)(x).shape == (3, 64)


def test_attention_flops():
    # thop calls count_flops with the module, its inputs and its output, and reads total_ops.
    module = QKVAttention(2)
    module.total_ops = th.zeros(1, dtype=th.float64)
    x = randn(0, 3, 3 * 2 * 8, 5)
    QKVAttention.count_flops(module, (x,), (module(x)[0:1],))
    # Q K^T and the weighted sum of values: 5 * 5 * 16 multiply-adds each
    assert module.total_ops.item() == 2 * 5 * 5 * 16


# Every option of the networks

SMALL = dict(
    image_size=16, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2),
)  # fmt: skip
OPTIONS = {
    "plain": {},
    "one dimension": dict(dims=1),
    "three dimensions": dict(dims=3),
    "three dimensions, residual": dict(dims=3, resblock_updown=True),
    "one dimension, no conv": dict(dims=1, conv_resample=False),
    "heads by number": dict(num_heads=4),
    "heads by width": dict(num_head_channels=32),
    "heads by width win": dict(num_heads=5, num_head_channels=16),
    "new order": dict(num_heads=2, use_new_attention_order=True),
    "decoder heads": dict(num_heads=2, num_heads_upsample=4),
    "scale-shift": dict(use_scale_shift_norm=True),
    "residual resampling": dict(resblock_updown=True),
    "pooled resampling": dict(conv_resample=False),
    "classes": dict(num_classes=10),
    "one class": dict(num_classes=1),
    "learned sigma": dict(out_channels=6),
    "grey": dict(in_channels=1, out_channels=2),
    "four channels": dict(in_channels=4, out_channels=4),
    "checkpointed": dict(use_checkpoint=True),
    "dropout": dict(dropout=0.3),
    "fractional": dict(model_channels=64, channel_mult=(0.5, 1, 1.5)),
    "one level": dict(model_channels=64, channel_mult=(1,), attention_resolutions=()),
    "attention everywhere": dict(attention_resolutions=(1, 2, 4), channel_mult=(1, 1, 2)),
    "deep": dict(num_res_blocks=3),
    "size 24": dict(image_size=24, channel_mult=(1, 1, 2, 2)),
    "size 48": dict(image_size=48, channel_mult=(1, 1, 1, 1, 2), attention_resolutions=(8, 16)),
    "sizes by pair": dict(image_size=(8, 24)),
    "any size": dict(image_size=None),
    "everything": dict(
        num_head_channels=16, use_new_attention_order=True, use_scale_shift_norm=True, resblock_updown=True,
        num_classes=10, out_channels=6, use_checkpoint=True, dropout=0.1,
    ),
}  # fmt: skip


def input_for(options, batch=2):
    """x, timesteps and model keyword arguments for a network of these options."""
    size = options["image_size"] or 8
    size = list(size) if isinstance(size, tuple) else [size] * 2
    size = {1: size[:1], 2: size, 3: [3, *size]}[options.get("dims", 2)]
    labels = dict(y=th.arange(batch) % options["num_classes"]) if options.get("num_classes") else {}
    return randn(7, batch, options["in_channels"], *size), th.linspace(1.5, 900, batch), labels


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    options = {**SMALL, **OPTIONS[name]}
    model = UNetModel(**options)
    x, t, labels = input_for(options)
    x.requires_grad_(True)
    assert not model(x, t, **labels).any()  # a new model's last convolution is zero
    fill_by_name(model).train()
    output = model(x, t, **labels)
    assert output.shape == (2, options["out_channels"], *x.shape[2:]) and output.dtype == th.float32
    output.pow(2).mean().backward()
    for key, p in [("x", x), *model.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), key
        # A weight that is used gets a gradient. (A bias before a norm of single channels rightly gets none.)
        assert p.ndim < 2 or p.grad.any(), key
    model.eval()
    with th.no_grad():
        once, again = model(x, t, **labels), model(x, t, **labels)
        assert th.equal(once, again)
        assert relative_error(model(x, t.flip(0), **labels), once) > 1e-3  # time matters
        alone = model(x[1:], t[1:], **{key: y[1:] for key, y in labels.items()})
        th.testing.assert_close(alone, once[1:], rtol=1e-3, atol=1e-4)  # the rest of the batch does not
        if options.get("num_classes", 1) > 1:
            assert relative_error(model(x, t, y=labels["y"].flip(0)), once) > 1e-4


@pytest.mark.parametrize("size", [(8, 16), (16, 4), (24, 8)])
def test_sizes_other_than_the_built_for(size):
    model = fill_by_name(UNetModel(**SMALL, resblock_updown=True))
    x, t = randn(0, 2, 3, *size), th.tensor([0, 500])
    with th.no_grad():
        assert model(x, t).shape == x.shape


def test_transposed_images_give_transposed_outputs():
    # With kernels that are symmetric in the two axes nothing tells height from width.
    model = fill_by_name(UNetModel(**SMALL))
    for p in model.parameters():
        if p.ndim == 4:
            p.data = (p.data + p.data.mT) / 2
    x, t = randn(0, 1, 3, 8, 16), th.tensor([100])
    with th.no_grad():
        th.testing.assert_close(model(x.mT, t), model(x, t).mT, rtol=1e-3, atol=1e-4)


def test_dropout_only_in_training():
    model = fill_by_name(UNetModel(**SMALL, dropout=0.5))
    x, t, _ = input_for(SMALL)
    with th.no_grad():
        reference = fill_by_name(UNetModel(**SMALL))(x, t)
        assert th.equal(model(x, t), reference)
        model.train()
        assert relative_error(model(x, t), model(x, t)) > 1e-2


def test_fractional_widths():
    model = UNetModel(**{**SMALL, "model_channels": 64, "channel_mult": (0.5, 1, 1.5)})
    assert model.input_blocks[0][0].out_channels == 32
    assert model.middle_block[0].channels == 96
    assert model.out[0].num_channels == 32


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_checkpointing_changes_nothing_but_memory(kind):
    def make(use_checkpoint):
        if kind == "unet":
            return fill_by_name(UNetModel(**SMALL, use_checkpoint=use_checkpoint, num_classes=4))
        return fill_by_name(EncoderUNetModel(**SMALL, use_checkpoint=use_checkpoint))

    def run(model):
        calls = []
        for module in model.modules():
            if isinstance(module, (ResBlock, AttentionBlock)):
                first = module.in_layers[0] if isinstance(module, ResBlock) else module.norm
                first.register_forward_hook(lambda *_: calls.append(1))
        x, t, labels = input_for(dict(SMALL, num_classes=4 if kind == "unet" else None))
        x.requires_grad_(True)
        output = model(x, t, **labels)
        forward = len(calls)
        output.square().sum().backward()
        return output, [x.grad, *(p.grad for p in model.parameters())], forward, len(calls) - forward

    plain_output, plain_grads, blocks, recomputed = run(make(False))
    assert recomputed == 0
    output, grads, _, recomputed = run(make(True))
    assert recomputed == blocks > 0
    assert th.equal(output, plain_output)
    for grad, plain in zip(grads, plain_grads, strict=True):
        th.testing.assert_close(grad, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def test_checkpointing_frozen_networks():
    # Guidance needs the gradient of the input alone.
    model = fill_by_name(EncoderUNetModel(**SMALL, use_checkpoint=True)).requires_grad_(False)
    x, t, _ = input_for(SMALL)
    x.requires_grad_(True)
    (grad,) = th.autograd.grad(model(x, t).sum(), x)
    assert grad.any()


def test_checkpoint_function():
    calls = []

    def function(x, y):
        calls.append(1)
        return x.square() * y

    x, y = th.tensor([3.0], requires_grad=True), th.tensor([2.0], requires_grad=True)
    for flag, expected in [(False, 1), (True, 2)]:
        calls.clear()
        assert th.autograd.grad(checkpoint(function, (x, y), (), flag), (x, y)) == (th.tensor([12.0]), th.tensor([9.0]))
        assert len(calls) == expected


def test_labels_belong_to_conditional_models():
    x, t, _ = input_for(SMALL)
    conditional = UNetModel(**SMALL, num_classes=3)
    with pytest.raises(ValueError, match="label"):
        conditional(x, t)
    with pytest.raises(ValueError, match="label"):
        UNetModel(**SMALL)(x, t, y=th.tensor([0, 1]))
    with pytest.raises(ValueError, match="3.*2"):
        conditional(x, t, y=th.tensor([0, 1, 2]))


def test_registration_order():
    # Weights drawn from a seed and an optimiser's state depend on the order in which layers are made.
    children = [name for name, _ in UNetModel(**SMALL, num_classes=4).named_children()]
    assert children == ["time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"]


# Upsamplers


@pytest.mark.parametrize("dims, mode", [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
@pytest.mark.parametrize("low_size", [4, 8])
def test_upsampler_sees_the_enlarged_image(dims, mode, low_size):
    arguments = [16, 3, 32, 6, 1, (2,)]  # by position, as a UNet's
    model = fill_by_name(SuperResModel(*arguments, channel_mult=(1, 2), dims=dims, num_classes=4))
    plain = fill_by_name(UNetModel(**{**SMALL, "in_channels": 6, "out_channels": 6}, dims=dims, num_classes=4))
    assert model.state_dict().keys() == plain.state_dict().keys()
    x, low = randn(0, 2, 3, *[16] * dims), randn(1, 2, 3, *[low_size] * dims)
    t, y = th.tensor([0, 500]), th.tensor([1, 3])
    both = th.cat([x, F.interpolate(low, x.shape[2:], mode=mode, align_corners=False)], dim=1)
    with th.no_grad():
        output = model(x, t, low_res=low, y=y)
        th.testing.assert_close(output, plain(both, t, y))
        assert output.shape == (2, 6, *x.shape[2:])


# Classifiers


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_classifier_pooling(pool):
    options = {**SMALL, "out_channels": 7, "pool": pool, "num_head_channels": 32, "resblock_updown": True}
    model = fill_by_name(EncoderUNetModel(**options))
    x, t, _ = input_for(options)
    x.requires_grad_(True)
    logits = model(x, t)
    assert logits.shape == (2, 7) and logits.dtype == th.float32
    F.cross_entropy(logits, th.tensor([0, 6])).backward()
    for key, p in [("x", x), *model.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.ndim < 2 or p.grad.any(), key
    with th.no_grad():
        assert relative_error(model(x, t.flip(0)), logits) > 1e-4


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_averaging_classifiers_take_any_shape(pool):
    model = fill_by_name(EncoderUNetModel(**{**SMALL, "image_size": None, "pool": pool}))
    with th.no_grad():
        assert model(randn(0, 2, 3, 8, 20), th.tensor([1, 2])).shape == (2, 3)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_averaging_classifiers_in_other_dimensions(dims, pool):
    options = {**SMALL, "dims": dims, "pool": pool}
    model = fill_by_name(EncoderUNetModel(**options))
    x, t, _ = input_for(options)
    with th.no_grad():
        assert model(x, t).shape == (2, 3)


def test_new_adaptive_classifier_is_undecided():
    x, t, _ = input_for(SMALL)
    assert not EncoderUNetModel(**SMALL)(x, t).any()


def test_pooled_means():
    # "spatial" sees the means of every block's output: check it through a head that passes them on.
    model = fill_by_name(EncoderUNetModel(**{**SMALL, "pool": "spatial"}))
    seen = []
    for block in [*model.input_blocks, model.middle_block]:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.mean(dim=(2, 3))))
    model.out = th.nn.Identity()
    x, t, _ = input_for(SMALL)
    with th.no_grad():
        th.testing.assert_close(model(x, t), th.cat(seen, dim=1))


# Half precision


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("attention", [QKVAttention, QKVAttentionLegacy])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["smooth", "peaked"])
def test_attention_in_half_precision(dtype, attention, size):
    # At size 30 a score is up to 1e5, beyond float16: scores and softmax must be those of float32.
    qkv = (size * randn(0, 2, 3 * 2 * 64, 100)).to(dtype)
    output = attention(2)(qkv)
    assert output.dtype == dtype
    assert relative_error(output, attention(2)(qkv.float())) < 5e-3


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_group_norm_in_half_precision(dtype):
    # Sums of squares of such numbers are beyond float16.
    x = (1000 + 300 * randn(0, 2, 64, 16, 16)).to(dtype)
    norm = fill_by_name(GroupNorm32(32, 64))
    output = norm(x)
    assert output.dtype == dtype
    assert relative_error(output, norm(x.float())) < 5e-3


@pytest.mark.parametrize("half", HALVES)
def test_embedding_stays_in_single_precision(half):
    model = fill_by_name(UNetModel(**SMALL, num_classes=4))
    x, _, labels = input_for(dict(SMALL, num_classes=4))
    t = th.tensor([998.0, 999.0])  # which float16 tells apart, and bfloat16 does not
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
                # Of the torso the convolutions are converted: what has a kernel.
                assert p.dtype == (HALVES[half] if torso and is_convolution(network, key) else th.float32), key
        output = model(x, t, **kwargs)
        assert th.equal(built_half(x, t, **kwargs), output)
        assert output.dtype == th.float32 and output.isfinite().all()
        # bfloat16 has three bits fewer
        assert relative_error(output, reference) < (5e-3 if half == "fp16" else 4e-2)
        assert not th.equal(output, reference)  # it did run in half precision
        model.convert_to_fp32()
        assert all(p.dtype == th.float32 for p in model.parameters())
        # and back, with the rounding that the weights have had: half a unit in the last of 11 or 8 bits
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
    scale = 1024.0  # lifts small gradients above float16's smallest
    (got,) = th.autograd.grad(scale * loss, x)
    assert relative_error(got / scale, want) < (1e-2 if half == "fp16" else 8e-2)


def test_hooks_on_a_block_s_layers_fire():
    """Others read features by hooks on in_layers and out_layers."""
    model, seen = UNetModel(**SMALL), []
    block = model.middle_block[0]
    block.in_layers.register_forward_hook(lambda *_: seen.append("in"))
    block.out_layers.register_forward_hook(lambda *_: seen.append("out"))
    x, t, _ = input_for(SMALL)
    model(x, t)
    assert seen == ["in", "out"]


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_runs_in_a_fused_kernel(new_order):
    # A fused kernel never holds the T x T weights. It wants each head's channels side by side in memory.
    block = AttentionBlock(64, num_heads=2, use_new_attention_order=new_order)
    with th.profiler.profile() as profile, th.no_grad():
        block(th.randn(1, 64, 16, 16))
    names = {event.name for event in profile.events()}
    assert any("flash_attention" in name for name in names), names
    assert not any("attention_math" in name for name in names)


# Combinations that cannot work


def test_sizes_that_do_not_divide():
    # The decoder could not join its maps with the encoder's. A classifier has no decoder: only its attention pool,
    # which counts positions, must know how many are left.
    for size, words in [(18, (18, 4, "(1, 1, 2)")), ((16, 10), ("16x10", 4))]:
        refused(lambda: UNetModel(**{**SMALL, "image_size": size, "channel_mult": (1, 1, 2)}), *words)
    options = {**SMALL, "image_size": 18, "channel_mult": (1, 1, 2), "num_head_channels": 32}
    refused(lambda: EncoderUNetModel(**options, pool="attention"), 18, 4)
    model = EncoderUNetModel(**options, pool="adaptive")
    assert model(th.zeros(2, SMALL["in_channels"], 18, 18), th.zeros(2)).shape == (2, SMALL["out_channels"])


def refused(build, *words):
    """Check that `build` raises InputError, in one line that holds all of the words."""
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("make", [UNetModel, EncoderUNetModel])
@pytest.mark.parametrize(
    "options, words",
    [
        (dict(model_channels=48), (48, 32)),
        (dict(channel_mult=(1, 1.5)), (48, 32)),
        (dict(channel_mult=(0.5, 1)), (16, 32)),
        (dict(num_heads=5), (64, 5)),
        (dict(num_heads=0), (64, 0)),
        (dict(num_head_channels=48), (64, 48)),
        (dict(num_head_channels=128), (64, 128)),
        (dict(use_fp16=True, use_bf16=True), ("use_fp16", "use_bf16")),
        (dict(dims=4), ("dimensions", 4, "1, 2, 3")),
    ],
    ids=str,
)
def test_impossible_networks(make, options, words):
    refused(lambda: make(**{**SMALL, **options}), *words)


def test_impossible_decoder_heads():
    refused(lambda: UNetModel(**SMALL, num_heads=2, num_heads_upsample=3), 64, 3)


def test_impossible_poolings():
    refused(lambda: EncoderUNetModel(**SMALL, pool="max"), "max", "adaptive, attention, spatial, spatial_v2")
    refused(lambda: EncoderUNetModel(**SMALL, pool="attention"), "num_head_channels")
    refused(lambda: EncoderUNetModel(**SMALL, pool="attention", num_head_channels=48), 64, 48)
    options = {**SMALL, "image_size": None}
    refused(lambda: EncoderUNetModel(**options, pool="attention", num_head_channels=32), "image_size")
    refused(lambda: AttentionPool2d(4, 64, 48), 64, 48)
    refused(lambda: AttentionPool2d(4, 64, 32)(randn(0, 1, 64, 2, 2)), 16, 4)


def test_impossible_inputs():
    model = UNetModel(**{**SMALL, "channel_mult": (1, 1, 2)})
    refused(lambda: model(randn(0, 1, 3, 16, 18), th.tensor([0])), "16x18", 4)


def test_impossible_layers():
    refused(lambda: Downsample(32, False, out_channels=64), 32, 64)
    refused(lambda: normalization(40), 40, 32)
    refused(lambda: conv_nd(0, 3, 3, 1), 0)


# From flags to networks


def flags(**changes):
    small = dict(num_channels=32, num_res_blocks=1, num_heads=2)
    return {**script_util.model_and_diffusion_defaults(), **small, **changes}


@pytest.mark.parametrize(
    "image_size, expected",
    [
        (64, (1, 2, 3, 4)),
        (128, (1, 1, 2, 3, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (32, (1, 2, 3, 4)),
        (24, (1, 2, 3)),
        (48, (1, 2, 3, 4)),
        (28, (1, 2, 3)),
        (96, (1, 2, 3, 4)),
        (7, (1,)),
    ],
)
def test_default_channel_multiples(image_size, expected):
    # The paper's for its sizes; of other sizes it is asked that they halve evenly, to no less than 4.
    assert script_util.default_channel_mult(image_size) == expected


def test_upsampler_channel_multiples():
    # At 512 the upsampler's first level is not halved.
    with th.device("meta"):
        model = script_util.sr_create_model(512, 128, 192)
    assert model.channel_mult == (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize("image_size", [24, 48])
@pytest.mark.parametrize("changes", [dict(), dict(class_cond=True, num_classes=5, in_channels=1, learn_sigma=True)])
def test_unusual_sizes_from_flags(image_size, changes):
    chosen = flags(image_size=image_size, attention_resolutions="12", **changes)
    model, diffusion = script_util.create_model_and_diffusion(**chosen)
    channels = chosen["in_channels"]
    x = randn(0, 2, channels, image_size, image_size)
    labels = dict(y=th.tensor([0, 4])) if chosen["class_cond"] else {}
    losses = diffusion.training_losses(model, x.clamp(-1, 1), th.tensor([0, 999]), model_kwargs=labels)
    losses["loss"].sum().backward()
    assert losses["loss"].shape == (2,) and losses["loss"].isfinite().all()
    assert all(p.grad is not None for p in model.parameters())
    if chosen["class_cond"]:
        assert model.label_emb.num_embeddings == 5
    assert sum(isinstance(m, AttentionBlock) for m in model.output_blocks.modules()) == 2  # at 12x12 only


def test_written_lists():
    with th.device("meta"):
        one = script_util.create_model(512, 64, 1, channel_mult="0.5, 1,1", attention_resolutions=" 32, 16, 8")
    assert one.channel_mult == (0.5, 1, 1)
    assert one.attention_resolutions == (16, 32, 64)


def test_create_model_has_its_own_defaults():
    with th.device("meta"):
        bare, scripts = script_util.create_model(64, 32, 1), script_util.create_model_and_diffusion(**flags())[0]
    assert bare.attention_resolutions == (4,) and scripts.attention_resolutions == (4, 8)
    assert bare.num_heads == 1 and not bare.use_scale_shift_norm and scripts.use_scale_shift_norm
    assert script_util.model_and_diffusion_defaults()["num_heads"] == 4


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("image_size", [24, 32])
def test_classifier_from_flags(pool, image_size):
    chosen = dict(
        script_util.classifier_and_diffusion_defaults(), image_size=image_size, classifier_width=64, classifier_depth=1,
        classifier_pool=pool, num_classes=5, in_channels=1, classifier_attention_resolutions="12,8",
    )  # fmt: skip
    classifier, diffusion = script_util.create_classifier_and_diffusion(**chosen)
    with th.no_grad():
        assert classifier(randn(0, 2, 1, image_size, image_size), th.tensor([0, 999])).shape == (2, 5)
    assert diffusion.num_timesteps == 1000


def test_upsampler_from_flags():
    small = dict(large_size=32, small_size=8, num_channels=32, num_res_blocks=1, class_cond=True, num_classes=5)
    chosen = {**script_util.sr_model_and_diffusion_defaults(), **small, "in_channels": 1, "learn_sigma": True}
    model, _ = script_util.sr_create_model_and_diffusion(**chosen)
    with th.no_grad():
        output = model(randn(0, 2, 1, 32, 32), th.tensor([0, 9]), low_res=randn(1, 2, 1, 8, 8), y=th.tensor([0, 4]))
    assert output.shape == (2, 2, 32, 32)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_channels=40), (40, 32)),
        (dict(num_heads=3), (3,)),
        (dict(image_size=30, channel_mult="1,1,1"), (30, 4)),
        (dict(channel_mult="1,x"), ("channel_mult", "1,x")),
        (dict(attention_resolutions="16;8"), ("attention_resolutions", "16;8")),
        (dict(attention_resolutions="16,0"), ("attention_resolutions", "16,0")),
        (dict(diffusion_steps=0), ("diffusion_steps", 0)),
        (dict(diffusion_steps=10), ("diffusion_steps", 10, "cosine")),
        (dict(noise_schedule="quadratic"), ("noise_schedule", "quadratic", "linear, cosine")),
        (dict(timestep_respacing="2000"), (2000, 1000)),
        (dict(timestep_respacing="fast"), ("timestep_respacing", "fast")),
        (dict(use_fp16=True, use_bf16=True), ("use_fp16", "use_bf16")),
    ],
    ids=str,
)
def test_impossible_flags(changes, words):
    with th.device("meta"):
        refused(lambda: script_util.create_model_and_diffusion(**flags(**changes)), *words)


def test_unknown_flags_are_refused():
    with pytest.raises(TypeError, match="num_layers"):
        script_util.create_model_and_diffusion(**flags(num_layers=3))
