"""Layers and steps made for speed: they compute what plain torch does, and the same bits in every batch.

From top to bottom: convolutions and linear layers, the same bits whatever the batch and the threads, training steps,
upsampling. The norm with a SiLU is in test_norm_silu.py.
"""

import contextlib
import os

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    SMALL,
    all_gradients,
    assert_near,
    fill_by_name,
    input_for,
    output_and_gradients,
    randn,
    relative_error,
)
from launch import clean_environment, run
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.fp16_util import LeanAdamW
from guided_diffusion.nn import Conv1d, Conv2d, Linear
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import ResBlock, UNetModel, Upsample

needs_onednn = pytest.mark.skipif(not th.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


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
    optimizers = [kind(params[:2], lr=1e-2, **options) for kind, params in ((LeanAdamW, lean), (th.optim.AdamW, plain))]
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
import torch.utils.checkpoint  # in older versions of torch, this alone loads sympy
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
    assert last == first


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
