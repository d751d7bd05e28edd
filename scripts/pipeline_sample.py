"""Sample small images with guidance and upsample them, as one job (ADM-G, ADM-U). Run it again, and it goes on.

The upsampler's flags are those of super_res_sample.py, with `upsampler_` before their names. The small images stay in
the folder `base` of --log_dir.
"""

from guided_diffusion import files, logger
from guided_diffusion.errors import InputError, check_at_least
from guided_diffusion.sample_util import (
    BaseSamples,
    class_flags,
    guidance_flags,
    guide,
    sample_job,
    sampling_flags,
)
from guided_diffusion.sampling_setup import (
    CLASSIFIER,
    DIFFUSION,
    PIPELINE_UPSAMPLER,
    image_sampler,
    job_of,
    labels_for,
    load_diffusion,
    load_guide,
    load_upsampler,
    set_up_sampling,
    upsampling_sampler,
    without_prefix,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)

# What the upsampler's flags must agree with
BASE = {"small_size": "image_size", "in_channels": "in_channels", "num_classes": "num_classes"}


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)
    flags = without_prefix(args, PIPELINE_UPSAMPLER)
    check_fit(args, flags)
    job = job_of(args, DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)
    upsampler = load_upsampler(
        flags, flags.path, flags.batch_size if args.compile else 0
    )  # first: a mistake shows before hours go into small images
    base_samples = sample_base(args, {k: v for k, v in job.items() if not k.startswith(PIPELINE_UPSAMPLER.prefix)})
    upsample(args, flags, job, base_samples, *upsampler)
    logger.log("sampling complete")


def check_fit(args, flags):
    """Refuse an upsampler of other images than the first stage makes."""
    check_at_least(1, upsampler_batch_size=flags.batch_size)
    misfits = [name for name in ("small_size", "in_channels") if getattr(flags, name) != getattr(args, BASE[name])]
    if flags.class_cond and flags.num_classes < args.num_classes:
        misfits.append("num_classes")
    for name in misfits:
        mine, theirs = getattr(flags, name), getattr(args, BASE[name])
        raise InputError(f"--upsampler_{name} {mine} does not fit the small images' --{BASE[name]} {theirs}")


def sample_base(args, job):
    """The first stage, as classifier_sample.py: the path of its .npz."""
    model, diffusion = load_diffusion(args)
    cond_fn = guide(load_guide(args), diffusion, **args_to_dict(args, guidance_flags()))
    labels = labels_for(args, args.num_classes, "classifier_path", "model_path")
    logger.log("sampling small images...")
    return sample_job(
        image_sampler(args, model, diffusion, labels, cond_fn),
        job,
        labels=labels,
        rows_by_class=bool(args.classes),
        folder=files.join(logger.get_dir(), "base"),
        **args_to_dict(args, ["num_samples", "batch_size"]),
    )


def upsample(args, flags, job, base_samples, model, diffusion):
    """The second stage, as super_res_sample.py."""
    base = BaseSamples(base_samples, flags.small_size, flags.in_channels, flags.num_classes, flags.class_cond)
    logger.log("upsampling...")
    sample_job(
        upsampling_sampler(flags, model, diffusion, base, args.seed, args.clip_denoised),
        job,
        batch_size=flags.batch_size,
        labels=base.labels_of(args.num_samples),
        rows_by_class=bool(args.classes),
        **args_to_dict(args, ["num_samples", "save_images", "progress_grid"]),
    )


def create_argparser():
    flags = {**sampling_flags(), **class_flags(), **guidance_flags(), "classifier_path": ""}
    upsampler = dict(path="", batch_size=4, use_ddim=False, **sr_model_and_diffusion_defaults())
    flags.update({PIPELINE_UPSAMPLER.prefix + name: default for name, default in upsampler.items()})
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **model_and_diffusion_defaults(), **classifier_defaults()})
    return parser


if __name__ == "__main__":
    main()
