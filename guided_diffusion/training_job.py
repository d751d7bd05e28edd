"""Set up a training script: flags, ranks, run folder, seed, checkpoint to resume, data and config.json."""

import os
import secrets

import torch as th

from . import dist_util, files, logger
from .checkpoint_util import (
    Checkpoint,
    get_blob_logdir,
    parse_resume_step_from_filename,
    require_path,
    settle_flags,
    write_config,
)
from .errors import InputError
from .image_datasets import data_flags, load_data
from .presets import FACTORIES, presets_for
from .random_util import seed_everything
from .script_util import RUNTIME_FLAGS, args_to_dict, given_flags, identity_flags
from .training_state import continues_records, find_model_to_resume, refuse_later_checkpoints


def common_training_flags(batch_size):
    """Return the flags that all training scripts pass to TrainLoop, with their defaults."""
    flags = dict(batch_size=batch_size, microbatch=-1, seed=-1, log_interval=10, save_interval=10000, compile=False)
    flags.update(resume_checkpoint="", keep_checkpoints=0, warmup_steps=0, max_grad_norm=0.0, max_bad_steps=20)
    return flags


def diffusion_training_flags():
    """Return the flags that the scripts for diffusion models and upsamplers pass to TrainLoop, with their defaults."""
    flags = dict(lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, total_steps=0, ema_rate="0.9999", sample_interval=0)
    flags.update(use_fp16=False, use_bf16=False, fp16_scale_growth=1e-3)
    return {**flags, **common_training_flags(batch_size=1)}


def set_up_training(parser, kind):
    """Parse the command line, join the other ranks, open the run folder, seed, and find the checkpoint to resume.

    :param parser: the parser of the script, with log_dir, preset and the common training flags.
    :param kind: the kind of network: "diffusion", "upsampler" or "classifier".
    :return: the flags, and a dict for record_run. A resumed run has the network flags of its config.json, and a
        `batch_size` that keeps the global batch size. A negative `seed` is replaced by the seed of the resumed run, or
        by a random seed. The entry "classes" of the dict has the class names if a run continues in its own folder.
    """
    args = parser.parse_args()
    dist_util.setup_dist()
    if args.resume_checkpoint == "auto" and not (args.log_dir or os.environ.get("OPENAI_LOGDIR")):
        raise InputError("--resume_checkpoint auto looks in --log_dir, which is missing: give it")
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    files.make_dirs(get_blob_logdir())
    given = given_flags(parser)
    settled = dict(given)
    if args.preset:
        _apply_preset(args, settled, kind)
    args.resume_checkpoint = find_model_to_resume(args.resume_checkpoint)
    same_folder = continues_records(args.resume_checkpoint)
    checkpoint = Checkpoint(args.resume_checkpoint) if args.resume_checkpoint else None
    if checkpoint:
        require_path("resume_checkpoint", args.resume_checkpoint)
        network_flags = FACTORIES[kind][1]()
        checkpoint.adopt_flags(args, settled, identity_flags(network_flags))
        # Flags given by hand take precedence for settings that do not change the function of the network.
        checkpoint.adopt_flags(args, {}, sorted(RUNTIME_FLAGS & network_flags.keys() - given.keys()))
        if args.seed < 0:
            checkpoint.adopt_flags(args, {}, ["seed"])
    if args.seed < 0:
        args.seed = dist_util.broadcast_object(secrets.randbits(48))
    seed_everything(args.seed)
    if same_folder:
        step = parse_resume_step_from_filename(args.resume_checkpoint)
        dist_util.from_rank_0(lambda: refuse_later_checkpoints(step))
    record = {"flags": dict(vars(args)), "classes": checkpoint.classes if checkpoint and same_folder else None}
    if checkpoint:
        _keep_global_batch(args, checkpoint)
    record["global_batch"] = args.batch_size * dist_util.get_world_size()
    return args, record


def _apply_preset(args, settled, kind):
    """Set the network and training flags of a preset that are not given by hand. Divide its global batch among the
    ranks.

    :param settled: see settle_flags.
    """
    preset, ranks = presets_for(args.preset).get(kind), dist_util.get_world_size()
    if preset is None:
        raise InputError(f"--preset {args.preset} contains no {kind}, which this script trains: choose another preset")
    values = {**preset.training, **preset.flags}
    total = values.pop("global_batch")
    if total % ranks and "batch_size" not in settled:
        raise InputError(
            f"--preset {args.preset}: {ranks} ranks cannot share its global batch of {total} images evenly: start "
            f"another number of ranks, or give --batch_size, the images of each rank"
        )
    values["batch_size"] = total // ranks
    if not th.cuda.is_available():
        values.pop("use_fp16", None)  # half precision is slow on most CPUs
    values = {name: value for name, value in values.items() if name not in settled}
    by_hand = " ".join(f"--{name} {value}" for name, (value, _) in settled.items())
    logger.log(f"--preset {args.preset} sets {' '.join(f'--{name} {value}' for name, value in values.items())}")
    logger.log(f"given by hand: {by_hand}")
    settle_flags(args, settled, values, f"--preset {args.preset}")


def _keep_global_batch(args, checkpoint):
    """Set args.batch_size such that a run that resumes on another number of ranks keeps its global batch size.

    A --batch_size that differs from the recorded one changes the global batch size.
    """
    total, ranks = (checkpoint.config or {}).get("global_batch"), dist_util.get_world_size()
    if not total or checkpoint.flags.get("batch_size") != args.batch_size or total == ranks * args.batch_size:
        return
    if total % ranks:
        raise InputError(
            f"{args.resume_checkpoint} is of a run with a global batch of {total} images, which {ranks} ranks cannot "
            f"share evenly: start another number of ranks, or give another --batch_size than {args.batch_size}"
        )
    args.batch_size = total // ranks
    logger.log(f"{args.batch_size} images a step on each of {ranks} ranks keep the global batch of {total}")


def training_data(args, record, image_size, **changes):
    """Return an iterator over the images that the flags select; see load_data.

    :param record: the dict that set_up_training returns.
    :param changes: arguments of load_data that replace those from the flags.
    """
    options = args_to_dict(args, [*data_flags(), "batch_size", "num_classes", "seed"])
    options.update(image_size=image_size, channels=args.in_channels, classes=record["classes"])
    return load_data(**{**options, **changes})


def record_run(record, kind, classes):
    """Write config.json to the checkpoint folder, and log the classes.

    :param record: the dict that set_up_training returns.
    :param kind: "diffusion", "upsampler" or "classifier".
    :param classes: the names of the classes in the order of their labels, or None.
    """
    write_config(**{**record, "classes": classes}, kind=kind)
    if classes:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:10]))
        logger.log(f"{len(classes)} classes: {named}{', ...' if len(classes) > 10 else ''}")
        room = record["flags"]["num_classes"]
        if room and room > len(classes):
            logger.warn(f"--num_classes {room}: the data have only {len(classes)} classes; the others get no images")
