"""Bound the negative log-likelihood of images under a diffusion model, in bits per dimension."""

import math
from contextlib import contextmanager

import numpy as np

from guided_diffusion import dist_util, files, logger
from guided_diffusion.image_datasets import image_dataset
from guided_diffusion.likelihood_util import TERMS, bits_per_dim
from guided_diffusion.sampling_networks import (
    DIFFUSION,
    class_names_of,
    load_diffusion,
    sampling_parser,
    set_up_sampling,
)
from guided_diffusion.script_util import args_to_dict


def main():
    args = set_up_sampling(create_argparser(), DIFFUSION)
    model, diffusion = load_diffusion(args)

    logger.log("creating data loader...")
    dataset, _ = image_dataset(
        args.data_dir,
        args.image_size,
        class_cond=args.class_cond,
        num_classes=args.num_classes,
        classes=class_names_of(args, "model_path"),
        channels=args.in_channels,
        labels=args.labels,
    )

    logger.log("evaluating...")
    result = bits_per_dim(
        diffusion,
        model,
        dataset,
        count=args.num_samples,
        **args_to_dict(args, ["batch_size", "seed", "clip_denoised", "num_workers"]),
    )
    mean, error = mean_and_error(result["total_bpd"])
    logger.log(f"{len(result['total_bpd'])} images: {mean:.4f} +- {error:.4f} bits/dim (one standard error)")
    dist_util.from_rank_0(lambda: save_likelihood(result))


def mean_and_error(values):
    """Return the mean of independent values [N] and its standard error, which is nan for a single value."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def save_likelihood(result):
    """Write the result of bits_per_dim to the run folder. Only rank 0 calls this function.

    bpd.npz contains all arrays by name. vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz contain one term by
    timestep as arr_0, as in the original code. terms.png is a plot of the terms.
    """
    for name, arrays in [("bpd", result), *((f"{name}_terms", {"arr_0": result[name]}) for name in TERMS)]:
        with _writing(f"{name}.npz") as f:
            np.savez(f, **arrays)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warn("no plot of the terms: pip install matplotlib")
        return
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    labels = ("variational bound, bits/dim", "error of x_start", "error of eps")
    for axes, name, label in zip(figure.subplots(1, len(TERMS)), TERMS, labels):
        values = result[name][::-1]
        axes.plot(np.arange(len(values)), values)
        axes.set(xlabel="timestep, from clean to noise", title=label)
        if (values > 0).all():
            axes.set_yscale("log")
    with _writing("terms.png") as f:
        figure.savefig(f, format="png", dpi=100)


@contextmanager
def _writing(name):
    path = files.join(logger.get_dir(), name)
    with files.disk_errors(path, "the result is the last line before this"), files.write_atomically(path) as f:
        yield f


def create_argparser():
    flags = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="", log_dir="")
    flags.update(labels="name", num_workers=1, seed=0, preset="", models_dir="models", class_table="", compile=False)
    return sampling_parser(__doc__, flags, DIFFUSION)


if __name__ == "__main__":
    main()
