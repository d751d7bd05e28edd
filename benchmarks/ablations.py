"""Change the architecture choices of ADM one at a time, in a small model of 16x16 digits (the paper's tables 1 and 2).

    python benchmarks/ablations.py --data_dir quickstart/digits --held_out_dir quickstart/digits_held_out \
        --clean_path DIR/model000300.pt --out_dir ablations --workers 2

`make quickstart` writes the digits. docs/evaluation.md has a command that trains the clean classifier. With the same
seed, all variants train for the same number of steps with the same images, timesteps and noise. Columns:

    parameters    the number of weights
    loss          the training loss of held-out images, at timesteps and noise that are the same for all models
    frechet       the Frechet distance of unguided samples to the images of --data_dir, in features of a classifier that
                  was trained on clean images (--clean_path); samples take 15 evaluations by dpmpp_2m_sde
    seconds       the CPU time of training and sampling, on one core

The loss and the samples use the moving average of the weights. Each finished row is appended to ablations.csv in
--out_dir, and a killed benchmark continues when the same command is run again. At the end, the script prints a table
(mean over seeds and half their range) and writes ablations.png.

By default 10 variants train for 300 steps of 32 images with 3 seeds. On a busy machine with AVX2, one thread takes 0.29
to 0.4 s for a step of the base, and 11 times as long for a step of all variants; 500 samples of the base take 30 s.
That makes 66 to 90 core-minutes in all: 33 to 45 minutes with two workers on two cores. Idle cores are faster.
"""

import argparse
import copy
import multiprocessing
import os
import threading
import time

import numpy as np
import torch as th
from few_steps import DEVICE, append_row, load, moments, read_rows, summary  # puts the root on sys.path

from evaluations.classifier_features import ClassifierFeatures
from evaluations.metrics import frechet_distance
from guided_diffusion.image_datasets import each_once, image_dataset
from guided_diffusion.nn import update_ema
from guided_diffusion.pictures import to_uint8
from guided_diffusion.random_util import SampleNoise
from guided_diffusion.script_util import (
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.solvers import SAMPLERS

SIZE, CHANNELS = 16, 1
BASE = dict(
    image_size=SIZE, in_channels=CHANNELS, num_channels=32, channel_mult="1,2", num_res_blocks=1,
    attention_resolutions="8", num_head_channels=32, resblock_updown=True, use_scale_shift_norm=True,
    learn_sigma=True, noise_schedule="cosine",
)  # fmt: skip
# The middle block always has attention. The attention blocks have 64 channels, and therefore 2 heads in the base.
VARIANTS = {
    "base": {},
    "attention in the middle only": dict(attention_resolutions=""),
    "attention at 16 and 8": dict(attention_resolutions="16,8"),
    "1 head of 64 channels": dict(num_head_channels=64),
    "4 heads of 16 channels": dict(num_head_channels=16),
    "resampling by convolutions": dict(resblock_updown=False),
    "timestep added (no adaptive norm)": dict(use_scale_shift_norm=False),
    "deeper: 2 blocks a level": dict(num_res_blocks=2),
    "wider: 64 channels at 16x16": dict(channel_mult="2,2"),  # as many weights as the deeper one
    # One head, attention in the middle only, resampling by convolutions, and the timestep added
    "plain: four changes together": dict(
        attention_resolutions="", num_head_channels=64, resblock_updown=False, use_scale_shift_norm=False
    ),
}
KEY = ("variant", "seed", "steps", "samples")
FIGURES = ("parameters", "loss", "frechet", "seconds")
LR, EMA_RATE = 1e-3, 0.98


def main():
    args = create_argparser().parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, "ablations.csv")
    keys = [(name, int(seed), args.steps, args.num_samples) for seed in args.seeds.split(",") for name in VARIANTS]
    done = {tuple(row[name] for name in KEY) for row in read_rows(path)}
    missing = [key for key in keys if tuple(map(str, key)) not in done]
    if missing:
        measure(args, missing, path)
    wanted = {tuple(map(str, key)) for key in keys}
    rows = [row for row in read_rows(path) if tuple(row[name] for name in KEY) in wanted]
    print_table(args, rows)
    draw(os.path.join(args.out_dir, "ablations.png"), rows)


def measure(args, keys, path):
    """Train and sample in worker processes, evaluate the samples here, and append the rows to a .csv."""
    images, held_out = load_images(args.data_dir), load_images(args.held_out_dir)
    _, clean = load(args.clean_path, create_classifier_and_diffusion, classifier_and_diffusion_defaults())
    network = ClassifierFeatures(clean)
    th.set_num_threads(1)

    def statistics(pictures):
        parts = th.from_numpy(pictures).split(args.batch_size)
        return moments(th.cat([network(part.to(DEVICE))[0] for part in parts]))

    reference = statistics(to_uint8(th.from_numpy(images)).numpy())
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(args.workers, start_worker, (images, held_out, args.batch_size)) as pool:
        for key, figures, samples in pool.imap_unordered(train_and_sample, keys):
            figures["frechet"] = f"{frechet_distance(*statistics(samples), *reference):.3f}"
            row = dict(zip(KEY, key), **figures)
            append_row(path, row)
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def load_images(folder):
    """Return all images of a folder: float32 [N, C, H, W] in [-1, 1]."""
    dataset, _ = image_dataset(folder, SIZE, channels=CHANNELS)
    return np.concatenate([batch.numpy() for _, batch, _ in each_once(dataset, 500)])


def start_worker(images, held_out, batch_size):
    global data
    data = th.from_numpy(images), th.from_numpy(held_out), batch_size
    th.set_num_threads(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """Exit when the parent process is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_and_sample(key):
    """Return the key, its figures except the Frechet distance, and samples uint8 [N, H, W, C]."""
    start = time.process_time()
    (name, seed, steps, count), (images, held_out, batch_size) = key, data
    flags = {**model_and_diffusion_defaults(), **BASE, **VARIANTS[name]}
    model, diffusion = train(flags, images, steps, seed)
    loss = held_out_loss(model, diffusion, held_out, batch_size)
    _, spaced = create_model_and_diffusion(**{**flags, "timestep_respacing": "15"})
    samples = sample(model, spaced, seed, count, batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    seconds = time.process_time() - start
    return key, dict(parameters=parameters, loss=f"{loss:.5f}", seconds=f"{seconds:.0f}"), samples


def train(flags, images, steps, seed, batch_size=32):
    """Train a model. Return a model with the moving average of the weights, and the diffusion process."""
    th.manual_seed(seed)  # for the initial weights
    model, diffusion = create_model_and_diffusion(**flags)
    model.to(DEVICE)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = th.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    schedule = th.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    generator = th.Generator().manual_seed(seed)  # the same batches, timesteps and noise for all variants
    for _ in range(steps):
        x_start = images[th.randint(len(images), (batch_size,), generator=generator)]
        t = th.randint(diffusion.num_timesteps, (batch_size,), generator=generator)
        noise = th.randn(x_start.shape, generator=generator)
        losses = diffusion.training_losses(model, x_start.to(DEVICE), t.to(DEVICE), noise=noise.to(DEVICE))
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        schedule.step()
        update_ema(average.parameters(), model.parameters(), rate=EMA_RATE)
    return average, diffusion


@th.inference_mode()
def held_out_loss(model, diffusion, images, batch_size, repeats=2):
    """The mean training loss of images, each at `repeats` timesteps that are evenly spaced over all images."""
    x_start = images.repeat(repeats, 1, 1, 1)
    generator = th.Generator().manual_seed(0)
    t = th.randperm(len(x_start), generator=generator) * diffusion.num_timesteps // len(x_start)
    noise = th.randn(x_start.shape, generator=generator)
    batches = zip(*(values.to(DEVICE).split(batch_size) for values in (x_start, t, noise)))
    return float(th.cat([diffusion.training_losses(model, x, t, noise=e)["loss"] for x, t, e in batches]).mean())


def sample(model, diffusion, seed, count, batch_size):
    """Samples 0 to count - 1: uint8 [count, H, W, C]."""
    samples, shape = [], (CHANNELS, SIZE, SIZE)
    for start in range(0, count, batch_size):
        noise = SampleNoise(seed, range(start, min(start + batch_size, count)), DEVICE)
        x = noise.randn(*shape)
        *_, last = SAMPLERS["dpmpp_2m_sde"](diffusion, model, x.shape, noise=x, randn_like=noise.randn_like)
        samples.append(to_uint8(last["sample"]).cpu().numpy())
    return np.concatenate(samples)


def by_variant(rows, figure):
    """{variant: the figure for each seed}."""
    return {name: [float(row[figure]) for row in rows if row["variant"] == name] for name in VARIANTS}


def print_table(args, rows):
    """Print a Markdown table: the mean over seeds, and half the range of its values."""
    print(f"\n{args.steps} steps, {args.num_samples} samples, seeds {args.seeds}; Frechet distance in features of")
    print(f"{args.clean_path}\n\n| variant | " + " | ".join(FIGURES) + " |\n|" + "---|" * (len(FIGURES) + 1))
    columns = [by_variant(rows, figure) for figure in FIGURES]
    for name in VARIANTS:
        parameters, *cells = (column[name] for column in columns)
        print(f"| {name} | {int(parameters[0]):,} | " + " | ".join(map(summary, cells)) + " |")


def draw(path, rows):
    """Write the picture: a small dot for each seed, a large one for their mean, and a band for the base's range."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in zip(panels, ("loss", "frechet"), ("held-out loss", "Frechet distance of samples")):
        found = by_variant(rows, name)
        axes.axvspan(min(found["base"]), max(found["base"]), color="tab:blue", alpha=0.15)
        for y, values in enumerate(found.values()):
            axes.plot([min(values), max(values)], [y, y], color="tab:grey")
            axes.plot(values, [y] * len(values), ".", color="tab:grey")
            axes.plot(np.mean(values), y, "o", color="tab:blue")
        axes.set(title=title, xlabel="lower is better")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(VARIANTS)), VARIANTS)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=90)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of digits to train on")
    parser.add_argument("--held_out_dir", required=True, help="folder of held-out digits")
    parser.add_argument("--clean_path", required=True, help="checkpoint of the clean classifier that judges samples")
    parser.add_argument("--out_dir", default="ablations")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=250, help="of sampling and evaluation")
    parser.add_argument("--workers", type=int, default=1, help="models to train at a time, with one thread each")
    return parser


if __name__ == "__main__":
    main()
