"""Compare a batch of samples with a reference batch: Inception Score, FID, sFID, precision and recall.

    python evaluations/evaluator.py REF.npz SAMPLES.npz
    mpiexec -n 8 python evaluations/evaluator.py REF.npz SAMPLES.npz

Both files hold images arr_0, uint8 [N, H, W, 3]. The reference may also hold statistics of the whole data set. The
metrics are printed to stdout, and messages to stderr.
"""

import argparse
import json
import os
import sys

import torch as th

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.batches import Batch  # noqa: E402
from evaluations.features import METRICS, Features, check_batches, compare, reference_features  # noqa: E402
from evaluations.inception import InceptionV3, find_graph, read_graph  # noqa: E402
from evaluations.output import say, write_output  # noqa: E402
from guided_diffusion import dist_util  # noqa: E402
from guided_diffusion.checkpoint_util import fingerprint  # noqa: E402
from guided_diffusion.errors import InputError, check_at_least  # noqa: E402

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    wanted = parse_metrics(args.metrics)
    check_at_least(1, batch_size=args.batch_size)
    check_at_least(0, num_samples=args.num_samples)
    reference, samples = Batch(args.ref_batch), Batch(args.sample_batch)
    check_batches(reference, samples, min(len(samples), args.num_samples or len(samples)))
    network, identity = load_inception(args.inception_path, args.dtype, args.device)

    say("computing features of the reference batch...")
    of_reference = reference_features(network, reference, args.batch_size, wanted, args.cache_dir, identity)
    say("computing features of the sample batch...")
    of_samples = Features(network, samples, args.batch_size, wanted, args.num_samples)
    if dist_util.get_rank() != 0:
        return
    say("computing metrics...")
    figures = compare(wanted, reference, of_reference, of_samples, network.device)
    for name, value in figures.items():
        print(f"{METRICS[name]}: {value}")
    if args.json:
        record = {"reference": args.ref_batch, "samples": args.sample_batch, "dtype": args.dtype, **figures}
        with write_output(args.json) as f:
            f.write(json.dumps(record, indent=1).encode())


def parse_metrics(text):
    names = [name.strip().lower() for name in text.split(",") if name.strip()] or list(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(f"--metrics {text}: unknown metric {unknown[0]!r}: choose some of {','.join(METRICS)}")
    return names


def load_inception(path, dtype, device=""):
    """Return the Inception network, and a string that identifies its weights and dtype. Every rank must call this.

    :param path: path of the Inception graph; "" searches for a local copy, and downloads the graph if there is none.
    :param dtype: a key of DTYPES.
    :param device: a device such as "cpu"; "" selects this rank's device.
    """
    try:
        device = th.empty(0, device=device or dist_util.dev()).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: not available ({str(e).splitlines()[0]})") from None
    graph = dist_util.from_rank_0(lambda: find_graph(path))
    return InceptionV3(read_graph(graph), DTYPES[dtype]).to(device), f"{fingerprint(graph)}-{dtype}"


def add_network_flags(parser):
    """Add --batch_size and the flags that select the Inception network and its device."""
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch on each rank (default: 32)")
    parser.add_argument("--device", default="", help="device such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the network (default: fp32)")
    parser.add_argument("--inception_path", default="", help="path of the Inception graph (default: find or download)")


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref_batch", help=".npz file of reference images")
    parser.add_argument("sample_batch", help=".npz file of samples")
    parser.add_argument("--metrics", default="", help=f"comma-separated metrics (default: {','.join(METRICS)})")
    parser.add_argument("--json", default="", help="JSON file to write the metrics to as well")
    parser.add_argument("--num_samples", type=int, default=0, help="use only the first samples; 0 (default) uses all")
    parser.add_argument("--cache_dir", default="", help="folder to cache features of references in")
    add_network_flags(parser)
    return parser


if __name__ == "__main__":
    main()
