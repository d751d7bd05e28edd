"""Speed of a sampling step of the released models: the UNet, and guided, the classifier's gradient, too.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --presets 256x256_diffusion,64_256_upsampler --batch_sizes 1,8,32

prints for each model, batch size and precision: seconds a step, images a second at 250 steps, utilisation (the step's
operations a second, by torch's counter, over the machine's rate for a large matrix product of the same type), peak
memory, and how far what the step changes is from what it changes in float32. Weights are random, of a size that keeps
activations alive. Each row is measured in a process of its own.
"""

import argparse
import json
import os
import sys

from measuring import ROOT, OtherLoad, count_operations, in_own_process, matmul_rate, peak_rss_mb, timed

sys.path.insert(0, ROOT)
CLASSIFIERS = {"64x64_diffusion": "64x64_classifier", "128x128_diffusion": "128x128_classifier",
               "256x256_diffusion": "256x256_classifier", "512x512_diffusion": "512x512_classifier"}  # fmt: skip

STEPS = 250  # what images a second are counted by


def main():
    args = create_argparser().parse_args()
    if args.row:
        print(json.dumps(measure(args, *args.row.split(","))))
        return
    print(
        f"{'':20}{'batch':>6}{'':>6}{'':>9}{'s/step':>9}{'images/s':>10}{'of matmul':>10}{'peak MB':>9}{'error':>9}"
        f"{'others':>7}"
    )
    for preset in args.presets.split(","):
        for batch_size in args.batch_sizes.split(","):
            for precision in args.precisions.split(","):
                for guided in ("plain", "guided") if preset in CLASSIFIERS else ("plain",):
                    row = f"{preset},{batch_size},{precision},{guided}"
                    found = in_own_process(__file__, *sys.argv[1:], "--row", row)
                    print(f"{preset:20}{batch_size:>6}{precision:>6}{guided:>9}{found['seconds']:9.3f}"
                          f"{found['images_per_s']:10.4f}{found['share']:10.0%}{found['peak_mb']:9.0f}"
                          f"{found['error']:9.1e}{found['others']:7.2f}", flush=True)  # fmt: skip


def measure(args, preset_name, batch_size, precision, guided):
    """Time the step of one row."""
    import torch as th

    from guided_diffusion.guidance import classifier_cond_fn, route_labels
    from guided_diffusion.presets import get_preset

    th.manual_seed(0)
    if args.threads:
        th.set_num_threads(args.threads)
    device = "cuda" if th.cuda.is_available() else "cpu"
    dtype = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}[precision]
    flags = dict(use_fp16=False, use_bf16=False)
    preset = get_preset(preset_name)
    model, diffusion = preset.create(**flags)
    model = ready(model, device)
    size = preset.flags.get("image_size", preset.flags.get("large_size"))
    n = int(batch_size)
    x, t = th.randn(n, 3, size, size, device=device), th.full((n,), 500, device=device)
    kwargs = {"y": th.arange(n, device=device) % 1000} if preset.flags.get("class_cond") or guided == "guided" else {}
    if "small_size" in preset.flags:
        kwargs["low_res"] = th.randn(n, 3, *[preset.flags["small_size"]] * 2, device=device)
    networks, cond_fn = [model], None
    if guided == "guided":
        classifier, _ = get_preset(CLASSIFIERS[preset_name]).create(classifier_use_fp16=False)
        classifier = ready(classifier, device)
        networks.append(classifier)
        cond_fn = classifier_cond_fn(classifier, scale=1.0)
    model_fn = route_labels(model, "y" in kwargs and preset.flags.get("class_cond"))

    @th.no_grad()
    def step():
        return diffusion.p_sample(model_fn, x, t, cond_fn=cond_fn, model_kwargs=kwargs, randn_like=th.zeros_like)[
            "sample"
        ]

    expected = step()
    operations = count_operations(lambda: model_fn(x, t, **kwargs))
    if guided == "guided":  # an input's gradient takes as many operations as the way forward
        operations += 2 * count_operations(lambda: classifier(x, t))
    for network in networks:
        {"fp32": network.convert_to_fp32, "bf16": network.convert_to_bf16, "fp16": network.convert_to_fp16}[precision]()
    if device == "cuda":
        th.cuda.reset_peak_memory_stats()
    with OtherLoad() as load:
        seconds = timed(step, args.rounds, warmup=2)
    peak = th.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_rss_mb()
    error = float((step() - expected).norm() / (expected - x).norm())
    rate = operations / seconds
    return dict(seconds=seconds, images_per_s=n / (seconds * STEPS), share=rate / matmul_rate(dtype, device),
                peak_mb=peak, error=error, others=load.cores)  # fmt: skip


def ready(network, device):
    """A network as sampling has it, with weights that keep activations of about the same size."""
    import torch as th

    with th.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return network.to(device).eval().requires_grad_(False)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="64x64_diffusion", help="with commas (default: 64x64_diffusion)")
    parser.add_argument("--batch_sizes", default="2")
    parser.add_argument("--precisions", default="fp32,bf16", help="of fp32, bf16 and fp16 (default: fp32,bf16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
