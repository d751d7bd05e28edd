"""The released models: their flags, parameters and attention."""

import pytest
import torch as th
from helpers import load_json

from guided_diffusion import script_util
from guided_diffusion.presets import PRESETS, get_preset
from guided_diffusion.unet import AttentionBlock, QKVAttention, QKVAttentionLegacy

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
