"""Sample from a diffusion model guided by a noisy-image classifier: an .npz of images with labels, and a picture.

Run it again after a kill, and it goes on.
"""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.run_setup import CLASSIFIER, DIFFUSION, class_names_of, job_of, set_up_sampling
from guided_diffusion.sample_util import (
    BatchSampler,
    by_index,
    choose_labels,
    class_flags,
    guidance_flags,
    guide,
    half_name,
    prepare_network,
    sample_job,
    sampling_flags,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION, CLASSIFIER)

    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    prepare_network(model, args.model_path, half_name(args.use_fp16, args.use_bf16))

    logger.log("creating classifier...")
    classifier = create_classifier(**args_to_dict(args, classifier_defaults()))
    prepare_network(classifier, args.classifier_path, half_name(args.classifier_use_fp16, args.classifier_use_bf16))
    names = class_names_of(args, "classifier_path", "model_path")
    labels = choose_labels(args.classes, args.num_samples, args.num_classes, args.seed, names)

    logger.log("sampling...")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        conditions=by_index(labels),
        cond_fn=guide(classifier, diffusion, **args_to_dict(args, guidance_flags())),
        **args_to_dict(args, ["seed", "use_ddim", "clip_denoised"]),
    )
    sample_job(
        sampler,
        job_of(args, DIFFUSION, CLASSIFIER),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, ["num_samples", "batch_size", "save_images", "progress_grid"]),
    )
    logger.log("sampling complete")


def create_argparser():
    flags = dict(classifier_path="", **guidance_flags())
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(
        parser,
        {**sampling_flags(), **class_flags(), **flags, **model_and_diffusion_defaults(), **classifier_defaults()},
    )
    return parser


if __name__ == "__main__":
    main()
