"""Create models and diffusion processes from flags.

The tables below declare each flag of a network or process once, with its default. The functions `*_defaults()` return
copies of these tables for the parsers of the scripts and for the factories.
"""

import math

from . import gaussian_diffusion as gd
from .errors import InputError
from .flags import ADDED_FLAGS, FlagParser, add_dict_to_argparser, args_to_dict, given_flags, str2bool  # noqa: F401
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

NUM_CLASSES = 1000

DIFFUSION_FLAGS = dict(
    learn_sigma=False,
    diffusion_steps=1000,
    noise_schedule="linear",
    timestep_respacing="",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
)
DATA_FLAGS = dict(num_classes=NUM_CLASSES, in_channels=3)
NETWORK_FLAGS = dict(
    num_channels=128,
    num_res_blocks=2,
    num_heads=4,
    num_heads_upsample=-1,
    num_head_channels=-1,
    attention_resolutions="16,8",
    dropout=0.0,
    class_cond=False,
    use_checkpoint=False,
    use_scale_shift_norm=True,
    resblock_updown=False,
    use_fp16=False,
    use_bf16=False,
    **DATA_FLAGS,
)
MODEL_FLAGS = dict(image_size=64, channel_mult="", use_new_attention_order=False, **NETWORK_FLAGS)
UPSAMPLER_FLAGS = dict(large_size=256, small_size=64, **NETWORK_FLAGS)
CLASSIFIER_FLAGS = dict(
    image_size=64,
    classifier_use_fp16=False,
    classifier_use_bf16=False,
    classifier_width=128,
    classifier_depth=2,
    classifier_attention_resolutions="32,16,8",
    classifier_use_scale_shift_norm=True,
    classifier_resblock_updown=True,
    classifier_pool="attention",
    **DATA_FLAGS,
)
# Flags that do not change the function that a network with given weights computes, except for rounding.
RUNTIME_FLAGS = {
    "use_fp16", "use_bf16", "use_checkpoint", "dropout", "classifier_use_fp16", "classifier_use_bf16",
    "timestep_respacing", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip

CHANNEL_MULTS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
UPSAMPLER_CHANNEL_MULTS = {**CHANNEL_MULTS, 512: CHANNEL_MULTS[256]}
CLASSIFIER_HEAD_CHANNELS = 64


def diffusion_defaults():
    """Return the flags of the diffusion process."""
    return dict(DIFFUSION_FLAGS)


def classifier_defaults():
    """Return the flags of the classifier."""
    return {**CLASSIFIER_FLAGS, "num_classes": NUM_CLASSES}


def model_and_diffusion_defaults():
    """Return the flags of the diffusion model and its process."""
    return {**MODEL_FLAGS, "num_classes": NUM_CLASSES, **DIFFUSION_FLAGS}


def classifier_and_diffusion_defaults():
    """Return the flags of the classifier and of the diffusion process that noises its images."""
    return {**classifier_defaults(), **DIFFUSION_FLAGS}


def sr_model_and_diffusion_defaults():
    """Return the flags of the upsampler and its process."""
    return {**UPSAMPLER_FLAGS, "num_classes": NUM_CLASSES, **DIFFUSION_FLAGS}


# The functions below have the positional parameters of the original code in the original order, because other projects
# pass them by position and inspect their names. Parameters that this package adds are keyword-only.


def create_model_and_diffusion(
    image_size, class_cond, learn_sigma, num_channels, num_res_blocks, channel_mult, num_heads, num_head_channels,
    num_heads_upsample, attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl,
    predict_xstart, rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm,
    resblock_updown, use_fp16, use_new_attention_order, *, num_classes=None, in_channels=3, use_bf16=False,
):  # fmt: skip
    """Create a UNet and its process from the flags of model_and_diffusion_defaults()."""
    model = create_model(
        image_size, num_channels, num_res_blocks, channel_mult=channel_mult, learn_sigma=learn_sigma,
        class_cond=class_cond, use_checkpoint=use_checkpoint, attention_resolutions=attention_resolutions,
        num_heads=num_heads, num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm, dropout=dropout, resblock_updown=resblock_updown,
        use_fp16=use_fp16, use_new_attention_order=use_new_attention_order, num_classes=num_classes,
        in_channels=in_channels, use_bf16=use_bf16,
    )  # fmt: skip
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, noise_schedule=noise_schedule, use_kl=use_kl,
        predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing,
    )  # fmt: skip
    return model, diffusion


def create_model(
    image_size, num_channels, num_res_blocks, channel_mult="", learn_sigma=False, class_cond=False,
    use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
    use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False, use_new_attention_order=False, *,
    num_classes=None, in_channels=3, use_bf16=False,
):  # fmt: skip
    """Create a UNet. The defaults are those of the original function, and differ from the defaults of the flags.

    :param channel_mult: numbers separated by commas, one per level. "" derives the numbers from the image size.
    :param attention_resolutions: the resolutions that have attention, numbers separated by commas.
    :param num_classes: the number of classes if class_cond is set. The default is NUM_CLASSES.
    """
    if channel_mult == "":
        channel_mult = default_channel_mult(image_size)
    return UNetModel(
        image_size=image_size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1), num_res_blocks=num_res_blocks,
        attention_resolutions=attention_factors("attention_resolutions", attention_resolutions, image_size),
        dropout=dropout, channel_mult=parse_numbers("channel_mult", channel_mult, float),
        num_classes=_count_classes(num_classes) if class_cond else None, use_checkpoint=use_checkpoint,
        use_fp16=use_fp16, num_heads=num_heads, num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order, **_bf16(use_bf16),
    )  # fmt: skip


def _count_classes(num_classes):
    return NUM_CLASSES if num_classes is None else num_classes  # other projects assign NUM_CLASSES


def _bf16(use_bf16):
    return {"use_bf16": True} if use_bf16 else {}  # a unet.py of another project may lack the argument


def create_classifier_and_diffusion(
    image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
    classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, learn_sigma, diffusion_steps,
    noise_schedule, timestep_respacing, use_kl, predict_xstart, rescale_timesteps, rescale_learned_sigmas, *,
    num_classes=None, in_channels=3, classifier_use_bf16=False,
):  # fmt: skip
    """Create a classifier and its process from the flags of classifier_and_diffusion_defaults()."""
    classifier = create_classifier(
        image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
        classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, num_classes=num_classes,
        in_channels=in_channels, classifier_use_bf16=classifier_use_bf16,
    )  # fmt: skip
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, noise_schedule=noise_schedule, use_kl=use_kl,
        predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing,
    )  # fmt: skip
    return classifier, diffusion


def create_classifier(
    image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
    classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, *, num_classes=None,
    in_channels=3, classifier_use_bf16=False,
):  # fmt: skip
    """Create a noisy-image classifier from the flags of classifier_defaults()."""
    return EncoderUNetModel(
        image_size=image_size, in_channels=in_channels, model_channels=classifier_width,
        out_channels=_count_classes(num_classes), num_res_blocks=classifier_depth,
        attention_resolutions=attention_factors(
            "classifier_attention_resolutions", classifier_attention_resolutions, image_size
        ),
        channel_mult=default_channel_mult(image_size), use_fp16=classifier_use_fp16,
        num_head_channels=CLASSIFIER_HEAD_CHANNELS, use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown, pool=classifier_pool, **_bf16(classifier_use_bf16),
    )  # fmt: skip


def sr_create_model_and_diffusion(
    large_size, small_size, class_cond, learn_sigma, num_channels, num_res_blocks, num_heads, num_head_channels,
    num_heads_upsample, attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl,
    predict_xstart, rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm,
    resblock_updown, use_fp16, *, num_classes=None, in_channels=3, use_bf16=False,
):  # fmt: skip
    """Create an upsampler and its process from the flags of sr_model_and_diffusion_defaults()."""
    model = sr_create_model(
        large_size, small_size, num_channels, num_res_blocks, learn_sigma=learn_sigma, class_cond=class_cond,
        use_checkpoint=use_checkpoint, attention_resolutions=attention_resolutions, num_heads=num_heads,
        num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm, dropout=dropout, resblock_updown=resblock_updown,
        use_fp16=use_fp16, num_classes=num_classes, in_channels=in_channels, use_bf16=use_bf16,
    )  # fmt: skip
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, noise_schedule=noise_schedule, use_kl=use_kl,
        predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing,
    )  # fmt: skip
    return model, diffusion


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
    resblock_updown, use_fp16, *, num_classes=None, in_channels=3, use_bf16=False,
):  # fmt: skip
    """Create an upsampler. It takes low-resolution images of any size, and ignores small_size."""
    return SuperResModel(
        image_size=large_size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1), num_res_blocks=num_res_blocks,
        attention_resolutions=attention_factors("attention_resolutions", attention_resolutions, large_size),
        dropout=dropout, channel_mult=default_channel_mult(large_size, UPSAMPLER_CHANNEL_MULTS),
        num_classes=_count_classes(num_classes) if class_cond else None, use_checkpoint=use_checkpoint,
        use_fp16=use_fp16, num_heads=num_heads, num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown, **_bf16(use_bf16),
    )  # fmt: skip


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="",
):  # fmt: skip
    """Create a diffusion process.

    :param steps: the number of timesteps of the process that the model is trained on.
    :param timestep_respacing: the timesteps to visit; see space_timesteps. "" visits all timesteps.
    :param sigma_small: if the variance is not learned, use the variance of the posterior instead of beta.
    """
    if steps < 1:
        raise InputError(f"--diffusion_steps {steps}: a process needs at least one timestep")
    if noise_schedule == "linear" and steps <= 20:
        raise InputError(
            f"--diffusion_steps {steps}: a linear schedule so short ends with a beta of 1 or more; give at least 21, "
            f"or take --noise_schedule cosine"
        )
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        var_type = gd.ModelVarType.LEARNED_RANGE
    else:
        var_type = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def default_channel_mult(image_size, table=CHANNEL_MULTS):
    """Return the channel multiples for an image size: those of the paper for 64, 128, 256 and 512 pixels.

    Any other size takes the multiples of the next smaller of these sizes, or of 64. It has at most as many levels as
    the size can be halved without becoming smaller than 4.
    """
    if image_size in table:
        return table[image_size]
    mult = table[max((size for size in table if size <= image_size), default=min(table))]
    levels = 1
    while levels < len(mult) and image_size % 2**levels == 0 and image_size // 2**levels >= 4:
        levels += 1
    return mult[:levels]


def attention_factors(flag, resolutions, image_size):
    """Convert the resolutions that have attention, such as "32,16,8", to downsampling factors of an image size."""
    resolutions = parse_numbers(flag, resolutions, int)
    if any(r < 1 for r in resolutions):
        raise InputError(f"--{flag} {','.join(map(str, resolutions))}: resolutions start from 1")
    return tuple(image_size // r for r in resolutions)


def parse_numbers(flag, text, kind):
    """Parse the value of a flag that is a list of numbers separated by commas. Return a tuple.

    :param text: a string, or a sequence of numbers, which is not parsed.
    :param kind: int or float. Whole floats become ints.
    """
    if not isinstance(text, str):
        return tuple(text)
    try:
        numbers = [kind(x) for x in text.split(",")] if text.strip() else []
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{flag} {text!r} does not parse: give {what} with commas between them") from None
    return tuple(int(x) if x == int(x) else x for x in numbers)


def identity_flags(defaults):
    """Return the names of the flags that determine the function that a network with given weights computes."""
    return [name for name in defaults if name not in RUNTIME_FLAGS]
