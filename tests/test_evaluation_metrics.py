"""The metrics of evaluations/, compared with closed forms for Gaussians and direct counts for small sets."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch as th
from known_features import by_hand, radii_by_hand
from launch import run

from evaluations.metrics import InceptionScore, Moments, frechet_distance, manifold_radii, precision_recall

pytestmark = pytest.mark.usefixtures("cpu")

RNG = np.random.default_rng(0)


def covariance(dim, rank=None, seed=0):
    a = np.random.default_rng(seed).standard_normal((dim, rank or 2 * dim))
    return a @ a.T / a.shape[1]


# Frechet distance


def test_frechet_distance_of_commuting_gaussians():
    """With common principal axes, the distance is the sum of squared differences of means and standard deviations."""
    q, _ = np.linalg.qr(RNG.standard_normal((40, 40)))
    a, b = RNG.uniform(0, 3, 40), RNG.uniform(0, 3, 40)
    mu_a, mu_b = RNG.standard_normal((2, 40))
    want = ((mu_a - mu_b) ** 2).sum() + ((a - b) ** 2).sum()
    assert frechet_distance(mu_a, q * a**2 @ q.T, mu_b, q * b**2 @ q.T) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("ranks", [(5, 5), (5, 40), (40, 7), (1, 1), (40, 40)])
def test_frechet_distance_of_rank_deficient_covariances(ranks):
    """For covariances S1 = A1 A1^T and S2 = A2 A2^T, tr (S1 S2)^(1/2) is the nuclear norm of A1^T A2."""
    a, b = (np.random.default_rng(seed).standard_normal((40, rank)) for seed, rank in enumerate(ranks))
    zero = np.zeros(40)
    want = (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert frechet_distance(zero, a @ a.T, zero, b @ b.T) == pytest.approx(want, rel=1e-9)


def test_a_gaussian_has_distance_zero_to_itself():
    for rank in (None, 10):
        sigma, mu = covariance(60, rank), RNG.standard_normal(60)
        assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-6 * np.trace(sigma)


def test_statistics_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


# Moments


@pytest.mark.parametrize("chunks", [[100], [1, 99], [37, 0, 63], [25] * 4])
@pytest.mark.parametrize("at_once", [1, 30, 1024])
def test_moments_of_chunks_and_of_several_ranks(chunks, at_once, monkeypatch):
    monkeypatch.setattr(Moments, "ROWS", at_once)
    rows = (1000 + RNG.standard_normal((100, 6))).astype(np.float32)  # with a large mean, naive sums lose precision
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


def test_moments_do_not_keep_a_reference_to_their_input():
    moments, buffer = Moments(2), np.zeros((2, 2))
    for value in (1.0, 3.0):
        buffer[:] = value  # a caller may reuse its buffer
        moments.update(buffer)
    mean, cov = moments.statistics()
    assert (mean == 2).all() and np.allclose(cov, 4 / 3)


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


def test_inception_scores_with_known_values():
    sure = 1e4 * np.eye(10).repeat(3, axis=0)  # certain predictions of ten equally frequent classes
    assert score(sure) == pytest.approx(10, rel=1e-12)
    assert score(np.zeros((50, 7))) == pytest.approx(1, rel=1e-12)  # every prediction is uniform
    assert score(np.tile([0.0, 3.0, -1.0], (20, 1))) == pytest.approx(1, rel=1e-12)  # all predictions are identical
    p = np.array([0.9, 0.1])  # two mirrored predictions: KL divergence to the uniform mean
    want = math.exp((p * np.log(p / 0.5)).sum())
    assert score(np.log([[0.9, 0.1], [0.1, 0.9]])) == pytest.approx(want, rel=1e-12)


def test_inception_score_is_the_unweighted_mean_over_splits_in_any_order():
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


def test_precision_and_recall_far_from_the_origin():
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((40, 3)) + 100
    samples = rng.standard_normal((31, 3)) * [1.5, 0.3, 0.3] + 100
    want = by_hand(reference, samples, 3)
    assert 0.2 < want[1] < want[0] < 1
    assert precision_recall(reference, samples) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("neighbours", [1, 3, 6])
def test_block_size_does_not_change_precision_and_recall(neighbours):
    """Any block size gives the same result, even if points occur twice in a set or in both sets."""
    rng = np.random.default_rng(4)
    reference = rng.standard_normal((41, 6))
    samples = rng.standard_normal((30, 6)) * [1.5, 0.3, 0.3, 1, 1, 0.8]
    reference[[7, 40]], samples[[3, 29, 12]] = reference[[31, 0]], [samples[17], reference[9], reference[10]]
    radii, want = radii_by_hand(reference, neighbours), by_hand(reference, samples, neighbours)
    for block in (1, 10, 29, 30, 41, 1000):
        got = manifold_radii(reference, neighbours, block).numpy()
        np.testing.assert_allclose(got, radii, rtol=1e-12, atol=1e-13, err_msg=f"block {block}")
        found = precision_recall(reference, samples, neighbours, block=block)
        assert found == pytest.approx(want, abs=1e-12), block


@pytest.mark.parametrize("dim, block", [(64, 7), (2048, 33), (2048, 2048)])
def test_repeated_points_have_radius_zero(dim, block):
    """If each point occurs five times, every ball has radius zero and still contains the copies of its centre."""
    rng = np.random.default_rng(5)
    few = (10 + rng.random((20, dim))).astype(np.float32)
    many = few.repeat(5, axis=0)
    assert manifold_radii(many, block=block).tolist() == [0] * 100
    for order in (np.arange(100), rng.permutation(100)):
        assert precision_recall(many, many[order], block=block) == (1, 1)
    half = np.concatenate([few[:10], few[10:] + 0.5]).repeat(5, axis=0)
    assert precision_recall(many, half, block=block) == (0.5, 0.5)


def test_nearly_identical_points_are_distinguished():
    """Points that differ by 1e-4 of their size, like features of very similar images, have exact radii."""
    rng = np.random.default_rng(6)
    few = rng.random((10, 256))
    close = np.concatenate([few + 1e-4 * i * np.eye(256)[i] for i in range(1, 6)])
    np.testing.assert_allclose(manifold_radii(close, 1), radii_by_hand(close, 1), rtol=1e-5)
    assert precision_recall(close, few.repeat(5, axis=0), 1) == by_hand(close, few.repeat(5, axis=0), 1)


def test_a_set_has_precision_and_recall_1_with_itself():
    points = RNG.standard_normal((50, 8)).astype(np.float32)
    assert precision_recall(points, points.copy()) == (1.0, 1.0)
    assert precision_recall(points, points + 1000) == (0.0, 0.0)


def test_radii_are_squared_distances_to_the_third_nearest_neighbour():
    line = th.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]], dtype=th.float64)
    assert manifold_radii(line).tolist() == [49.0, 36.0, 16.0, 36.0, 36.0]
    with pytest.raises(ValueError, match="3 points have no 3 neighbours"):
        manifold_radii(line[:3])


# The full distance matrix would take 288 MB; one block of distances takes 0.5 MB and the features take 12 MB.
MEMORY = """
import json, re
import numpy as np
from evaluations.metrics import precision_recall

def memory(name):
    with open("/proc/self/status") as f:
        return int(re.search(name + r":\\s+(\\d+) kB", f.read())[1]) * 1024

rng = np.random.default_rng(0)
reference, samples = (rng.standard_normal((n, 512)).astype(np.float32) for n in (6000, 500))
precision_recall(reference[:300], samples[:300], block=256)  # a warm-up: the libraries allocate their own memory
before = memory("VmRSS")
found = precision_recall(reference, samples, block=256)
print(json.dumps([memory("VmHWM") - before, found]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc/self/status to read the memory use")
def test_memory_does_not_grow_quadratically_with_the_number_of_points():
    grown, (precision, recall) = json.loads(run(["-c", MEMORY]).check().output.splitlines()[-1])
    assert grown < 0.1 * 6000**2 * 8
    assert 0 < precision < 1 and 0 < recall < 1


# Non-finite values


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused(bad):
    rows = RNG.standard_normal((6, 3))
    good, spoilt = rows.copy(), rows.copy()
    spoilt[4, 1] = bad
    good_gaussian = [np.zeros(3), np.eye(3)] * 2
    bad_gaussian = [np.array([0, bad, 0]), np.where(np.eye(3) > 0, bad, 0)] * 2
    calls = {
        "moments": lambda: Moments(3).update(spoilt.astype(np.float32)),
        "scores": lambda: InceptionScore().update(spoilt, 0),
        "radii": lambda: manifold_radii(spoilt),
        "reference": lambda: precision_recall(spoilt, good),
        "samples": lambda: precision_recall(good, spoilt),
    }
    for i in range(4):
        arguments = [*good_gaussian[:i], bad_gaussian[i], *good_gaussian[i + 1 :]]
        calls[f"distance {i}"] = lambda arguments=arguments: frechet_distance(*arguments)
    for name, call in calls.items():
        with pytest.raises(ValueError, match="finite"):
            pytest.fail(f"{name}: {call()}")
