"""Sample from a diffusion model: an .npz of images, and a picture.

If the job is killed, run the same command again: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.sample_job import BatchSampler, sample_job
from guided_diffusion.sampler_flags import guide_flags
from guided_diffusion.sampling_networks import (
    DIFFUSION,
    class_flags,
    job_of,
    labels_for,
    load_diffusion,
    load_guide,
    output_flags,
    sampler_options,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
    with_guide,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION)
    model, diffusion = load_diffusion(args)
    model = with_guide(args, model, load_guide(args), diffusion, args.guide_scale)
    labels = labels_for(args, args.num_classes if args.class_cond else None, "model_path")
    sampler = BatchSampler(diffusion, model, conditions=labels, **sampler_options(args))

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, DIFFUSION, guide_model_path=args.guide_model_path),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    return sampling_parser(__doc__, {**sampling_flags(), **class_flags(), **guide_flags()}, DIFFUSION)


if __name__ == "__main__":
    main()
