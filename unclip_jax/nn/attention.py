"""The one attention function; every backend is chosen here."""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ / sqrt(D)) v, the softmax in f32, or in f64 where q is f64.

    Args:
      q: [B, N, H, D].
      k: [B, S, H, D].
      v: [B, S, H, D].
      mask: bool, broadcastable to [B, H, N, S]; True where a query may look. A row without any True attends
        evenly to all keys, so it stays finite.

    Returns:
      [B, N, H, D] in q's dtype.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if q.dtype == jnp.float64:  # jax's own has its softmax in f32 whatever it is given
        scores = jnp.einsum("BNHD,BSHD->BHNS", q, k) / q.shape[-1] ** 0.5
        seen = scores if mask is None else jnp.where(mask, scores, -1e30)
        return jnp.einsum("BHNS,BSHD->BNHD", jax.nn.softmax(seen), v)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def causal_mask(queries: int, keys: int) -> jax.Array:
    """bool[1, 1, queries, keys]: the last `queries` of a sequence of `keys`, each seeing itself and all before it."""
    return jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None, None]


def caption_mask(mask: jax.Array, queries: int, total: int) -> jax.Array:
    """bool[B, 1, queries, total]: the last `queries` of a sequence that begins with a caption, mask bool[B, L].

    Causal; padding is unseen but by itself, so that no row is empty.
    """
    seen = jnp.pad(mask, ((0, 0), (0, total - mask.shape[1])), constant_values=True)[:, None, None]
    itself = jnp.eye(total, dtype=bool)[-queries:][None, None]
    return causal_mask(queries, total) & (seen | itself)
