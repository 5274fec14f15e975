"""The one attention function; every backend is chosen here."""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ / sqrt(D)) v, the softmax in f32, for float64 arguments in f64.

    Args:
      q: [B, N, H, D].
      k: [B, S, H, D].
      v: [B, S, H, D].
      mask: bool, broadcastable to [B, H, N, S]; True where a query may look. A row without any True attends
        evenly to all keys, so it stays finite.

    Returns:
      [B, N, H, D] in q's dtype.
    """
    if q.dtype == jnp.float64:  # JAX's own would round the weights to f32
        logits = jnp.einsum("BNHD,BSHD->BHNS", q, k) * q.shape[-1] ** -0.5
        logits = logits if mask is None else jnp.where(mask, logits, -1e30)
        return jnp.einsum("BHNS,BSHD->BNHD", jax.nn.softmax(logits), v)
    return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)


def causal_mask(queries: int, keys: int) -> jax.Array:
    """bool[1, 1, queries, keys]: the last `queries` of a sequence of `keys`, each seeing itself and all before it."""
    return jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None, None]
