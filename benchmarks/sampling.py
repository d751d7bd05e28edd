"""Measure the speed of a sampling step of the released models, without and with classifier guidance.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --presets all --batch_sizes 1,8,64 --precisions bf16,fp16 --compile False,True

The benchmark prints one row per model, batch size, precision, and compilation mode. The columns are seconds per step,
images per second with 250 steps, utilisation, peak memory, and the relative error of the step's update against eager
float32. Utilisation ("of matmul") is the step's operation rate divided by the machine's rate for a large matrix product
of the same dtype. --psnr True adds the PSNR of unguided samples of 25 DDIM steps against float32 samples. Weights are
random, and scaled to preserve the magnitude of activations. Each row is measured in a separate process.
"""

import argparse
import itertools
import json
import os
import sys

from measuring import ROOT, OtherLoad, count_operations, in_own_process, matmul_rate, peak_rss_mb, timed

sys.path.insert(0, ROOT)
CLASSIFIERS = {"64x64_diffusion": "64x64_classifier", "128x128_diffusion": "128x128_classifier",
               "256x256_diffusion": "256x256_classifier", "512x512_diffusion": "512x512_classifier"}  # fmt: skip

STEPS = 250  # sampling steps per image, for images per second
COLUMNS = "s/step", "images/s", "of matmul", "peak MB", "error", "PSNR", "others"


def main():
    args = create_argparser().parse_args()
    if args.row:
        print(json.dumps(measure(args, *args.row.split(","))))
        return
    print(f"{'':22}{'batch':>6}{'':>6}{'':>8}{'':>9}" + "".join(f"{name:>10}" for name in COLUMNS))
    from guided_diffusion.presets import PRESETS

    presets = [name for name in PRESETS if name not in CLASSIFIERS.values()]
    choices = ((presets if args.presets == "all" else args.presets.split(",")), args.batch_sizes.split(","),
               args.precisions.split(","), args.compile.split(","), ("plain", "guided"))  # fmt: skip
    for preset, batch_size, precision, compiled, guided in itertools.product(*choices):
        if guided == "guided" and preset not in CLASSIFIERS:
            continue
        row = f"{preset},{batch_size},{precision},{compiled},{guided}"
        found = in_own_process(__file__, *sys.argv[1:], "--row", row)
        print(f"{preset:22}{batch_size:>6}{precision:>6}{guided:>8}{'compiled' if compiled == 'True' else '':>9}"
              f"{found['seconds']:10.3f}{found['images_per_s']:10.4f}{found['share']:10.0%}{found['peak_mb']:10.0f}"
              f"{found['error']:10.1e}{found['psnr']:10.1f}{found['others']:10.2f}", flush=True)  # fmt: skip


def measure(args, preset_name, batch_size, precision, compiled, guided):
    """Measure the sampling step of one row of the table."""
    import torch as th

    from guided_diffusion.guidance import classifier_cond_fn, route_labels
    from guided_diffusion.presets import get_preset

    th.manual_seed(0)
    if args.threads:
        th.set_num_threads(args.threads)
    device = "cuda" if th.cuda.is_available() else "cpu"
    dtype = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}[precision]
    preset = get_preset(preset_name)
    model, diffusion = preset.create(use_fp16=False, use_bf16=False)
    networks = [ready(model, device)]
    if guided == "guided":
        networks.append(ready(get_preset(CLASSIFIERS[preset_name]).create(classifier_use_fp16=False)[0], device))
    x, t, kwargs = inputs(preset, int(batch_size), guided, device)

    def sampler(networks):
        """Return functions that run one step and 25 unguided DDIM steps of [model] or [model, classifier]."""
        model_fn = route_labels(networks[0], preset.flags.get("class_cond"))
        cond_fn = classifier_cond_fn(networks[1]) if networks[1:] else None
        few = preset.create(use_fp16=False, timestep_respacing="ddim25")[1] if args.psnr == "True" else None
        step = th.no_grad()(
            lambda: diffusion.p_sample(
                model_fn, x, t, cond_fn=cond_fn, model_kwargs=kwargs, randn_like=th.zeros_like
            )["sample"]
        )  # fmt: skip
        return (
            step,
            lambda: few and few.ddim_sample_loop(model_fn, x.shape, noise=x, model_kwargs=kwargs, device=device),
        )

    step, images = sampler(networks)
    expected, expected_images = step(), images()
    operations = count_operations(lambda: route_labels(model, preset.flags.get("class_cond"))(x, t, **kwargs))
    for classifier in networks[1:]:  # the gradient with respect to the input costs as much as the forward pass
        operations += 2 * count_operations(lambda c=classifier: c(x, t))
    for network in networks:
        {"fp32": network.convert_to_fp32, "bf16": network.convert_to_bf16, "fp16": network.convert_to_fp16}[precision]()
    if compiled == "True":
        networks = [th.compile(network, dynamic=False) for network in networks]
    step, images = sampler(networks)
    if device == "cuda":
        th.cuda.reset_peak_memory_stats()
    with OtherLoad() as load:
        seconds = timed(step, args.rounds, warmup=2)
    peak = th.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_rss_mb()
    error = float((step() - expected).norm() / (expected - x).norm())
    psnr = (
        float(10 * th.log10(4 / (images() - expected_images).square().mean())) if args.psnr == "True" else float("nan")
    )
    return dict(seconds=seconds, images_per_s=len(x) / (seconds * STEPS), others=load.cores, peak_mb=peak, error=error,
                psnr=psnr, share=operations / seconds / matmul_rate(dtype, device))  # fmt: skip


def inputs(preset, n, guided, device):
    """Return a batch of model inputs: x_t, t and the keyword arguments."""
    import torch as th

    size = preset.flags.get("image_size", preset.flags.get("large_size"))
    x, t = th.randn(n, 3, size, size, device=device), th.full((n,), 500, device=device)
    kwargs = {"y": th.arange(n, device=device) % 1000} if preset.flags.get("class_cond") or guided == "guided" else {}
    if "small_size" in preset.flags:
        kwargs["low_res"] = th.randn(n, 3, *[preset.flags["small_size"]] * 2, device=device)
    return x, t, kwargs


def ready(network, device):
    """Prepare a network for sampling, with random weights that preserve the magnitude of activations."""
    import torch as th

    with th.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return network.to(device).eval().requires_grad_(False)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="64x64_diffusion", help="comma-separated, or all (default: %(default)s)")
    parser.add_argument("--batch_sizes", default="2")
    parser.add_argument("--precisions", default="fp32,bf16", help="some of fp32, bf16 and fp16 (default: fp32,bf16)")
    parser.add_argument("--compile", default="False", help="False, True or False,True (default: False)")
    parser.add_argument("--psnr", default="False", help="True: also measure the PSNR of 25 DDIM steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
