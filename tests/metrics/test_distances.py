"""metrics.distances: against scipy's matrix root, and kernels summed pair by pair."""

import functools
import warnings

import numpy as np
import pytest
import scipy.linalg

from unclip_jax.errors import UserError
from unclip_jax.metrics.distances import Moments, cmmd, frechet, kid, mmd_unbiased, polynomial, unit

RNG = np.random.default_rng(0)


def features(n, d=24, shift=0.0):
    mix = RNG.standard_normal((d, d)) / np.sqrt(d)
    return (RNG.standard_normal((n, d)) @ mix + shift).astype(np.float32)


REAL, DRAWN = features(400), features(300, shift=0.3)


def by_scipy(x, y):
    """FID as pytorch-fid and clean-fid compute it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(c1 @ c2)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root.real)


def distance(x, y):
    a, b = Moments.of(x), Moments.of(y)
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


def test_moments_of_blocks_are_those_of_the_whole():
    for blocks in ([REAL], np.split(REAL, [1, 2, 90]), np.split(REAL, 8)):
        got = functools.reduce(Moments.merge, map(Moments.of, blocks))
        assert got.n == 400
        np.testing.assert_allclose(got.mean, REAL.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(got.covariance, np.cov(REAL.astype(np.float64), rowvar=False), rtol=1e-10)
    np.testing.assert_array_equal(Moments.of(REAL[:1]).covariance, np.zeros((24, 24)))  # of one there is no spread


def test_weighted_moments_are_those_of_repeated_rows():
    counts = RNG.integers(0, 4, 300)
    a, b = Moments.weighted(DRAWN.astype(np.float64), counts), Moments.of(DRAWN.repeat(counts, 0))
    assert a.n == b.n
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-9, atol=1e-9)


def test_frechet_is_scipys():
    assert distance(REAL, DRAWN) == pytest.approx(by_scipy(REAL, DRAWN), rel=1e-9)


def test_frechet_of_diagonal_covariances_is_known():
    a, b = RNG.uniform(0.1, 2, (2, 10))
    mean = RNG.standard_normal(10)
    exact = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(mean, np.diag(a), 0 * mean, np.diag(b)) == pytest.approx(exact, rel=1e-12)


def test_frechet_without_full_rank_is_exact():
    """Covariances of rank 1: with C = u u^T the root's trace is |u.v|; scipy is off by 1e-4 of it here."""
    u, v = RNG.standard_normal((2, 200))
    zero = np.zeros(200)
    exact = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(exact, rel=1e-9)
    b = RNG.uniform(0.1, 2, 200)  # beside one of full rank, tr (u u^T C)^1/2 = (u^T C u)^1/2
    exact = u @ u + b.sum() - 2 * np.sqrt(u @ (b * u))
    assert frechet(zero, np.outer(u, u), zero, np.diag(b)) == pytest.approx(exact, rel=1e-9)
    few = features(20, 64)
    assert distance(few, few) < 1e-9 * np.trace(Moments.of(few).covariance)


def test_frechet_is_never_negative():
    """Of a set and itself rounding leaves a little, of either sign."""
    assert all(0 <= distance(few, few) < 1e-9 for few in (features(40, 8) for _ in range(20)))


def test_frechet_takes_statistics_that_were_stored_in_float32():
    """Rounding makes eigenvalues that were zero negative by a little."""
    few = Moments.of(features(20, 64))
    rounded = few.covariance.astype(np.float32)
    assert -1e-6 < np.linalg.eigvalsh(np.float64(rounded))[0] / np.trace(rounded) < -1e-12
    whole = np.diag(RNG.uniform(0.1, 2, 64))
    exact = frechet(few.mean, few.covariance, 0 * few.mean, whole)
    assert frechet(few.mean, rounded, 0 * few.mean, whole) == pytest.approx(exact, rel=1e-3)


def test_frechet_of_a_shift_is_its_square():
    assert distance(REAL.astype(np.float64), REAL + 0.5) == pytest.approx(24 * 0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda m, c: (m, c, m[:3], c[:3, :3]), "not of the same features"),
        (lambda m, c: (m, c, m, c * np.nan), "NaN"),
        (lambda m, c: (m, c, m, c - np.eye(24)), "eigenvalue"),
        (lambda m, c: (m, c, m, np.diag(np.r_[np.ones(23), -1e-4])), "eigenvalue -0.0001"),
    ],
)
def test_statistics_that_are_none_are_refused(bad, words):
    moments = Moments.of(REAL)
    with pytest.raises(UserError, match=words):
        frechet(*bad(moments.mean, moments.covariance))


def test_features_that_are_not_finite_are_named():
    bad = REAL.copy()
    bad[[7, 9], 3] = np.nan
    for measure in (lambda: Moments.of(bad), lambda: kid(bad, DRAWN), lambda: cmmd(DRAWN, bad)):
        with pytest.raises(UserError, match="2 of 400 rows .* row 7"):
            measure()


def loops(x, y, kernel):
    """The unbiased estimate, pair by pair."""
    pairs = lambda a, b, same: [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if same or i != j]  # noqa: E731
    return np.mean(pairs(x, x, False)) + np.mean(pairs(y, y, False)) - 2 * np.mean(pairs(x, y, True))


def test_kid_of_all_pictures_is_the_estimate_pair_by_pair():
    x, y = REAL[:30].astype(np.float64), DRAWN[:30].astype(np.float64)
    exact = loops(x, y, lambda p, q: (p @ q / 24 + 1) ** 3)
    assert kid(x, y, 30) == kid(x, y) == (pytest.approx(exact, rel=1e-10), 0.0)
    for n, m in ((5, 9), (9, 5)):
        few = mmd_unbiased(x[:n], y[:m], polynomial)
        assert few == pytest.approx(loops(x[:n], y[:m], lambda p, q: (p @ q / 24 + 1) ** 3), rel=1e-10)


def test_kid_is_unbiased_over_its_subsets():
    """Subsets average to the estimate over all; the same seed gives the same ones."""
    x, y = REAL[:60].astype(np.float64), DRAWN[:60].astype(np.float64)
    mean, std = kid(x, y, 20, 400, seed=1)
    assert abs(mean - mmd_unbiased(x, y, polynomial)) < 4 * std / 20
    assert kid(x, y, 20, 400, seed=1) == (mean, std) != kid(x, y, 20, 400, seed=2)
    for parts in (kid(x[:20], y, 20, 9), kid(x, y[:20], 20, 9), kid(x[:20], y, 50, 9), kid(x, y[:20], 50, 9)):
        assert parts[1] > 0  # of one set all, of the other parts


def test_kid_needs_two_pictures():
    with pytest.raises(UserError, match="at least 2"):
        kid(REAL[:1], DRAWN)


def test_cmmd_is_the_mean_over_pairs():
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (REAL[:40].astype(float), DRAWN[:30].astype(float)))
    mean = lambda a, b: np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in a for q in b])  # noqa: E731
    exact = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(REAL[:40], DRAWN[:30]) == pytest.approx(exact, rel=1e-6)
    assert cmmd(REAL[:40], 5 * DRAWN[:30], chunk=7) == pytest.approx(exact, rel=1e-6)
    assert abs(cmmd(REAL, REAL)) < 1e-10


def test_a_row_of_zeros_has_no_direction_and_stays():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]], rtol=1e-12)
