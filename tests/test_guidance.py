"""Classifier guidance: formulas, gradients and computational cost."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import START_X, Tables, fill_by_name, process, randn, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from guided_diffusion.guidance import classifier_cond_fn, route_labels
from guided_diffusion.unet import EncoderUNetModel


def test_guided_mean_and_score_follow_the_paper():
    diffusion, t = process(mean=START_X), th.arange(1, 250)
    x, x_start, gradient = (randn(seed, 249, 2, 1, 1) for seed in (0, 1, 2))
    tables = Tables(diffusion.betas, t, x)
    out = diffusion.p_mean_variance(lambda x, t: x_start, x, t, clip_denoised=False)
    # ADM, algorithm 1: the mean moves by variance * gradient
    mean = diffusion.condition_mean(lambda x, t: gradient, out, x, t)
    assert relative_error(mean, out["mean"].double() + tables.beta * gradient) < 1e-6
    # ADM, algorithm 2: eps becomes eps - sqrt(1 - alpha_bar) * gradient
    eps = (x - tables.signal * x_start) / tables.noise - tables.noise * gradient
    new = diffusion.condition_score(lambda x, t: gradient, out, x, t)
    want = (x - tables.noise * eps) / tables.signal
    assert relative_error(new["pred_xstart"], want) < 1e-5
    posterior_mean, _, _ = diffusion.q_posterior_mean_variance(want.float(), x, t)
    assert relative_error(new["mean"], posterior_mean) < 1e-5
    assert th.equal(out["pred_xstart"], x_start)  # condition_score does not modify its input dict


class SmoothClassifier(th.nn.Module):
    """A small classifier in float64."""

    def __init__(self):
        super().__init__()
        self.layers = th.nn.Sequential(th.nn.Linear(13, 16), th.nn.Tanh(), th.nn.Linear(16, 5)).double()
        fill_by_name(self)

    def forward(self, x, t):
        return self.layers(th.cat([x.flatten(1), t[:, None].double() / 1000], dim=1))


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_classifier_gradient_equals_finite_differences(scale):
    classifier = SmoothClassifier()
    x, t, y = randn(0, 3, 3, 2, 2).double(), th.tensor([0, 10, 999]), th.tensor([0, 4, 2])
    step = 1e-5
    want = th.zeros_like(x)
    for index in np.ndindex(*x.shape):
        shift = th.zeros_like(x)
        shift[index] = step
        up, down = (classifier(x + s, t).log_softmax(1)[index[0], y[index[0]]] for s in (shift, -shift))
        want[index] = scale * (up - down) / (2 * step)
    gradient = classifier_cond_fn(classifier, scale)(x, t, y=y)
    # cond_fn converts the logits to float32, so the gradient has a relative error of about 1e-6.
    assert relative_error(gradient, want) < 1e-5
    assert not gradient.requires_grad


def encoder():
    return fill_by_name(EncoderUNetModel(
        image_size=16, in_channels=3, model_channels=32, out_channels=4, num_res_blocks=1, attention_resolutions=(4,),
        channel_mult=(1, 1, 2), num_head_channels=32, dropout=0.5, resblock_updown=True, pool="attention",
    ))  # fmt: skip


def test_guidance_does_not_change_the_classifier_and_disables_dropout():
    classifier = encoder().train()
    before = {name: p.clone() for name, p in classifier.state_dict().items()}
    cond_fn = classifier_cond_fn(classifier)
    x, t, y = randn(0, 2, 3, 16, 16), th.tensor([3, 700]), th.tensor([0, 3])
    with th.no_grad():  # sampling loops also run under no_grad
        first, second = cond_fn(x, t, y=y, other="the model's"), cond_fn(x, t, y)
    assert th.equal(first, second)  # dropout is disabled
    assert first.shape == x.shape and first.any()
    assert x.grad is None and not x.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    assert all(th.equal(p, before[name]) for name, p in classifier.state_dict().items())
    # The gradient of a sample depends only on the label of that sample.
    assert th.equal(cond_fn(x, t, th.tensor([0, 1]))[0], first[0])
    assert not th.equal(cond_fn(x, t, th.tensor([0, 1]))[1], first[1])
    with pytest.raises(TypeError, match="labels"):
        cond_fn(x, t)


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's FlopCounterMode fails for autograd.grad with respect to an input."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(function):
    with FlopCounter() as counter:
        function()
    return counter.total


def test_guidance_does_not_compute_weight_gradients():
    classifier, x, t, y = encoder(), randn(0, 2, 3, 16, 16), th.tensor([3, 700]), th.tensor([0, 3])
    forward = flops(lambda: classifier(x, t))
    trained = flops(lambda: F.cross_entropy(classifier(x.clone().requires_grad_(True), t), y).backward())
    assert trained > 2.8 * forward  # forward, input gradient and weight gradient cost about the same
    guided = flops(lambda: classifier_cond_fn(classifier)(x, t, y))
    assert 1.5 * forward < guided < 2.15 * forward


def test_route_labels_drops_labels_for_unconditional_networks():
    x, t, y = randn(0, 2, 1, 2, 2), th.tensor([0, 1]), th.tensor([5, 6])

    def network(x, t, **kwargs):
        return kwargs

    assert route_labels(network, True)(x, t, y=y) == dict(y=y)
    assert route_labels(network, False)(x, t, y=y) == {}
    assert route_labels(network, False)(x, t, y=y, low_res=3) == dict(low_res=3)
