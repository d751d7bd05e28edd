"""What is there for speed and memory: it computes what plain torch does, keeps less, and is the same in every batch."""

import contextlib
import gc
import json
import os
import platform
import sys
import weakref

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from helpers import SMALL, fill_by_name, input_for, randn, relative_error
from launch import clean_environment, run
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.nn import Conv1d, Conv2d, GroupNorm32, Linear, NormFirst, SiLU
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import _LeanAdamW
from guided_diffusion.unet import ResBlock, UNetModel, Upsample

needs_onednn = pytest.mark.skipif(not th.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

FILM = pytest.mark.parametrize("film", [False, True], ids=["plain", "scale_shift"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


# Norm with SiLU


def norm_inputs(shape, film):
    """x, weight and bias of a group norm, and scale and shift [N, C] with `film`."""
    n, channels = shape[:2]
    x, weight, bias = 3 + 2 * randn(0, *shape), 1 + 0.3 * randn(1, channels), 0.3 * randn(2, channels)
    return [x, weight, bias] + ([0.5 * randn(3, n, channels), 0.5 * randn(4, n, channels)] if film else [])


def plain_norm_silu(x, weight, bias, scale=None, shift=None):
    y = F.group_norm(x, 32, weight, bias, eps=1e-5)
    if scale is not None:
        scale, shift = (v.reshape(*v.shape, *[1] * (x.ndim - 2)) for v in (scale, shift))
        y = y * (1 + scale) + shift
    return F.silu(y)


def norm_silu(x, weight, bias, *film, training=True):
    norm = GroupNorm32(32, x.shape[1]).train(training)
    return th.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, *film), {"silu": True})


def output_and_gradients(function, inputs, wanted=None):
    """function(*inputs), and the gradients, to the inputs at the `wanted` positions, of its product with noise."""
    wanted = range(len(inputs)) if wanted is None else wanted
    inputs = [v.detach().clone().requires_grad_(i in wanted) for i, v in enumerate(inputs)]
    y = function(*inputs)
    return [y, *th.autograd.grad(y, [inputs[i] for i in wanted], randn(9, *y.shape).to(y.dtype))]


def assert_near(got, want, tolerance):
    """Compare lists of tensors, each by its largest element's size."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        g, w = g.detach().double(), w.detach().double()
        error, size = float((g - w).abs().max()), float(w.abs().max())
        assert error <= tolerance * max(size, 1), (i, error, size)


def check_norm_silu(inputs, wanted=None, tolerance=5e-6, **options):
    got = output_and_gradients(lambda *v: norm_silu(*v, **options), inputs, wanted)
    want = output_and_gradients(plain_norm_silu, [v.double() for v in inputs], wanted)
    assert got[0].dtype == inputs[0].dtype
    assert [g.dtype for g in got[1:]] == [inputs[i].dtype for i in wanted or range(len(inputs))]
    assert_near(got, want, tolerance)


SHAPES = {
    "1D": (2, 64, 7),
    "2D": (3, 64, 5, 4),
    "3D": (2, 64, 3, 2, 3),
    "vectors": (2, 320),
    "one sample": (1, 32, 6, 6),
}


@TRAINING
@FILM
@pytest.mark.parametrize("name", SHAPES)
def test_norm_with_silu(name, film, training):
    check_norm_silu(norm_inputs(SHAPES[name], film), training=training)


@TRAINING
@FILM
def test_norm_of_single_numbers(film, training):
    # One channel a group and one pixel: nothing but the bias is left, and rounding is magnified by 1 / sqrt(1e-5).
    check_norm_silu(norm_inputs((2, 32, 1, 1), film), tolerance=1e-3, training=training)


@FILM
@pytest.mark.parametrize("layout", ["channels last", "transposed", "sliced"])
def test_norm_of_what_is_not_contiguous(layout, film):
    x, *rest = norm_inputs((2, 64, 4, 6), film)
    change = {
        "channels last": lambda x: x.contiguous(memory_format=th.channels_last),
        "transposed": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: th.cat([x, x], dim=1)[:, :64],
    }[layout]
    got = output_and_gradients(lambda x, *rest: norm_silu(change(x), *rest), [x, *rest])
    assert not change(x).is_contiguous()
    assert_near(got, output_and_gradients(plain_norm_silu, [v.double() for v in (x, *rest)]), 5e-6)


@TRAINING
@FILM
@pytest.mark.parametrize("half, tolerance", [(th.bfloat16, 2e-2), (th.float16, 3e-3)], ids=["bf16", "fp16"])
def test_norm_with_silu_in_half_precision(half, tolerance, film, training):
    x, *rest = norm_inputs((2, 64, 5, 4), film)
    check_norm_silu([x.to(half), *rest], tolerance=tolerance, training=training)


@pytest.mark.parametrize("film, wanted", [
    (False, [0]), (False, [1]), (False, [2]), (False, [1, 2]), (True, [0]), (True, [1, 2]), (True, [3]), (True, [4]),
    (True, [0, 4]),
])  # fmt: skip
def test_norm_of_which_a_part_is_frozen(film, wanted):
    check_norm_silu(norm_inputs((2, 64, 5, 4), film), wanted)


def test_norm_of_which_all_is_frozen():
    y = norm_silu(*norm_inputs((2, 64, 5, 4), True))
    assert not y.requires_grad


# A norm with SiLU and the layers that read it


def after_norm(*layers, channels=64):
    """A norm with SiLU and the layers, run as one operation and one by one."""
    module = fill_by_name(NormFirst(GroupNorm32(32, channels), SiLU(), *layers)).train()

    def one_by_one(x, *film):
        x = plain_norm_silu(x, module[0].weight, module[0].bias, *film)
        for layer in layers:
            x = layer(x)
        return x

    return module, one_by_one


def all_gradients(module, function, inputs, seed=0):
    """function(*inputs) and the gradients to the inputs and the module's parameters, with a seed for dropout."""
    inputs = [v.detach().clone().requires_grad_(True) for v in inputs]
    th.manual_seed(seed)
    y = function(*inputs)
    return [y, *th.autograd.grad(y.float().square().mean(), [*inputs, *module.parameters()])]


class Transposed(nn.Module):
    """Keeps a view of its input that is not contiguous."""

    def forward(self, x):
        return x.mT.square()


READERS = {
    "convolution": lambda: [nn.Dropout(0.0), Conv2d(64, 32, 3, padding=1)],
    "dropout": lambda: [nn.Dropout(0.4), Conv2d(64, 32, 3, padding=1)],
    "strided": lambda: [Conv2d(64, 32, 3, stride=2)],
    "pool": lambda: [nn.AdaptiveAvgPool2d(1), Conv2d(64, 8, 1), nn.Flatten()],
    "views": lambda: [nn.Flatten(), Linear(64 * 64, 8)],
    "transposed": lambda: [Transposed(), Conv2d(64, 32, 3, padding=1)],
    "several": lambda: [SiLU(), Conv2d(64, 32, 3, padding=1), SiLU()],
    # What the first layer has read is freed: another's input may take its place.
    "dropout first": lambda: [nn.Dropout(0.4), SiLU(), Conv2d(64, 64, 3, padding=1), SiLU(), Conv2d(64, 8, 1)],
}


@FILM
@pytest.mark.parametrize("name", READERS)
def test_layers_after_the_norm(name, film):
    module, one_by_one = after_norm(*READERS[name]())
    x, _, _, *film = norm_inputs((2, 64, 8, 8), film)
    want = all_gradients(module, one_by_one, [x, *film])
    assert_near(all_gradients(module, module, [x, *film]), want, 1e-5)
    assert_near(all_gradients(module.eval(), one_by_one, [x, *film]), all_gradients(module, module, [x, *film]), 1e-5)


@FILM
@pytest.mark.parametrize("half", [th.bfloat16, th.float16], ids=["bf16", "fp16"])
def test_layers_after_the_norm_in_half_precision(half, film):
    module, _ = after_norm(Conv2d(64, 32, 3, padding=1).to(half))
    x, _, _, *film = norm_inputs((2, 64, 4, 4), film)

    def in_float32(x, *film):
        h = plain_norm_silu(x.float(), module[0].weight, module[0].bias, *film)
        return module[2](h.to(half))

    inputs = [x.to(half), *film]
    assert_near(all_gradients(module, module, inputs), all_gradients(module, in_float32, inputs), 2e-2)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("layers", [
    lambda: [nn.Dropout(0.4), Conv2d(32, 32, 3, padding=1)],
    lambda: [nn.Dropout(0.4), SiLU(), Conv2d(32, 8, 1)],
], ids=["convolution", "silu"])  # fmt: skip
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float32"])
def test_tensors_that_take_a_freed_one_s_place_are_not_taken_for_it(size, layers, autocast):
    # Sizes differ in whether the allocator gives the place of dropout's input to one of as many elements.
    module, one_by_one = after_norm(*layers(), channels=32)
    inputs = norm_inputs((2, 32, size, size), True)
    with th.autocast("cpu", dtype=th.bfloat16, enabled=autocast):
        got, want = (all_gradients(module, f, [inputs[0], *inputs[3:]]) for f in (module, one_by_one))
    assert_near(got, want, 2e-2 if autocast else 1e-5)


# Residual blocks: gradients of gradients, repeated ones, of single samples


def block_and_inputs(film, **options):
    block = fill_by_name(ResBlock(64, 16, use_scale_shift_norm=film, **{"dropout": 0.0, **options}))
    return block, randn(0, 3, 64, 4, 4), randn(1, 3, 16)


@FILM
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}], ids=["same", "up", "down"])
def test_gradients_of_gradients(film, resample):
    block, *inputs = block_and_inputs(film, out_channels=64, **resample)

    def gradients(training):
        block.train(training)
        wanted = [v.clone().requires_grad_(True) for v in inputs]
        y = block(*wanted)
        wanted += block.parameters()
        first = th.autograd.grad(y.square().sum(), wanted, create_graph=True)
        length = sum(g.square().mean() for g in first)
        return [*first, *th.autograd.grad(length, wanted, materialize_grads=True, allow_unused=True)]

    want = gradients(training=False)
    assert want[-2].any()
    assert_near(gradients(training=True), want, 1e-5)


def test_gradients_of_gradients_where_the_scale_depends_on_x():
    """Each dependence counts once."""
    norm = fill_by_name(GroupNorm32(32, 64)).train()
    x = randn(0, 2, 64, 3, 3)

    def first(function, dtype):
        leaf = x.to(dtype).requires_grad_(True)
        weight, bias = (p.to(dtype) for p in (norm.weight, norm.bias))
        y = function(leaf, weight, bias, leaf.mean((2, 3)), leaf.std((2, 3)))
        (g,) = th.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return [g, *th.autograd.grad(g.square().sum(), leaf)]

    assert_near(first(norm_silu, th.float32), first(plain_norm_silu, th.float64), 1e-5)


@TRAINING
@FILM
def test_an_empty_batch_passes(film, training):
    block, x, emb = block_and_inputs(film)
    x = x[:0].requires_grad_(True)
    y = block.train(training)(x, emb[:0])
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64, 4, 4)


@FILM
def test_backward_passes_repeat(film):
    block, *inputs = block_and_inputs(film)
    block.train()
    wanted = [v.requires_grad_(True) for v in inputs]
    loss = block(*wanted).square().sum()
    wanted += block.parameters()
    once = th.autograd.grad(loss, wanted, retain_graph=True)
    alone = th.autograd.grad(loss, wanted[-1], retain_graph=True)  # a convolution's, which does not reach the norms
    with_graph = th.autograd.grad(loss, wanted, create_graph=True)
    again = th.autograd.grad(loss, wanted)
    assert all(th.equal(a, b) for a, b in zip(once, again))
    assert th.equal(alone[0], once[-1])
    assert_near(with_graph, once, 1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@TRAINING
@FILM
def test_per_sample_gradients(film, training):
    block, *inputs = block_and_inputs(film)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters, x, emb):
        return th.func.functional_call(block, parameters, (x[None], emb[None])).square().sum()

    def one_by_one():
        for x, emb in zip(*inputs):
            yield th.autograd.grad(block(x[None], emb[None]).square().sum(), list(block.parameters()))

    want = [th.stack(of_samples) for of_samples in zip(*one_by_one())]
    block.train(training)
    got = th.func.vmap(th.func.grad(loss), (None, 0, 0))(parameters, *inputs)
    assert_near(got.values(), want, 1e-5)


# What is kept for the backward pass


def inputs_alive(block, inputs, layers):
    """Whether, after the forward pass, the inputs of the named layers are still there."""
    kept = []
    for name in layers:
        block.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0])))
    output = block(*inputs)
    gc.collect()
    assert output.grad_fn is not None and len(kept) == len(layers)
    return [reference() is not None for reference in kept]


CONVOLUTIONS_OF_A_BLOCK = ["in_layers.2", "out_layers.3"]


@FILM
def test_training_drops_what_convolutions_read(film):
    block, *inputs = block_and_inputs(film)
    assert inputs_alive(block.eval(), inputs, CONVOLUTIONS_OF_A_BLOCK) == [True, True]
    block, *inputs = block_and_inputs(film)
    assert inputs_alive(block.train(), inputs, CONVOLUTIONS_OF_A_BLOCK) == [False, False]


@TRAINING
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_checkpointed_block_keeps_none_of_it(dropout, training):
    block, *inputs = block_and_inputs(True, use_checkpoint=True, dropout=dropout)
    assert inputs_alive(block.train(training), inputs, CONVOLUTIONS_OF_A_BLOCK) == [False, False]


@FILM
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_a_block_leaves_its_gradients(dropout, film):
    plain, *inputs = block_and_inputs(film, dropout=dropout)
    checkpointed, *_ = block_and_inputs(film, dropout=dropout, use_checkpoint=True)
    want, got = (all_gradients(block.train(), block, inputs) for block in (plain, checkpointed))
    assert all(th.equal(g, w) for g, w in zip(got, want, strict=True))


# Convolutions and linear layers


OPTIONS = {
    "same size": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1),
    "no bias": dict(kernel_size=3, bias=False),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=3, dilation=2, padding=2),
    "groups": dict(kernel_size=3, groups=2, padding=1),
    "depthwise": dict(kernel_size=3, groups=4, padding=1),
    "all": dict(kernel_size=5, stride=3, padding=4, dilation=2, groups=2),
}
CONVOLUTIONS = {f"{name}, {dims}D": (dims, options) for name, options in OPTIONS.items() for dims in (1, 2)}
CONVOLUTIONS["uneven"] = 2, dict(kernel_size=(3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
PLAIN = {1: F.conv1d, 2: F.conv2d}
EITHER = pytest.mark.parametrize("dims", [1, 2], ids=["1D", "2D"])


def conv_and_plain(dims, bias=True, **options):
    """A convolution from 4 to 8 channels, torch's function of it, and an input."""
    layer = fill_by_name({1: Conv1d, 2: Conv2d}[dims](4, 8, bias=bias, **options))
    named = {k: v for k, v in options.items() if k != "kernel_size"}

    def plain(x):
        return PLAIN[dims](x, layer.weight, layer.bias, **named)

    return layer, plain, randn(0, 2, 4, *[9, 8][:dims])


@TRAINING
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, training):
    dims, options = CONVOLUTIONS[name]
    layer, plain, x = conv_and_plain(dims, **options)
    layer.train(training)
    assert_near(all_gradients(layer, layer, [x]), all_gradients(layer, plain, [x]), 1e-6)


@EITHER
def test_convolution_of_one_image_without_a_batch(dims):
    layer, plain, x = conv_and_plain(dims, kernel_size=3, padding=1)
    th.testing.assert_close(layer(x[0]), plain(x[0]))


@EITHER
def test_convolution_in_double_precision(dims):
    layer, _, x = conv_and_plain(dims, kernel_size=3, padding=1)
    single, layer, x = layer(x), layer.double(), x.double()
    plain = PLAIN[dims](x, layer.weight, layer.bias, padding=1)
    assert layer(x).dtype == th.float64 and relative_error(layer(x), plain) < 1e-15
    assert 0 < relative_error(single, plain) < 1e-6


@EITHER
def test_convolution_with_padding_by_name(dims):
    layer, plain, x = conv_and_plain(dims, kernel_size=3, padding="same", dilation=2)
    th.testing.assert_close(layer(x), plain(x))
    assert layer(x).shape[2:] == x.shape[2:]
    layer, _, x = conv_and_plain(dims, kernel_size=3)
    around = type(layer)(4, 8, 3, padding=2, padding_mode="circular")
    around.load_state_dict(layer.state_dict())
    th.testing.assert_close(around(x), layer(F.pad(x, [2, 2] * dims, mode="circular")))


@pytest.mark.parametrize("layout", ["channels last", "transposed", "one image twice"])
def test_convolution_of_what_is_not_contiguous(layout):
    layer, plain, x = conv_and_plain(2, kernel_size=3, padding=1)
    x = {"channels last": x.contiguous(memory_format=th.channels_last), "transposed": x.mT,
         "one image twice": x[:1].expand(2, -1, -1, -1)}[layout]  # fmt: skip
    assert_near(all_gradients(layer, layer, [x]), all_gradients(layer, plain, [x]), 1e-6)


@EITHER
def test_convolution_under_autocast(dims):
    layer, plain, x = conv_and_plain(dims, kernel_size=3, padding=1)
    want = all_gradients(layer, plain, [x])
    with th.autocast("cpu", dtype=th.bfloat16):
        got = all_gradients(layer, layer, [x])
    assert got[0].dtype == th.bfloat16 and got[1].dtype == th.float32
    assert_near(got, want, 2e-2)


@pytest.mark.parametrize("shape", [(3, 5), (5,), (2, 3, 5), (0, 5)], ids=str)
@TRAINING
def test_linear(shape, training):
    layer = fill_by_name(Linear(5, 7)).train(training)
    x = randn(0, *shape)

    def plain(x):
        return F.linear(x, layer.weight, layer.bias)

    th.testing.assert_close(layer(x), plain(x))
    if x.numel():
        assert_near(all_gradients(layer, layer, [x]), all_gradients(layer, plain, [x]), 1e-6)
    double, x = layer.double(), x.double()
    assert th.equal(double(x), plain(x))


def test_linear_under_autocast():
    layer = fill_by_name(Linear(5, 7))
    with th.autocast("cpu", dtype=th.bfloat16):
        y = layer(randn(0, 3, 5))
    assert y.dtype == th.bfloat16
    assert relative_error(y, F.linear(randn(0, 3, 5), layer.weight, layer.bias)) < 1e-2


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: th.device("meta")], ids=["fake", "meta"])
@pytest.mark.filterwarnings("error")
@TRAINING
def test_shapes_without_numbers(mode, training):
    """As compilers and planners of memory ask for them."""
    with mode():
        block = ResBlock(64, 16, 0.0, use_scale_shift_norm=True, down=True).train(training)
        y = block(th.zeros(2, 64, 4, 4), th.zeros(2, 16))
        y.sum().backward()
        assert y.shape == (2, 64, 2, 2)
        assert all(p.grad.shape == p.shape for p in block.parameters())
        assert Conv1d(4, 6, 3)(th.zeros(2, 4, 8)).shape == (2, 6, 6)
        assert Linear(4, 6).eval()(th.zeros(2, 4)).shape == (2, 6)


def operations(function, x):
    """How many operations torch counts forward, and forward and backward."""
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    x = x.clone().requires_grad_(True)
    with forward:
        function(x)
    with both:
        function(x).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operations_of_convolutions_are_counted(name):
    dims, options = CONVOLUTIONS[name]
    layer, plain, x = conv_and_plain(dims, **options)
    got, want = operations(layer, x), operations(plain, x)
    assert got == want and want[1] > want[0] > 0


def test_operations_of_linear_layers_are_counted():
    assert operations(Linear(5, 7).eval(), randn(0, 3, 5)) == (2 * 3 * 5 * 7, 3 * 2 * 3 * 5 * 7)


# The same bits whatever the batch and the threads


@contextlib.contextmanager
def threads(count):
    before = th.get_num_threads()
    th.set_num_threads(count)
    try:
        yield
    finally:
        th.set_num_threads(before)


UNETS = {
    "resampling layers": {},
    "residual resampling": dict(
        resblock_updown=True, use_scale_shift_norm=True, use_new_attention_order=True, num_head_channels=16,
        num_classes=4,
    ),
}  # fmt: skip


def assert_bits_of_each_alone(function, inputs, on_two_threads=(1, 3)):
    """Check that function(*inputs), of five samples, is in every batch and on every thread what it is for each alone.

    :param on_two_threads: the batches to try there: slow, where other work shares the cores.
    """
    with th.no_grad():
        alone = th.cat([function(*(v[i : i + 1] for v in inputs)) for i in range(5)])
        for number, batches in ((1, (2, 3, 5)), (2, on_two_threads)):
            with threads(number):
                for size in batches:
                    batch = function(*(v[-size:] for v in inputs))  # so that no sample always comes first
                    assert th.equal(batch, alone[-size:]), (number, size)


@needs_onednn
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", UNETS)
def test_an_image_s_output_depends_neither_on_its_batch_nor_on_threads(name, half):
    options = {**SMALL, **UNETS[name]}
    model = fill_by_name(UNetModel(**options))
    if half:
        model.convert_to_bf16()
    x, t, labels = input_for(options, batch=5)
    assert_bits_of_each_alone(model, [x, t, *labels.values()])


@needs_onednn
@pytest.mark.parametrize("make", [
    lambda: (Conv2d(32, 48, 3, padding=1), (16, 16)),
    lambda: (Conv2d(32, 48, 3, padding=1), (3, 5)),
    lambda: (Conv2d(3, 32, 3, padding=1, stride=2), (16, 16)),
    lambda: (Conv1d(64, 96, 1), (64,)),
    lambda: (Linear(128, 512), ()),
], ids=["images", "small images", "strided", "sequences", "vectors"])  # fmt: skip
def test_a_layer_s_output_depends_neither_on_the_batch_nor_on_threads(make):
    layer, size = make()
    assert_bits_of_each_alone(fill_by_name(layer), [randn(0, 5, layer.weight.shape[1], *size)], (1, 2, 3, 5))


@needs_onednn
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_sample_depends_neither_on_its_batch_nor_on_threads(loop):
    model = fill_by_name(UNetModel(**SMALL, resblock_updown=True))
    diffusion = create_gaussian_diffusion(steps=100, timestep_respacing="3")

    def sample(noise, noise_of_steps):
        of_steps = iter(noise_of_steps.unbind(1))
        options = dict(noise=noise, device="cpu", randn_like=lambda _: next(of_steps))
        return getattr(diffusion, loop)(model, noise.shape, **options)

    inputs = [randn(0, 5, 3, 16, 16), randn(1, 5, 3, 3, 16, 16)]
    assert_bits_of_each_alone(sample, inputs, on_two_threads=[2] if loop == "ddim_sample_loop" else [])


# Training steps


@pytest.mark.parametrize(
    "options", [dict(fused=True), dict(fused=True, weight_decay=0.1), dict(foreach=False)], ids=str
)
def test_the_optimizer_takes_adamw_s_steps(options):
    lean, plain = ([nn.Parameter(randn(i, *shape)) for i, shape in enumerate([(3, 4), (5,), ()])] for _ in range(2))
    optimizers = [
        kind(params[:2], lr=1e-2, **options) for kind, params in ((_LeanAdamW, lean), (th.optim.AdamW, plain))
    ]
    for optimizer, params in zip(optimizers, (lean, plain)):
        optimizer.add_param_group({"params": params[2:], "lr": 1e-3})
        steps = []
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = randn(100 + 10 * step + i, *p.shape) if (step, i) != (2, 1) else None
            optimizer.step()
        assert len(steps) == 5
    assert all(th.equal(a, b) for a, b in zip(lean, plain))
    assert not th.equal(lean[0], randn(0, 3, 4))
    got, want = (optimizer.state_dict() for optimizer in optimizers)
    assert got["param_groups"] == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    for i in want["state"]:
        assert list(got["state"][i]) == list(want["state"][i]) == ["step", "exp_avg", "exp_avg_sq"]
        assert all(th.equal(got["state"][i][key], value) for key, value in want["state"][i].items())


HEAVY = """
import sys
import torch
heavy = ("torch._dynamo", "sympy")
print([name for name in heavy if name in sys.modules])
from helpers import batch_of, new_loop, new_model
loop = new_loop(*new_model())
before = [p.detach().clone() for p in loop.mp_trainer.master_params]
loop.run_step(batch_of(6), {})
assert not all(torch.equal(a, b) for a, b in zip(before, loop.mp_trainer.master_params))
print([name for name in heavy if name in sys.modules])
"""


def test_a_training_step_does_not_load_the_compiler(tmp_path):
    tests = os.path.dirname(__file__) + os.pathsep + clean_environment()["PYTHONPATH"]
    done = run(["-c", HEAVY], env=dict(PYTHONPATH=tests, OPENAI_LOGDIR=str(tmp_path))).check()
    first, *_, last = done.output.splitlines()
    if first != "[]":
        pytest.skip(f"importing torch alone loads {first}")
    assert last == "[]"


FAULTS = """
import json, resource
from guided_diffusion import dist_util
dist_util.setup_dist()
import torch as th
found = []
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    th.ones(10 * 2**20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="memory is kept by asking glibc for it"
)
def test_freed_memory_is_used_again():
    """Tensors of 40 MB, in pages of 4 KB or 2 MB, lie where earlier ones lay: that costs no page faults.

    Some of the first do not: small objects lie in the way. Above 32 MB glibc alone would give back each.
    """
    found = json.loads(run(["-c", FAULTS]).check().output.splitlines()[-1])
    assert found[0] >= 20
    assert sum(found[-20:]) < 200, found


# Upsampling


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16, th.float64], ids=str)
@pytest.mark.parametrize("size", [(5,), (5, 3), (3, 5, 2)], ids=["1D", "2D", "3D"])
def test_upsampling_is_interpolation_by_the_nearest(size, dtype):
    dims = len(size)
    factors = [1.0, 2.0, 2.0] if dims == 3 else [2.0] * dims
    layer, x = Upsample(4, False, dims), randn(0, 2, 4, *size).to(dtype)
    layouts = [x, x.mT if dims > 1 else x[:, :, ::2]]
    if dims == 2:
        layouts.append(x.contiguous(memory_format=th.channels_last))
    for x in layouts:
        functions = [layer, lambda x: F.interpolate(x, scale_factor=factors, mode="nearest")]
        (got, got_gradient), (want, want_gradient) = (output_and_gradients(f, [x]) for f in functions)
        assert th.equal(got, want)
        assert_near([got_gradient], [want_gradient], 1e-2 if dtype == th.bfloat16 else 1e-6)
