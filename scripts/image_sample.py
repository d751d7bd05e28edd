"""Sample from a diffusion model: an .npz of images, and a picture. Run it again after a kill, and it goes on."""

from guided_diffusion import logger
from guided_diffusion.sample_util import class_flags, output_flags, sample_job, sampling_flags
from guided_diffusion.sampling_setup import (
    DIFFUSION,
    image_sampler,
    job_of,
    labels_for,
    load_diffusion,
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

    logger.log("sampling...")
    sample_job(
        image_sampler(args, model, diffusion, labels),
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
