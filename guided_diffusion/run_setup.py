"""From a script's command line to a run that is ready to be built: ranks, folder, seed, and what networks it is of."""

import csv
import io
import os
from argparse import Namespace
from dataclasses import dataclass, replace

import torch as th

from . import checkpoint_util, dist_util, files, logger
from .errors import InputError
from .presets import presets_for
from .random_util import seed_everything
from .script_util import (
    DIFFUSION_FLAGS,
    RUNTIME_FLAGS,
    classifier_defaults,
    given_flags,
    identity_flags,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)

# Training


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
            setattr(args, name, config["flags"][name])  # by hand, these may change from run to run
        record["flags"] = dict(vars(args))
        _keep_global_batch(args, config)
        record["classes" if goes_on else "former_classes"] = config.get("classes")
    if goes_on:
        step = checkpoint_util.parse_resume_step_from_filename(args.resume_checkpoint)
        dist_util.from_rank_0(lambda: checkpoint_util.refuse_later_checkpoints(step))
        logger.get_current().rewind(step)
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
    record = dict(record)
    former = record.pop("former_classes", None)
    if classes and former and classes != former:
        logger.warn("the classes are numbered by this run's data, and not as in the run that it resumes from")
    checkpoint_util.write_config(**{**record, "classes": classes}, kind=kind)
    if classes:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:10]))
        logger.log(f"{len(classes)} classes: {named}{', ...' if len(classes) > 10 else ''}")


# Sampling


@dataclass(frozen=True)
class Network:
    """A network that a script samples with.

    :param kind: "diffusion", "classifier" or "upsampler": a preset's.
    :param path_flag: the flag with its checkpoint's path.
    :param flags: the flags that it is built from, a dict with their defaults.
    :param prefix: what the names of these flags begin with on the command line.
    """

    kind: str
    path_flag: str
    flags: dict
    prefix: str = ""


# What the classifier must have been trained on is the diffusion model's.
NOISE_FLAGS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
DIFFUSION = Network("diffusion", "model_path", model_and_diffusion_defaults())
CLASSIFIER = Network(
    "classifier", "classifier_path", {**classifier_defaults(), **{k: DIFFUSION_FLAGS[k] for k in NOISE_FLAGS}}
)
UPSAMPLER = Network("upsampler", "model_path", sr_model_and_diffusion_defaults())
PIPELINE_UPSAMPLER = replace(UPSAMPLER, path_flag="upsampler_path", prefix="upsampler_")

# Flags that leave the images as they are, but for rounding.
NOT_OF_THE_JOB = {
    "num_samples", "batch_size", "log_dir", "save_images", "progress_grid", "preset", "models_dir", "class_table",
    "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip


def set_up_sampling(parser, *networks):
    """Parse the command line, join the other ranks, open the run's folder, and settle what the networks are.

    They are what --preset says, and the config.json beside each checkpoint; what contradicts them is refused.

    :param parser: the script's, with sample_util's sampling_flags.
    :param networks: what the script samples with.
    :return: the parsed flags, complete.
    """
    args = parser.parse_args()
    dist_util.setup_dist()
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    given = given_flags(parser)
    settled = dict(given)
    if args.preset:
        _apply_preset(args, given, settled, networks)
    for network in networks:
        names = identity_flags(network.flags)
        checkpoint_util.adopt_config(args, settled, network.path_flag, names, network.prefix)
    return args


def _apply_preset(args, given, settled, networks):
    presets = presets_for(args.preset)
    of_this_script = [(network, presets[network.kind]) for network in networks if network.kind in presets]
    if not of_this_script:
        raise InputError(f"--preset {args.preset} is a model of another script's: this one samples with "
                         f"{' and '.join(network.kind for network in networks)}")  # fmt: skip
    for network, preset in of_this_script:
        flags, names = preset.all_flags(), identity_flags(network.flags)
        for name in names:
            checkpoint_util.settle(args, settled, network.prefix + name, flags[name], f"--preset {args.preset}")
        samples = hasattr(args, f"{network.prefix}use_ddim")  # image_nll.py doesn't: its bound is of all timesteps
        fast = given.get(f"{network.prefix}use_ddim", (False,))[0] and preset.ddim_sampling
        advice = {**preset.sampling, **(preset.ddim_sampling if fast else {})} if samples else {}
        if th.cuda.is_available():  # half precision is slow on most CPUs
            advice.update((name, flags[name]) for name in network.flags if name.endswith("use_fp16"))
        advice[network.path_flag] = os.path.join(args.models_dir, preset.file_name)
        for name, value in advice.items():
            name = name if name == network.path_flag else network.prefix + name
            if hasattr(args, name) and name not in given:
                setattr(args, name, value)
        path = getattr(args, network.path_flag)
        if network.path_flag not in given and not files.exists(path):
            raise InputError(
                f"--preset {args.preset} needs {path}, which is not there: put the released file in --models_dir, "
                f"or give --{network.path_flag}"
            )


def job_of(args, *networks, **more):
    """What decides the images of a sampling run, for sample_util.sample_job: a dict of flags and of files' content.

    :param more: further files by the flags that name them.
    """
    paths = {network.path_flag: getattr(args, network.path_flag) for network in networks}
    no_part = {*NOT_OF_THE_JOB, *paths, *more, *(net.prefix + name for net in networks for name in NOT_OF_THE_JOB)}
    job = {name: value for name, value in vars(args).items() if name not in no_part}
    for flag, path in {**paths, **more}.items():
        job[flag] = f"with content {dist_util.from_rank_0(lambda p=path: checkpoint_util.fingerprint(p))}"
    return job


def without_prefix(args, network):
    """The flags of one network of several, under their plain names."""
    length = len(network.prefix)
    return Namespace(**{k[length:]: v for k, v in vars(args).items() if k.startswith(network.prefix)})


def class_names_of(args, *path_flags):
    """The names of the classes, from --class_table or the config.json beside one of the checkpoints; or None."""
    if args.class_table:
        return dist_util.from_rank_0(lambda: _read_class_table(args.class_table))
    configs = [checkpoint_util.read_config(getattr(args, flag)) or {} for flag in path_flags]
    return next((config["classes"] for config in configs if config.get("classes")), None)


def _read_class_table(path):
    try:
        with files.open_file(path) as f:
            rows = list(csv.DictReader(io.TextIOWrapper(f, "utf-8")))
        table = {int(row["label"]): ",".join(filter(None, [row.get("wnid"), row["name"]])) for row in rows}
        return [table[i] for i in range(len(table))]
    except OSError as e:
        raise InputError(f"--class_table {path}: cannot be read ({e.strerror})") from None
    except (KeyError, ValueError, TypeError):
        raise InputError(
            f"--class_table {path}: a CSV file with the columns label and name is expected, with labels from 0 on, "
            f"such as the classes.csv that datasets/imagenet.py writes"
        ) from None
