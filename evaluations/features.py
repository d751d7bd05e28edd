"""Extract features from batches of images on all ranks, and compute metrics. Features of references can be cached."""

import os

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util
from guided_diffusion.checkpoint_util import fingerprint
from guided_diffusion.errors import InputError
from guided_diffusion.logger import progress_bar
from guided_diffusion.npz_arrays import DAMAGED

from .metrics import InceptionScore, Moments, frechet_distance, precision_recall
from .output import say, write_output

METRICS = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}
MANIFOLDS = {"precision", "recall"}
FEWEST, ADVISED = 4, 10_000


class Features:
    """Features of a batch of images, reduced to the statistics that the metrics need. Every rank must create an
    instance.

    On rank 0 the statistics cover the whole batch; on the other ranks they cover only the rank's share.

    :param network: network(uint8 [n, H, W, C]) returns (pool [n, pool_dim], spatial [n, spatial_dim]);
        network.logits(pool) returns the logits for the Inception Score.
    :param batch: a Batch.
    :param wanted: the metrics to prepare for, as keys of METRICS.
    :param limit: use only the first `limit` images; 0 uses all images.
    :ivar moments: {"pool": Moments, "spatial": Moments} of the features.
    :ivar score: an InceptionScore.
    :ivar pool: all pool features, float32 [N, pool_dim], if precision or recall is wanted; otherwise [0, pool_dim].
    :raises InputError: if the features contain NaN or infinite values.
    """

    def __init__(self, network, batch, batch_size, wanted, limit=0):
        self.moments = {"pool": Moments(network.pool_dim), "spatial": Moments(network.spatial_dim)}
        self.score, pools = InceptionScore(), [np.zeros((0, network.pool_dim), np.float32)]
        mine = share(min(len(batch), limit or len(batch)), batch_size)
        position = mine.start
        with progress_bar(total=len(mine), desc=os.path.basename(batch.path), unit="image") as bar:
            for images in batch.images(mine.start, mine.stop, batch_size):
                pool, spatial = network(th.from_numpy(images).to(network.device))
                if not (pool.isfinite().all() and spatial.isfinite().all()):
                    raise InputError(
                        f"{batch.place(position, position + len(images) - 1)} have features that are not finite: the "
                        f"cause is the network's weights or precision (try --dtype fp32)"
                    )
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
        everyone = gather_on_rank_0((self.moments, self.score, self.pool))
        for moments, score, _ in everyone[1:]:
            for kind in self.moments:
                self.moments[kind].merge(moments[kind])
            self.score.merge(score)
        if everyone:
            self.pool = np.concatenate([pool for *_, pool in everyone])

    def save(self, path):
        """Write the moments and the pool features to an .npz file."""
        arrays = {"pool": self.pool}
        for kind, moments in self.moments.items():
            arrays.update({f"{kind}_{name}": value for name, value in moments.state().items()})
        with write_output(path) as f:
            np.savez(f, **arrays)

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote. Returns None if the file is missing or damaged."""
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


def share(count, batch_size):
    """Return the range of image indices that this rank processes, out of `count` images. Consists of whole batches.

    Images are grouped into the same batches for any number of ranks. Rounding in convolutions depends on the batch, so
    fixed batches make the features independent of the number of ranks.
    """
    batches, size = -(-count // batch_size), dist_util.get_world_size()
    first, last = (rank * batches // size * batch_size for rank in (dist_util.get_rank(), dist_util.get_rank() + 1))
    return range(min(first, count), min(last, count))


def gather_on_rank_0(value):
    """Return a list of all ranks' values, ordered by rank, on rank 0, and an empty list on the other ranks.

    Unlike gather_objects, gather_on_rank_0 does not copy all values to every rank, and does not time out on slow ranks.
    """
    if dist_util.get_world_size() == 1:
        return [value]
    dist_util.wait_for_all()
    values = [None] * dist_util.get_world_size() if dist_util.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def reference_features(network, batch, batch_size, wanted, cache_dir="", identity=""):
    """Return the Features of a reference batch, or None if the statistics in its file suffice for the metrics.

    Every rank must call this function.

    :param cache_dir: folder in which to cache the features; "" disables the cache.
    :param identity: a string that identifies the network in names of cache files.
    """
    wanted = {"fid", "sfid", *MANIFOLDS} & set(wanted)
    if batch.statistics is not None:
        wanted &= MANIFOLDS
    if not wanted:
        return None
    if not cache_dir:
        return Features(network, batch, batch_size, wanted)
    kinds = sorted({"manifold" if name in MANIFOLDS else name for name in wanted})
    path = os.path.join(cache_dir, "-".join([fingerprint(batch.path), identity, *kinds]) + ".npz")
    kept = Features.load(path) if dist_util.get_rank() == 0 else None
    if dist_util.broadcast_object(kept is not None):
        say(f"using the features kept in {path}")
        return kept
    features = Features(network, batch, batch_size, wanted)
    if dist_util.get_rank() == 0:
        features.save(path)
    return features


def compare(wanted, reference, of_reference, of_samples, device="cpu"):
    """Return {key of METRICS: value} in the order of the original evaluator's output. Only rank 0 may call this.

    :param reference: the reference Batch. Statistics in its file take precedence over of_reference.
    :param of_reference: the result of reference_features.
    :param of_samples: the Features of the samples.
    """
    figures = {}
    if "is" in wanted:
        figures["is"] = of_samples.score.value()
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        if name in wanted:
            known = reference.statistics[kind] if reference.statistics else of_reference.moments[kind].statistics()
            mine = of_samples.moments[kind].statistics()
            if known[0].shape != mine[0].shape:
                raise InputError(
                    f"{reference.path}: has statistics of {len(known[0])} features, but the network has "
                    f"{len(mine[0])} features"
                )
            figures[name] = frechet_distance(*mine, *known)
    if MANIFOLDS & set(wanted):
        pair = dict(zip(("precision", "recall"), precision_recall(of_reference.pool, of_samples.pool, device=device)))
        figures.update((name, value) for name, value in pair.items() if name in wanted)
    return figures


def check_batches(reference, samples, used):
    """Raise an error for batches that are too small, and warn about differences that make metrics incomparable.

    :param used: the number of samples to evaluate.
    """
    for path, count in ((reference.path, len(reference)), (samples.path, used)):
        if count < FEWEST:
            raise InputError(f"{path}: {count} images; the metrics need at least {FEWEST}")
    if used < ADVISED:
        say(f"warning: {used} samples: FID is biased upwards in proportion to 1/N; published values use 50,000 samples")
    if samples.shape[1:] != reference.shape[1:]:
        sizes = [f"{b.shape[1]}x{b.shape[2]}" for b in (samples, reference)]
        say(f"warning: samples are {sizes[0]}, reference images {sizes[1]}: both are resized for the network")
