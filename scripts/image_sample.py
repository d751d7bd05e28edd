"""Sample from a diffusion model: an .npz of images, and a picture.

Run the same command again after a kill: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.sample_job import BatchSampler, sample_job
from guided_diffusion.sampling_networks import (
    DIFFUSION,
    class_flags,
    job_of,
    labels_for,
    load_diffusion,
    output_flags,
    sampling_flags,
    set_up_sampling,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION)
    model, diffusion = load_diffusion(args)
    labels = labels_for(args, args.num_classes if args.class_cond else None, "model_path")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        args.seed,
        labels,
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
    )

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, DIFFUSION),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**sampling_flags(), **class_flags(), **model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
