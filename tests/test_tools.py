"""External tools work on the networks and the process: hooks, replaced layers, export, torch.func and others."""

import copy
import io
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch as th
import torch.nn as nn
from helpers import SMALL, assert_near, fill_by_name, input_for, randn, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.nn import GroupNorm32, SiLU
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import POOLS, EncoderUNetModel, QKVAttention, QKVAttentionLegacy, SuperResModel, UNetModel

STYLES = {
    "film": dict(use_scale_shift_norm=True),
    "film, updown": dict(use_scale_shift_norm=True, resblock_updown=True),
    "added": dict(conv_resample=False),
    "added, updown": dict(resblock_updown=True, use_new_attention_order=True),
}
KINDS = ("diffusion", "upsampler", *POOLS)
EVERY = [(kind, style) for kind in KINDS for style in STYLES]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_attention():
    """Unfused attention, because fused attention kernels support neither second nor forward-mode derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def network(kind="diffusion", style="film", **options):
    """A small network whose output depends on every parameter, and a tuple of inputs."""
    options = {**SMALL, **STYLES[style], "num_head_channels": 32, "dropout": 0.1, **options}
    x, t, _ = input_for(options)
    if kind == "diffusion":
        return fill_by_name(UNetModel(num_classes=4, **options)), (x, t, th.tensor([3, 0]))
    if kind == "upsampler":
        return fill_by_name(SuperResModel(**options)), (x, t, randn(8, 2, 3, 8, 8))
    return fill_by_name(EncoderUNetModel(**{**options, "out_channels": 5}, pool=kind)), (x, t)


def replace_modules(root, kinds, make):
    """Replace every module of the given types by make(module). Return the number of replaced modules."""
    found = [(name, m) for name, m in root.named_modules() if isinstance(m, kinds)]
    for name, m in found:
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, make(m))
    return len(found)


def leaves(root):
    return {name: m for name, m in root.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}


# Hooks and replaced layers


@pytest.mark.parametrize("kind, style", EVERY)
def test_the_forward_hook_of_every_leaf_module_is_called_once(kind, style):
    model, inputs = network(kind, style)
    calls = Counter()
    for name, leaf in leaves(model).items():
        leaf.register_forward_hook(lambda *_, name=name: calls.update([name]))
    for training in (False, True):
        for grad in (False, True):
            calls.clear()
            with th.set_grad_enabled(grad):
                model.train(training)(*inputs)
            assert calls == dict.fromkeys(leaves(model), 1)


@pytest.mark.parametrize("kind, style", EVERY)
def test_replaced_activations_are_used(kind, style):
    model, inputs = network(kind, style)
    before, calls = model(*inputs), []

    def relu(_):
        new = nn.ReLU()
        new.register_forward_hook(lambda *_: calls.append(1))
        return new

    count = replace_modules(model, SiLU, relu)
    assert relative_error(model(*inputs), before) > 0.01
    assert len(calls) == count > 8


@pytest.mark.parametrize("kind, style", EVERY)
def test_replacing_group_norms_by_torch_s_own_keeps_the_output(kind, style):
    model, inputs = network(kind, style)

    def plain(norm):
        new = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
        new.load_state_dict(norm.state_dict())
        return new

    before = model(*inputs)
    assert replace_modules(model, GroupNorm32, plain) > 4
    assert relative_error(model(*inputs), before) < 1e-6


class LowRank(nn.Module):
    """Wraps a layer like LoRA: adds the output of a trainable layer to that of the frozen base layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.extra = copy.deepcopy(base).requires_grad_(True)

    def forward(self, x):
        return self.base(x) + 0.1 * self.extra(x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_wrapped_as_in_lora_gets_a_gradient(kind):
    model, inputs = network(kind)
    replace_modules(model, (nn.Linear, *CONVOLUTIONS), LowRank)
    model.train()(*inputs).square().sum().backward()
    wrapped = [m for m in model.modules() if isinstance(m, LowRank)]
    assert len(wrapped) > 10
    assert all(m.extra.weight.grad.abs().sum() > 0 and m.base.weight.grad is None for m in wrapped)


def test_spectral_norm_and_weight_norm_reach_every_layer():
    for parametrise in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        model, inputs = network()
        before = model(*inputs)
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
        for layer in layers:
            parametrise(layer)
        after = model.train()(*inputs)
        assert (relative_error(model.eval()(*inputs), before) < 1e-5) == (parametrise.__name__ == "weight_norm")
        after.square().sum().backward()
        originals = [p for name, p in model.named_parameters() if "parametrizations.weight" in name]
        assert len(originals) >= len(layers) and all(p.grad.abs().sum() > 0 for p in originals)


# Tools that search for torch's own layers, and export

ONE_LEVEL = dict(channel_mult=(1,), attention_resolutions=(1,))  # small, because export takes seconds per block


def test_dynamic_quantization_finds_every_linear_layer():
    model, inputs = network()
    linear = sum(type(m) is nn.Linear for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized = th.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=th.qint8)
    found = [m for m in quantized.modules() if type(m) is th.ao.nn.quantized.dynamic.Linear]
    assert len(found) == linear > 5
    assert relative_error(quantized(*inputs), model(*inputs)) < 0.05


@pytest.mark.parametrize("kind, options", [("diffusion", {}), ("attention", {"resblock_updown": True})])
def test_export_with_a_dynamic_batch(kind, options):
    model, inputs = network(kind, **(options or ONE_LEVEL))
    batch = th.export.Dim("batch", min=1, max=64)
    program = th.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    others = tuple(th.cat([v, v, v])[:5] for v in inputs)
    assert relative_error(program.module()(*others), model(*others)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_export(dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = network(**ONE_LEVEL)
    buffer = io.BytesIO()
    if dynamo:
        th.onnx.export(model, inputs, dynamo=True, verbose=False).save(buffer)
    else:
        th.onnx.export(model, inputs, buffer, dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), inputs, strict=True)}
    assert relative_error(session.run(None, feed)[0], model(*inputs)) < 1e-4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["diffusion", "upsampler", "attention", "spatial"])
def test_jit_trace(kind):
    model, inputs = network(kind)
    traced = th.jit.trace(model, inputs)
    others = tuple(v.flip(0) for v in inputs)
    assert relative_error(traced(*others), model(*others)) < 1e-5


def test_thop_counts_as_many_flops_as_torch():
    thop = pytest.importorskip("thop")
    model, inputs = network()
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    custom_ops = {kind: kind.count_flops for kind in (QKVAttention, QKVAttentionLegacy)}
    multiply_adds, _ = thop.profile(model, inputs, custom_ops=custom_ops, verbose=False)
    assert abs(multiply_adds - counter.get_total_flops() / 2) < 0.01 * multiply_adds


# Derivatives


def test_torch_func_transforms():
    model, (x, t, y) = network()
    v = randn(11, *x.shape)

    def f(x):
        return model(x, t, y)

    with plain_attention():
        _, along = th.func.jvp(f, (x,), (v,))
    out, pull = th.func.vjp(f, x)
    (back,) = pull(out)
    double = copy.deepcopy(model).double()
    x64, v64 = x.double(), v.double()
    difference = (double(x64 + 1e-6 * v64, t, y) - double(x64 - 1e-6 * v64, t, y)) / 2e-6
    assert relative_error(along, difference) < 1e-4
    assert abs(float((back * v).sum() - (out * along).sum())) < 1e-3 * float((out * along).sum().abs())
    each = th.func.vmap(lambda x, t, y: model(x[None], t[None], y[None])[0], randomness="error")(x, t, y)
    assert relative_error(each, model(x, t, y)) < 1e-5


def test_per_sample_gradients():
    model, (x, t, y) = network()
    params = dict(model.named_parameters())

    def loss(params, x, t, y):
        return th.func.functional_call(model, params, (x[None], t[None], y[None])).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap warns that it runs some kernels in a loop
        got = th.func.vmap(th.func.grad(loss), in_dims=(None, 0, 0, 0))(params, x, t, y)
    for i in range(len(x)):
        want = th.autograd.grad(loss(params, x[i], t[i], y[i]), list(params.values()))
        assert_near([got[name][i] for name in params], want, 1e-4)


def test_double_backward():
    model, (x, t, y) = network()

    def gradient_norm(model, x):
        (g,) = th.autograd.grad(model(x, t, y).square().sum(), x, create_graph=True)
        return g.square().sum()

    with plain_attention():
        (got,) = th.autograd.grad(gradient_norm(model, x.requires_grad_()), x)
        double, x64, v = copy.deepcopy(model).double(), x.detach().double(), randn(12, *x.shape).double()
        ends = [gradient_norm(double, (x64 + d * v).requires_grad_()).detach() for d in (1e-5, -1e-5)]
    slope = float(ends[0] - ends[1]) / 2e-5
    assert abs(float((got.double() * v).sum()) - slope) < 1e-3 * abs(slope)


# Precisions and layouts


def test_double_half_and_bfloat16():
    model, (x, t, y) = network()
    want = copy.deepcopy(model).double()(x.double(), t, y)
    assert want.dtype == th.float64
    assert relative_error(model(x, t, y), want) < 1e-5
    for half, tolerance in ((th.float16, 1e-2), (th.bfloat16, 6e-2)):
        cast = copy.deepcopy(model).to(half)
        assert cast(x.to(half), t, y).dtype == half
        assert cast(x, t, y).dtype == th.float32  # with a float32 x, as samplers have, the output is float32
        assert relative_error(cast(x, t, y), want) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind):
    model, inputs = network(kind)
    before = model(*inputs)
    model.to(memory_format=th.channels_last)
    assert relative_error(model(*inputs), before) < 1e-5
    x = inputs[0].contiguous(memory_format=th.channels_last)
    assert relative_error(model(x, *inputs[1:]), before) < 1e-5


@pytest.mark.parametrize("kind", ["diffusion", "attention"])
def test_autocast(kind):
    model, inputs = network(kind)
    with th.autocast("cpu", dtype=th.bfloat16):
        got = model(*inputs)
        got.float().square().sum().backward()
    assert relative_error(got, model(*inputs)) < 6e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# The process


def process_and_model(**options):
    diffusion = create_gaussian_diffusion(learn_sigma=True, **{"timestep_respacing": "ddim5", **options})
    return diffusion, network(out_channels=6)[0], dict(y=th.tensor([1, 2])), randn(3, 2, 3, 16, 16)


def copied(thing):
    return [copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))]


def test_copies_and_pickles_before_and_after_use():
    diffusion, model, kwargs, noise = process_and_model()

    def sample(diffusion, model):
        return diffusion.ddim_sample_loop(model, noise.shape, noise=noise, model_kwargs=kwargs)

    before = copied((diffusion, model))
    want = sample(diffusion, model)
    t = th.tensor([1, 3])
    th.func.vjp(lambda x: diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs)["mean"], noise)
    for pair in before + copied((diffusion, model)):
        assert th.equal(sample(*pair), want)


def test_sampling_in_inference_mode_then_training():
    diffusion, model, kwargs, noise = process_and_model()
    with th.inference_mode():
        diffusion.p_sample(model, noise, th.tensor([1, 3]), model_kwargs=kwargs)
        diffusion.ddim_sample_loop(model, noise.shape, model_kwargs=kwargs)
    diffusion.training_losses(model, noise, th.tensor([1, 3]), model_kwargs=kwargs)["loss"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_process_first_used_inside_a_transform_trains_afterwards():
    diffusion, model, kwargs, x = process_and_model()
    t = th.tensor([1, 3])

    def mean(x):
        return diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs)["mean"]

    want = process_and_model()[0].p_mean_variance(model, x, t, model_kwargs=kwargs)["mean"]
    with plain_attention():
        th.func.jvp(mean, (x,), (x,))
        th.func.jacrev(lambda s: mean(s * x).sum())(th.ones(()))
    assert th.equal(mean(x), want)
    diffusion.training_losses(model, x, t, model_kwargs=kwargs)["loss"].mean().backward()


def test_a_timestep_tensor_may_be_changed_in_place():
    diffusion, _, _, x = process_and_model()
    steps = np.array([1, 1])
    t = th.from_numpy(steps)
    first = diffusion.q_sample(x, t, noise=x)
    steps[:] = 4
    assert th.equal(diffusion.q_sample(x, t, noise=x), diffusion.q_sample(x, th.tensor([4, 4]), noise=x))
    t.data.fill_(1)
    assert th.equal(diffusion.q_sample(x, t, noise=x), first)


def test_tables_are_read_only_and_can_be_replaced():
    diffusion, _, _, x = process_and_model()
    t = th.tensor([1, 3])
    before = diffusion.q_sample(x, t, noise=x)
    tables = [value for value in vars(diffusion).values() if isinstance(value, np.ndarray)]
    assert len(tables) >= 12
    for table in tables:
        with pytest.raises(ValueError, match="read-only"):
            table[:] = 0
    diffusion.sqrt_alphas_cumprod = np.zeros_like(diffusion.sqrt_alphas_cumprod)
    assert not th.equal(diffusion.q_sample(x, t, noise=x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_accepts_one_timestep_for_all_samples(kind):
    model, (x, _, *rest) = network(kind)
    for t in (th.tensor([7]), th.tensor([7.5])):
        assert relative_error(model(x, t, *rest), model(x, t.expand(2), *rest)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"use_kl": True}, {"learn_sigma": False}, {"rescale_timesteps": True}])
def test_a_process_accepts_one_timestep_for_all_samples(options):
    diffusion = create_gaussian_diffusion(**{"learn_sigma": True, "timestep_respacing": "ddim5", **options})
    model = network(out_channels=6 if options.get("learn_sigma", True) else 3)[0]
    kwargs, x = dict(model_kwargs={"y": th.tensor([1, 2])}), randn(3, 2, 3, 16, 16)
    for i in (0, 3):
        one, all_of_them = th.tensor([i]), th.tensor([i, i])
        for call in (
            lambda t: diffusion.p_sample(model, x, t, randn_like=lambda x: x, cond_fn=lambda x, t, y: x, **kwargs),
            lambda t: diffusion.ddim_sample(model, x, t, eta=0.5, randn_like=lambda x: x, **kwargs),
            lambda t: diffusion.ddim_reverse_sample(model, x, t, **kwargs),
            lambda t: diffusion.training_losses(model, x, t, noise=x, **kwargs),
        ):
            got, want = call(one), call(all_of_them)
            assert all(relative_error(got[name], want[name]) < 1e-5 for name in want)
