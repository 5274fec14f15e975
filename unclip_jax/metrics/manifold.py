"""Precision and recall of drawn pictures by nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.metrics.distances import checked

CHUNK = 1024


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3, chunk: int = CHUNK) -> tuple[float, float]:
    """(share of drawn features within the real manifold, share of real ones within the drawn manifold).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest other point.

    Args:
      real, drawn: [N, D], [M, D]; about as many of each, for the balls shrink as points are added.
      k: neighbours, below N and M. chunk: rows of distances held at once.
    """
    real, drawn = checked(real), checked(drawn)
    least = min(len(real), len(drawn))
    if not 1 <= k < least:
        raise UserError(f"k={k} neighbours must be in 1 … {least - 1}, for there are {least} pictures")
    inside = covered(drawn, real, radii(real, k, chunk), chunk), covered(real, drawn, radii(drawn, k, chunk), chunk)
    return float(inside[0].mean()), float(inside[1].mean())


def radii(points: np.ndarray, k: int, chunk: int = CHUNK) -> np.ndarray:
    """Squared distance of each of [N, D] to its k-th nearest other one, f64[N]."""
    out = np.empty(len(points))
    for start in range(0, len(points), chunk):
        squares = _squares(points[start : start + chunk], points)
        rows = np.arange(len(squares))
        squares[rows, start + rows] = 0  # itself, whatever rounding says
        out[start : start + chunk] = np.partition(squares, k, axis=1)[:, k]
    return out


def covered(queries: np.ndarray, points: np.ndarray, radius: np.ndarray, chunk: int = CHUNK) -> np.ndarray:
    """Whether each of the queries [M, D] lies in the ball of any point, bool[M]; radius: squared, f64[N]."""
    parts = [
        (_squares(queries[start : start + chunk], points) <= radius[None]).any(1)
        for start in range(0, len(queries), chunk)
    ]
    return np.concatenate(parts)


def _squares(x, y):
    """|x - y|^2 of all pairs, f64[N, M]."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
