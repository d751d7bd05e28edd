"""From a batch of images to what the metrics need of its features, over all ranks; kept in a cache if asked for."""

import hashlib
import os
import sys

import numpy as np
import torch as th

from .batches import DAMAGED
from .errors import EvaluationError
from .files import write_arrays
from .metrics import InceptionScore, Moments, frechet_distance, precision_recall

METRICS = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
MANIFOLDS = {"precision", "recall"}
FEWEST, ADVISED = 4, 10_000


class Features:
    """What the metrics need of a batch's features. On rank 0 it is that of the whole batch, on others of their share.

    :param network: what gives features: network(uint8 [n, H, W, C]) is (pool [n, pool_dim], spatial [n, spatial_dim]),
        network.logits(pool) what the Inception Score takes for logits.
    :param batch: a Batch.
    :param wanted: the metrics, by their short names.
    :param limit: take the first so many images; 0 takes all.
    :ivar moments: of features by kind, "pool" and "spatial".
    :ivar score: an InceptionScore.
    :ivar pool: all pool features [N, pool_dim] float32, where precision or recall is wanted.
    :raises EvaluationError: for features that are not finite.
    """

    def __init__(self, network, batch, batch_size, ranks, wanted, limit=0):
        self.moments = {"pool": Moments(network.pool_dim), "spatial": Moments(network.spatial_dim)}
        self.score, pools = InceptionScore(), [np.zeros((0, network.pool_dim), np.float32)]
        mine = ranks.share(min(len(batch), limit or len(batch)), batch_size)
        position = mine.start
        with progress(ranks, total=len(mine), desc=os.path.basename(batch.path)) as bar:
            for images in batch.images(mine.start, mine.stop, batch_size):
                pool, spatial = network(th.from_numpy(images).to(network.device))
                check_finite(pool, spatial, f"{batch.path}: images {position} to {position + len(images) - 1}")
                if "is" in wanted:
                    self.score.update(network.logits(pool).cpu(), position)
                pool = pool.cpu().numpy()
                if "fid" in wanted:
                    self.moments["pool"].update(pool)
                if "sfid" in wanted:
                    self.moments["spatial"].update(spatial.cpu().numpy())
                if MANIFOLDS & set(wanted):
                    pools.append(pool)
                position += len(images)
                bar.update(len(images))
        self.pool = np.concatenate(pools)
        self._merge(ranks)

    def _merge(self, ranks):
        others = ranks.gather((self.moments, self.score, self.pool))
        if others is None:
            return
        for moments, score, _ in others[1:]:
            for kind in self.moments:
                self.moments[kind].merge(moments[kind])
            self.score.merge(score)
        self.pool = np.concatenate([pool for *_, pool in others])

    def save(self, path):
        """Write what a reference batch is needed for to an .npz."""
        arrays = {"pool": self.pool}
        for kind, moments in self.moments.items():
            arrays.update({f"{kind}_{name}": value for name, value in moments.state().items()})
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; None where there is no such file, or a damaged one."""
        features = cls.__new__(cls)
        try:
            with np.load(path) as arrays:
                features.pool = arrays["pool"]
                features.moments = {
                    kind: Moments.of({name: arrays[f"{kind}_{name}"] for name in ("n", "mean", "scatter")})
                    for kind in ("pool", "spatial")
                }
        except DAMAGED:
            return None
        return features


def check_finite(pool, spatial, images):
    """Refuse features that are not finite; `images` says whose they are."""
    if not (pool.isfinite().all() and spatial.isfinite().all()):
        raise EvaluationError(
            f"{images} have features that are not finite: the network's weights or precision are at fault "
            f"(try --dtype fp32)"
        )


def reference_features(network, batch, batch_size, ranks, wanted, cache_dir="", identity=""):
    """The Features of a reference batch that a comparison needs; None where its own statistics are enough.

    :param cache_dir: a folder to keep them in for the next run; "" keeps none.
    :param identity: what tells the network from others, for the cache.
    """
    wanted = {"fid", "sfid", *MANIFOLDS} & set(wanted)
    if batch.statistics is not None:
        wanted &= MANIFOLDS
    if not wanted:
        return None
    if not cache_dir:
        return Features(network, batch, batch_size, ranks, wanted)
    kinds = sorted({"manifold" if name in MANIFOLDS else name for name in wanted})
    path = os.path.join(cache_dir, f"{digest(batch.path, identity + ' '.join(kinds))}.npz")
    kept = Features.load(path) if ranks.rank == 0 else None
    if ranks.gather_all(kept is not None)[0]:
        say(ranks, f"its features are those kept in {path}")
        return kept
    features = Features(network, batch, batch_size, ranks, wanted)
    if ranks.rank == 0:
        features.save(path)
    return features


def compare(wanted, reference, of_reference, of_samples, device="cpu"):
    """The figures by the short names of the metrics, in the original's order. Rank 0 calls it.

    :param reference: the reference Batch, whose own statistics are taken where it has any.
    :param of_reference, of_samples: Features, as reference_features and Features give them.
    """
    figures = {}
    if "is" in wanted:
        figures["is"] = of_samples.score.value()
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if name in wanted:
            known = reference.statistics[kind] if reference.statistics else of_reference.moments[kind].statistics()
            mine = of_samples.moments[kind].statistics()
            if known[0].shape != mine[0].shape:
                raise EvaluationError(
                    f"{reference.path}: its statistics are of {len(known[0])} features, but these have {len(mine[0])}"
                )
            figures[name] = frechet_distance(*mine, *known)
    if MANIFOLDS & set(wanted):
        pair = dict(zip(("precision", "recall"), precision_recall(of_reference.pool, of_samples.pool, device=device)))
        figures.update((name, value) for name, value in pair.items() if name in wanted)
    return figures


def check_batches(reference, samples, used, ranks):
    """Refuse batches too small; warn of what makes figures differ from others'.

    :param used: how many of the samples are taken.
    """
    for path, count in ((reference.path, len(reference)), (samples.path, used)):
        if count < FEWEST:
            raise EvaluationError(f"{path}: {count} images; the metrics need at least {FEWEST}")
    if used < ADVISED:
        say(ranks, f"warning: {used} samples: FID is biased upwards with few, by about 1/N: published figures have "
                   f"50,000")  # fmt: skip
    if samples.shape[1:] != reference.shape[1:]:
        sizes = [f"{b.shape[1]}x{b.shape[2]}" for b in (samples, reference)]
        say(ranks, f"warning: samples are {sizes[0]}, the reference {sizes[1]}: both are resized, which hides a "
                   f"mistake")  # fmt: skip


def digest(path, identity=""):
    """What tells a file's content, and `identity`, from others: 32 hexadecimal digits."""
    found = hashlib.sha256(identity.encode())
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.hexdigest()[:32]


def say(ranks, text):
    """Tell the user, on rank 0."""
    if ranks.rank == 0:
        print(text, file=sys.stderr, flush=True)


def progress(ranks, **kwargs):
    """A bar on rank 0."""
    from tqdm import tqdm

    return tqdm(unit="image", disable=ranks.rank != 0, dynamic_ncols=True, **kwargs)
