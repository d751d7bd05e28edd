"""Train an upsampler, a diffusion model of large images given small images, which are made from the large ones."""

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import data_flags
from guided_diffusion.previews import Preview
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.training_job import diffusion_training_flags, record_run, set_up_training, training_data
from guided_diffusion.upsampler_util import UpsamplerTrainLoop, check_sizes, fixed_conditions


def main():
    args, record = set_up_training(create_argparser(), "upsampler")
    check_sizes(args.large_size, args.small_size)

    logger.log("creating model and diffusion...")
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(args, sr_model_and_diffusion_defaults()))
    model.to(dist_util.dev())

    logger.log("creating data loader...")
    data = training_data(args, record, args.large_size, class_cond=args.class_cond)
    preview = None
    if args.sample_interval:
        conditions = fixed_conditions(data.dataset, args.small_size, 16, args.skip_bad_images)
        preview = Preview(diffusion, (args.in_channels, args.large_size, args.large_size), conditions=conditions)

    loop = UpsamplerTrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        small_size=args.small_size,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        preview=preview,
        **args_to_dict(args, diffusion_training_flags()),
    )
    record_run(record, "upsampler", data.classes)

    logger.log("training...")
    loop.run_loop()


def create_argparser():
    flags = dict(schedule_sampler="uniform", log_dir="", preset="", **data_flags())
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **diffusion_training_flags(), **sr_model_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
