"""From a training script's command line to a run that is ready to be built: ranks, folder, seed, what to resume."""

from . import checkpoint_util, dist_util, logger
from .errors import InputError
from .random_util import seed_everything
from .script_util import given_flags, identity_flags


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
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    seed_everything(args.seed)
    args.resume_checkpoint = checkpoint_util.resolve_resume_checkpoint(args.resume_checkpoint)
    record = {"flags": dict(vars(args)), "classes": None}
    if args.resume_checkpoint:
        names = identity_flags(network_flags)
        checkpoint_util.adopt_config(args, given_flags(parser), "resume_checkpoint", names)
        record["flags"] = dict(vars(args))
        config = checkpoint_util.read_config(args.resume_checkpoint) or {}
        _keep_global_batch(args, config)
        if checkpoint_util.is_of_this_run(args.resume_checkpoint):
            record["classes"] = config.get("classes")
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


def record_run(record, kind, classes):
    """Write config.json to the run's folder, and print the table of classes.

    :param record: what set_up_training returned.
    :param kind: "diffusion", "upsampler" or "classifier".
    :param classes: the names of the classes in the order of their labels, or None.
    """
    checkpoint_util.write_config(**{**record, "classes": classes}, kind=kind)
    if classes:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:10]))
        logger.log(f"{len(classes)} classes: {named}{', ...' if len(classes) > 10 else ''}")
