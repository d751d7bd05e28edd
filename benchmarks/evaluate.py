"""Measure speed and memory of the evaluator: features, Frechet distance, precision and recall.

    python benchmarks/evaluate.py

Each row is measured in a separate process. Without --inception_path, the Inception network has random weights, which do
not affect speed. Utilisation ("of matmul") is the operation rate divided by the machine's rate for a large matrix
product of the same dtype, measured in the same process.
"""

import argparse
import json
import os
import sys

from measuring import ROOT, OtherLoad, count_operations, in_own_process, matmul_rate, peak_rss_mb, timed

sys.path.insert(0, ROOT)


def main():
    args = create_argparser().parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    print(f"{'':34}{'':>22}{'of matmul':>11}{'peak MB':>9}{'others':>8}")
    for part in PARTS:
        found = in_own_process(__file__, *sys.argv[1:], "--part", part)
        share = f"{found['share']:.0%}" if "share" in found else ""
        print(f"{part:34}{found['figure']:>22}{share:>11}{found['peak_mb']:9.0f}{found['others']:8.2f}", flush=True)


def features(args, dtype):
    """Measure how many images per second the Inception network processes."""
    import torch as th

    from evaluations.inception import InceptionV3, read_graph

    setup(args)
    constants = read_graph(args.inception_path) if args.inception_path else random_constants()
    network = InceptionV3(constants, dtype).to(args.device)
    images = th.randint(256, (args.batch_size, args.image_size, args.image_size, 3), dtype=th.uint8, device=args.device)
    with OtherLoad() as load:
        seconds = timed(lambda: network(images), rounds=7)
    peak = peak_rss_mb()
    counted = InceptionV3(constants, th.bfloat16).to(args.device)  # the FLOP counter ignores oneDNN's float32 operator
    operations = count_operations(lambda: counted(images[:1])) * args.batch_size
    share = operations / seconds / matmul_rate(dtype, args.device)
    return report(f"{args.batch_size / seconds:.1f} images/s", load, peak, share)


def distance(args):
    """Measure the Frechet distance between two full-rank Gaussians."""
    import numpy as np

    from evaluations.metrics import frechet_distance

    setup(args)
    rng = np.random.default_rng(0)
    gaussians = []
    for _ in range(2):
        x = rng.standard_normal((3 * args.dim, args.dim)) * np.geomspace(1, 1e-3, args.dim)
        gaussians += [x.mean(axis=0), np.cov(x, rowvar=False)]
    del x
    with OtherLoad() as load:
        seconds = timed(lambda: frechet_distance(*gaussians), rounds=3)
    return report(f"{seconds:.2f} s", load, peak_rss_mb())


def manifolds(args):
    """Measure precision and recall of random features."""
    import torch as th

    from evaluations.metrics import precision_recall

    setup(args)
    generator = th.Generator().manual_seed(0)
    sets = [th.randn(args.count, args.dim, generator=generator).numpy() for _ in range(2)]
    device = "cuda" if th.device(args.device).type == "cuda" else "cpu"
    with OtherLoad() as load:
        seconds = timed(lambda: precision_recall(*sets, device=device), rounds=1, warmup=0)
    peak = peak_rss_mb()
    # The minimum work is half of the distances within each of the two sets (the matrix is symmetric), and all distances
    # between the sets: 2 * count**2 distances in total.
    rate = 2 * args.dim * 2 * args.count**2 / seconds
    return report(f"{seconds:.1f} s", load, peak, rate / matmul_rate(th.float64, device))


def features_fp32(args):
    import torch as th

    return features(args, th.float32)


def features_bf16(args):
    import torch as th

    return features(args, th.bfloat16)


PARTS = {
    "features, float32": features_fp32,
    "features, bfloat16": features_bf16,
    "Frechet distance": distance,
    "precision and recall": manifolds,
}


def setup(args):
    import torch as th

    th.manual_seed(0)
    if args.threads:
        th.set_num_threads(args.threads)


def report(figure, load, peak_mb, share=None):
    found = {"figure": figure, "peak_mb": peak_mb, "others": load.cores}
    return found if share is None else {**found, "share": share}


def random_constants():
    """Return random Inception weights that preserve the magnitude of activations from layer to layer."""
    import numpy as np

    from evaluations.inception import expected_shapes

    rng, constants = np.random.default_rng(0), {}
    for name, shape in expected_shapes().items():
        if name.endswith("conv2d_params"):
            constants[name] = rng.standard_normal(shape, dtype=np.float32) * (2 / np.prod(shape[:3])) ** 0.5
        elif name.endswith("moving_variance"):
            constants[name] = np.ones(shape, np.float32)
        else:
            constants[name] = rng.standard_normal(shape, dtype=np.float32) * 0.02
    return constants


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=64, help="side before resizing to 299 (default: 64)")
    parser.add_argument("--count", type=int, default=10_000, help="number of points in each set (default: 10000)")
    parser.add_argument("--dim", type=int, default=2048, help="dimension of the features (default: 2048)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--inception_path", default="")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
