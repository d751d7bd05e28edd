"""Train an upsampler from 16 to 32 pixels on two photographs, and compare it with bicubic interpolation.

    python benchmarks/upsampler_photos.py

The benchmark cuts scikit-learn's two sample photographs into training crops and held-out tiles of 32x32 pixels that do
not overlap with any crop. It trains with scripts/super_res_train.py for some minutes, and upsamples the shrunken tiles
with scripts/super_res_sample.py. Then it prints the mean squared error (in squared grey levels) of bicubic
interpolation, of DDPM samples and of DDIM samples.

Many large images are consistent with a small image. A sample from a perfect model is one of these large images, and has
twice the mean squared error of their mean. At both timesteps of this benchmark, the noise in x_t hides the details that
the small image lacks. Samples are therefore close to the mean, and have a low error.
"""

import argparse
import os
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LARGE, SMALL = 32, 16
EVERY = 7  # one in EVERY tiles is held out
# Flags for training. Sampling reads the flags from config.json.
NETWORK = dict(
    large_size=LARGE, small_size=SMALL, num_channels=64, num_res_blocks=1, num_heads=2, attention_resolutions="",
    learn_sigma=True, rescale_learned_sigmas=True, predict_xstart=True, noise_schedule="cosine", diffusion_steps=2,
    use_bf16=True,
)  # fmt: skip


def main():
    args = create_argparser().parse_args()
    crops = os.path.join(args.out_dir, "crops")
    truth, small = make_crops(crops, args.count)
    base = os.path.join(args.out_dir, "held_out_16.npz")
    np.savez(base, small)
    run("super_res_train", args.ranks, data_dir=crops, log_dir=os.path.join(args.out_dir, "upsampler"), **NETWORK,
        batch_size=16 // args.ranks, lr=4e-4, warmup_steps=50, lr_anneal_steps=args.steps, ema_rate=0.98,
        log_interval=100, save_interval=10**6, num_workers=0, resume_checkpoint="auto")  # fmt: skip
    model = os.path.join(args.out_dir, "upsampler", f"ema_0.98_{args.steps:06d}.pt")

    bicubic = error(truth, np.stack([enlarge(image) for image in small]))
    print(f"{len(truth)} held-out tiles; mean squared error of bicubic interpolation: {bicubic:.1f}")
    for name in ("DDPM", "DDIM"):
        folder = os.path.join(args.out_dir, name)
        run("super_res_sample", args.ranks, model_path=model, base_samples=base, log_dir=folder, batch_size=37,
            num_samples=len(small), use_ddim=name == "DDIM")  # fmt: skip
        with np.load(os.path.join(folder, f"samples_{len(small)}x{LARGE}x{LARGE}x3.npz")) as f:
            found = error(truth, f["arr_0"])
        print(f"{name}: {found:.1f}, {found / bicubic:.2f} times the error of bicubic interpolation")


def make_crops(folder, count):
    """Write training crops. Return held-out tiles, and the tiles shrunk by area averaging, uint8 [N, S, S, 3]."""
    from sklearn.datasets import load_sample_images

    os.makedirs(folder, exist_ok=True)
    rng, truth = np.random.default_rng(0), []
    for number, photo in enumerate(load_sample_images().images):
        held_out = np.zeros(photo.shape[:2], bool)
        for row, column in np.ndindex(photo.shape[0] // LARGE, photo.shape[1] // LARGE):
            if (row + 2 * column) % EVERY == 0:
                tile = np.s_[row * LARGE : (row + 1) * LARGE, column * LARGE : (column + 1) * LARGE]
                held_out[tile] = True
                truth.append(photo[tile])
        windows = np.lib.stride_tricks.sliding_window_view(held_out, (LARGE, LARGE))
        corners = np.argwhere(~windows.any(axis=(2, 3)))
        for i, (y, x) in enumerate(corners[rng.integers(len(corners), size=count // 2)]):
            Image.fromarray(photo[y : y + LARGE, x : x + LARGE]).save(os.path.join(folder, f"{number}_{i:05d}.png"))
    truth = np.stack(truth)
    factor = LARGE // SMALL
    areas = truth.reshape(len(truth), SMALL, factor, SMALL, factor, 3).astype(float)
    return truth, np.rint(areas.mean(axis=(2, 4))).astype(np.uint8)


def enlarge(image):
    return np.asarray(Image.fromarray(image).resize((LARGE, LARGE), Image.BICUBIC))


def error(truth, images):
    return float(((truth.astype(float) - images) ** 2).mean())


def run(name, ranks, **flags):
    """Run a script of the folder scripts/ with the given flags on `ranks` processes."""
    mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    script = os.path.join(ROOT, "scripts", f"{name}.py")
    launcher = [mpiexec if os.path.exists(mpiexec) else "mpiexec", "-n", str(ranks)]
    subprocess.run([*launcher, sys.executable, script, *words], check=True, stdout=subprocess.DEVNULL)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="upsampler_photos")
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default: 1600)")
    parser.add_argument("--count", type=int, default=20000, help="number of training crops (default: 20000)")
    parser.add_argument("--ranks", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
