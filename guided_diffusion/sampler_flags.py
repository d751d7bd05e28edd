"""The flags of samplers, sample sizes and guidance, and the objects that these flags select."""

from functools import partial

import numpy as np

from .errors import InputError, choose
from .guidance import classifier_cond_fn, limit_guidance
from .script_util import UPSAMPLER_CHANNEL_MULTS, default_channel_mult, parse_numbers
from .solvers import SAMPLERS, thresholding


def sampler_flags(prefix=""):
    """Return the flags that select a sampler, with their defaults."""
    return {f"{prefix}{name}": default for name, default in dict(sampler="", threshold="", use_ddim=False).items()}


def guide_flags():
    """Return the flags of guidance by a second model, with their defaults."""
    return dict(guide_model_path="", guide_preset="", guide_scale=1.0, guidance_interval="")


def classifier_guidance_flags():
    """Return the flags of guidance by a classifier, with their defaults."""
    return dict(classifier_path="", classifier_scale=1.0, guidance_interval="")


def sampler_name(args, prefix=""):
    """Return the name of the sampler that the flags select, a key of SAMPLERS.

    :raises InputError: if the flags are unknown or contradict each other.
    """
    name, threshold, use_ddim = (getattr(args, prefix + flag) for flag in ("sampler", "threshold", "use_ddim"))
    if name:
        choose(f"--{prefix}sampler", name, SAMPLERS)
        if use_ddim and name != "ddim":
            raise InputError(f"--{prefix}use_ddim True contradicts --{prefix}sampler {name}: leave one of them out")
    name = name or ("ddim" if use_ddim else "ddpm")
    if threshold:
        if name == "ddpm":
            raise InputError(f"--{prefix}threshold {threshold}: DDPM has no guided prediction to limit: choose another "
                             f"--{prefix}sampler")  # fmt: skip
        thresholding(threshold)
    return name


def make_sampler(args):
    """Return the sampler that the flags select, a function of SAMPLERS with its options."""
    options = {"threshold": args.threshold} if args.threshold else {}
    return partial(SAMPLERS[sampler_name(args)], clip_denoised=args.clip_denoised, **options)


def sample_shape(args):
    """Return the shape (C, H, W) of a sample: --sample_size, or else the size that the model was trained on.

    :raises InputError: if the network cannot halve --sample_size once for each of its levels but the last.
    """
    upsamples = "large_size" in args
    trained = args.large_size if upsamples else args.image_size
    if not args.sample_size:
        return args.in_channels, trained, trained
    size = parse_numbers("sample_size", args.sample_size, int)
    if len(size) not in (1, 2) or min(size) < 1:
        raise InputError(f"--sample_size {args.sample_size}: give one number, or height,width such as 32,64")
    if upsamples:
        levels = default_channel_mult(trained, UPSAMPLER_CHANNEL_MULTS)
    else:
        levels = parse_numbers("channel_mult", args.channel_mult, float) or default_channel_mult(trained)
    factor = 2 ** (len(levels) - 1)
    if any(n % factor for n in size):
        raise InputError(f"--sample_size {args.sample_size}: must be divisible by {factor}, as the network halves its "
                         f"images {len(levels) - 1} times")  # fmt: skip
    return args.in_channels, size[0], size[-1]


def small_shape(args):
    """Return the size (H, W) of the small images that an upsampler enlarges to sample_shape(args)."""
    _, *size = sample_shape(args)
    small = [n * args.small_size / args.large_size for n in size]
    if any(n != int(n) for n in small):
        raise InputError(f"--sample_size {args.sample_size}: the small images, by --small_size {args.small_size} / "
                         f"--large_size {args.large_size} of it, would not have whole sizes")  # fmt: skip
    return tuple(map(int, small))


def guide(classifier, diffusion, classifier_scale, guidance_interval=""):
    """Return the cond_fn for guidance by a classifier, or None at scale 0, which does not call the classifier."""
    if not abs(classifier_scale) < float(np.finfo(np.float32).max):
        raise InputError(f"--classifier_scale {classifier_scale}: must be finite")
    interval = parse_interval(guidance_interval, diffusion)
    if not classifier_scale:
        return None
    cond_fn = classifier_cond_fn(classifier, classifier_scale)
    return limit_guidance(cond_fn, *interval) if interval else cond_fn


def parse_interval(guidance_interval, diffusion):
    """Return the arguments (first, last, num_timesteps) of limit_guidance, or None if guidance is not limited.

    :param guidance_interval: "a,b" limits guidance to the part of the process from a to b, where 0 is the clean end and
        1 the noisy end; "" does not limit guidance.
    """
    ends = parse_numbers("guidance_interval", guidance_interval, float)
    if ends and (len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1):
        raise InputError(f"--guidance_interval {guidance_interval}: give two numbers from 0 to 1, such as 0.2,0.8")
    return (*ends, 1000 if diffusion.rescale_timesteps else diffusion.original_num_steps) if ends else None
