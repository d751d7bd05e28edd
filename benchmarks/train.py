"""Measure speed and memory of a training step, relative to plain autograd and Adam on the same network.

    python benchmarks/train.py

The benchmark alternates between `TrainLoop.run_step` (gradient, norms, AdamW, moving average, logged losses) and a
minimal training step (loss, backward, torch.optim.Adam), each in separate processes. The benchmark prints a table of
images per second, peak memory and their ratios. GPUs are also measured with half precision. Peak memory is that of the
whole process on a CPU, and that of tensors on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def main():
    args = create_argparser().parse_args()
    if args.variant:
        print(json.dumps(measure(args, json.loads(args.variant))))
        return
    import torch as th

    variants = {
        "plain autograd and Adam": {"plain": True},
        "TrainLoop": {},
        "TrainLoop, 2 microbatches": {"microbatch": -(-args.batch_size // 2)},
        "TrainLoop, use_checkpoint": {"use_checkpoint": True},
    }
    if th.cuda.is_available():
        variants |= {"TrainLoop, use_fp16": {"use_fp16": True}, "TrainLoop, use_bf16": {"use_bf16": True}}
    device = th.cuda.get_device_name() if th.cuda.is_available() else f"CPU, {args.threads} threads"
    print(
        f"{device}; torch {th.__version__}; {args.image_size} px, {args.num_channels} channels, batch {args.batch_size}"
    )
    outcomes = {name: [] for name in variants}
    for _ in range(args.rounds):  # alternate between variants, so that other load on the machine affects all of them
        for name, variant in variants.items():
            argv = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--variant", json.dumps(variant)]
            done = subprocess.run(argv, check=True, capture_output=True, text=True)
            outcomes[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':28}{'images/s':>10}{'ratio':>7}{'peak MB':>10}{'ratio':>7}")
    plain = None
    for name, found in outcomes.items():
        rate, peak = (statistics.median(f[key] for f in found) for key in ("images_per_s", "peak_mb"))
        plain = plain or (rate, peak)
        print(f"{name:28}{rate:10.2f}{rate / plain[0]:7.2f}{peak:10.0f}{peak / plain[1]:7.2f}")


def measure(args, variant):
    """Measure the training steps of one variant in this process."""
    import torch as th

    from guided_diffusion import dist_util, logger
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    from guided_diffusion.train_util import TrainLoop
    from guided_diffusion.training_metrics import peak_memory_mb

    if args.threads:
        th.set_num_threads(args.threads)
    precision = {k: v for k, v in variant.items() if k in ("use_fp16", "use_bf16")}
    flags = dict(image_size=args.image_size, num_channels=args.num_channels, learn_sigma=True, class_cond=True)
    flags.update(noise_schedule="cosine", use_checkpoint=variant.get("use_checkpoint", False))
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags, **precision})
    device = dist_util.dev()
    model.to(device)
    x = th.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
    y = th.randint(0, 1000, (args.batch_size,), device=device)

    if variant.get("plain"):
        opt = th.optim.Adam(model.parameters(), lr=1e-4)

        def step():
            opt.zero_grad()
            t = th.randint(0, diffusion.num_timesteps, (len(x),), device=device)
            diffusion.training_losses(model, x, t, model_kwargs={"y": y})["loss"].mean().backward()
            opt.step()
    else:
        logger.configure(tempfile.mkdtemp(), format_strs=[])
        loop = TrainLoop(model=model, diffusion=diffusion, data=None, batch_size=len(x), lr=1e-4, ema_rate="0.9999",
                         microbatch=variant.get("microbatch", -1), log_interval=10, save_interval=10**9,
                         resume_checkpoint="", **precision)  # fmt: skip

        def step():
            loop.run_step(x, {"y": y})
            loop.step += 1

    seconds = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            th.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"images_per_s": len(x) / statistics.median(seconds[2:]), "peak_mb": peak_memory_mb()}


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_channels", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per process, after two warm-up steps")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
