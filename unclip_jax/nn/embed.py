"""Embeddings of time."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.layers import Dense


def sinusoid(time: jax.Array, width: int) -> jax.Array:
    """cos(t w_i) then sin(t w_i), w_i = 10000^(-i / (width/2)) (Ho et al. 2020, in GLIDE's order: cosines first).

    Args:
      time: [B], any real or integer dtype.
      width: even.

    Returns:
      f32[B, width] (f64 in JAX's x64 mode).
    """
    half = width // 2
    frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=float) / half)
    angle = time.astype(float)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid → Dense → SiLU → Dense: [B] → [B, width], in f32 until it leaves as `dtype`, as GLIDE's.

    Attributes:
      width: of both layers and of the result.
      frequencies: width of the sinusoid; `width` itself where None.
    """

    width: int
    frequencies: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        exact = jnp.promote_types(self.dtype, jnp.float32)
        h = sinusoid(time, self.frequencies or self.width).astype(exact)
        h = Dense(self.width, dtype=exact, name="fc1")(h)
        return Dense(self.width, dtype=exact, name="fc2")(nn.silu(h)).astype(self.dtype)
