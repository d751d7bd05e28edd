"""Sample from a diffusion model guided by a noisy-image classifier: an .npz of images with labels, and a picture.

If the job is killed, run the same command again: it makes the missing samples.
"""

from guided_diffusion import logger
from guided_diffusion.sample_job import BatchSampler, sample_job
from guided_diffusion.sampler_flags import classifier_guidance_flags, guide, guide_flags
from guided_diffusion.sampling_networks import (
    CLASSIFIER,
    DIFFUSION,
    class_flags,
    job_of,
    labels_for,
    load_diffusion,
    load_guide,
    load_guiding_classifier,
    output_flags,
    sampler_options,
    sampling_flags,
    sampling_parser,
    set_up_sampling,
    with_guide,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER)
    model, diffusion = load_diffusion(args)
    model = with_guide(args, model, load_guide(args), diffusion, args.guide_scale)
    classifier = load_guiding_classifier(args)
    cond_fn = guide(classifier, diffusion, args.classifier_scale, args.guidance_interval)
    labels = labels_for(args, args.num_classes, "classifier_path", "model_path")
    sampler = BatchSampler(diffusion, model, conditions=labels, cond_fn=cond_fn, **sampler_options(args))

    logger.log("sampling...")
    sample_job(
        sampler,
        job_of(args, DIFFUSION, CLASSIFIER, guide_model_path=args.guide_model_path),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, output_flags()),
    )
    logger.log("sampling complete")


def create_argparser():
    flags = {**sampling_flags(), **class_flags(), **classifier_guidance_flags(), **guide_flags()}
    return sampling_parser(__doc__, flags, DIFFUSION, CLASSIFIER)


if __name__ == "__main__":
    main()
