"""Sampling and losses keep all tensors on one device and never synchronise. The "meta" device stands in for a GPU.

Meta tensors have no values, so an operation that would wait for a value on a GPU raises an error on "meta".
"""

import pytest
import torch as th
from sampling import CLASSIFIER, MODEL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from guided_diffusion.guidance import classifier_cond_fn
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

SHAPE = (2, 3, 8, 8)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of different devices, except scalars, and records copies between devices."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, th.Tensor) and v.ndim]
        made = [v for v in tree_leaves(result) if isinstance(v, th.Tensor) and v.ndim]
        if function in (th.ops.aten._to_copy.default, th.ops.aten.copy_.default):
            if len({v.device for v in given + made}) > 1:
                self.moved.append((function, [v.shape for v in made]))
        else:
            assert len({v.device for v in given}) < 2, (function, [(v.shape, v.device) for v in given])
        return result


def build(**options):
    with th.device("meta"):
        model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL, **options})
        classifier = create_classifier(**{**classifier_defaults(), **CLASSIFIER})
    for network in (model, classifier):
        network.eval().requires_grad_(False)
    return model, diffusion, classifier, {"y": th.zeros(2, dtype=th.int64, device="meta")}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sampling_does_not_synchronise_or_copy_between_devices(precision, name, guided):
    model, diffusion, classifier, labels = build(timestep_respacing="5")
    for network in (model, classifier):
        getattr(network, f"convert_to_{precision}")()
    cond_fn = classifier_cond_fn(classifier, 1.0) if guided else None
    with OneDevice() as watch:
        steps = getattr(diffusion, name)(model, SHAPE, device="meta", model_kwargs=labels, cond_fn=cond_fn)
        next(steps)
        watch.moved.clear()  # the first step copies the schedule's tables to the device
        samples = [out["sample"] for out in steps]
    assert [(x.device.type, x.shape) for x in samples] == [("meta", SHAPE)] * 4
    assert not watch.moved


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("loss", [{}, {"learn_sigma": False}, {"use_kl": True}, {"rescale_learned_sigmas": True}])
def test_training_losses_do_not_synchronise_or_copy_between_devices(loss, precision):
    model, diffusion, _, labels = build(**loss)
    getattr(model, f"convert_to_{precision}")()
    model.train().requires_grad_(True)
    x, t = th.zeros(SHAPE, device="meta"), th.zeros(2, dtype=th.int64, device="meta")
    for _ in range(2):
        with OneDevice() as watch:
            diffusion.training_losses(model, x, t, labels)["loss"].mean().backward()
    assert not watch.moved
    assert all(p.grad.device.type == "meta" for p in model.parameters())
