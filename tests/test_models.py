"""UNets, upsamplers and classifiers: every option, and the combinations of options that are refused."""

import pytest
import torch as th
import torch.nn.functional as F
from helpers import SMALL, fill_by_name, input_for, randn, refused, relative_error

from guided_diffusion.nn import conv_nd, normalization
from guided_diffusion.unet import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    SuperResModel,
    UNetModel,
)

# UNet options

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


@pytest.mark.parametrize("name", OPTIONS)
def test_unet_option(name):
    options = {**SMALL, **OPTIONS[name]}
    model = UNetModel(**options)
    x, t, labels = input_for(options)
    x.requires_grad_(True)
    assert not model(x, t, **labels).any()  # the last convolution is initialised to zero
    fill_by_name(model).train()
    output = model(x, t, **labels)
    assert output.shape == (2, options["out_channels"], *x.shape[2:]) and output.dtype == th.float32
    output.pow(2).mean().backward()
    for key, p in [("x", x), *model.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), key
        # Every weight matrix has a nonzero gradient. A bias before a norm with one channel per group has none.
        assert p.ndim < 2 or p.grad.any(), key
    model.eval()
    with th.no_grad():
        once, again = model(x, t, **labels), model(x, t, **labels)
        assert th.equal(once, again)
        assert relative_error(model(x, t.flip(0), **labels), once) > 1e-3  # the output depends on the timestep
        alone = model(x[1:], t[1:], **{key: y[1:] for key, y in labels.items()})
        th.testing.assert_close(alone, once[1:], rtol=1e-3, atol=1e-4)  # independent of other images in the batch
        if options.get("num_classes", 1) > 1:
            assert relative_error(model(x, t, y=labels["y"].flip(0)), once) > 1e-4


@pytest.mark.parametrize("size", [(8, 16), (16, 4), (24, 8)])
def test_input_size_may_differ_from_image_size(size):
    model = fill_by_name(UNetModel(**SMALL, resblock_updown=True))
    x, t = randn(0, 2, 3, *size), th.tensor([0, 500])
    with th.no_grad():
        assert model(x, t).shape == x.shape


def test_transposed_images_give_transposed_outputs():
    # If all kernels are symmetric, the network is equivariant to transposing height and width.
    model = fill_by_name(UNetModel(**SMALL))
    for p in model.parameters():
        if p.ndim == 4:
            p.data = (p.data + p.data.mT) / 2
    x, t = randn(0, 1, 3, 8, 16), th.tensor([100])
    with th.no_grad():
        th.testing.assert_close(model(x.mT, t), model(x, t).mT, rtol=1e-3, atol=1e-4)


def test_dropout_is_active_only_in_training_mode():
    model = fill_by_name(UNetModel(**SMALL, dropout=0.5))
    x, t, _ = input_for(SMALL)
    with th.no_grad():
        reference = fill_by_name(UNetModel(**SMALL))(x, t)
        assert th.equal(model(x, t), reference)
        model.train()
        assert relative_error(model(x, t), model(x, t)) > 1e-2


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_activation_checkpointing_does_not_change_outputs_and_gradients(kind):
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


def test_activation_checkpointing_of_frozen_networks():
    # Classifier guidance computes only the gradient with respect to the input.
    model = fill_by_name(EncoderUNetModel(**SMALL, use_checkpoint=True)).requires_grad_(False)
    x, t, _ = input_for(SMALL)
    x.requires_grad_(True)
    (grad,) = th.autograd.grad(model(x, t).sum(), x)
    assert grad.any()


def test_labels_are_required_by_conditional_models_only():
    x, t, _ = input_for(SMALL)
    conditional = UNetModel(**SMALL, num_classes=3)
    with pytest.raises(ValueError, match="label"):
        conditional(x, t)
    with pytest.raises(ValueError, match="label"):
        UNetModel(**SMALL)(x, t, y=th.tensor([0, 1]))
    with pytest.raises(ValueError, match="3.*2"):
        conditional(x, t, y=th.tensor([0, 1, 2]))


# Upsamplers


@pytest.mark.parametrize("dims, mode", [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
@pytest.mark.parametrize("low_size", [4, 8])
def test_upsampler_input_is_concatenated_with_the_enlarged_image(dims, mode, low_size):
    arguments = [16, 3, 32, 6, 1, (2,)]  # positional, in the same order as for UNetModel
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


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_averaging_classifiers_take_any_shape(dims, pool):
    model = fill_by_name(EncoderUNetModel(**{**SMALL, "image_size": None, "dims": dims, "pool": pool}))
    with th.no_grad():
        assert model(randn(0, 2, 3, *(8, 20, 4)[:dims]), th.tensor([1, 2])).shape == (2, 3)


def test_new_adaptive_classifier_returns_zero_logits():
    x, t, _ = input_for(SMALL)
    assert not EncoderUNetModel(**SMALL)(x, t).any()


# Invalid combinations


def test_sizes_that_cannot_be_halved_are_refused():
    # The decoder of a UNet could not concatenate its feature maps with those of the encoder. A classifier has no
    # decoder, but its attention pool needs the exact size of the last feature map.
    for size, words in [(18, (18, 4, "(1, 1, 2)")), ((16, 10), ("16x10", 4))]:
        refused(lambda: UNetModel(**{**SMALL, "image_size": size, "channel_mult": (1, 1, 2)}), *words)
    options = {**SMALL, "image_size": 18, "channel_mult": (1, 1, 2), "num_head_channels": 32}
    refused(lambda: EncoderUNetModel(**options, pool="attention"), 18, 4)
    model = EncoderUNetModel(**options, pool="adaptive")
    assert model(th.zeros(2, SMALL["in_channels"], 18, 18), th.zeros(2)).shape == (2, SMALL["out_channels"])


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
def test_invalid_network_options_are_refused(make, options, words):
    refused(lambda: make(**{**SMALL, **options}), *words)


def test_invalid_decoder_heads_are_refused():
    refused(lambda: UNetModel(**SMALL, num_heads=2, num_heads_upsample=3), 64, 3)


def test_invalid_pooling_options_are_refused():
    refused(lambda: EncoderUNetModel(**SMALL, pool="attention"), "num_head_channels")
    refused(lambda: EncoderUNetModel(**SMALL, pool="attention", num_head_channels=48), 64, 48)
    options = {**SMALL, "image_size": None}
    refused(lambda: EncoderUNetModel(**options, pool="attention", num_head_channels=32), "image_size")
    refused(lambda: AttentionPool2d(4, 64, 48), 64, 48)
    refused(lambda: AttentionPool2d(4, 64, 32)(randn(0, 1, 64, 2, 2)), 16, 4)


def test_invalid_input_sizes_are_refused():
    model = UNetModel(**{**SMALL, "channel_mult": (1, 1, 2)})
    refused(lambda: model(randn(0, 1, 3, 16, 18), th.tensor([0])), "16x18", 4)


def test_invalid_layer_options_are_refused():
    refused(lambda: Downsample(32, False, out_channels=64), 32, 64)
    refused(lambda: normalization(40), 40, 32)
    refused(lambda: conv_nd(0, 3, 3, 1), 0)
