"""What the tasks of CLIP and of both priors share: lengths, candidates, cosines and pictures of embeddings."""

import jax
import jax.numpy as jnp


def unit(z: jax.Array) -> jax.Array:
    """z / |z| along the last axis."""
    return z * jax.lax.rsqrt(jnp.sum(jnp.square(z), -1, keepdims=True) + 1e-12)


def matrix_picture(matrix: jax.Array) -> jax.Array:
    """A matrix [N, M] as one grey picture f32[1, 4N, 4M, 3], each row's smallest value black and largest white."""
    low, high = matrix.min(-1, keepdims=True), matrix.max(-1, keepdims=True)
    grey = 2 * (matrix - low) / jnp.maximum(high - low, 1e-6) - 1
    grey = jnp.repeat(jnp.repeat(grey, 4, 0), 4, 1)
    return jnp.broadcast_to(grey[None, :, :, None], (1, *grey.shape, 3))


def candidate_keys(keys: jax.Array, candidates: int) -> jax.Array:
    """key[B] → key[B * candidates], caption by caption; a candidate's key does not depend on how many there are."""
    own = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(candidates)))(keys)
    return own.reshape(-1)


def best(z: jax.Array, near: jax.Array) -> jax.Array:
    """Of each caption's candidates f32[B * C, D] the one whose dot product with `near` f32[B, D] is largest."""
    z = z.reshape(near.shape[0], -1, near.shape[1])
    first = jnp.einsum("bcd,bd->bc", z, near).argmax(1)
    return jnp.take_along_axis(z, first[:, None, None], axis=1)[:, 0]


def cosines(z: jax.Array, batch, mean: jax.Array) -> dict[str, tuple[jax.Array, int]]:
    """{metric: (sum, count)}: cosine of drawn z and true embeddings, beside those of what costs nothing."""
    b = z.shape[0]
    cosine = lambda a: jnp.sum(unit(a) * unit(batch["z_img"]))  # noqa: E731
    return {
        "cosine": (cosine(z), b),
        "cosine_of_text_embedding": (cosine(batch["z_txt"]), b),
        "cosine_of_mean": (cosine(jnp.broadcast_to(mean[None], z.shape)), b),
        "cosine_of_others": (cosine(jnp.roll(batch["z_img"], 1, axis=0)), b),
    }
