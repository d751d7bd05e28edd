"""The scripts' command line: what each flag means, its group in --help, and parsers.

Defaults are declared where flags are used: a script passes dicts of names and defaults to add_dict_to_argparser.
"""

import argparse

from .errors import launcher_rank

ADDED_FLAGS = {"num_classes", "in_channels", "use_bf16", "classifier_use_bf16"}  # which the original code lacks
PREFIXES = {"upsampler_": "upsampler", "feature_": "feature network"}  # of flags that are listed below without them

HELP = {
    "data": {
        "data_dir": "folder of images (jpg, png, gif, webp), searched recursively; a local path or a blob URL",
        "labels": "where an image's class is found: name (up to the first _), folder, or a CSV file of path,label",
        "val_data_dir": "folder of held-out images to validate a classifier on",
        "val_labels": "as --labels, for --val_data_dir",
        "random_crop": "crop at random instead of at the centre",
        "random_flip": "mirror half of the images",
        "num_workers": "processes that decode images, on each rank; 0 decodes in the main process",
        "skip_bad_images": "skip and count images that cannot be read, instead of ending the run",
        "num_classes": "number of classes",
        "in_channels": "channels of the images: 1, 3 or 4",
        "base_samples": ".npz of small images to upsample",
    },
    "model": {
        "preset": "a released model: sets its flags, the paper's settings and, to sample, its path in --models_dir",
        "image_size": "side of the images",
        "large_size": "side of the upsampled images",
        "small_size": "side of the small images",
        "num_channels": "base width, which channel_mult multiplies",
        "channel_mult": "width of each level as a multiple of num_channels, such as 1,2,4; empty: from the image size",
        "num_res_blocks": "residual blocks per level",
        "num_heads": "attention heads, if num_head_channels is -1",
        "num_heads_upsample": "attention heads of the decoder, if they differ; -1: as num_heads",
        "num_head_channels": "channels per attention head; -1: num_heads decides",
        "attention_resolutions": "resolutions that have attention, such as 32,16,8",
        "dropout": "dropout rate",
        "class_cond": "the model takes class labels",
        "use_checkpoint": "save memory in training by recomputing activations",
        "use_scale_shift_norm": "adaptive group norm: the timestep scales and shifts, instead of being added",
        "resblock_updown": "resample in residual blocks, as BigGAN does",
        "use_new_attention_order": "channel layout of the attention projections; the released models differ in it",
        "use_fp16": "run the torso in float16",
        "use_bf16": "run the torso in bfloat16",
    },
    "classifier": {
        "classifier_path": "checkpoint of the classifier that guides",
        "classifier_scale": "scale of the classifier's gradient; 0 samples without guidance",
        "classifier_use_fp16": "run the classifier's torso in float16",
        "classifier_use_bf16": "run the classifier's torso in bfloat16",
        "classifier_width": "base width of the classifier",
        "classifier_depth": "residual blocks per level of the classifier",
        "classifier_attention_resolutions": "resolutions at which the classifier has attention",
        "classifier_use_scale_shift_norm": "adaptive group norm in the classifier",
        "classifier_resblock_updown": "resample in the classifier's residual blocks",
        "classifier_pool": "how the classifier pools: adaptive, attention, spatial or spatial_v2",
    },
    "guidance": {
        "guide_model_path": "checkpoint of a second model that guides the first",
        "guide_preset": "a released model as guide: sets its flags and its path in --models_dir",
        "guide_scale": "scale of guidance by the second model; 1: off",
        "guidance_interval": "guide only in this part of the process, such as 0.2,0.8; 0 is its clean end",
    },
    "process": {
        "learn_sigma": "the model predicts the variance of a step",
        "diffusion_steps": "timesteps of the process that the model is trained on",
        "noise_schedule": "linear or cosine",
        "timestep_respacing": "timesteps to visit: a count, counts per section (10,10,15), ddimN or quadN; empty: all",
        "use_kl": "train on the variational bound",
        "predict_xstart": "the model predicts x_start instead of the noise",
        "rescale_timesteps": "show the model timesteps scaled to 0..1000",
        "rescale_learned_sigmas": "scale the bound's term of the loss by the number of timesteps / 1000",
    },
    "training": {
        "microbatch": "images that pass through the network at once; -1: the whole batch",
        "lr": "learning rate",
        "weight_decay": "AdamW's weight decay",
        "lr_anneal_steps": "steps of training, over which the learning rate falls linearly to 0; 0: constant",
        "anneal_lr": "let the learning rate fall linearly to 0 over --iterations",
        "warmup_steps": "steps over which the learning rate first rises linearly",
        "total_steps": "steps after which training ends; 0: never, or with --lr_anneal_steps",
        "iterations": "steps of training a classifier",
        "ema_rate": "rates of the moving averages of the weights, separated by commas",
        "fp16_scale_growth": "increase of the logarithmic loss scale per step, in float16",
        "max_grad_norm": "scale larger gradients down to this norm; 0: never",
        "max_bad_steps": "steps in a row without a finite loss after which training ends",
        "schedule_sampler": "distribution over timesteps: uniform or loss-second-moment",
        "noised": "train the classifier on noised images; False: on clean ones",
        "resume_checkpoint": "modelNNNNNN.pt to resume from; auto: the newest of --log_dir, if there is one",
    },
    "sampling": {
        "model_path": "checkpoint of the diffusion model or upsampler",
        "models_dir": "folder of the released checkpoints",
        "num_samples": "number of samples, or of images for the likelihood",
        "sampler": "ddpm, ddim, plms, dpmpp_2m, dpmpp_2m_sde or unipc; empty: ddpm, or ddim with --use_ddim True",
        "threshold": "limit guided predictions of x_start: static, to [-1, 1], dynamic, or the latter's quantile; "
        "empty: static, but not for ddim",
        "use_ddim": "sample by DDIM instead of DDPM",
        "clip_denoised": "clip predictions of x_start to [-1, 1]",
        "sample_size": "size of the samples, such as 48 or 32,64 (height, width); empty: as trained",
        "classes": "classes to sample: numbers or names separated by commas, balanced, or a file; empty: random",
        "class_table": "CSV file with the columns label and name, for class names",
        "scales": "scales of classifier guidance to sweep, separated by commas",
        "guide_scales": "scales of guidance by a second model to sweep instead",
    },
    "output": {
        "log_dir": "folder of the run; empty: a dated folder under the system's temporary one",
        "log_interval": "steps between log rows",
        "save_interval": "steps between checkpoints",
        "keep_checkpoints": "newest checkpoints to keep; 0: all",
        "sample_interval": "steps between previews; 0: none",
        "eval_interval": "steps between validations",
        "save_images": "folder to also write each sample to, as a PNG",
        "progress_grid": "also draw the sampling process of the first samples",
    },
    "evaluation": {
        "ref_batch": ".npz of reference images",
        "features": "network whose features are compared: inception or classifier",
        "inception_path": "the Inception graph; empty: found or downloaded",
        "path": "checkpoint of this network",
        "eval_batch_size": "images per batch of the evaluation",
        "eval_dtype": "precision of the Inception network: fp32 or bf16",
    },
    "run": {
        "batch_size": "images per batch, on each rank",
        "seed": "seed of all random numbers; -1 in training: draw one, and record it in config.json",
        "compile": "compile the networks with torch.compile; meant for GPUs",
    },
}


class FlagParser(argparse.ArgumentParser):
    """An argument parser for scripts that run on several ranks: one rank prints a usage error, in one line."""

    def __init__(self, **kwargs):
        super().__init__(usage="%(prog)s [--flag value ...]", **kwargs)

    def error(self, message):
        line = f"{self.prog}: error: {message} (--help lists the flags)"
        raise SystemExit(line if launcher_rank() == 0 else 1)


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for each entry of a dict, with its default and of its type. None stands for a string."""
    groups = {}
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        title, text = _describe(name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        groups[title].add_argument(f"--{name}", default=default, type=kind, metavar="", help=text)


def _describe(name):
    """The group and the help of a flag, with its default. Flags of other projects' scripts have none."""
    for prefix, title in PREFIXES.items():
        if name.startswith(prefix):
            return title, _describe(name.removeprefix(prefix))[1]
    for title, flags in HELP.items():
        if name in flags:
            return title, flags[name].replace("%", "%%") + " (default: %(default)s)"
    return None, None


def args_to_dict(args, keys):
    """The parsed flags of these names, as a dict. Flags that the original code lacks may be missing from `args`."""
    return {name: getattr(args, name) for name in keys if name not in ADDED_FLAGS or hasattr(args, name)}


def str2bool(v):
    """Parse a boolean flag: yes, true, t, y, 1 and no, false, f, n, 0, in any case."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"a boolean such as True or False is expected, not {v!r}")


def given_flags(parser, argv=None):
    """The flags on the command line: {name: (value, "on the command line")}, as Checkpoint.adopt_flags expects."""
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in defaults:
            action.default = argparse.SUPPRESS
        return {name: (value, "on the command line") for name, value in vars(parser.parse_args(argv)).items()}
    finally:
        for action, default in defaults.items():
            action.default = default
