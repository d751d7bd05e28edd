"""From a training script's command line to what its loop is built from: ranks, folder, seed, what to resume, data."""

import os

from . import checkpoint_util, dist_util, files, logger
from .errors import InputError
from .image_datasets import data_flags, load_data
from .random_util import seed_everything
from .script_util import RUNTIME_FLAGS, args_to_dict, given_flags, identity_flags


def common_training_flags(batch_size):
    """The flags that TrainLoop takes as they are, whatever it trains, with their defaults."""
    return dict(
        batch_size=batch_size,
        microbatch=-1,
        seed=-1,
        log_interval=10,
        save_interval=10000,
        keep_checkpoints=0,
        resume_checkpoint="",
        warmup_steps=0,
        max_grad_norm=0.0,
        max_bad_steps=20,
        compile=False,
    )


def diffusion_training_flags():
    """The flags of training a diffusion model that TrainLoop takes as they are, with their defaults."""
    return dict(
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        total_steps=0,
        ema_rate="0.9999",
        sample_interval=0,
        use_fp16=False,
        use_bf16=False,
        fp16_scale_growth=1e-3,
        **common_training_flags(batch_size=1),
    )


def set_up_training(parser, network_flags):
    """Parse the command line, join the other ranks, open the run's folder, seed, and settle what to resume.

    :param parser: the script's; with log_dir and the common training flags.
    :param network_flags: the names of the flags of the network and process.
    :return: the parsed flags, where a resumed run has the network flags of its config.json, and `batch_size` is such
        that the global batch is the one it had; and a record for record_run, a dict, whose "classes" are those of the
        run that goes on in its folder, else None.
    """
    args = parser.parse_args()
    dist_util.setup_dist()
    if args.resume_checkpoint == "auto" and not (args.log_dir or os.environ.get("OPENAI_LOGDIR")):
        raise InputError("--resume_checkpoint auto looks in --log_dir, which is missing: give it")
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    files.make_dirs(checkpoint_util.get_blob_logdir())
    seed_everything(args.seed)
    args.resume_checkpoint = checkpoint_util.resolve_resume_checkpoint(args.resume_checkpoint)
    record = {"flags": dict(vars(args)), "classes": None}
    goes_on = not args.resume_checkpoint or checkpoint_util.is_of_this_run(args.resume_checkpoint)
    if args.resume_checkpoint:
        given = given_flags(parser)
        checkpoint_util.adopt_config(args, dict(given), "resume_checkpoint", identity_flags(network_flags))
        config = checkpoint_util.read_config(args.resume_checkpoint) or {}
        for name in RUNTIME_FLAGS & network_flags.keys() & config.get("flags", {}).keys() - given.keys():
            source = checkpoint_util.beside(args.resume_checkpoint, checkpoint_util.CONFIG_NAME)
            checkpoint_util.check_recorded(source, name, config["flags"][name], getattr(args, name))
            setattr(args, name, config["flags"][name])  # by hand, these may change from run to run
        record["flags"] = dict(vars(args))
        _keep_global_batch(args, config)
        record["classes" if goes_on else "former_classes"] = config.get("classes")
    if goes_on:
        step = checkpoint_util.parse_resume_step_from_filename(args.resume_checkpoint)
        dist_util.from_rank_0(lambda: checkpoint_util.refuse_later_checkpoints(step))
    record["global_batch"] = args.batch_size * dist_util.get_world_size()
    return args, record


def _keep_global_batch(args, config):
    """Set args.batch_size so that a run resumed on another number of ranks keeps its global batch.

    Only where --batch_size is what it was: another one is taken to be meant.
    """
    total, ranks = config.get("global_batch"), dist_util.get_world_size()
    if not total or config["flags"].get("batch_size") != args.batch_size or total == ranks * args.batch_size:
        return
    if total % ranks:
        raise InputError(
            f"{args.resume_checkpoint} is of a run with a global batch of {total} images, which {ranks} ranks cannot "
            f"share evenly: start another number of ranks, or give another --batch_size than {args.batch_size}"
        )
    args.batch_size = total // ranks
    logger.log(f"{args.batch_size} images a step on each of {ranks} ranks keep the global batch of {total}")


def training_data(args, record, image_size, **changes):
    """The images that the flags ask for: see load_data.

    :param record: what set_up_training returned.
    :param changes: arguments of load_data that differ from the flags.
    """
    options = dict(
        batch_size=args.batch_size,
        image_size=image_size,
        classes=record["classes"],
        num_classes=args.num_classes,
        channels=args.in_channels,
        seed=args.seed,
        **args_to_dict(args, data_flags()),
    )
    return load_data(**{**options, **changes})


def record_run(record, kind, classes):
    """Write config.json to the run's folder, and print the table of classes.

    :param record: what set_up_training returned.
    :param kind: "diffusion", "upsampler" or "classifier".
    :param classes: the names of the classes in the order of their labels, or None.
    """
    record = dict(record)
    former = record.pop("former_classes", None)
    if classes and former and classes != former:
        logger.warn("the classes are numbered by this run's data, and not as in the run that it resumes from")
    room = record["flags"].get("num_classes")
    if classes and room and room > len(classes):
        logger.warn(
            f"the data have {len(classes)} classes, fewer than --num_classes {room}: no image teaches the others"
        )
    checkpoint_util.write_config(**{**record, "classes": classes}, kind=kind)
    if classes:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:10]))
        logger.log(f"{len(classes)} classes: {named}{', ...' if len(classes) > 10 else ''}")
