"""Sample small images with guidance and upsample them, as one job (ADM-G, ADM-U). Run it again, and it goes on.

The upsampler's flags are those of super_res_sample.py, with `upsampler_` before their names. The small images stay in
the folder `base` of --log_dir.
"""

from guided_diffusion import files, logger
from guided_diffusion.errors import InputError, check_at_least
from guided_diffusion.guidance import route_labels
from guided_diffusion.run_setup import (
    CLASSIFIER,
    DIFFUSION,
    PIPELINE_UPSAMPLER,
    class_names_of,
    job_of,
    set_up_sampling,
    without_prefix,
)
from guided_diffusion.sample_util import (
    UPSAMPLING,
    BaseSamples,
    BatchSampler,
    by_index,
    choose_labels,
    class_flags,
    guidance_flags,
    guide,
    half_name,
    prepare_network,
    sample_job,
    sampling_flags,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

# What the upsampler's flags must agree with
BASE = {"small_size": "image_size", "in_channels": "in_channels", "num_classes": "num_classes"}


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)
    upsampler = create_upsampler(args, without_prefix(args, PIPELINE_UPSAMPLER))
    job = job_of(args, DIFFUSION, CLASSIFIER, PIPELINE_UPSAMPLER)
    base_samples = sample_base(args, {k: v for k, v in job.items() if not k.startswith(PIPELINE_UPSAMPLER.prefix)})
    upsample(args, job, base_samples, *upsampler)
    logger.log("sampling complete")


def create_upsampler(args, flags):
    """The second stage's network and process. They come first: a mistake shows before hours go into small images."""
    check_at_least(1, upsampler_batch_size=flags.batch_size)
    misfits = [name for name in ("small_size", "in_channels") if getattr(flags, name) != getattr(args, BASE[name])]
    if flags.class_cond and flags.num_classes < args.num_classes:
        misfits.append("num_classes")
    for name in misfits:
        mine, theirs = getattr(flags, name), getattr(args, BASE[name])
        raise InputError(f"--upsampler_{name} {mine} does not fit the small images' --{BASE[name]} {theirs}")
    logger.log("creating upsampler...")
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(flags, sr_model_and_diffusion_defaults()))
    return prepare_network(model, flags.path, half_name(flags.use_fp16, flags.use_bf16)), diffusion


def sample_base(args, job):
    """The first stage, as classifier_sample.py: the path of its .npz."""
    logger.log("creating model, diffusion and classifier...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    prepare_network(model, args.model_path, half_name(args.use_fp16, args.use_bf16))
    classifier = create_classifier(**args_to_dict(args, classifier_defaults()))
    prepare_network(classifier, args.classifier_path, half_name(args.classifier_use_fp16, args.classifier_use_bf16))
    names = class_names_of(args, "classifier_path", "model_path")
    labels = choose_labels(args.classes, args.num_samples, args.num_classes, args.seed, names)

    logger.log("sampling small images...")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        conditions=by_index(labels),
        cond_fn=guide(classifier, diffusion, **args_to_dict(args, guidance_flags())),
        **args_to_dict(args, ["seed", "use_ddim", "clip_denoised"]),
    )
    return sample_job(
        sampler,
        job,
        labels=labels,
        rows_by_class=bool(args.classes),
        folder=files.join(logger.get_dir(), "base"),
        **args_to_dict(args, ["num_samples", "batch_size"]),
    )


def upsample(args, job, base_samples, model, diffusion):
    """The second stage, as super_res_sample.py."""
    flags = without_prefix(args, PIPELINE_UPSAMPLER)
    base = BaseSamples(base_samples, flags.small_size, flags.in_channels, flags.num_classes, flags.class_cond)
    logger.log("upsampling...")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, flags.class_cond),
        (flags.in_channels, flags.large_size, flags.large_size),
        conditions=base.conditions,
        seed=args.seed,
        use_ddim=flags.use_ddim,
        clip_denoised=args.clip_denoised,
        stream=UPSAMPLING,
    )
    sample_job(
        sampler,
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
