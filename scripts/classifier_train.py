"""Train a classifier on noised images, to guide a diffusion model with."""

from guided_diffusion import checkpoint_util, dist_util, logger
from guided_diffusion.classifier_util import ClassifierTrainLoop, classifier_training_flags
from guided_diffusion.image_datasets import class_names, load_data
from guided_diffusion.random_util import seed_everything
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    FlagParser,
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    given_flags,
    identity_flags,
)


def main():
    parser = create_argparser()
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    seed_everything(args.seed)
    args.resume_checkpoint = checkpoint_util.resolve_resume_checkpoint(args.resume_checkpoint)
    if args.resume_checkpoint:
        names = identity_flags(classifier_and_diffusion_defaults())
        checkpoint_util.adopt_config(args, given_flags(parser), "resume_checkpoint", names)

    logger.log("creating model and diffusion...")
    model, diffusion = create_classifier_and_diffusion(**args_to_dict(args, classifier_and_diffusion_defaults()))
    model.to(dist_util.dev())

    logger.log("creating data loader...")
    classes = class_names(args.data_dir)
    data_flags = dict(
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=True,
        classes=classes,
        num_classes=args.num_classes,
        channels=args.in_channels,
        num_workers=args.num_workers,
        seed=args.seed if args.seed >= 0 else None,
    )
    data = load_data(data_dir=args.data_dir, random_crop=args.random_crop, random_flip=args.random_flip, **data_flags)
    val_data = load_data(data_dir=args.val_data_dir, **data_flags) if args.val_data_dir else None

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
    checkpoint_util.write_config(vars(args), kind="classifier", classes=classes)

    logger.log("training...")
    loop.run_loop()


def create_argparser():
    flags = dict(
        data_dir="",
        val_data_dir="",
        schedule_sampler="uniform",
        log_dir="",
        num_workers=1,
        random_crop=True,
        random_flip=True,
    )
    parser = FlagParser(description=__doc__)
    add_dict_to_argparser(parser, {**flags, **classifier_training_flags(), **classifier_and_diffusion_defaults()})
    return parser


if __name__ == "__main__":
    main()
