"""Upsample images: an .npz of small ones becomes one of large ones. Run it again after a kill, and it goes on."""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.run_setup import UPSAMPLER, job_of, set_up_sampling
from guided_diffusion.sample_util import (
    UPSAMPLING,
    BaseSamples,
    BatchSampler,
    half_name,
    prepare_network,
    sample_job,
    sampling_flags,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), UPSAMPLER)
    base = BaseSamples(args.base_samples, args.small_size, args.in_channels, args.num_classes, args.class_cond)

    logger.log("creating model and diffusion...")
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(args, sr_model_and_diffusion_defaults()))
    prepare_network(model, args.model_path, half_name(args.use_fp16, args.use_bf16))

    logger.log("sampling...")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.large_size, args.large_size),
        conditions=base.conditions,
        stream=UPSAMPLING,
        **args_to_dict(args, ["seed", "use_ddim", "clip_denoised"]),
    )
    sample_job(
        sampler,
        job_of(args, UPSAMPLER, base_samples=args.base_samples),
        labels=base.labels_of(args.num_samples),
        **args_to_dict(args, ["num_samples", "batch_size", "save_images", "progress_grid"]),
    )
    logger.log("sampling complete")


def create_argparser():
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**sampling_flags(), "base_samples": "", **sr_model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
