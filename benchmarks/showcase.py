"""Reproduce the paper's claims on a laptop: train on emoji, sample, evaluate, and write tables and pictures.

    make showcase
    python benchmarks/showcase.py --out_dir showcase --ranks 2

Each stage is a command of this repository. The command is printed before it runs, and can also be run by hand. After
an interruption, run the showcase again: finished stages are skipped, and the interrupted stage continues. On two CPU
cores, training a 32x32 model and an upsampler to 64x64 takes 80 minutes, and sampling and evaluation take about an
hour. On a GPU, the showcase trains a 64x64 model and an upsampler to 128x128. The contents of --out_dir are:

    emoji, held_out           the images; every fifth emoji is held out of training
    base, classifier, upsampler, clean, clean_large    run folders of the training scripts
    sweep/sweep.csv, .png     guidance trades diversity for fidelity (paper, figures 4 and 5)
    few_steps/few_steps.png   quality against the number of network evaluations (paper, table 5)
    unguided, guided          samples of the base model and the upsampler, one row per class
    stages.csv                guidance combined with upsampling: four kinds of large samples (paper, table 5)
    *_bicubic.png             the small samples, enlarged by bicubic interpolation
    neighbours.png            samples above their nearest training images
    likelihood/               bits per dimension of the held-out images
    times.csv                 the wall time of each stage, in seconds
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch as th
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from few_steps import load  # noqa: E402

from evaluations.batches import Batch  # noqa: E402
from evaluations.classifier_features import ClassifierFeatures  # noqa: E402
from evaluations.features import Features, compare, reference_features  # noqa: E402
from guided_diffusion.pictures import save_grid  # noqa: E402
from guided_diffusion.script_util import classifier_and_diffusion_defaults, create_classifier_and_diffusion  # noqa: E402

CLASSES = 9
METRICS = ("fid", "is", "precision", "recall")
SCHEDULE = dict(noise_schedule="cosine", random_flip=False)


@dataclass(frozen=True)
class Scale:
    """Image sizes, network sizes and training steps for one kind of machine."""

    small: int
    large: int
    batch_size: int  # images per step on all ranks
    base: dict  # flags of the base model
    upsampler: dict
    classifier: dict
    base_steps: int
    upsampler_steps: int
    classifier_steps: int
    clean_steps: int
    ema_rate: float
    samples: int


LAPTOP = Scale(
    small=32, large=64, batch_size=32,
    base=dict(num_channels=64, channel_mult="1,2,2", num_res_blocks=1, attention_resolutions="8"),
    upsampler=dict(num_channels=32, num_res_blocks=1, attention_resolutions="8"),
    classifier=dict(classifier_width=64, classifier_depth=1, classifier_attention_resolutions="8"),
    base_steps=2400, upsampler_steps=800, classifier_steps=400, clean_steps=400, ema_rate=0.995, samples=500,
)  # fmt: skip
GPU = Scale(
    small=64, large=128, batch_size=128,
    base=dict(num_channels=128, channel_mult="1,2,3,4", num_res_blocks=2, attention_resolutions="16,8", use_bf16=True),
    upsampler=dict(num_channels=64, num_res_blocks=2, attention_resolutions="16", use_bf16=True),
    classifier=dict(classifier_width=64, classifier_depth=2, classifier_attention_resolutions="16,8"),
    base_steps=20000, upsampler_steps=5000, classifier_steps=3000, clean_steps=2000, ema_rate=0.999, samples=2000,
)  # fmt: skip


class Showcase:
    """Runs the stages of the showcase in order. Each stage is a command with its flags."""

    def __init__(self, args):
        self.out, self.ranks, self.scale = args.out_dir, args.ranks, GPU if th.cuda.is_available() else LAPTOP
        self.guidance, self.times = args.classifier_scale, os.path.join(args.out_dir, "times.csv")
        self.steps = dict(sampler="unipc", timestep_respacing=args.evaluations)

    def path(self, *names):
        return os.path.join(self.out, *names)

    def run(self, stage, script, *words, launch=True, **flags):
        """Run the command of a stage, unless times.csv lists the stage as finished."""
        if os.path.exists(self.times):
            with open(self.times, newline="") as f:
                if stage in [row[0] for row in csv.reader(f)]:
                    return
        mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
        launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(self.ranks)] if launch else []
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        command = [*launcher, sys.executable, os.path.join(ROOT, script), *words, *given]
        print(f"\n{stage}: {' '.join(command)}", flush=True)
        start = time.time()
        subprocess.run(command, check=True)
        with open(self.times, "a", newline="") as f:
            csv.writer(f).writerow([stage, round(time.time() - start)])

    def data(self):
        self.run("emoji", "datasets/emoji.py", self.path("emoji"), size=self.scale.large,
                 held_out_dir=self.path("held_out"), launch=False)  # fmt: skip
        for size in (self.scale.small, self.scale.large):
            self.run(f"reference {size}", "evaluations/make_reference.py", self.path("emoji"), self.reference(size),
                     "--no_statistics", image_size=size, launch=False)  # fmt: skip

    def reference(self, size):
        return self.path(f"reference{size}.npz")

    def train(self):
        scale, share = self.scale, self.scale.batch_size // self.ranks
        common = dict(data_dir=self.path("emoji"), resume_checkpoint="auto", seed=0, batch_size=share, lr=4e-4,
                      save_interval=200, keep_checkpoints=1, log_interval=50, **SCHEDULE)  # fmt: skip
        diffusion = dict(class_cond=True, num_classes=CLASSES, learn_sigma=True, resblock_updown=True,
                         num_head_channels=32, ema_rate=scale.ema_rate, warmup_steps=100, **common)  # fmt: skip
        self.run("base", "scripts/image_train.py", image_size=scale.small, log_dir=self.path("base"),
                 lr_anneal_steps=scale.base_steps, sample_interval=400, **scale.base, **diffusion)  # fmt: skip
        self.run("upsampler", "scripts/super_res_train.py", large_size=scale.large, small_size=scale.small,
                 log_dir=self.path("upsampler"), lr_anneal_steps=scale.upsampler_steps, sample_interval=400,
                 **scale.upsampler, **diffusion)  # fmt: skip
        held_out = dict(val_data_dir=self.path("held_out"), eval_interval=50, num_classes=CLASSES, anneal_lr=True,
                        weight_decay=0.05, **scale.classifier, **common)  # fmt: skip
        for name, size, steps in (
            ("classifier", scale.small, scale.classifier_steps),
            ("clean", scale.small, scale.clean_steps),
            ("clean_large", scale.large, scale.clean_steps),
        ):
            self.run(name, "scripts/classifier_train.py", image_size=size, iterations=steps, log_dir=self.path(name),
                     noised=name == "classifier", random_crop=name != "classifier", **held_out)  # fmt: skip

    def weights(self, name):
        """Return the path of a training run's final weights, or of their moving average if the run has one."""
        scale, average = self.scale, f"ema_{self.scale.ema_rate}_"
        file_name = {
            "base": f"{average}{scale.base_steps:06d}.pt",
            "upsampler": f"{average}{scale.upsampler_steps:06d}.pt",
            "classifier": f"model{scale.classifier_steps:06d}.pt",
        }.get(name, f"model{scale.clean_steps:06d}.pt")
        return self.path(name, file_name)

    def sample(self):
        scale = self.scale
        networks = dict(model_path=self.weights("base"), classifier_path=self.weights("classifier"))
        job = dict(classes="balanced", num_samples=scale.samples, batch_size=50, **self.steps, **networks)
        self.run("sweep", "scripts/guidance_sweep.py", log_dir=self.path("sweep"), scales="0,0.5,1,2,4,8",
                 ref_batch=self.reference(scale.small), features="classifier", feature_path=self.weights("clean"),
                 **job)  # fmt: skip
        for name, guidance in (("unguided", 0), ("guided", self.guidance)):
            self.run(name, "scripts/pipeline_sample.py", log_dir=self.path(name), classifier_scale=guidance,
                     upsampler_path=self.weights("upsampler"), upsampler_batch_size=50,
                     **{f"upsampler_{flag}": value for flag, value in self.steps.items()}, **job)  # fmt: skip
        self.run("few steps", "benchmarks/few_steps.py", **networks, clean_path=self.weights("clean"), launch=False,
                 data_dir=self.path("emoji"), out_dir=self.path("few_steps"), num_samples=scale.samples,
                 samplers="ddpm,ddim,dpmpp_2m,unipc", spacings="N", evaluations="5,8,12,25",
                 scales=f"0,{self.guidance}")  # fmt: skip
        self.run("likelihood", "scripts/image_nll.py", model_path=self.weights("base"), data_dir=self.path("held_out"),
                 log_dir=self.path("likelihood"), num_samples=100, batch_size=25, timestep_respacing=100)  # fmt: skip

    def report(self):
        """Evaluate the four kinds of large samples. Write stages.csv, enlarged samples and nearest neighbours."""
        classifier = (create_classifier_and_diffusion, classifier_and_diffusion_defaults())
        _, network = load(self.weights("clean_large"), *classifier)
        features, reference = ClassifierFeatures(network), Batch(self.reference(self.scale.large), 3)
        known = reference_features(features, reference, 100, METRICS)
        rows = []
        for name in ("unguided", "guided"):
            for kind, path in (("bicubic", self.enlarge(name)), ("upsampler", self.samples(name))):
                found = Features(features, Batch(path, 3), 100, METRICS)
                labels = th.from_numpy(np.load(path)["arr_1"])
                predicted = features.logits(th.from_numpy(found.pool)).argmax(dim=1).cpu()
                figures = compare(METRICS, reference, known, found)
                agreement = float((predicted == labels).float().mean())
                rows.append({"base samples": name, "enlarged by": kind, **figures, "agreement": agreement})
        with open(self.path("stages.csv"), "w", newline="") as f:
            table = csv.DictWriter(f, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        print("  ".join(f"{name:>12}" for name in rows[0]))
        for row in rows:
            print("  ".join(f"{value:>12}" if isinstance(value, str) else f"{value:12.4g}" for value in row.values()))
        self.neighbours(features, known.pool)

    def samples(self, name, folder="", size=0):
        size = size or self.scale.large
        return self.path(name, folder, f"samples_{self.scale.samples}x{size}x{size}x3.npz")

    def enlarge(self, name):
        """Enlarge the base model's samples by bicubic interpolation. Write an .npz file and a picture."""
        with np.load(self.samples(name, "base", self.scale.small)) as arrays:
            small, labels = arrays["arr_0"], arrays["arr_1"]
        side = (self.scale.large, self.scale.large)
        images = np.stack([np.asarray(Image.fromarray(image).resize(side, Image.BICUBIC)) for image in small])
        path = self.path(f"{name}_bicubic")
        np.savez(path + ".npz", images, labels)
        save_grid(path + ".png", images, labels)
        return path + ".npz"

    def neighbours(self, features, known):
        """Draw 16 guided samples above their nearest training images, by pixels and by features of the classifier."""
        with np.load(self.samples("guided")) as arrays, np.load(self.reference(self.scale.large)) as reference:
            samples, training = arrays["arr_0"][:16], reference["arr_0"]
        pool, _ = features(th.from_numpy(samples))
        by_pixels = nearest(samples.reshape(16, -1) / 255, training.reshape(len(training), -1) / 255)
        by_features = nearest(pool.cpu().numpy(), known)
        rows = [samples, training[by_pixels], training[by_features]]
        save_grid(self.path("neighbours.png"), np.concatenate(rows), columns=16)


def nearest(points, pool):
    """Return, for each row of `points`, the index of the nearest row of `pool` by Euclidean distance."""
    return [int(((pool - point) ** 2).sum(axis=1).argmin()) for point in points]


def main():
    args = create_argparser().parse_args()
    os.makedirs(args.out_dir, exist_ok=True)
    showcase = Showcase(args)
    showcase.data()
    showcase.train()
    showcase.sample()
    showcase.report()


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="showcase")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--classifier_scale", type=float, default=2.0, help="guidance scale of the guided samples")
    parser.add_argument("--evaluations", type=int, default=15, help="evaluations of each network per sample")
    return parser


if __name__ == "__main__":
    main()
