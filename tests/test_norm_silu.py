"""The group norm that goes with a SiLU: it computes what plain torch does, and in training keeps less."""

import gc
import weakref

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from helpers import all_gradients, assert_near, fill_by_name, output_and_gradients, randn

from guided_diffusion.nn import Conv2d, GroupNorm32, Linear, NormFirst, SiLU
from guided_diffusion.unet import ResBlock

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
def test_norm_of_many_samples_is_taken_in_parts(film, training, monkeypatch):
    monkeypatch.setattr(GroupNorm32, "MOST", 2)
    sizes, group_norm = [], th.native_group_norm

    def noting(x, *args):
        sizes.append(x.shape[:2].numel())
        return group_norm(x, *args)

    inputs = norm_inputs((5, 64, 3, 3), film)
    check_norm_silu(inputs, training=training)
    monkeypatch.setattr(th, "native_group_norm", noting)
    norm_silu(*(v.requires_grad_() for v in inputs), training=True).sum().backward()
    assert sizes == ([64, 128, 128] if film else [5 * 64])  # of the second pass, from the last part to the first


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
