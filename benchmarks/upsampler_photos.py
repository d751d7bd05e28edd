"""Train a 16 to 32 pixel upsampler on two photographs for some minutes, and compare it with bicubic interpolation.

    python benchmarks/upsampler_photos.py

cuts scikit-learn's two sample photographs into a left part to train on and a right part that is held out, trains with
scripts/super_res_train.py, upsamples shrunken crops of the held-out part with scripts/super_res_sample.py, and prints
the mean squared error (in grey levels squared) of bicubic interpolation, of DDPM and of DDIM samples with few and more
steps. A sample is one of the many pictures that fit; with few steps it is nearer to their mean, which has the least
error.
"""

import argparse
import os
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LARGE, SMALL = 32, 16
HELD_OUT = 0.3  # the share of a photograph's width
# The same network for training; sampling reads it from config.json.
NETWORK = dict(
    large_size=LARGE, small_size=SMALL, num_channels=32, num_res_blocks=2, num_heads=2, attention_resolutions="8",
    predict_xstart=True, noise_schedule="cosine",
)  # fmt: skip
SPACINGS = ["2", "4", "50"]


def main():
    args = create_argparser().parse_args()
    crops = os.path.join(args.out_dir, "crops")
    truth, small = make_crops(crops, args.count)
    base = os.path.join(args.out_dir, "held_out_16.npz")
    np.savez(base, small)
    run("super_res_train", args.ranks, data_dir=crops, log_dir=os.path.join(args.out_dir, "upsampler"), **NETWORK,
        batch_size=32 // args.ranks, lr=1e-3, warmup_steps=50, lr_anneal_steps=args.steps, ema_rate=0.99,
        log_interval=100, save_interval=10**6, num_workers=0, resume_checkpoint="auto")  # fmt: skip
    model = os.path.join(args.out_dir, "upsampler", f"ema_0.99_{args.steps:06d}.pt")

    bicubic = error(truth, np.stack([enlarge(image) for image in small]))
    print(f"{len(truth)} held-out crops; mean squared error of bicubic interpolation: {bicubic:.1f}")
    for name in ("DDPM", "DDIM"):
        for spacing in SPACINGS:
            folder = os.path.join(args.out_dir, f"{name}-{spacing}")
            run("super_res_sample", args.ranks, model_path=model, base_samples=base, log_dir=folder, batch_size=50,
                num_samples=len(small), use_ddim=name == "DDIM", timestep_respacing=spacing)  # fmt: skip
            with np.load(os.path.join(folder, f"samples_{len(small)}x{LARGE}x{LARGE}x3.npz")) as f:
                found = error(truth, f["arr_0"])
            print(f"{name}, {spacing:>2} steps: {found:.1f}, {found / bicubic:.2f} of bicubic's")


def make_crops(folder, count):
    """Write crops to train on; return held-out ones, and those shrunk by averaging areas: uint8 [N, size, size, 3]."""
    from sklearn.datasets import load_sample_images

    os.makedirs(folder, exist_ok=True)
    rng, truth = np.random.default_rng(0), []
    for number, photo in enumerate(load_sample_images().images):
        height, width, _ = photo.shape
        border = int(width * (1 - HELD_OUT))
        for i in range(count // 2):
            y, x = rng.integers(height - LARGE + 1), rng.integers(border - LARGE + 1)
            Image.fromarray(photo[y : y + LARGE, x : x + LARGE]).save(os.path.join(folder, f"{number}_{i:05d}.png"))
        corners = [(y, x) for y in range(0, height - LARGE, LARGE) for x in range(border, width - LARGE, LARGE)]
        truth += [photo[y : y + LARGE, x : x + LARGE] for y, x in corners]
    truth = np.stack(truth)
    factor = LARGE // SMALL
    areas = truth.reshape(len(truth), SMALL, factor, SMALL, factor, 3).astype(float)
    return truth, np.rint(areas.mean(axis=(2, 4))).astype(np.uint8)


def enlarge(image):
    return np.asarray(Image.fromarray(image).resize((LARGE, LARGE), Image.BICUBIC))


def error(truth, images):
    return float(((truth.astype(float) - images) ** 2).mean())


def run(name, ranks, **flags):
    """Run one of the scripts."""
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    script = os.path.join(ROOT, "scripts", f"{name}.py")
    launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(ranks)]
    subprocess.run([*launcher, sys.executable, script, *words], check=True, stdout=subprocess.DEVNULL)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="upsampler_photos")
    parser.add_argument("--steps", type=int, default=2000, help="of training (default: 2000)")
    parser.add_argument("--count", type=int, default=4000, help="crops to train on (default: 4000)")
    parser.add_argument("--ranks", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
