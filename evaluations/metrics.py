"""The metrics as functions of arrays. Nothing here knows of networks, files or ranks.

Everything is computed in float64. The original evaluator took means in float32 and distances in float16: what that
makes of its figures each docstring says.
"""

import math

import numpy as np
import torch as th

EIGENVALUES_CUT = 1e-12  # relative to the largest: what a covariance's rank is counted by
NEIGHBOURS = 3
SPLIT = 5000
BLOCK = 2048
ROUNDING = 1e-13  # of a point's squared norm: squared distances below it are nothing but rounding


class Moments:
    """Mean and covariance of rows that come in chunks, also on several ranks.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    n, mean and scatter lag behind the rows that still wait: state() and statistics() know all.
    """

    ROWS = 1024  # to be taken in at once: with few, the passes over [dim, dim] take longer than the product

    def __init__(self, dim):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # the sum of outer products of deviations from the mean
        self._waiting = []

    def update(self, rows):
        """Take in rows [n, dim]."""
        rows = np.array(rows)  # a copy, as they wait
        if not np.isfinite(rows).all():
            raise ValueError("moments of values that are not finite")
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= self.ROWS:
            self._take_in()

    def _take_in(self):
        rows, self._waiting = self._waiting, []
        rows = np.concatenate([np.zeros((0, len(self.mean))), *rows])
        if len(rows):
            deviations = rows - rows.mean(axis=0)
            self._add(len(rows), rows.mean(axis=0), deviations.T @ deviations)

    def merge(self, other):
        """Take in all that another one has."""
        self._take_in()
        other._take_in()
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def _add(self, n, mean, scatter):
        total = self.n + n
        shift = mean - self.mean
        self.scatter += scatter + np.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def state(self):
        """All it knows, as arrays by name."""
        self._take_in()
        return {"n": self.n, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def of(cls, state):
        """One that knows what another one's state() was."""
        moments = cls(len(state["mean"]))
        moments.n, moments.mean, moments.scatter = int(state["n"]), state["mean"], state["scatter"]
        return moments

    def statistics(self):
        """The mean [dim] and the unbiased covariance [dim, dim], of at least two rows."""
        self._take_in()
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two samples, not {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians (Dowson and Landau, 1982; as FID: Heusel et al., 2017).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With sigma_i = A_i A_i^T the last trace is the
    sum of the singular values of A_1^T A_2, which holds for covariances without full rank, too, and has no square roots
    of rounding errors. The original took scipy's matrix square root and float32 means: about 1e-6 of the value away.

    :param mu1, mu2: means [dim].
    :param sigma1, sigma2: covariances [dim, dim].
    """
    mu1, sigma1, mu2, sigma2 = (th.as_tensor(np.asarray(x), dtype=th.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics that are not finite have no distance")
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"statistics of unlike shapes: {[tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]}")
    cross = th.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def _factor(sigma):
    """A [dim, rank] with A A^T = sigma, without what is nothing but rounding."""
    factor, failed = th.linalg.cholesky_ex(sigma)
    diagonal = factor.diagonal().square()
    if not failed and diagonal.min() > EIGENVALUES_CUT * diagonal.max():
        return factor
    values, vectors = th.linalg.eigh(sigma)
    kept = values > EIGENVALUES_CUT * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


class InceptionScore:
    """The Inception Score (Salimans et al., 2016) of class probabilities that come in chunks, also on several ranks.

    exp of the mean KL divergence between an image's class distribution and that of its split; the unweighted mean over
    splits. In log space: where the original's float32 probabilities underflow, 0 log 0 made it nan.

    :param split: images in each split, by their index; the last may have fewer.
    """

    def __init__(self, split=SPLIT):
        self.split = split
        self.sums = {}  # by split: images, sum of p log p, log of the sum of p [classes]

    def update(self, logits, start):
        """Take in logits [n, classes] of images start, start + 1, ..."""
        log_p = th.as_tensor(logits, dtype=th.float64).log_softmax(dim=1)
        if not log_p.isfinite().all():
            raise ValueError("logits that are not finite")
        position = 0
        while position < len(log_p):
            number, offset = divmod(start + position, self.split)
            part = log_p[position : position + self.split - offset]
            negentropy = float((part.exp() * part.clamp(min=-1e4)).sum())
            self._add(number, len(part), negentropy, part.logsumexp(dim=0))
            position += len(part)

    def merge(self, other):
        """Take in all that another one has."""
        for number, sums in other.sums.items():
            self._add(number, *sums)

    def _add(self, number, count, negentropy, log_sum):
        if number in self.sums:
            n, e, s = self.sums[number]
            count, negentropy, log_sum = n + count, e + negentropy, th.logaddexp(s, log_sum)
        self.sums[number] = (count, negentropy, log_sum)

    def value(self):
        """The score: from 1 to the number of classes."""
        scores = []
        for _, (count, negentropy, log_sum) in sorted(self.sums.items()):
            log_mean = log_sum - math.log(count)
            marginal = float((log_mean.exp() * log_mean.clamp(min=-1e4)).sum())
            scores.append(math.exp(max(negentropy / count - marginal, 0.0)))
        return float(np.mean(scores))


def precision_recall(reference, samples, neighbours=NEIGHBOURS, device="cpu", block=BLOCK):
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision is the share of samples that lie within the ball of some reference point, whose radius is the distance to
    its `neighbours`-th neighbour; recall the share of reference points within the balls of the samples. The original
    computed distances in float16, which moves radii by up to 1.7 % and either figure by some thousandths.

    :param reference, samples: features [N, dim] and [M, dim], of more than `neighbours` rows each.
    :param block: rows at a time: beyond the features, memory does not grow with N or M.
    :raises ValueError: for values that are not finite.
    """
    # Distances do not change with the origin; near the data they lose fewer digits to large norms.
    reference, samples = (_finite(x) for x in (reference, samples))
    centre = np.mean(reference, axis=0, dtype=np.float64)
    reference_radii = manifold_radii(reference, neighbours, block, device, centre)
    sample_radii = manifold_radii(samples, neighbours, block, device, centre)
    covered, covering = (th.zeros(len(x), dtype=th.bool, device=device) for x in (samples, reference))
    for rows, columns, distances in _tiles(samples, reference, block, device, centre):
        covered[rows] |= (distances <= reference_radii[columns]).any(dim=1)
        covering[columns] |= (distances <= sample_radii[rows, None]).any(dim=0)
    return float(covered.double().mean()), float(covering.double().mean())


def manifold_radii(features, neighbours=NEIGHBOURS, block=BLOCK, device="cpu", centre=0.0):
    """The squared distance of each row [N, dim] to its `neighbours`-th neighbour among the others: float64 [N].

    :param centre: what to subtract from all rows first: it changes nothing but rounding.
    """
    features = _finite(features)
    if len(features) <= neighbours:
        raise ValueError(f"{len(features)} points have no {neighbours} neighbours each")
    nearest = th.full((len(features), neighbours), th.inf, dtype=th.float64, device=device)

    def take_in(rows, distances):
        closest = distances.topk(min(neighbours, distances.shape[1]), largest=False).values
        nearest[rows] = th.cat([nearest[rows], closest], dim=1).topk(neighbours, largest=False).values

    for rows, columns, distances in _tiles(features, None, block, device, centre):
        if rows == columns:
            distances.fill_diagonal_(th.inf)  # a point is no neighbour of its own
        else:
            take_in(columns, distances.T)
        take_in(rows, distances)
    return nearest.amax(dim=1)


def _tiles(a, b, block, device, centre):
    """Squared distances |a_i - b_j|^2, a tile at a time: yields slices of rows and columns, and float64 of their shape.

    :param b: None stands for `a`; of two tiles that are each other's mirror image it then yields one.
    """

    def parts(x, first):
        for start in range(first, len(x), block):
            part = th.from_numpy(x[start : start + block].astype(np.float64) - centre).to(device)
            yield slice(start, start + len(part)), part, part.square().sum(dim=1)

    for rows, of_rows, row_norms in parts(a, 0):
        for columns, of_columns, norms in parts(a if b is None else b, rows.start if b is None else 0):
            distances = (of_rows @ of_columns.T).mul_(-2).add_(row_norms[:, None]).add_(norms)
            # Copies of a point are in each other's balls, also where these have no radius
            distances.masked_fill_(distances <= ROUNDING * row_norms[:, None], 0)
            yield rows, columns, distances


def _finite(features):
    features = np.asarray(features)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features are finite numbers [N, dim]; these, of shape {features.shape}, are not")
    return features
