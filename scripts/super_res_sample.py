"""Upsample the images in an .npz file.

If the job is killed, run the same command again: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.sample_job import UPSAMPLING, BaseSamples, BatchSampler, sample_job
from guided_diffusion.sampler_flags import small_shape
from guided_diffusion.sampling_networks import (
    UPSAMPLER,
    job_of,
    load_upsampler,
    output_flags,
    sampler_options,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), UPSAMPLER)
    size = small_shape(args)
    base = BaseSamples(args.base_samples, size, args.in_channels, args.num_classes, args.class_cond)
    model, diffusion = load_upsampler(args, args.model_path, args.compile)
    sampler = BatchSampler(diffusion, model, conditions=base.conditions, stream=UPSAMPLING, **sampler_options(args))

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, UPSAMPLER, base_samples=args.base_samples),
        labels=base.labels_of(args.num_samples),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    return sampling_parser(__doc__, {**sampling_flags(), "base_samples": ""}, UPSAMPLER)


if __name__ == "__main__":
    main()
