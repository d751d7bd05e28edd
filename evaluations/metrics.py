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


class Moments:
    """Mean and covariance of rows that come in chunks, also on several ranks.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, dim):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # the sum of outer products of deviations from the mean

    def update(self, rows):
        """Take in rows [n, dim]."""
        rows = np.asarray(rows, dtype=np.float64)
        if len(rows):
            deviations = rows - rows.mean(axis=0)
            self._add(len(rows), rows.mean(axis=0), deviations.T @ deviations)

    def merge(self, other):
        """Take in all that another one has."""
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def _add(self, n, mean, scatter):
        total = self.n + n
        shift = mean - self.mean
        self.scatter += scatter + np.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def statistics(self):
        """The mean [dim] and the unbiased covariance [dim, dim], of at least two rows."""
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


def precision_recall(reference, samples, neighbours=NEIGHBOURS, device="cpu", block=1024):
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision is the share of samples that lie within the ball of some reference point, whose radius is the distance to
    its `neighbours`-th neighbour; recall the share of reference points within the balls of the samples. The original
    computed distances in float16, which moves radii by up to 1.7 % and either figure by some thousandths.

    :param reference, samples: features [N, dim] and [M, dim], of more than `neighbours` rows each.
    :param block: rows at a time: memory grows with block * max(N, M).
    """
    # Distances do not change with the origin; near the data they lose fewer digits to large norms.
    reference, samples = (th.as_tensor(np.asarray(x)).to(device, th.float64) for x in (reference, samples))
    reference, samples = (x - reference.mean(dim=0) for x in (reference, samples))
    reference_radii = manifold_radii(reference, neighbours, block)
    sample_radii = manifold_radii(samples, neighbours, block)
    in_reference = 0
    within_samples = th.zeros(len(reference), dtype=th.bool, device=reference.device)
    for start in range(0, len(samples), block):
        part = slice(start, start + block)
        distances = _squared_distances(samples[part], reference)
        in_reference += int((distances <= reference_radii).any(dim=1).sum())
        within_samples |= (distances <= sample_radii[part, None]).any(dim=0)
    return in_reference / len(samples), int(within_samples.sum()) / len(reference)


def manifold_radii(features, neighbours=NEIGHBOURS, block=1024):
    """The squared distance of each row [N, dim] to its `neighbours`-th neighbour among the others: float64 [N]."""
    if len(features) <= neighbours:
        raise ValueError(f"{len(features)} points have no {neighbours} neighbours each")
    radii = []
    for start in range(0, len(features), block):
        distances = _squared_distances(features[start : start + block], features)
        own = th.arange(len(distances), device=features.device)
        distances[own, start + own] = 0.0
        radii.append(distances.kthvalue(neighbours + 1, dim=1).values)  # the nearest is the row itself
    return th.cat(radii)


def _squared_distances(a, b):
    """|a_i - b_j|^2: float64 [len(a), len(b)]."""
    products = a @ b.T
    return products.mul_(-2).add_(a.square().sum(dim=1)[:, None]).add_(b.square().sum(dim=1)).clamp_(min=0)
