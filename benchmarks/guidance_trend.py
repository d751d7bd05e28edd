"""What the scale of guidance does to the quickstart's digits: agreement with the label rises, diversity falls.

    make quickstart
    python benchmarks/guidance_trend.py

samples at several scales from the models that the quickstart trained, and prints for each the share of samples that an
independent judge (scikit-learn's SVC, trained on real digits) takes for the digit asked for, and the mean distance
between two samples of one class, over that between two real digits of one class.
"""

import argparse
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "datasets"))


def main():
    args = create_argparser().parse_args()
    from digits import load_digit_images
    from judge_digits import agreement, read_samples, train_judge

    real, labels = load_digit_images(16)
    judge, spread = train_judge(16), distance_within_classes(real, labels)
    print(f"{'scale':>6}{'agreement':>11}{'diversity':>11}")
    for scale in args.scales.split(","):
        images, wanted = read_samples(sample(args, scale))
        share, diversity = agreement(judge, images, wanted), distance_within_classes(images, wanted) / spread
        print(f"{scale:>6}{share:>11.1%}{diversity:>11.3f}", flush=True)


def sample(args, scale):
    """Sample with the script; what is there already is not made again. Return the .npz's path."""
    quickstart, folder = args.quickstart_dir, os.path.join(args.out_dir, f"scale-{scale}")
    flags = dict(
        model_path=os.path.join(quickstart, "diffusion", "ema_0.995_001200.pt"),
        classifier_path=os.path.join(quickstart, "classifier", "model000300.pt"),
        classifier_scale=scale, log_dir=folder, classes="balanced", num_samples=args.num_samples, batch_size=50,
        timestep_respacing=args.timestep_respacing,
    )  # fmt: skip
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(args.ranks)]
    words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    script = os.path.join(ROOT, "scripts", "classifier_sample.py")
    subprocess.run([*launcher, sys.executable, script, *words], check=True, stdout=subprocess.DEVNULL)
    return os.path.join(folder, f"samples_{args.num_samples}x16x16x1.npz")


def distance_within_classes(images, labels):
    """The mean Euclidean distance between two images of one class, over all pairs and classes."""
    means = []
    for label in np.unique(labels):
        x = images[labels == label].reshape(np.sum(labels == label), -1).astype(float)
        squares = (x**2).sum(axis=1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
        means.append(distances[np.triu_indices(len(x), 1)].mean())
    return float(np.mean(means))


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart_dir", default="quickstart")
    parser.add_argument("--out_dir", default="guidance_trend")
    parser.add_argument("--scales", default="0,1,2,4,8")
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--timestep_respacing", default="100")
    parser.add_argument("--ranks", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
