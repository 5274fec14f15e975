"""Principal components of CLIP's image embeddings, and their codes in buckets (unCLIP, section 2.2).

    z = mean + components y        y = componentsᵀ (z - mean), uncorrelated, largest variance first

Mean and covariance are gathered in one pass over batches: each batch about its own mean, on the devices, then merged
in f64 on the host (Chan, Golub & LeVeque 1979), so that nothing large is ever subtracted from something as large.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.metrics.distances import Moments

BOUND = 4.0  # standard deviations that the buckets reach to either side
LEAST_VARIANCE = 1e-6


class PCA(NamedTuple):
    """mean [D], components [D, K] with orthonormal columns, std [K] of the coordinates, falling."""

    mean: jax.Array
    components: jax.Array
    std: jax.Array

    def project(self, z: jax.Array) -> jax.Array:
        """z [B, D] → y [B, K]."""
        with jax.default_matmul_precision("highest"):  # else a TPU rounds codes to others
            return (z - self.mean[None]) @ self.components

    def back(self, y: jax.Array) -> jax.Array:
        """y [B, K] → z [B, D], what lies outside the components being the mean's."""
        with jax.default_matmul_precision("highest"):
            return self.mean[None] + y @ self.components.T

    def keep(self, dims: int | float) -> "PCA":
        """The first `dims` components, or those that hold the share `dims` < 1 of the variance."""
        dims = dims if isinstance(dims, (int, np.integer)) else dims_for(self.std, dims)
        if not 1 <= dims <= self.std.shape[0]:
            raise UserError(f"{dims} principal components: must be within 1 … {self.std.shape[0]}")
        return PCA(self.mean, self.components[:, :dims], self.std[:dims])


def batch_moments(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [D] and scatter [D, D] of a batch [B, D], for jit: of a sharded batch, sums over all its devices."""
    mean = z.mean(0)
    centred = z - mean[None]
    return mean, jnp.einsum("bi,bj->ij", centred, centred, precision="highest")


def merge(seen: Moments | None, count: int, mean: np.ndarray, scatter: np.ndarray) -> Moments:
    """`seen` and a batch of `count` more, in f64."""
    own = Moments(count, np.asarray(mean, np.float64), np.asarray(scatter, np.float64))
    return own if seen is None else seen.merge(own)


def fit(moments: Moments) -> PCA:
    """All D components in f64; of each column the largest entry is positive, so that its sign is decided too."""
    variance, vectors = np.linalg.eigh(moments.scatter / moments.n)
    variance, vectors = variance[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    return PCA(moments.mean, vectors * np.sign(largest), np.sqrt(np.maximum(variance, LEAST_VARIANCE)))


def dims_for(std: np.ndarray, share: float) -> int:
    """How many of all components hold the share, in (0, 1), of the variance."""
    if not 0 < share < 1:
        raise UserError(f"a share of the variance of {share} must be between 0 and 1")
    held = np.cumsum(np.square(std)) / np.square(std).sum()
    return int(np.searchsorted(held, share)) + 1


def to_codes(y: jax.Array, std: jax.Array, buckets: int) -> jax.Array:
    """Coordinates [B, K] → i32[B, K] in [0, buckets).

    The buckets divide -4 … 4 standard deviations of each coordinate evenly; what lies further out goes into the last.
    One rule for all coordinates, so that a code means the same in each and one table embeds them all; nothing but the
    deviations has to be measured and kept, in one pass, and a picture unlike all others does not widen the buckets.
    """
    place = (y / std[None] / BOUND + 1) * (buckets / 2)
    return jnp.clip(jnp.floor(place), 0, buckets - 1).astype(jnp.int32)


def from_codes(codes: jax.Array, std: jax.Array, buckets: int) -> jax.Array:
    """The middle of each code's bucket: i32[B, K] → [B, K]."""
    return ((codes + 0.5) * (2 / buckets) - 1) * BOUND * std[None]
