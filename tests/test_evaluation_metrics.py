"""The metrics of evaluations/ against what is known of Gaussians, identical sets, and small sets counted by hand."""

import itertools
import math

import numpy as np
import pytest
import torch as th

from evaluations.metrics import InceptionScore, Moments, frechet_distance, manifold_radii, precision_recall

RNG = np.random.default_rng(0)


def covariance(dim, rank=None, seed=0):
    a = np.random.default_rng(seed).standard_normal((dim, rank or 2 * dim))
    return a @ a.T / a.shape[1]


# Frechet distance


def test_distance_of_gaussians_in_one_dimension():
    assert frechet_distance([1.0], [[4.0]], [4.0], [[9.0]]) == pytest.approx((1 - 4) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_distance_of_gaussians_that_commute():
    """With common axes it is the sum over them of (difference of means)^2 + (difference of deviations)^2."""
    q, _ = np.linalg.qr(RNG.standard_normal((40, 40)))
    a, b = RNG.uniform(0, 3, 40), RNG.uniform(0, 3, 40)
    mu_a, mu_b = RNG.standard_normal((2, 40))
    want = ((mu_a - mu_b) ** 2).sum() + ((a - b) ** 2).sum()
    assert frechet_distance(mu_a, q * a**2 @ q.T, mu_b, q * b**2 @ q.T) == pytest.approx(want, rel=1e-10)


def test_distance_by_a_known_optimal_map():
    """x -> T x with T symmetric and positive is the optimal map: the distance is that of each point from its image."""
    sigma, t = covariance(30, seed=1), covariance(30, seed=2) + 0.1 * np.eye(30)
    moved = (t - np.eye(30)) @ sigma @ (t - np.eye(30)).T
    zero = np.zeros(30)
    assert frechet_distance(zero, sigma, zero, t @ sigma @ t) == pytest.approx(np.trace(moved), rel=1e-10)


@pytest.mark.parametrize("ranks", [(5, 5), (5, 40), (40, 7), (1, 1)])
def test_distance_without_full_rank(ranks):
    """tr (S1 S2)^(1/2) is the nuclear norm of A1^T A2, computed here from the factors that made the covariances."""
    a, b = (np.random.default_rng(seed).standard_normal((40, rank)) for seed, rank in enumerate(ranks))
    zero = np.zeros(40)
    want = (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert frechet_distance(zero, a @ a.T, zero, b @ b.T) == pytest.approx(want, rel=1e-9)


def test_a_gaussian_is_at_no_distance_from_itself():
    for rank in (None, 10):
        sigma, mu = covariance(60, rank), RNG.standard_normal(60)
        assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-6 * np.trace(sigma)


def test_statistics_of_unlike_sizes_are_refused():
    with pytest.raises(ValueError, match="unlike shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


# Moments


@pytest.mark.parametrize("chunks", [[100], [1, 99], [37, 0, 63], [25] * 4])
def test_moments_in_chunks_and_of_several_ranks(chunks):
    rows = (1000 + RNG.standard_normal((100, 6))).astype(np.float32)  # far from zero, where naive sums lose digits
    ends = list(itertools.accumulate(chunks))
    streamed, merged = Moments(6), Moments(6)
    for end, count in zip(ends, chunks):
        streamed.update(rows[end - count : end])
        own = Moments(6)
        own.update(rows[end - count : end])
        merged.merge(own)
    exact = rows.astype(np.float64)
    for moments in (streamed, merged):
        mean, cov = moments.statistics()
        np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_of_one_row_are_refused():
    moments = Moments(2)
    moments.update(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least two"):
        moments.statistics()


# Inception Score


def score(logits, split=5000):
    value = InceptionScore(split)
    value.update(logits, 0)
    return value.value()


def test_scores_that_are_known():
    sure = 1e4 * np.eye(10).repeat(3, axis=0)  # ten classes, certainly and equally often: underflows to 0 in float32
    assert score(sure) == pytest.approx(10, rel=1e-12)
    assert score(np.zeros((50, 7))) == pytest.approx(1, rel=1e-12)  # nothing is known of any image
    assert score(np.tile([0.0, 3.0, -1.0], (20, 1))) == pytest.approx(1, rel=1e-12)  # all images are alike
    p = np.array([0.9, 0.1])  # two images, mirrored: KL to the even mixture
    want = math.exp((p * np.log(p / 0.5)).sum())
    assert score(np.log([[0.9, 0.1], [0.1, 0.9]])) == pytest.approx(want, rel=1e-12)


def test_splits_are_averaged_unweighted_however_they_come():
    logits = RNG.standard_normal((23, 5)) * 3
    want = np.mean([score(logits[i : i + 10]) for i in (0, 10, 20)])
    assert score(logits, split=10) == pytest.approx(want, rel=1e-12)
    ranks = [InceptionScore(10) for _ in range(3)]
    for rank, (start, stop) in zip(ranks, [(0, 8), (8, 15), (15, 23)]):
        for i in range(start, stop, 3):
            rank.update(logits[i : min(i + 3, stop)], i)
    for other in ranks[1:]:
        ranks[0].merge(other)
    assert ranks[0].value() == pytest.approx(want, rel=1e-12)


# Precision and recall


def by_hand(reference, samples, k):
    """From the definition, pair by pair."""

    def radius(points, i):
        return sorted(((points[i] - p) ** 2).sum() for j, p in enumerate(points) if j != i)[k - 1]

    def covered(points, by):
        radii = [radius(by, i) for i in range(len(by))]
        return np.mean([any(((p - q) ** 2).sum() <= r for q, r in zip(by, radii)) for p in points])

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_precision_and_recall_by_definition(shift):
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((40, 3)) + shift
    samples = rng.standard_normal((31, 3)) * [1.5, 0.3, 0.3] + shift
    want = by_hand(reference, samples, 3)
    assert 0.2 < want[1] < want[0] < 1
    for block in (7, 1024):
        assert precision_recall(reference, samples, block=block) == pytest.approx(want, abs=1e-12)


def test_a_set_covers_itself():
    points = RNG.standard_normal((50, 8)).astype(np.float32)
    assert precision_recall(points, points.copy()) == (1.0, 1.0)
    assert precision_recall(points, points + 1000) == (0.0, 0.0)


def test_radii_are_squared_distances_to_the_third_of_the_others():
    line = th.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]], dtype=th.float64)
    assert manifold_radii(line).tolist() == [49.0, 36.0, 16.0, 36.0, 36.0]
    with pytest.raises(ValueError, match="3 points have no 3 neighbours"):
        manifold_radii(line[:3])
