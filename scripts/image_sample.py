"""Sample from a diffusion model: an .npz of images, and a picture. Run it again after a kill, and it goes on."""

from guided_diffusion import logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.run_setup import DIFFUSION, class_names_of, job_of, set_up_sampling
from guided_diffusion.sample_util import (
    BatchSampler,
    by_index,
    choose_labels,
    class_flags,
    half_name,
    prepare_network,
    sample_job,
    sampling_flags,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION)

    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    prepare_network(model, args.model_path, half_name(args.use_fp16, args.use_bf16))
    labels = choose_labels(
        args.classes,
        args.num_samples,
        args.num_classes if args.class_cond else None,
        args.seed,
        class_names_of(args, "model_path"),
    )

    logger.log("sampling...")
    sampler = BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        conditions=by_index(labels),
        **args_to_dict(args, ["seed", "use_ddim", "clip_denoised"]),
    )
    sample_job(
        sampler,
        job_of(args, DIFFUSION),
        labels=labels,
        rows_by_class=bool(args.classes),
        **args_to_dict(args, ["num_samples", "batch_size", "save_images", "progress_grid"]),
    )
    logger.log("sampling complete")


def create_argparser():
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**sampling_flags(), **class_flags(), **model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
