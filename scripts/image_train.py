"""Train a diffusion model on a folder of images."""

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import data_flags
from guided_diffusion.previews import Preview
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training_job import diffusion_training_flags, record_run, set_up_training, training_data


def main():
    args, record = set_up_training(create_argparser(), "diffusion")

    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    model.to(dist_util.dev())

    logger.log("creating data loader...")
    data = training_data(args, record, args.image_size, class_cond=args.class_cond)

    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        preview=Preview(
            diffusion,
            (args.in_channels, args.image_size, args.image_size),
            num_classes=args.num_classes if args.class_cond else None,
        ),
        **args_to_dict(args, diffusion_training_flags()),
    )
    record_run(record, "diffusion", data.classes)

    logger.log("training...")
    loop.run_loop()


def create_argparser():
    flags = dict(schedule_sampler="uniform", log_dir="", preset="", **data_flags())
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **diffusion_training_flags(), **model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
