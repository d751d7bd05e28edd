"""Upsample images: an .npz of small ones becomes one of large ones. Run it again after a kill, and it goes on."""

from guided_diffusion import logger
from guided_diffusion.sample_util import BaseSamples, output_flags, sample_job, sampling_flags
from guided_diffusion.sampling_setup import (
    UPSAMPLER,
    batch_to_compile,
    job_of,
    load_upsampler,
    set_up_sampling,
    upsampling_sampler,
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

    logger.log("sampling...")
    sample_job(
        upsampling_sampler(args, model, diffusion, base, args.seed, args.clip_denoised),
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
