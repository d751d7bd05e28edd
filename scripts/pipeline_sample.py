"""Sample small images with guidance and upsample them, as one job (ADM-G, ADM-U).

The upsampler's flags are those of super_res_sample.py with the prefix `upsampler_`. The small images stay in the folder
`base` of --log_dir. If the job is killed, run the same command again: it makes the missing samples.
"""

from guided_diffusion import files, logger
from guided_diffusion.errors import InputError, check_at_least
from guided_diffusion.models import GuidedModel
from guided_diffusion.sample_job import UPSAMPLING, BaseSamples, BatchSampler, sample_job
from guided_diffusion.sampler_flags import (
    classifier_guidance_flags,
    guide_flags,
    sample_shape,
    sampler_flags,
    small_shape,
)
from guided_diffusion.sampling_networks import (
    CLASSIFIER,
    DIFFUSION,
    PIPELINE_UPSAMPLER,
    class_flags,
    job_of,
    load_upsampler,
    sampler_options,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
    without_prefix,
)
from guided_diffusion.script_util import args_to_dict

# {flag of the upsampler: the flag of the small images that must have the same value}
BASE = {"small_size": "image_size", "in_channels": "in_channels", "num_classes": "num_classes"}


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)
    flags = without_prefix(args, PIPELINE_UPSAMPLER)
    flags.seed, flags.clip_denoised = args.seed, args.clip_denoised  # both stages share these
    check_fit(args, flags)
    _, *size = sample_shape(args)
    flags.sample_size = ",".join(str(n * flags.large_size // flags.small_size) for n in size)
    job = job_of(args, DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER, guide_model_path=args.guide_model_path)
    # Load the upsampler first, so that mistakes in its flags are reported before hours of sampling.
    upsampler = load_upsampler(flags, flags.path, args.compile)
    base_samples = sample_base(args, {k: v for k, v in job.items() if not k.startswith(PIPELINE_UPSAMPLER.prefix)})
    upsample(args, flags, job, base_samples, *upsampler)
    logger.log("sampling complete")


def check_fit(args, flags):
    """Raise InputError if the upsampler was trained for small images of another kind than those of the first stage."""
    check_at_least(1, upsampler_batch_size=flags.batch_size)
    misfits = [name for name in ("small_size", "in_channels") if getattr(flags, name) != getattr(args, BASE[name])]
    if flags.class_cond and flags.num_classes < args.num_classes:
        misfits.append("num_classes")
    for name in misfits:
        mine, theirs = getattr(flags, name), getattr(args, BASE[name])
        raise InputError(f"--upsampler_{name} {mine} does not fit the small images' --{BASE[name]} {theirs}")


def sample_base(args, job):
    """Sample the small images, as classifier_sample.py does. Return the path of their .npz file."""
    model = GuidedModel(args)
    labels = model.labels(args)
    logger.log("sampling small images...")
    return sample_job(
        model.sampler(args, labels),
        job,
        labels=labels,
        rows_by_class=bool(args.classes),
        folder=files.join(logger.get_dir(), "base"),
        **args_to_dict(args, ["num_samples", "batch_size"]),
    )


def upsample(args, flags, job, base_samples, model, diffusion):
    """Upsample the small images, as super_res_sample.py does."""
    base = BaseSamples(base_samples, small_shape(flags), flags.in_channels, flags.num_classes, flags.class_cond)
    sampler = BatchSampler(diffusion, model, conditions=base.conditions, stream=UPSAMPLING, **sampler_options(flags))
    logger.log("upsampling...")
    sample_job(
        sampler,
        job,
        batch_size=flags.batch_size,
        labels=base.labels_of(args.num_samples),
        rows_by_class=bool(args.classes),
        **args_to_dict(args, ["num_samples", "save_images", "progress_grid"]),
    )


def create_argparser():
    flags = {**sampling_flags(), **class_flags(), **classifier_guidance_flags(), **guide_flags()}
    flags.update(upsampler_path="", upsampler_batch_size=4, **sampler_flags(PIPELINE_UPSAMPLER.prefix))
    return sampling_parser(__doc__, flags, DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)


if __name__ == "__main__":
    main()
