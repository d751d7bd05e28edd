"""Sample from a diffusion model guided by a noisy-image classifier: an .npz of images with labels, and a picture.

Run it again after a kill, and it goes on.
"""

from guided_diffusion import logger
from guided_diffusion.sample_util import class_flags, guidance_flags, guide, output_flags, sample_job, sampling_flags
from guided_diffusion.sampling_setup import (
    CLASSIFIER,
    DIFFUSION,
    image_sampler,
    job_of,
    labels_for,
    load_diffusion,
    load_guide,
    set_up_sampling,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER)
    model, diffusion = load_diffusion(args)
    cond_fn = guide(load_guide(args), diffusion, **args_to_dict(args, guidance_flags()))
    labels = labels_for(args, args.num_classes, "classifier_path", "model_path")

    logger.log("sampling...")
    sample_job(
        image_sampler(args, model, diffusion, labels, cond_fn),
        job_of(args, DIFFUSION, CLASSIFIER),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    flags = {**sampling_flags(), **class_flags(), **guidance_flags(), "classifier_path": ""}
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **model_and_diffusion_defaults(), **classifier_defaults()})
    return parser


if __name__ == "__main__":
    main()
