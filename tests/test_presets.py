"""Presets of the released models: flags, parameters and attention."""

import pytest
import torch as th
from helpers import load_json

from guided_diffusion.presets import PRESETS
from guided_diffusion.unet import AttentionBlock, QKVAttention, QKVAttentionLegacy

RELEASED = load_json("released_models.json.gz")


def build_preset(name):
    """Build a released model on the meta device, which allocates no memory for weights."""
    with th.device("meta"):
        return PRESETS[name].create()[0]


def test_there_is_a_preset_for_each_released_model():
    assert PRESETS.keys() == RELEASED.keys()
    assert len(PRESETS) == 15


@pytest.mark.parametrize("name", RELEASED)
def test_preset_has_the_released_flags(name):
    assert PRESETS[name].all_flags().items() >= RELEASED[name]["flags"].items()


@pytest.mark.parametrize("name", RELEASED)
def test_preset_has_the_released_parameters(name):
    model, released = build_preset(name), RELEASED[name]
    shapes = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert shapes == released["state_dict"]  # parameter names, order and shapes are equal
    assert sum(p.numel() for p in model.parameters()) == released["parameters"]
    # Optimiser state refers to parameters by their order. Released checkpoints contain parameters only, no buffers.
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in released["state_dict"]]


@pytest.mark.parametrize("name", RELEASED)
def test_preset_has_the_released_attention(name):
    # The number of heads and the order of the qkv channels cannot be inferred from parameter shapes.
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
