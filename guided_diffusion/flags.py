"""The command-line flags of the scripts: help texts, groups in --help, and parsers.

The modules that use a flag declare its default. Scripts pass dicts of flag names and defaults to add_dict_to_argparser.
"""

import argparse

from .errors import launcher_rank

ADDED_FLAGS = {"num_classes", "in_channels", "use_bf16", "classifier_use_bf16"}  # flags that the original code lacks
PREFIXES = {"upsampler_": "upsampler", "feature_": "feature network"}  # HELP omits these prefixes

HELP = {
    "data": {
        "data_dir": "folder of images (jpg, png, gif, webp), searched recursively; a local path or a blob URL",
        "labels": "source of the class labels: name (file name up to the first _), folder, or a CSV file of path,label",
        "val_data_dir": "folder of held-out images for validating the classifier",
        "val_labels": "source of the class labels for --val_data_dir, given in the same way as --labels",
        "random_crop": "crop images at random instead of at the centre",
        "random_flip": "flip each image horizontally with probability 0.5",
        "num_workers": "number of processes per rank that decode images; 0 decodes in the main process",
        "skip_bad_images": "skip and count images that cannot be read, instead of ending the run",
        "num_classes": "number of classes",
        "in_channels": "number of image channels: 1, 3 or 4",
        "base_samples": ".npz file of low-resolution images to upsample",
    },
    "model": {
        "preset": "name of a released model; sets its flags, the paper's settings and its checkpoint in --models_dir",
        "image_size": "height and width of the images in pixels",
        "large_size": "height and width of the upsampled images in pixels",
        "small_size": "height and width of the low-resolution images in pixels",
        "num_channels": "base number of channels, which channel_mult multiplies",
        "channel_mult": "channels of each level as multiples of num_channels, such as 1,2,4; empty: set by image_size",
        "num_res_blocks": "number of residual blocks per level",
        "num_heads": "number of attention heads; used if num_head_channels is -1",
        "num_heads_upsample": "number of attention heads in the decoder; -1: equal to num_heads",
        "num_head_channels": "number of channels per attention head; -1: use num_heads instead",
        "attention_resolutions": "resolutions with attention layers, such as 32,16,8",
        "dropout": "dropout probability",
        "class_cond": "make the model class-conditional",
        "use_checkpoint": "recompute activations in the backward pass, which saves memory",
        "use_scale_shift_norm": "use adaptive group norm: scale and shift activations by the timestep embedding",
        "resblock_updown": "upsample and downsample in residual blocks, as in BigGAN",
        "use_new_attention_order": "split attention projections into q, k, v before heads; must match the checkpoint",
        "use_fp16": "run the convolutional torso of the network in float16",
        "use_bf16": "run the convolutional torso of the network in bfloat16",
    },
    "classifier": {
        "classifier_path": "checkpoint of the classifier that guides sampling",
        "classifier_scale": "scale of classifier guidance; 0 samples without guidance",
        "classifier_use_fp16": "run the convolutional torso of the classifier in float16",
        "classifier_use_bf16": "run the convolutional torso of the classifier in bfloat16",
        "classifier_width": "base number of channels of the classifier",
        "classifier_depth": "number of residual blocks per level of the classifier",
        "classifier_attention_resolutions": "resolutions at which the classifier has attention layers",
        "classifier_use_scale_shift_norm": "use adaptive group norm in the classifier",
        "classifier_resblock_updown": "downsample in the residual blocks of the classifier",
        "classifier_pool": "pooling layer of the classifier: adaptive, attention, spatial or spatial_v2",
    },
    "guidance": {
        "guide_model_path": "checkpoint of a second diffusion model that guides the first",
        "guide_preset": "name of a released model to use as the guide; sets its flags and its path in --models_dir",
        "guide_scale": "scale of guidance by the second model; 1 disables guidance",
        "guidance_interval": "part of the process to guide, such as 0.2,0.8; 0 is the clean end, 1 the noisy end",
    },
    "process": {
        "learn_sigma": "the model also predicts the variance of each step",
        "diffusion_steps": "number of timesteps of the diffusion process that the model is trained on",
        "noise_schedule": "noise schedule of the diffusion process: linear or cosine",
        "timestep_respacing": "timesteps to use: a number, numbers per section (10,10,15), ddimN or quadN; empty: all",
        "use_kl": "train on the variational bound instead of the mean squared error",
        "predict_xstart": "the model predicts x_start instead of the noise",
        "rescale_timesteps": "scale the timesteps that the model gets to 0..1000",
        "rescale_learned_sigmas": "multiply the variational bound in the loss by diffusion_steps / 1000",
    },
    "training": {
        "microbatch": "number of images in each forward and backward pass; -1: the whole batch",
        "lr": "learning rate",
        "weight_decay": "weight decay of AdamW",
        "lr_anneal_steps": "total number of steps, over which the learning rate falls linearly to 0; 0: constant rate",
        "anneal_lr": "decrease the learning rate linearly to 0 over --iterations",
        "warmup_steps": "number of initial steps over which the learning rate rises linearly",
        "total_steps": "number of steps after which training ends; 0: train until --lr_anneal_steps, or without end",
        "iterations": "number of training steps of the classifier",
        "ema_rate": "decay rates of the moving averages (EMA) of the weights, separated by commas",
        "fp16_scale_growth": "amount added to log2 of the loss scale after each float16 step",
        "max_grad_norm": "clip gradients to this L2 norm; 0 disables clipping",
        "max_bad_steps": "number of consecutive steps without a finite loss or gradient that ends training; 0: never",
        "schedule_sampler": "distribution of the training timesteps: uniform or loss-second-moment",
        "noised": "train the classifier on noised images; False: on clean images",
        "resume_checkpoint": "modelNNNNNN.pt file to resume from; auto: the newest one in --log_dir, if there is one",
    },
    "sampling": {
        "model_path": "checkpoint of the diffusion model or upsampler",
        "models_dir": "folder that holds the released checkpoints",
        "num_samples": "number of samples to draw, or of images for the likelihood",
        "sampler": "ddpm, ddim, plms, dpmpp_2m, dpmpp_2m_sde or unipc; empty: ddpm, or ddim with --use_ddim True",
        "threshold": "limit on guided predictions of x_start: static ([-1, 1]), dynamic, or a quantile for dynamic "
        "thresholding; empty: static, or no limit for ddim",
        "use_ddim": "sample with DDIM instead of DDPM",
        "clip_denoised": "clip predictions of x_start to [-1, 1]",
        "sample_size": "size of the samples, such as 48 or 32,64 (height,width); empty: the size used in training",
        "classes": "classes to sample: numbers or names separated by commas, balanced, or a file; empty: random",
        "class_table": "CSV file of class names, with the columns label and name",
        "scales": "scales of classifier guidance to compare, separated by commas",
        "guide_scales": "scales of guidance by a second model to compare instead of --scales, separated by commas",
    },
    "output": {
        "log_dir": "run folder; empty: the variable OPENAI_LOGDIR, or a dated folder in the system's temporary folder",
        "log_interval": "number of steps between rows of metrics",
        "save_interval": "number of steps between checkpoints",
        "keep_checkpoints": "number of newest checkpoints to keep; 0: keep all",
        "sample_interval": "number of steps between preview images; 0: no preview images",
        "eval_interval": "number of steps between evaluations on held-out images",
        "save_images": "folder in which each sample is also saved as a PNG file",
        "progress_grid": "also save a picture of the sampling process of the first samples",
    },
    "evaluation": {
        "ref_batch": ".npz file of reference images",
        "features": "network whose features are compared: inception or classifier",
        "inception_path": "path of the Inception graph; empty: find or download the graph",
        "path": "path of the network's checkpoint",
        "eval_batch_size": "number of images per batch during evaluation",
        "eval_dtype": "precision of the Inception network: fp32 or bf16",
    },
    "run": {
        "batch_size": "number of images per batch on each rank",
        "seed": "seed of all random numbers; in training, -1 draws a seed and records it in config.json",
        "compile": "compile the networks with torch.compile; meant for GPUs",
    },
}


class FlagParser(argparse.ArgumentParser):
    """An argument parser for scripts that run on several ranks. A single rank prints usage errors, in one line."""

    def __init__(self, **kwargs):
        super().__init__(usage="%(prog)s [--flag value ...]", **kwargs)

    def error(self, message):
        line = f"{self.prog}: error: {message} (--help lists the flags)"
        raise SystemExit(line if launcher_rank() == 0 else 1)


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for each entry of a dict of names and defaults. A flag has its default's type, or str for None."""
    groups = {}
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        title, text = _describe(name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        groups[title].add_argument(f"--{name}", default=default, type=kind, metavar="", help=text)


def _describe(name):
    """Return the help group and help text of a flag, or (None, None) for flags of other projects."""
    for prefix, title in PREFIXES.items():
        if name.startswith(prefix):
            return title, _describe(name.removeprefix(prefix))[1]
    for title, flags in HELP.items():
        if name in flags:
            return title, flags[name].replace("%", "%%") + " (default: %(default)s)"
    return None, None


def args_to_dict(args, keys):
    """Return the parsed flags named in `keys` as a dict. Flags in ADDED_FLAGS may be missing from `args`."""
    return {name: getattr(args, name) for name in keys if name not in ADDED_FLAGS or hasattr(args, name)}


def str2bool(v):
    """Parse a boolean flag: yes, true, t, y, 1 or no, false, f, n, 0, in upper or lower case."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected a boolean such as True or False, not {v!r}")


def given_flags(parser, argv=None):
    """Return the flags on the command line as {name: (value, "on the command line")}, for Checkpoint.adopt_flags."""
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in defaults:
            action.default = argparse.SUPPRESS
        return {name: (value, "on the command line") for name, value in vars(parser.parse_args(argv)).items()}
    finally:
        for action, default in defaults.items():
            action.default = default
