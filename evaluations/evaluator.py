"""Compare a batch of samples with a reference batch: Inception Score, FID, sFID, precision and recall.

    python evaluations/evaluator.py REF.npz SAMPLES.npz
    mpiexec -n 8 python evaluations/evaluator.py REF.npz SAMPLES.npz

Both are .npz files with images arr_0 uint8 [N, H, W, 3]; the reference may have statistics of the whole data set. The
figures go to stdout, all else to stderr.
"""

import argparse
import json
import os
import sys

import torch as th

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.batches import Batch  # noqa: E402
from evaluations.errors import EvaluationError  # noqa: E402
from evaluations.features import METRICS, Features, check_batches, compare, digest, reference_features, say  # noqa: E402
from evaluations.files import write_whole  # noqa: E402
from evaluations.inception import InceptionV3, find_graph, read_graph  # noqa: E402
from evaluations.ranks import Ranks  # noqa: E402

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}


def main():
    args = create_argparser().parse_args()
    ranks = Ranks()
    run_evaluation(lambda: evaluate(args, ranks), ranks)


def run_evaluation(work, ranks):
    """Do the work; a mistake of the user's ends all ranks with one line."""
    try:
        work()
    except EvaluationError as e:
        ranks.fail(f"error: {e}", 1)
    except KeyboardInterrupt:
        sys.unraisablehook = lambda unraisable: None  # nothing about what is half made as it goes: a progress bar
        ranks.fail("interrupted", 130)


def evaluate(args, ranks):
    """Print the metrics asked for."""
    wanted = parse_metrics(args.metrics)
    if args.batch_size < 1 or args.num_samples < 0:
        raise EvaluationError("--batch_size must be at least 1, --num_samples at least 0")
    reference, samples = Batch(args.ref_batch), Batch(args.sample_batch)
    check_batches(reference, samples, min(len(samples), args.num_samples or len(samples)), ranks)
    network, identity = load_inception(args.inception_path, args.dtype, choose_device(args.device, ranks), ranks)

    say(ranks, "reference batch...")
    of_reference = reference_features(
        network, reference, args.batch_size, ranks, wanted, args.cache_dir, identity if args.cache_dir else ""
    )
    say(ranks, "sample batch...")
    of_samples = Features(network, samples, args.batch_size, ranks, wanted, limit=args.num_samples)
    if ranks.rank != 0:
        return
    say(ranks, "metrics...")
    figures = compare(wanted, reference, of_reference, of_samples, network.device)
    for name, value in figures.items():
        print(f"{METRICS[name]}: {value}")
    if args.json:
        record = {"reference": args.ref_batch, "samples": args.sample_batch, "dtype": args.dtype, **figures}
        with write_whole(args.json) as f:
            f.write(json.dumps(record, indent=1).encode())


def parse_metrics(text):
    names = [name.strip().lower() for name in text.split(",") if name.strip()] or list(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise EvaluationError(f"--metrics {text}: unknown metric {unknown[0]!r}: choose some of {','.join(METRICS)}")
    return names


def load_inception(path, dtype, device, ranks):
    """The Inception network, and what tells it from others. All ranks call it.

    :param path: the graph's; "" looks for it, and downloads it if need be.
    :param dtype: a name of DTYPES.
    """
    graph = find_graph_once(path, ranks)
    return InceptionV3(read_graph(graph), DTYPES[dtype]).to(device), f"{digest(graph)} {dtype} "


def choose_device(name, ranks):
    """This rank's device; where ranks share the cores of a machine, it takes its part of them."""
    if not name:
        name = f"cuda:{ranks.local_rank % th.cuda.device_count()}" if th.cuda.is_available() else "cpu"
    if name == "cpu" and ranks.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.size))
    try:
        return th.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise EvaluationError(f"--device {name}: not to be had here ({str(e).splitlines()[0]})") from None


def find_graph_once(path, ranks):
    """Let rank 0 find, and if need be download, the graph before the others look."""
    outcome = None
    if ranks.rank == 0:
        try:
            outcome = find_graph(path)
        except EvaluationError as e:
            outcome = e
    outcome = ranks.gather_all(outcome)[0]
    if isinstance(outcome, EvaluationError):
        raise outcome
    return outcome


def add_network_flags(parser):
    """The flags of load_inception, and --batch_size."""
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="", help="such as cpu or cuda:1; by default a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: fp32)")
    parser.add_argument("--inception_path", default="", help="the graph; by default found, or downloaded")


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref_batch", help="the reference's .npz")
    parser.add_argument("sample_batch", help="the samples' .npz")
    parser.add_argument("--metrics", default="", help=f"some of {','.join(METRICS)}; by default all")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    parser.add_argument("--num_samples", type=int, default=0, help="use the first so many samples; 0 uses all")
    parser.add_argument("--cache_dir", default="", help="keep the reference's features here for the next run")
    add_network_flags(parser)
    return parser


if __name__ == "__main__":
    main()
