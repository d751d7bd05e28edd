"""Sample from a diffusion model: an .npz of images, and a picture of them."""

from guided_diffusion import checkpoint_util, dist_util, logger
from guided_diffusion.guidance import route_labels
from guided_diffusion.sample_util import (
    choose_labels,
    generate,
    half_name,
    prepare_network,
    sampling_flags,
    save_samples,
)
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    given_flags,
    identity_flags,
    model_and_diffusion_defaults,
)


def main():
    parser = create_argparser()
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    checkpoint_util.adopt_config(
        args, given_flags(parser), "model_path", identity_flags(model_and_diffusion_defaults())
    )

    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    prepare_network(model, args.model_path, half_name(args.use_fp16, args.use_bf16))
    labels = choose_labels(args.classes, args.num_samples, args.num_classes if args.class_cond else None, args.seed)

    logger.log("sampling...")
    images = generate(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        labels=labels,
        **args_to_dict(args, ["num_samples", "batch_size", "seed", "use_ddim", "clip_denoised"]),
    )
    save_samples(images, labels)
    logger.log("sampling complete")


def create_argparser():
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**sampling_flags(), **model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
