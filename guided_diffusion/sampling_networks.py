"""Build the networks, guides and labels of a sampling script from its command line."""

import math
import os
import warnings
from argparse import Namespace
from dataclasses import dataclass, replace

import torch as th

from . import checkpoint_util, dist_util, files, logger
from .class_labels import choose_labels, read_class_table
from .errors import InputError, choose
from .flags import FlagParser, add_dict_to_argparser
from .guidance import guide_by_model, route_labels
from .presets import PRESETS, presets_for
from .sampler_flags import make_sampler, parse_interval, sample_shape, sampler_flags, sampler_name
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


def sampling_flags():
    """Return the flags that all sampling scripts share, with their defaults."""
    flags = dict(clip_denoised=True, sample_size="", model_path="", preset="", models_dir="models", log_dir="")
    return {**flags, **sampler_flags(), "seed": 0, "compile": False, **output_flags()}


def output_flags():
    """Return the flags that are arguments of sample_job, with their defaults."""
    return dict(num_samples=10000, batch_size=16, save_images="", progress_grid=False)


def class_flags():
    """Return the flags that select labels, with their defaults."""
    return dict(classes="", class_table="")


@dataclass(frozen=True)
class Network:
    """A network that a sampling script uses.

    :param kind: "diffusion", "classifier" or "upsampler", as in presets.
    :param path_flag: the name of the flag that gives the path of the checkpoint.
    :param flags: the flags of the network, with their defaults.
    :param prefix: the prefix of these flags on the command line.
    :param optional: whether the path of the checkpoint may be empty.
    """

    kind: str
    path_flag: str
    flags: dict
    prefix: str = ""
    optional: bool = False


# A classifier must have been trained with the noise schedule and timesteps of the diffusion model.
NOISE_FLAGS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
DIFFUSION = Network("diffusion", "model_path", model_and_diffusion_defaults())
CLASSIFIER = Network(
    "classifier", "classifier_path", {**classifier_defaults(), **{k: DIFFUSION_FLAGS[k] for k in NOISE_FLAGS}}
)
OPTIONAL_CLASSIFIER = replace(CLASSIFIER, optional=True)
UPSAMPLER = Network("upsampler", "model_path", sr_model_and_diffusion_defaults())
PIPELINE_UPSAMPLER = replace(UPSAMPLER, path_flag="upsampler_path", prefix="upsampler_")

# Flags that do not change the samples, except for rounding.
NOT_OF_THE_JOB = {
    "num_samples", "batch_size", "compile", "log_dir", "save_images", "progress_grid", "preset", "models_dir",
    "class_table", "guide_preset", "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip


def sampling_parser(description, flags, *networks):
    """Create the parser of a script, with `flags` and the flags of its networks."""
    parser = FlagParser(description=description)
    of_networks = {network.prefix + name: v for network in networks for name, v in network.flags.items()}
    add_dict_to_argparser(parser, {**flags, **of_networks})
    return parser


def set_up_sampling(parser, *networks):
    """Parse the command line, join the other ranks, open the run folder, and complete the flags of the networks.

    :param parser: the parser of the script, with sampling_flags.
    :param networks: the Networks that the script uses.
    :return: the flags, completed by complete_flags.
    """
    args = parser.parse_args()
    dist_util.setup_dist()
    logger.configure(dir=dist_util.broadcast_object(args.log_dir or logger.default_dir()))
    complete_flags(args, given_flags(parser), *networks)
    if dist_util.get_rank():
        warnings.simplefilter("ignore")  # rank 0 shows the warnings
    return args


def complete_flags(args, given, *networks):
    """Set the flags of the networks in `args` from --preset and from the config.json beside each checkpoint.

    :param given: the flags given by hand, as given_flags returns them.
    :raises InputError: if a flag given by hand contradicts the preset or a config.json.
    """
    settled = dict(given)
    if args.preset:
        _apply_preset(args, given, settled, networks)
    for network in networks:
        path = getattr(args, network.path_flag)
        if network.optional and not path:
            continue
        checkpoint_util.require_path(network.path_flag, path)
        checkpoint_util.Checkpoint(path).adopt_flags(args, settled, identity_flags(network.flags), network.prefix)
    for network in networks:
        if hasattr(args, f"{network.prefix}sampler"):
            sampler_name(args, network.prefix)


def _apply_preset(args, given, settled, networks):
    presets = presets_for(args.preset)
    of_this_script = [(network, presets[network.kind]) for network in networks if network.kind in presets]
    if not of_this_script:
        raise InputError(f"--preset {args.preset} is for another script: this one samples with "
                         f"{' and '.join(network.kind for network in networks)}")  # fmt: skip
    for network, preset in of_this_script:
        flags, names = preset.all_flags(), identity_flags(network.flags)
        for name in names:
            checkpoint_util.settle_flags(args, settled, {network.prefix + name: flags[name]}, f"--preset {args.preset}")
        advice = {}
        if hasattr(args, f"{network.prefix}sampler"):  # image_nll.py does not sample
            advice = preset.advice(sampler_name(args, network.prefix))
        if th.cuda.is_available():  # half precision is slow on most CPUs
            advice.update((name, flags[name]) for name in network.flags if name.endswith("use_fp16"))
        advice[network.path_flag] = os.path.join(args.models_dir, preset.file_name)
        for name, value in advice.items():
            name = name if name == network.path_flag else network.prefix + name
            if hasattr(args, name) and name not in given:
                setattr(args, name, value)
        if network.path_flag not in given:
            _require_released(preset, f"--preset {args.preset}", args.models_dir, network.path_flag)


def _require_released(preset, option, models_dir, path_flag):
    path = os.path.join(models_dir, preset.file_name)
    if not files.exists(path):
        command = f"python scripts/download_models.py {preset.file_name} --models_dir {models_dir}"
        raise InputError(f"{option} needs {path}, which does not exist: {command} downloads it from {preset.address}; "
                         f"or give --{path_flag}")  # fmt: skip


def job_of(args, *networks, **more):
    """Return the settings that determine the samples, for sample_job: a dict of flags and fingerprints of files.

    :param more: {name of a flag: path} of further files that determine the samples.
    """
    paths = {network.path_flag: getattr(args, network.path_flag) for network in networks}
    no_part = {*NOT_OF_THE_JOB, *paths, *more, *(net.prefix + name for net in networks for name in NOT_OF_THE_JOB)}
    job = {name: value for name, value in vars(args).items() if name not in no_part}
    for flag, path in {**paths, **more}.items():
        if path:
            job[flag] = f"with content {dist_util.from_rank_0(lambda p=path: checkpoint_util.fingerprint(p))}"
    return job


def without_prefix(args, network):
    """Return the flags of a network whose flags have a prefix, by their names without the prefix."""
    length = len(network.prefix)
    return Namespace(**{k[length:]: v for k, v in vars(args).items() if k.startswith(network.prefix)})


def class_names_of(args, *path_flags):
    """Return the class names from --class_table or from the config.json beside a checkpoint, or None if unknown."""
    if args.class_table:
        return dist_util.from_rank_0(lambda: read_class_table(args.class_table))
    configs = [checkpoint_util.Checkpoint(getattr(args, flag)).config or {} for flag in path_flags]
    return next((config["classes"] for config in configs if config.get("classes")), None)


# Networks, labels and guidance


def prepare_network(model, path, use_fp16=False, use_bf16=False, compile=False):
    """Load weights into a network, and prepare the network for sampling on this rank's device.

    :param use_fp16, use_bf16: run the torso of the network in half precision.
    :param compile: use torch.compile. The network is compiled in its first call, and again for another batch size.
    """
    checkpoint_util.load_weights(model, path)
    model.to(dist_util.dev(), memory_format=th.channels_last).eval().requires_grad_(False)
    if use_fp16:
        model.convert_to_fp16()
    elif use_bf16:
        model.convert_to_bf16()
    if compile:
        logger.log("the network will be compiled (--compile True): the first batch can take minutes")
        model = th.compile(model, dynamic=False)
    return model


def load_diffusion(args):
    """Return the diffusion model with its weights, as a function of (x, t, y), and its process.

    An unconditional model ignores the labels y.
    """
    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    model = prepare_network(model, args.model_path, args.use_fp16, args.use_bf16, args.compile)
    return route_labels(model, args.class_cond), diffusion


def load_guide(args):
    """Return the second model that guides the diffusion model, as a function of (x, t, y), or None without such a
    model.

    The flags of the guide come from --guide_preset or from its config.json.

    :raises InputError: if the guide and the diffusion model differ in size, schedule or predicted quantity.
    """
    path, preset = args.guide_model_path, None
    if args.guide_preset:
        known = {name: preset for name, preset in PRESETS.items() if preset.kind == "diffusion"}
        preset = choose("--guide_preset", args.guide_preset, known)
        if not path:
            _require_released(preset, f"--guide_preset {args.guide_preset}", args.models_dir, "guide_model_path")
            path = args.guide_model_path = os.path.join(args.models_dir, preset.file_name)
    if not path:
        if args.guide_scale != 1:
            raise InputError(f"--guide_scale {args.guide_scale}: there is no guide: give --guide_model_path")
        return None
    checkpoint_util.require_path("guide_model_path", path)
    recorded = preset.all_flags() if preset else checkpoint_util.Checkpoint(path).flags
    if not recorded:
        raise InputError(f"--guide_model_path {path}: no config.json beside it: restore it, or give --guide_preset")
    flags = {**DIFFUSION.flags, **recorded, "use_fp16": args.use_fp16, "use_bf16": args.use_bf16}
    flags = Namespace(**{name: flags[name] for name in DIFFUSION.flags})
    labels = ("num_classes",) if flags.class_cond else ()
    for name in ("image_size", "in_channels", "predict_xstart", *NOISE_FLAGS, *labels):
        if getattr(flags, name) != getattr(args, name):
            raise InputError(f"--guide_model_path {path}: its {name} is {getattr(flags, name)}, but the model's is "
                             f"{getattr(args, name)}: a guide must fit the model that it guides")  # fmt: skip
    if flags.class_cond and not args.class_cond and not getattr(args, "classifier_path", ""):
        raise InputError(f"--guide_model_path {path}: it takes class labels, but the model takes none")
    logger.log("creating guide...")
    guide, _ = create_model_and_diffusion(**vars(flags))
    guide = prepare_network(guide, path, flags.use_fp16, flags.use_bf16, args.compile)
    return route_labels(guide, flags.class_cond)


def with_guide(args, model, guide, diffusion, scale):
    """Return the diffusion model of load_diffusion, guided by the model of load_guide."""
    if not abs(scale) < math.inf:
        raise InputError(f"--guide_scale {scale}: must be finite")
    return guide_by_model(model, guide, scale, parse_interval(args.guidance_interval, diffusion))


def load_classifier(flags, path, compile=False):
    """Return a classifier with its weights.

    :param flags: the flags of the classifier, without a prefix.
    :param compile: see prepare_network.
    """
    logger.log("creating classifier...")
    classifier = create_classifier(**args_to_dict(flags, classifier_defaults()))
    return prepare_network(classifier, path, flags.classifier_use_fp16, flags.classifier_use_bf16, compile)


def load_guiding_classifier(args):
    """Return the classifier that guides sampling."""
    _, *size = sample_shape(args)
    if args.classifier_scale and args.classifier_pool == "attention" and set(size) != {args.image_size}:
        raise InputError(f"--sample_size {args.sample_size}: a classifier with --classifier_pool attention takes only "
                         f"--image_size {args.image_size}; sample without it: --classifier_scale 0")  # fmt: skip
    config = checkpoint_util.Checkpoint(args.classifier_path).config or {}
    if config.get("flags", {}).get("noised") is False:
        logger.warn(f"{args.classifier_path} was trained on clean images (--noised False): it cannot guide well")
    return load_classifier(args, args.classifier_path, args.compile)


def load_upsampler(flags, path, compile=False):
    """Return the upsampler with its weights, as a function of (x, t, low_res, y), and its process.

    An unconditional upsampler ignores the labels y.

    :param flags: the flags of the upsampler, without a prefix.
    :param compile: see prepare_network.
    """
    logger.log("creating upsampler...")
    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(flags, sr_model_and_diffusion_defaults()))
    model = prepare_network(model, path, flags.use_fp16, flags.use_bf16, compile)
    return route_labels(model, flags.class_cond), diffusion


def sampler_options(args):
    """Return the arguments of a BatchSampler that depend only on flags."""
    return dict(shape=sample_shape(args), seed=args.seed, sampler=make_sampler(args))


def labels_for(args, num_classes, *path_flags):
    """Return the labels of all samples that --classes selects; see choose_labels.

    :param path_flags: the flags of the checkpoints whose config.json may contain the class names.
    """
    return choose_labels(args.classes, args.num_samples, num_classes, args.seed, class_names_of(args, *path_flags))
