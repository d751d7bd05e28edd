"""Train a classifier on noised images, which can then guide a diffusion model."""

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier_util import (
    ClassifierTrainLoop,
    accuracy_by_noise,
    accuracy_table,
    classifier_training_flags,
)
from guided_diffusion.image_datasets import data_flags
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
)
from guided_diffusion.training_job import record_run, set_up_training, training_data


def main():
    args, record = set_up_training(create_argparser(), "classifier")

    logger.log("creating model and diffusion...")
    model, diffusion = create_classifier_and_diffusion(**args_to_dict(args, classifier_and_diffusion_defaults()))
    model.to(dist_util.dev())

    logger.log("creating data loader...")
    data = training_data(args, record, args.image_size, class_cond=True, random_crop=args.random_crop)
    held_out = dict(data_dir=args.val_data_dir, labels=args.val_labels or args.labels, classes=data.classes)
    val_data = None
    if args.val_data_dir:
        val_data = training_data(args, record, args.image_size, class_cond=True, **held_out)

    loop = ClassifierTrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        val_data=val_data,
        use_fp16=args.classifier_use_fp16,
        use_bf16=args.classifier_use_bf16,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        **args_to_dict(args, classifier_training_flags()),
    )
    record_run(record, "classifier", data.classes)

    logger.log("training...")
    loop.run_loop()
    if val_data is not None and loop.steps_done >= args.iterations:
        images = training_data(args, record, args.image_size, class_cond=True, **held_out, deterministic=True).dataset
        options = args_to_dict(args, ["batch_size", "num_workers", "skip_bad_images"])
        logger.log(accuracy_table(accuracy_by_noise(model, diffusion, images, **options)))


def create_argparser():
    flags = dict(schedule_sampler="uniform", log_dir="", preset="", **data_flags())
    flags.update(val_data_dir="", val_labels="", random_crop=True)
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **classifier_training_flags(), **classifier_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
