"""Compare a batch of samples with a reference batch: Inception Score, FID, sFID, precision and recall.

    python evaluations/evaluator.py REF.npz SAMPLES.npz
    mpiexec -n 8 python evaluations/evaluator.py REF.npz SAMPLES.npz

Both are .npz files with images arr_0 uint8 [N, H, W, 3]; the reference may have statistics of the whole data set. The
figures go to stdout, all else to stderr.
"""

import argparse
import hashlib
import json
import os
import sys

import numpy as np
import torch as th

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluations.batches import Batch  # noqa: E402
from evaluations.errors import EvaluationError  # noqa: E402
from evaluations.inception import POOL_DIM, SPATIAL_DIM, InceptionV3, find_graph, read_graph  # noqa: E402
from evaluations.metrics import InceptionScore, Moments, frechet_distance, precision_recall  # noqa: E402
from evaluations.ranks import Ranks  # noqa: E402

METRICS = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}
FEWEST, ADVISED = 4, 10_000


def main():
    args = create_argparser().parse_args()
    ranks = Ranks()
    figures = run_evaluation(lambda: evaluate(args, ranks), ranks)
    if ranks.rank == 0:
        for name, value in figures.items():
            print(f"{METRICS[name]}: {value}")
        if args.json:
            write_json(args, figures)


def run_evaluation(work, ranks):
    """Do the work; a mistake of the user's ends all ranks with one line."""
    try:
        return work()
    except EvaluationError as e:
        ranks.fail(f"error: {e}", 1)
    except KeyboardInterrupt:
        ranks.fail("interrupted", 130)


def evaluate(args, ranks):
    """The metrics asked for, by their short names."""
    wanted = parse_metrics(args.metrics)
    if args.batch_size < 1 or args.num_samples < 0:
        raise EvaluationError("--batch_size must be at least 1, --num_samples at least 0")
    device = choose_device(args.device, ranks)
    if device.type == "cpu" and ranks.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.size))
    reference, samples = Batch(args.ref_batch), Batch(args.sample_batch)
    check_batches(reference, samples, args, ranks)
    graph = find_graph_once(args.inception_path, ranks)
    network = InceptionV3(read_graph(graph), DTYPES[args.dtype]).to(device)

    say(ranks, "reference batch...")
    of_reference = reference_features(args, ranks, network, reference, graph, wanted)
    say(ranks, "sample batch...")
    of_samples = Features(network, samples, args, ranks, wanted, limit=args.num_samples)
    say(ranks, "metrics...")
    return metrics_of(wanted, reference, of_reference, of_samples, device) if ranks.rank == 0 else None


def metrics_of(wanted, reference, of_reference, of_samples, device):
    figures = {}
    if "is" in wanted:
        figures["is"] = of_samples.score.value()
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if name in wanted:
            known = reference.statistics and reference.statistics[kind]
            statistics = known or of_reference.moments[kind].statistics()
            figures[name] = frechet_distance(*of_samples.moments[kind].statistics(), *statistics)
    if {"precision", "recall"} & set(wanted):
        device = device if device.type == "cuda" else "cpu"
        pair = precision_recall(of_reference.pool, of_samples.pool, device=device)
        figures.update((name, value) for name, value in zip(("precision", "recall"), pair) if name in wanted)
    return {name: figures[name] for name in METRICS if name in figures}


class Features:
    """What the metrics need of a batch's features; on rank 0 of all of it.

    :ivar moments: by kind, "pool" and "spatial".
    :ivar score: an InceptionScore.
    :ivar pool: all pool features [N, 2048] float32, where precision or recall is wanted.
    """

    def __init__(self, network, batch, args, ranks, wanted, limit=0):
        count = min(len(batch), limit or len(batch))
        mine, device = ranks.share(count), network.softmax_weights.device
        self.moments = {"pool": Moments(POOL_DIM), "spatial": Moments(SPATIAL_DIM)}
        self.score, pools = InceptionScore(), []
        images = batch.images(mine.start, mine.stop, args.batch_size)
        bar = progress(ranks, total=len(mine), desc=os.path.basename(batch.path))
        with bar:
            position = mine.start
            for part in images:
                pool, spatial = network(th.from_numpy(part).to(device))
                if not (pool.isfinite().all() and spatial.isfinite().all()):
                    raise EvaluationError(
                        f"{batch.path}: features of images {position} on are not finite (try --dtype fp32)"
                    )
                self.score.update(network.logits(pool).cpu(), position)
                pool, spatial = pool.cpu().numpy(), spatial.cpu().numpy()
                self.moments["pool"].update(pool)
                if "sfid" in wanted:
                    self.moments["spatial"].update(spatial)
                if {"precision", "recall"} & set(wanted):
                    pools.append(pool)
                position += len(part)
                bar.update(len(part))
        self.pool = np.concatenate(pools) if pools else np.zeros((0, POOL_DIM), np.float32)
        self._merge(ranks)

    def _merge(self, ranks):
        if ranks.size == 1:
            return
        gathered = ranks.gather((self.moments, self.score, self.pool))
        for moments, score, _ in gathered[1:]:
            for kind in gathered[0][0]:
                gathered[0][0][kind].merge(moments[kind])
            gathered[0][1].merge(score)
        self.moments, self.score = gathered[0][:2]
        self.pool = np.concatenate([pool for *_, pool in gathered])


def reference_features(args, ranks, network, batch, graph, wanted):
    """The reference's features, from the cache if there is one and it has them."""
    needs_pool = {"precision", "recall"} & set(wanted)
    if batch.statistics is not None and not needs_pool:
        return None
    path = cache_path(args, batch, graph, wanted)
    if path and os.path.exists(path):
        say(ranks, f"its features are those kept in {path}")
        return read_cache(path)
    features = Features(network, batch, args, ranks, wanted)
    if path and ranks.rank == 0:
        write_cache(path, features)
    return features


def cache_path(args, batch, graph, wanted):
    if not args.cache_dir:
        return ""
    digest = hashlib.sha256(f"{args.dtype} {sorted(wanted)}".encode())
    for name in (batch.path, graph):
        with open(name, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    return os.path.join(args.cache_dir, f"{digest.hexdigest()[:32]}.npz")


def write_cache(path, features):
    arrays = {"pool": features.pool}
    for kind, moments in features.moments.items():
        arrays.update({f"{kind}_n": moments.n, f"{kind}_mean": moments.mean, f"{kind}_scatter": moments.scatter})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_cache(path):
    features = Features.__new__(Features)
    with np.load(path) as arrays:
        features.pool, features.moments = arrays["pool"], {}
        for kind in ("pool", "spatial"):
            moments = Moments(len(arrays[f"{kind}_mean"]))
            moments.n, moments.mean, moments.scatter = (
                int(arrays[f"{kind}_n"]), arrays[f"{kind}_mean"], arrays[f"{kind}_scatter"],
            )  # fmt: skip
            features.moments[kind] = moments
    return features


def parse_metrics(text):
    names = [name.strip().lower() for name in text.split(",") if name.strip()] or list(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise EvaluationError(f"--metrics {text}: unknown metric {unknown[0]!r}: choose some of {','.join(METRICS)}")
    return names


def choose_device(name, ranks):
    if not name:
        name = f"cuda:{ranks.local_rank % th.cuda.device_count()}" if th.cuda.is_available() else "cpu"
    try:
        return th.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise EvaluationError(f"--device {name}: not to be had here ({str(e).splitlines()[0]})") from None


def check_batches(reference, samples, args, ranks):
    """Refuse batches too small; warn of what makes figures differ from others'."""
    used = min(len(samples), args.num_samples or len(samples))
    for path, count in ((reference.path, len(reference)), (samples.path, used)):
        if count < FEWEST:
            raise EvaluationError(f"{path}: {count} images; the metrics need at least {FEWEST}")
    if used < ADVISED:
        say(
            ranks,
            f"warning: {used} samples: FID is biased upwards with few, by about 1/N: published figures have 50,000",
        )
    if samples.shape[1:] != reference.shape[1:]:
        sizes = [f"{b.shape[1]}x{b.shape[2]}" for b in (samples, reference)]
        say(
            ranks, f"warning: samples are {sizes[0]}, the reference {sizes[1]}: both are resized, which hides a mistake"
        )


def find_graph_once(path, ranks):
    """Let rank 0 find, and if need be download, the graph before the others look."""
    outcome = None
    if ranks.rank == 0:
        try:
            outcome = find_graph(path)
        except EvaluationError as e:
            outcome = e
    outcome = ranks.gather(outcome)[0]
    if isinstance(outcome, EvaluationError):
        raise outcome
    return outcome


def say(ranks, text):
    if ranks.rank == 0:
        print(text, file=sys.stderr, flush=True)


def progress(ranks, **kwargs):
    from tqdm import tqdm

    return tqdm(unit="image", disable=ranks.rank != 0, dynamic_ncols=True, **kwargs)


def write_json(args, figures):
    record = {"reference": args.ref_batch, "samples": args.sample_batch, "dtype": args.dtype, **figures}
    temporary = f"{args.json}.{os.getpid()}.tmp"
    with open(temporary, "w") as f:
        json.dump(record, f, indent=1)
    os.replace(temporary, args.json)


def create_argparser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref_batch", help="the reference's .npz")
    parser.add_argument("sample_batch", help="the samples' .npz")
    parser.add_argument("--metrics", default="", help=f"some of {','.join(METRICS)}; by default all")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--num_samples", type=int, default=0, help="use the first so many samples; 0 uses all")
    parser.add_argument("--device", default="", help="such as cpu or cuda:1; by default a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: fp32)")
    parser.add_argument("--inception_path", default="", help="the graph; by default found, or downloaded")
    parser.add_argument("--cache_dir", default="", help="keep the reference's features here for the next run")
    return parser


if __name__ == "__main__":
    main()
