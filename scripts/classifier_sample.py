"""Sample from a diffusion model guided by a noisy-image classifier: an .npz of images with labels, and a picture.

Run the same command again after a kill: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.sample_job import BatchSampler, sample_job
from guided_diffusion.sampling_networks import (
    CLASSIFIER,
    DIFFUSION,
    class_flags,
    guidance_flags,
    guide,
    job_of,
    labels_for,
    load_diffusion,
    load_guide,
    output_flags,
    sampler_options,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER)
    model, diffusion = load_diffusion(args)
    classifier = load_guide(args)
    cond_fn = guide(classifier, diffusion, args.classifier_scale, args.guidance_interval)
    labels = labels_for(args, args.num_classes, "classifier_path", "model_path")
    model = route_labels(model, args.class_cond)  # the classifier takes labels, the model perhaps not
    sampler = BatchSampler(diffusion, model, conditions=labels, cond_fn=cond_fn, **sampler_options(args))

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, DIFFUSION, CLASSIFIER),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    return sampling_parser(__doc__, {**sampling_flags(), **class_flags(), **guidance_flags()}, DIFFUSION, CLASSIFIER)


if __name__ == "__main__":
    main()
