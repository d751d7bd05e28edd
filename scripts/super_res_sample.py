"""Upsample images: an .npz of small images becomes one of large images.

Run the same command again after a kill: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.sample_job import UPSAMPLING, BaseSamples, BatchSampler, sample_job
from guided_diffusion.sampling_networks import (
    UPSAMPLER,
    batch_to_compile,
    job_of,
    load_upsampler,
    output_flags,
    sampling_flags,
    set_up_sampling,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    sr_model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), UPSAMPLER)
    base = BaseSamples(args.base_samples, args.small_size, args.in_channels, args.num_classes, args.class_cond)
    model, diffusion = load_upsampler(args, args.model_path, batch_to_compile(args))
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.large_size, args.large_size),
        args.seed,
        base.conditions,
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
        stream=UPSAMPLING,
    )

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, UPSAMPLER, base_samples=args.base_samples),
        labels=base.labels_of(args.num_samples),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**sampling_flags(), "base_samples": "", **sr_model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
