"""Building networks and diffusion processes from flags: defaults, lists, unusual sizes, and refused flags."""

import pytest
import torch as th
from helpers import randn

from guided_diffusion import script_util
from guided_diffusion.unet import AttentionBlock


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
    # 64, 128, 256 and 512 are the sizes in the paper. Other sizes are halved only while the result is an integer >= 4.
    assert script_util.default_channel_mult(image_size) == expected


def test_upsampler_channel_multiples():
    # At size 512, unlike the diffusion model, the upsampler does not start with a channel multiple of 0.5.
    with th.device("meta"):
        model, _ = script_util.sr_create_model_and_diffusion(
            **{**script_util.sr_model_and_diffusion_defaults(), "large_size": 512}
        )
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
    assert sum(isinstance(m, AttentionBlock) for m in model.output_blocks.modules()) == 2  # attention only at 12x12


def test_lists_in_flags_are_parsed():
    with th.device("meta"):
        one = script_util.create_model(512, 64, 1, channel_mult="0.5, 1,1", attention_resolutions=" 32, 16, 8")
    assert one.channel_mult == (0.5, 1, 1)
    assert one.attention_resolutions == (16, 32, 64)


def test_create_model_defaults_differ_from_script_defaults():
    with th.device("meta"):
        bare, scripts = script_util.create_model(64, 32, 1), script_util.create_model_and_diffusion(**flags())[0]
    assert bare.attention_resolutions == (4,) and scripts.attention_resolutions == (4, 8)
    assert bare.num_heads == 1
    assert [m.middle_block[0].use_scale_shift_norm for m in (bare, scripts)] == [False, True]
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


def test_unknown_flags_are_refused():
    with pytest.raises(TypeError, match="num_layers"):
        script_util.create_model_and_diffusion(**flags(num_layers=3))
