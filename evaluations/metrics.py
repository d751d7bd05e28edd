"""The metrics as functions of arrays, without networks, files or ranks.

Everything is computed in float64. The original evaluator computed means in float32 and distances in float16; each
docstring states the effect on its figures.
"""

import math

import numpy as np
import torch as th

RANK_TOLERANCE = 1e-12  # of a covariance, relative to its largest variance: the rest is rounding
NEIGHBOURS = 3
SPLIT = 5000
BLOCK = 2048
ROUNDING = 1e-13  # relative to a point's squared norm: smaller squared distances are rounding errors


class Moments:
    """Accumulates mean and covariance of rows that arrive in chunks, also on several ranks.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    The attributes n, mean and scatter do not include waiting rows; state() and statistics() do.
    """

    ROWS = 1024  # rows to wait for: with fewer, updating [dim, dim] takes longer than the matrix product

    def __init__(self, dim):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # the sum of outer products of deviations from the mean
        self._waiting = []

    def update(self, rows):
        """Add rows [n, dim]."""
        rows = np.array(rows)  # a copy: the caller may reuse the array
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
        """Add all rows of another instance."""
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
        """Return everything as {name: array}."""
        self._take_in()
        return {"n": self.n, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def of(cls, state):
        """Create an instance from the state() of another."""
        moments = cls(len(state["mean"]))
        moments.n, moments.mean, moments.scatter = int(state["n"]), state["mean"], state["scatter"]
        return moments

    def statistics(self):
        """Return the mean [dim] and the unbiased covariance [dim, dim] of at least two rows."""
        self._take_in()
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two samples, not {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Frechet distance of two Gaussians (Dowson and Landau, 1982; as FID: Heusel et al., 2017).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With sigma_i = A_i A_i^T the last trace is the
    sum of the singular values of A_1^T A_2. That also holds for singular covariances, and avoids square roots of
    rounding errors. The original used scipy's matrix square root and float32 means, which changes the value by 1e-6.

    :param mu1, mu2: means [dim].
    :param sigma1, sigma2: covariances [dim, dim].
    """
    mu1, sigma1, mu2, sigma2 = (th.as_tensor(np.asarray(x), dtype=th.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics that are not finite have no distance")
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"statistics of different shapes: {[tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]}")
    cross = th.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def _factor(sigma):
    """Return A [dim, rank] with A A^T = sigma. Directions with only rounding errors are left out."""
    factor, failed = th.linalg.cholesky_ex(sigma)
    diagonal = factor.diagonal().square()
    if not failed and diagonal.min() > RANK_TOLERANCE * diagonal.max():
        return factor
    # Singular, as with fewer images than features: Cholesky with pivoting, which stops at the rank
    remaining = sigma.diagonal().clone()
    factor, smallest = th.zeros_like(sigma), RANK_TOLERANCE * remaining.max()
    for rank in range(len(sigma)):
        pivot = remaining.argmax()
        if remaining[pivot] <= smallest:
            return factor[:, :rank]
        column = (sigma[pivot] - factor[:, :rank] @ factor[pivot, :rank]) / remaining[pivot].sqrt()
        factor[:, rank] = column
        remaining -= column.square()
    return factor


class InceptionScore:
    """Accumulates the Inception Score (Salimans et al., 2016) of logits that arrive in chunks, also on several ranks.

    The score of a split is exp of the mean KL divergence between an image's class distribution and the split's. The
    result is the unweighted mean over splits. It is computed in log space: the original's float32 probabilities can
    underflow, and 0 log 0 is nan.

    :param split: images per split, by their index; the last split may have fewer.
    """

    def __init__(self, split=SPLIT):
        self.split = split
        self.sums = {}  # {split: (number of images, sum of p log p, log of the sum of p [classes])}

    def update(self, logits, start):
        """Add the logits [n, classes] of images start, start + 1, ..."""
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
        """Add all images of another instance."""
        for number, sums in other.sums.items():
            self._add(number, *sums)

    def _add(self, number, count, negentropy, log_sum):
        if number in self.sums:
            n, e, s = self.sums[number]
            count, negentropy, log_sum = n + count, e + negentropy, th.logaddexp(s, log_sum)
        self.sums[number] = (count, negentropy, log_sum)

    def value(self):
        """Return the score, between 1 and the number of classes."""
        scores = []
        for _, (count, negentropy, log_sum) in sorted(self.sums.items()):
            log_mean = log_sum - math.log(count)
            marginal = float((log_mean.exp() * log_mean.clamp(min=-1e4)).sum())
            scores.append(math.exp(max(negentropy / count - marginal, 0.0)))
        return float(np.mean(scores))


def precision_recall(reference, samples, neighbours=NEIGHBOURS, device="cpu", block=BLOCK):
    """Return improved precision and recall (Kynkäänniemi et al., 2019).

    The ball of a point has the distance to its `neighbours`-th neighbour as its radius. Precision is the share of
    samples inside the ball of any reference point; recall is the share of reference points inside the ball of any
    sample. The original computed distances in float16, which changes radii by up to 1.7 % and figures by thousandths.

    :param reference, samples: features [N, dim] and [M, dim], each with more than `neighbours` rows.
    :param block: rows per tile. Memory beyond the features does not grow with N or M.
    :raises ValueError: if values are not finite.
    """
    # Moving the origin into the data does not change distances, and makes norms, and so rounding errors, small.
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
    """Return the squared distance of each row [N, dim] to its `neighbours`-th neighbour: float64 [N].

    :param centre: subtracted from all rows first, to reduce rounding errors.
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
            distances.fill_diagonal_(th.inf)  # a point is not its own neighbour
        else:
            take_in(columns, distances.T)
        take_in(rows, distances)
    return nearest.amax(dim=1)


def _tiles(a, b, block, device, centre):
    """Yield squared distances |a_i - b_j|^2 in tiles: (slice of rows, slice of columns, float64 [rows, columns]).

    :param b: None means `a`. Of two mirrored tiles only one is then yielded.
    """

    def parts(x, first):
        for start in range(first, len(x), block):
            part = th.from_numpy(x[start : start + block].astype(np.float64) - centre).to(device)
            yield slice(start, start + len(part)), part, part.square().sum(dim=1)

    for rows, of_rows, row_norms in parts(a, 0):
        for columns, of_columns, norms in parts(a if b is None else b, rows.start if b is None else 0):
            distances = (of_rows @ of_columns.T).mul_(-2).add_(row_norms[:, None]).add_(norms)
            # Copies of a point are inside each other's balls, even if the radius is 0
            distances.masked_fill_(distances <= ROUNDING * row_norms[:, None], 0)
            yield rows, columns, distances


def _finite(features):
    features = np.asarray(features)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features are finite numbers [N, dim]; these, of shape {features.shape}, are not")
    return features
