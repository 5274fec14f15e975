"""Great-circle paths between latents: CLIP embeddings and noise alike (the unCLIP paper, section 3.2)."""

import numpy as np


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """`share` of the way from a to b along a great circle, row by row -> f64[B, …].

    Directions move at constant speed on the sphere; where lengths differ, the length moves linearly from |a| to |b|.
    Parallel rows only change length; opposite ones go round by one fixed side, for every side is as short; a row of
    zeros has the direction of the other.

    Args:
      a, b: f[B, …], each row one vector, however shaped. share: 0 (a) … 1 (b).
    """
    rows = [np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b)]
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    u, v = (x / np.where(n > 0, n, 1) for x, n in zip(rows, lengths, strict=True))
    u, v = np.where(lengths[0] > 0, u, v), np.where(lengths[1] > 0, v, u)
    # Accurate for small and for nearly straight angles, unlike the arc cosine.
    angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=1, keepdims=True), np.linalg.norm(u + v, axis=1, keepdims=True))
    side = _across(u, v)
    short = np.linalg.norm(side, axis=1) < 1e-9
    axis = np.zeros_like(u[short])
    np.put_along_axis(axis, np.abs(u[short]).argmin(1)[:, None], 1, axis=1)
    side[short] = _across(u[short], axis)
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-300)
    length = (1 - share) * lengths[0] + share * lengths[1]
    return (length * (np.cos(share * angle) * u + np.sin(share * angle) * side)).reshape(np.shape(a))


def _across(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What of v is at right angles to the unit vectors u."""
    return v - (u * v).sum(1, keepdims=True) * u
