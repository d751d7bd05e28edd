"""Measure sample quality against the number of model evaluations for each sampler, with and without guidance.

    python benchmarks/few_steps.py --model_path DIR/ema_0.995_001200.pt --classifier_path DIR/model000300.pt \
        --clean_path DIR/model000300.pt --data_dir FOLDER

For each sampler, timestep spacing and number of evaluations, the benchmark draws samples of balanced classes and
reports:

    frechet    the Frechet distance to the images of --data_dir, in features of a classifier that was trained on
               noise-free images (classifier_train.py --noised False)
    agreement  the fraction of samples that the noise-free classifier assigns to the requested class
    distance   the RMS distance between 16 samples and the results of 1000 DDIM steps from the same initial noise (only
               for deterministic samplers and the first seed)

Each finished row is appended to few_steps.csv in --out_dir. An interrupted benchmark continues when the same command is
run again. At the end, the benchmark writes few_steps.png and prints tables of the mean over seeds and half the range.
"""

import argparse
import csv
import os
import sys
from collections import defaultdict

import numpy as np
import torch as th

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from evaluations.classifier_features import ClassifierFeatures  # noqa: E402
from evaluations.metrics import frechet_distance  # noqa: E402
from guided_diffusion.checkpoint_util import Checkpoint, load_weights  # noqa: E402
from guided_diffusion.guidance import classifier_cond_fn, route_labels  # noqa: E402
from guided_diffusion.image_datasets import each_once, image_dataset  # noqa: E402
from guided_diffusion.pictures import to_uint8  # noqa: E402
from guided_diffusion.random_util import SampleNoise  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.solvers import SAMPLERS  # noqa: E402

COLUMNS = ("sampler", "spacing", "evaluations", "scale", "seed", "frechet", "agreement", "distance")
STOCHASTIC = ("ddpm", "dpmpp_2m_sde")
SPACINGS = {"ddpm": ["N"], "ddim": ["ddimN"]}  # other samplers use --spacings
DEVICE = th.device("cuda" if th.cuda.is_available() else "cpu")


def main():
    args = create_argparser().parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, "few_steps.csv")
    bench = Bench(args)
    done = {tuple(row[name] for name in COLUMNS[:5]) for row in read_rows(path)}
    for key in planned(args):
        if tuple(map(str, key)) in done:
            continue
        row = dict(zip(COLUMNS, (*key, *bench.figures(*key))))
        append_row(path, row)
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows = read_rows(path)
    print_table(rows)
    draw(os.path.join(args.out_dir, "few_steps.png"), rows)


def planned(args):
    """Yield each (sampler, spacing, evaluations, scale, seed) to measure."""
    for seed in map(int, args.seeds.split(",")):
        for scale in map(float, args.scales.split(",")):
            for n in map(int, args.evaluations.split(",")):
                for sampler in args.samplers.split(","):
                    for spacing in SPACINGS.get(sampler, args.spacings.split(",")):
                        yield sampler, spacing, n, scale, seed


class Bench:
    """Holds the networks and the reference statistics, and measures rows."""

    def __init__(self, args):
        self.args = args
        self.model_flags, model = load(args.model_path, create_model_and_diffusion, model_and_diffusion_defaults())
        self.model = route_labels(model, self.model_flags["class_cond"])
        classifier = (create_classifier_and_diffusion, classifier_and_diffusion_defaults())
        self.classifier_flags, self.classifier = load(args.classifier_path, *classifier)
        _, clean = load(args.clean_path, *classifier)
        self.network = ClassifierFeatures(clean)
        size, channels = self.model_flags["image_size"], self.model_flags["in_channels"]
        self.shape = (channels, size, size)
        self.labels = th.arange(args.num_samples, device=DEVICE) % self.classifier_flags["num_classes"]
        dataset, _ = image_dataset(args.data_dir, size, channels=channels)
        batches = [batch for _, batch, _ in each_once(dataset, args.batch_size)]
        pool = th.cat([self.network(to_uint8(batch.to(DEVICE)))[0] for batch in batches])
        self.reference = moments(pool)

    def sample(self, sampler, respacing, scale, seed, count, **options):
        """Return the samples with indices 0 to count - 1, float [count, C, H, W]."""
        names = ("learn_sigma", "noise_schedule", "predict_xstart", "rescale_timesteps")
        flags = {name: self.model_flags[name] for name in names}
        diffusion = create_gaussian_diffusion(
            steps=self.model_flags["diffusion_steps"], timestep_respacing=respacing, **flags
        )
        cond_fn = classifier_cond_fn(self.classifier, scale) if scale else None
        samples = []
        for start in range(0, count, self.args.batch_size):
            indices = range(start, min(start + self.args.batch_size, count))
            noise = SampleNoise(seed, indices, DEVICE)
            for out in SAMPLERS[sampler](
                diffusion, self.model, (len(indices), *self.shape), noise=noise.randn(*self.shape), cond_fn=cond_fn,
                model_kwargs={"y": self.labels[indices.start : indices.stop]}, randn_like=noise.randn_like, **options,
            ):  # fmt: skip
                pass
            samples.append(out["sample"])
        return th.cat(samples)

    def figures(self, sampler, spacing, evaluations, scale, seed):
        # PLMS evaluates the model twice in its first step.
        timesteps = evaluations - (sampler == "plms")
        samples = self.sample(sampler, spacing.replace("N", str(timesteps)), scale, seed, self.args.num_samples)
        pool, _ = self.network(to_uint8(samples.nan_to_num()))
        frechet = frechet_distance(*moments(pool), *self.reference)
        agreement = float((self.network.logits(pool).argmax(dim=1) == self.labels).float().mean())
        distance = ""
        if sampler not in STOCHASTIC and seed == int(self.args.seeds.split(",")[0]):
            path = self.path(scale, seed)
            distance = f"{float((samples[: len(path)] - path).square().mean().sqrt()):.4f}"
        return f"{frechet:.3f}", f"{agreement:.4f}", distance

    def path(self, scale, seed):
        """Return the first 16 samples after 1000 DDIM steps. The result is cached in --out_dir."""
        kept = os.path.join(self.args.out_dir, f"path_{scale:g}_{seed}.npy")
        if not os.path.exists(kept):
            np.save(kept, self.sample("ddim", "", scale, seed, 16, threshold="static").cpu().numpy())
        return th.from_numpy(np.load(kept)).to(DEVICE)


def load(path, create, defaults):
    """Return the flags of a checkpoint that has a config.json, and the network with the checkpoint's weights."""
    checkpoint = Checkpoint(path)
    flags = {**defaults, **{name: value for name, value in checkpoint.flags.items() if name in defaults}}
    network, _ = create(**flags)
    load_weights(network, path)
    return flags, network.to(DEVICE).eval().requires_grad_(False)


def moments(pool):
    x = pool.double().cpu().numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False)


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def append_row(path, row):
    is_new = not os.path.exists(path)
    with open(path, "a", newline="") as f:
        table = csv.DictWriter(f, row, lineterminator="\n")
        if is_new:
            table.writeheader()
        table.writerow(row)


def by_curve(rows):
    """Group rows as {scale: {"SAMPLER SPACING": {evaluations: rows of all seeds}}}."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        curve = row["sampler"] + ("" if row["spacing"] in ("N", "ddimN") else f" {row['spacing']}")
        found[float(row["scale"])][curve][int(row["evaluations"])].append(row)
    return found


def print_table(rows):
    """Print a Markdown table of each metric: the mean over seeds, and +- half the range of several seeds."""
    for scale, curves in sorted(by_curve(rows).items()):
        counts = sorted({n for curve in curves.values() for n in curve})
        for figure in COLUMNS[5:]:
            print(f"\n{figure}, {f'guided at scale {scale:g}' if scale else 'unguided'}\n")
            print("| evaluations | " + " | ".join(map(str, counts)) + " |\n" + "|---" * (len(counts) + 1) + "|")
            for curve, by_count in curves.items():
                cells = [summary([float(row[figure]) for row in by_count.get(n, []) if row[figure]]) for n in counts]
                if any(cells):
                    print(f"| {curve} | " + " | ".join(cells) + " |")


def summary(values):
    if not values:
        return ""
    spread = f" +- {(max(values) - min(values)) / 2:.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread}"


def draw(path, rows):
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    found = by_curve(rows)
    names = sorted({curve for curves in found.values() for curve in curves})
    figure = Figure(figsize=(15, 4.5 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 3, squeeze=False)
    for line, (scale, curves) in zip(panels, sorted(found.items())):
        counts = sorted({n for curve in curves.values() for n in curve})
        for axes, name in zip(line, COLUMNS[5:]):
            for curve, by_count in sorted(curves.items()):
                points = [(n, [float(row[name]) for row in of_n if row[name]]) for n, of_n in sorted(by_count.items())]
                points = [(n, np.mean(values)) for n, values in points if values]
                if points:
                    color = f"C{names.index(curve)}"  # each curve has the same colour in all panels
                    axes.plot(*zip(*points), marker="o", markersize=3, label=curve, color=color)
            axes.set(xscale="log", xlabel="evaluations", title=f"{name}, {f'scale {scale:g}' if scale else 'unguided'}")
            axes.set_yscale("linear" if name == "agreement" else "log")
            axes.set_xticks(counts, list(map(str, counts)))
            axes.xaxis.set_minor_locator(NullLocator())
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="checkpoint of the diffusion model, with its config.json")
    parser.add_argument("--classifier_path", required=True, help="checkpoint of the classifier that guides sampling")
    parser.add_argument("--clean_path", required=True, help="checkpoint of the noise-free classifier that evaluates")
    parser.add_argument("--data_dir", required=True, help="folder of real images to compare samples with")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--evaluations", default="5,6,8,10,12,15,20,25,50")
    parser.add_argument("--spacings", default="N,quadN", help="timestep spacings of the solvers")
    parser.add_argument("--scales", default="0,6", help="guidance scales; 0 is unguided (default: 0,6)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--out_dir", default="few_steps")
    return parser


if __name__ == "__main__":
    main()
