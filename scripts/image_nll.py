"""Bound a diffusion model's likelihood of images: bits a dimension, with its terms by timestep."""

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import image_dataset
from guided_diffusion.likelihood_util import bits_per_dim, mean_and_error, save_likelihood
from guided_diffusion.sampling_networks import (
    DIFFUSION,
    class_names_of,
    load_diffusion,
    sampling_parser,
    set_up_sampling,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION)
    model, diffusion = load_diffusion(args)

    logger.log("creating data loader...")
    dataset, _ = image_dataset(
        args.data_dir,
        args.image_size,
        class_cond=args.class_cond,
        num_classes=args.num_classes,
        classes=class_names_of(args, "model_path"),
        channels=args.in_channels,
        labels=args.labels,
    )

    logger.log("evaluating...")
    result = bits_per_dim(
        diffusion,
        model,
        dataset,
        count=args.num_samples,
        **args_to_dict(args, ["batch_size", "seed", "clip_denoised", "num_workers"]),
    )
    mean, error = mean_and_error(result["total_bpd"])
    logger.log(f"{len(result['total_bpd'])} images: {mean:.4f} +- {error:.4f} bits/dim (one standard error)")
    dist_util.from_rank_0(lambda: save_likelihood(result))


def create_argparser():
    flags = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="", log_dir="")
    flags.update(labels="name", num_workers=1, seed=0, preset="", models_dir="models", class_table="", compile=False)
    return sampling_parser(__doc__, flags, DIFFUSION)


if __name__ == "__main__":
    main()
