"""The metrics as functions of arrays of features, independent of networks, files and ranks.

All metrics are computed in float64. The original evaluator computed means in float32 and distances in float16; each
docstring states how much the metric's value differs as a result.
"""

import math

import numpy as np
import torch as th

RANK_TOLERANCE = 1e-12  # variances below this fraction of the largest are rounding errors
NEIGHBOURS = 3
SPLIT = 5000
BLOCK = 2048
ROUNDING = 1e-13  # squared distances below this fraction of the point's squared norm are rounding errors


class Moments:
    """Accumulates the mean and covariance of rows that arrive in chunks. Instances of several ranks can be merged.

    See Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). The
    attributes n, mean and scatter do not include buffered rows; state() and statistics() do.
    """

    ROWS = 1024  # rows to buffer: with fewer rows, updating [dim, dim] takes longer than the matrix product

    def __init__(self, dim):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum of the outer products of deviations from the mean
        self._waiting = []

    def update(self, rows):
        """Add rows [n, dim]."""
        rows = np.array(rows)  # a copy: the caller may reuse the array
        if not np.isfinite(rows).all():
            raise ValueError("cannot compute moments of values that are not finite")
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
        """Add all rows of another Moments instance."""
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
        """Return the accumulated moments as {name: array}."""
        self._take_in()
        return {"n": self.n, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def of(cls, state):
        """Create an instance from the state() of another instance."""
        moments = cls(len(state["mean"]))
        moments.n, moments.mean, moments.scatter = int(state["n"]), state["mean"], state["scatter"]
        return moments

    def statistics(self):
        """Return the mean [dim] and the unbiased covariance [dim, dim]. Needs at least two rows."""
        self._take_in()
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two samples, not {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Frechet distance between two Gaussians (Dowson and Landau, 1982; FID: Heusel et al., 2017).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With sigma_i = A_i A_i^T, the last trace equals
    the sum of the singular values of A_1^T A_2. Singular values are also accurate for singular covariances, for which a
    matrix square root amplifies rounding errors. The original evaluator used scipy's matrix square root and float32
    means, which changes the distance by 1e-6.

    :param mu1, mu2: means [dim].
    :param sigma1, sigma2: covariances [dim, dim].
    """
    mu1, sigma1, mu2, sigma2 = (th.as_tensor(np.asarray(x), dtype=th.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("cannot compute the Frechet distance: statistics contain values that are not finite")
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"statistics of different shapes: {[tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]}")
    cross = th.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def _factor(sigma):
    """Return A [dim, rank] with A A^T = sigma. Directions whose variance is only rounding error are omitted."""
    factor, failed = th.linalg.cholesky_ex(sigma)
    diagonal = factor.diagonal().square()
    if not failed and diagonal.min() > RANK_TOLERANCE * diagonal.max():
        return factor
    # A singular covariance, for example from fewer images than features: use Cholesky with pivoting up to the rank
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
    """Accumulates the Inception Score (Salimans et al., 2016) of logits that arrive in chunks.

    The score of a split is the exponential of the mean KL divergence of each image's class distribution from the
    split's mean distribution. The Inception Score is the unweighted mean over splits. The computation is in log space,
    because float32 probabilities as in the original evaluator can underflow, and 0 log 0 is NaN. Instances of several
    ranks can be merged.

    :param split: number of consecutive images per split; the last split may have fewer.
    """

    def __init__(self, split=SPLIT):
        self.split = split
        self.sums = {}  # {split index: (number of images, sum of p log p, log of the sum of p [classes])}

    def update(self, logits, start):
        """Add the logits [n, classes] of the images with indices start to start + n - 1."""
        log_p = th.as_tensor(logits, dtype=th.float64).log_softmax(dim=1)
        if not log_p.isfinite().all():
            raise ValueError("cannot compute the Inception Score: logits contain values that are not finite")
        position = 0
        while position < len(log_p):
            number, offset = divmod(start + position, self.split)
            part = log_p[position : position + self.split - offset]
            negentropy = float((part.exp() * part.clamp(min=-1e4)).sum())
            self._add(number, len(part), negentropy, part.logsumexp(dim=0))
            position += len(part)

    def merge(self, other):
        """Add all images of another InceptionScore instance."""
        for number, sums in other.sums.items():
            self._add(number, *sums)

    def _add(self, number, count, negentropy, log_sum):
        if number in self.sums:
            n, e, s = self.sums[number]
            count, negentropy, log_sum = n + count, e + negentropy, th.logaddexp(s, log_sum)
        self.sums[number] = (count, negentropy, log_sum)

    def value(self):
        """Return the Inception Score, between 1 and the number of classes."""
        scores = []
        for _, (count, negentropy, log_sum) in sorted(self.sums.items()):
            log_mean = log_sum - math.log(count)
            marginal = float((log_mean.exp() * log_mean.clamp(min=-1e4)).sum())
            scores.append(math.exp(max(negentropy / count - marginal, 0.0)))
        return float(np.mean(scores))


def precision_recall(reference, samples, neighbours=NEIGHBOURS, device="cpu", block=BLOCK):
    """Return improved precision and recall (Kynkäänniemi et al., 2019).

    The ball around a point has the distance to the point's `neighbours`-th neighbour as its radius. Precision is the
    fraction of samples inside the ball of any reference point; recall is the fraction of reference points inside the
    ball of any sample. The original evaluator computed distances in float16, which changes radii by up to 1.7 %, and
    precision and recall by a few thousandths.

    :param reference: features [N, dim], with N > neighbours.
    :param samples: features [M, dim], with M > neighbours.
    :param block: rows and columns per tile of the distance matrix. The whole matrix [N, M] is never in memory.
    :raises ValueError: if features contain NaN or infinite values.
    """
    # Subtracting the mean does not change distances, but reduces norms and therefore rounding errors.
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
    """Return the squared distance from each row of features [N, dim] to its `neighbours`-th neighbour, float64 [N].

    :param centre: a vector to subtract from all rows first, which reduces rounding errors.
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
    """Yield tiles of squared distances |a_i - b_j|^2 as (slice of rows, slice of columns, float64 [rows, columns]).

    :param b: None means b = a. The matrix is then symmetric, and only its upper triangle of tiles is yielded.
    """

    def parts(x, first):
        for start in range(first, len(x), block):
            part = th.from_numpy(x[start : start + block].astype(np.float64) - centre).to(device)
            yield slice(start, start + len(part)), part, part.square().sum(dim=1)

    for rows, of_rows, row_norms in parts(a, 0):
        for columns, of_columns, norms in parts(a if b is None else b, rows.start if b is None else 0):
            distances = (of_rows @ of_columns.T).mul_(-2).add_(row_norms[:, None]).add_(norms)
            # Set rounding errors to 0, so that duplicates of a point are inside its ball even if the radius is 0
            distances.masked_fill_(distances <= ROUNDING * row_norms[:, None], 0)
            yield rows, columns, distances


def _finite(features):
    features = np.asarray(features)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features of shape {features.shape} are not a matrix [N, dim] of finite numbers")
    return features
