"""How far one set of features is from another: Frechet distance, KID, CMMD. Features in, float64 throughout.

    frechet   |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)             Heusel et al. 2017; FID on Inception's pool3
    kid       unbiased MMD^2, kernel (x.y / D + 1)^3                 Binkowski et al. 2018
    cmmd      1000 MMD^2, kernel exp(-|x - y|^2 / (2 10^2))          Jayasumana et al. 2024; unit CLIP embeddings
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError

CHUNK = 2048  # rows of a kernel matrix that are held at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class Moments(NamedTuple):
    """Count, mean f64[D] and sum of outer products of deviations f64[D, D] of features seen so far."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of [N, D] features."""
        features = checked(features)
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean[None]).T @ (features - mean[None]))

    @classmethod
    def weighted(cls, features: np.ndarray, counts: np.ndarray) -> Moments:
        """As if row i of the features was there counts[i] times."""
        n = int(counts.sum())
        mean = counts @ features / n
        away = features - mean[None]
        return cls(n, mean, (away * counts[:, None]).T @ away)

    def merge(self, other: Moments) -> Moments:
        """Of both sets of features together (Chan et al. 1979)."""
        n, gap = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.n * other.n / n)
        return Moments(n, self.mean + gap * (other.n / n), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """f64[D, D], divided by n - 1."""
        return self.scatter / max(1, self.n - 1)


def checked(features: np.ndarray, what: str = "features") -> np.ndarray:
    """[N, D] as f64; UserError where one is not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise ValueError(f"{what} {features.shape} must be [N, D]")
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise UserError(
            f"{what}: {len(bad)} of {len(features)} rows hold NaN or infinite values, the first is row {bad[0]}",
            "look at that picture, and compute features in float32",
        )
    return features


def frechet(mean1, covariance1, mean2, covariance2) -> float:
    """The Frechet distance of two Gaussians, >= 0.

    tr (C1 C2)^1/2 is the sum of the singular values of C1^1/2 C2^1/2, which is as exact for covariances without full
    rank (N < D) as for others; eigenvalues that are zero but for rounding are taken as zero.

    Args:
      mean1, mean2: [D]. covariance1, covariance2: [D, D], symmetric and without negative eigenvalues.

    Raises:
      UserError: other shapes, values that are not finite, or a covariance with an eigenvalue clearly below zero.
    """
    mean1, mean2, covariance1, covariance2 = (
        np.asarray(a, np.float64) for a in (mean1, mean2, covariance1, covariance2)
    )
    d = mean1.shape[0]
    if mean2.shape != (d,) or covariance1.shape != (d, d) or covariance2.shape != (d, d):
        shapes = f"{mean1.shape}, {covariance1.shape} and {mean2.shape}, {covariance2.shape}"
        raise UserError(f"statistics of shapes {shapes} are not of the same features", "compute both with one network")
    roots = _root(covariance1), _root(covariance2)
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    gap = mean1 - mean2
    return max(0.0, float(gap @ gap + np.trace(covariance1) + np.trace(covariance2) - 2 * cross))


def kid(
    real: np.ndarray, drawn: np.ndarray, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of the unbiased MMD^2 over random subsets of both sets, kernel (x.y / D + 1)^3.

    Args:
      real, drawn: [N, D], [M, D]. subset: rows of each that one estimate takes; at most min(N, M) are.
      subsets: how many estimates; one is enough where a subset is all there is.
    """
    real, drawn = checked(real), checked(drawn)
    size = min(subset, len(real), len(drawn))
    if size < 2:
        raise UserError(f"KID of {len(real)} and {len(drawn)} pictures needs at least 2 of each")
    rng = np.random.default_rng(seed)
    count = 1 if size == len(real) == len(drawn) else subsets
    values = []
    for _ in range(count):
        x = real[rng.choice(len(real), size, replace=False)]
        y = drawn[rng.choice(len(drawn), size, replace=False)]
        values.append(mmd_unbiased(x, y, polynomial))
    return float(np.mean(values)), float(np.std(values))


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3, f64[N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd_unbiased(x: np.ndarray, y: np.ndarray, kernel: Callable) -> float:
    """MMD^2 of [N, D] and [M, D] without the pairs of a row and itself (Gretton et al. 2012, eq. 3)."""
    n, m = len(x), len(y)
    kxx, kyy, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    return float(
        (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1)) - 2 * kxy.mean()
    )


def cmmd(real: np.ndarray, drawn: np.ndarray, chunk: int = CHUNK) -> float:
    """1000 times the (biased) MMD^2 of unit embeddings with a Gaussian kernel of sigma 10, as CMMD's authors have it.

    Args:
      real, drawn: CLIP embeddings [N, D], [M, D]; brought to unit length here.
    """
    real, drawn = unit(checked(real)), unit(checked(drawn))
    mean = lambda a, b: _kernel_mean(a, b, chunk)  # noqa: E731
    # Kernels near 1 are summed as their distance from 1, which keeps the digits that their difference needs.
    return CMMD_SCALE * (mean(real, real) + mean(drawn, drawn) - 2 * mean(real, drawn))


def _kernel_mean(x, y, chunk):
    """The mean of exp(-|x - y|^2 / (2 sigma^2)) - 1 over all pairs of unit vectors, `chunk` rows at once."""
    total = 0.0
    for start in range(0, len(x), chunk):
        squares = np.maximum(2 - 2 * x[start : start + chunk] @ y.T, 0)
        total += np.expm1(-squares / (2 * CMMD_SIGMA**2)).sum()
    return total / (len(x) * len(y))


def unit(z: np.ndarray) -> np.ndarray:
    """Rows of length 1, f64; a row of zeros stays."""
    z = np.asarray(z, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    if not np.isfinite(covariance).all():
        raise UserError("statistics hold NaN or infinite values", "compute them again")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    top = max(values[-1], 0.0)
    if values[0] < -1e-6 * max(top, 1e-12):
        raise UserError(
            f"a covariance has the eigenvalue {values[0]:.3g} (largest {top:.3g}), which no covariance has",
            "compute the statistics again in float64",
        )
    null = values <= len(values) * np.finfo(np.float64).eps * top
    return (vectors * np.sqrt(np.where(null, 0, values))[None]) @ vectors.T
