"""From a sampling script's command line to the networks and samplers that it asks for."""

import csv
import io
import os
from argparse import Namespace
from dataclasses import dataclass, replace

import torch as th

from . import checkpoint_util, dist_util, files, logger
from .errors import InputError
from .guidance import route_labels
from .presets import presets_for
from .sample_util import UPSAMPLING, BatchSampler, by_index, choose_labels, prepare_network
from .script_util import (
    DIFFUSION_FLAGS,
    args_to_dict,
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    given_flags,
    identity_flags,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

# The command line


@dataclass(frozen=True)
class Network:
    """A network that a script samples with.

    :param kind: "diffusion", "classifier" or "upsampler": a preset's.
    :param path_flag: the flag with its checkpoint's path.
    :param flags: the flags that it is built from, a dict with their defaults.
    :param prefix: what the names of these flags begin with on the command line.
    :param optional: whether the flag with its path may be empty, for a script to do without.
    """

    kind: str
    path_flag: str
    flags: dict
    prefix: str = ""
    optional: bool = False


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
    "num_samples", "batch_size", "compile", "log_dir", "save_images", "progress_grid", "preset", "models_dir",
    "class_table", "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
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
        if network.optional and not getattr(args, network.path_flag):
            continue
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


# What is built from the flags


def load_diffusion(args):
    """The diffusion model with its weights, and its process."""
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    return prepare_network(model, args.model_path, args.use_fp16, args.use_bf16, batch_to_compile(args)), diffusion


def batch_to_compile(args):
    """The size of the batches that networks are to be compiled for, or 0."""
    return args.batch_size if args.compile else 0


def load_classifier(flags, path, compile_for=0):
    """A classifier with its weights.

    :param flags: the classifier's, under their plain names.
    :param compile_for: see sample_util.prepare_network.
    """
    logger.log("creating classifier...")
    classifier = create_classifier(**args_to_dict(flags, classifier_defaults()))
    return prepare_network(classifier, path, flags.classifier_use_fp16, flags.classifier_use_bf16, compile_for)


def load_guide(args):
    """The classifier that guides, of a script's own flags."""
    config = checkpoint_util.read_config(args.classifier_path) or {}
    if config.get("flags", {}).get("noised") is False:
        logger.warn(f"{args.classifier_path} has only seen clean images (--noised False): it cannot guide well")
    return load_classifier(args, args.classifier_path, batch_to_compile(args))


def load_upsampler(flags, path, compile_for=0):
    """The upsampler with its weights, and its process.

    :param flags: the upsampler's, under their plain names.
    :param compile_for: see sample_util.prepare_network.
    """
    logger.log("creating upsampler...")
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(flags, sr_model_and_diffusion_defaults()))
    return prepare_network(model, path, flags.use_fp16, flags.use_bf16, compile_for), diffusion


def labels_for(args, num_classes, *path_flags):
    """The label of every sample, as --classes asks: see choose_labels.

    :param path_flags: of the checkpoints that may know the classes' names.
    """
    return choose_labels(args.classes, args.num_samples, num_classes, args.seed, class_names_of(args, *path_flags))


def image_sampler(args, model, diffusion, labels, cond_fn=None):
    """A BatchSampler of the diffusion model; `cond_fn`, too, gets the labels."""
    return BatchSampler(
        diffusion,
        route_labels(model, args.class_cond),
        (args.in_channels, args.image_size, args.image_size),
        conditions=by_index(labels),
        cond_fn=cond_fn,
        **args_to_dict(args, ["seed", "use_ddim", "clip_denoised"]),
    )


def upsampling_sampler(flags, model, diffusion, base, seed, clip_denoised):
    """A BatchSampler of the upsampler.

    :param flags: the upsampler's, under their plain names.
    :param base: the BaseSamples to upsample.
    """
    return BatchSampler(
        diffusion,
        route_labels(model, flags.class_cond),
        (flags.in_channels, flags.large_size, flags.large_size),
        conditions=base.conditions,
        seed=seed,
        use_ddim=flags.use_ddim,
        clip_denoised=clip_denoised,
        stream=UPSAMPLING,
    )
