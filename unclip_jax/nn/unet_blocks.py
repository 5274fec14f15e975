"""The convolutional parts of the ADM UNet (Dhariwal & Nichol 2021): residual block, attention to pixels and context."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import KV, attention
from unclip_jax.nn.layers import Conv, Dense, DenseGeneral
from unclip_jax.nn.rows import rows


class GroupNorm(nn.Module):
    """GroupNorm computed in f32 (eps 1e-5), and what follows it, pixel by pixel, in `dtype`.

    Written as per-channel moments pooled over each group: XLA reduces one pass over x, and the batch axis is never
    folded into another, so it stays sharded. The backward pass keeps x and computes the rest again.
    """

    groups: int = 32
    dtype: jnp.dtype = jnp.float32
    then: Callable[[jax.Array], jax.Array] = lambda y: y

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C] → normalised, times (1 + scale) plus shift where given, both [B, C]."""
        channels = x.shape[-1]
        gamma = self.param("scale", nn.initializers.ones, (channels,))
        beta = self.param("bias", nn.initializers.zeros, (channels,))
        return jax.checkpoint(self._normalised, prevent_cse=False)(x, gamma, beta, scale, shift)

    def _normalised(self, x, gamma, beta, scale, shift):
        h, size = x.astype(jnp.promote_types(x.dtype, jnp.float32)), x.shape[-1] // self.groups
        moments = jnp.stack([h.mean((1, 2)), jnp.square(h).mean((1, 2))])
        mean, square = moments.reshape(2, -1, self.groups, size).mean(-1)
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + 1e-5)
        mean, inverse = (jnp.repeat(a, size, axis=-1) for a in (mean, inverse))
        a = inverse * gamma[None]
        b = beta[None] - mean * a
        if scale is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift
        return self.then((h * a[:, None, None] + b[:, None, None]).astype(self.dtype))


def downsample(x: jax.Array) -> jax.Array:
    """2x2 average pooling: [B, H, W, C] → [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, twice: [B, H, W, C] → [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


RESAMPLE = {"": lambda x: x, "down": downsample, "up": upsample}


class ResBlock(nn.Module):
    """GN → SiLU → [resample] → conv → GN modulated by the embedding → SiLU → dropout → conv (zero at first), plus skip.

    Attributes:
      channels: of the output; a 1x1 convolution carries the skip where the input has others.
      resample: "", "down" or "up", applied to both branches before the first convolution.
      scale_shift: GN(h) (1 + scale) + shift from the embedding (ADM); else h + embedding before the norm.
    """

    channels: int
    resample: str = ""
    scale_shift: bool = True
    groups: int = 32
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, train: bool = False) -> jax.Array:
        """x [B, H, W, C], emb [B, E] → [B, H', W', channels]."""
        x, resample = rows(x), lambda a: rows(RESAMPLE[self.resample](a))
        h = GroupNorm(self.groups, self.dtype, nn.silu, name="norm1")(x)
        h = Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(resample(h))
        width = self.channels * (2 if self.scale_shift else 1)
        emb = Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))
        norm2 = GroupNorm(self.groups, self.dtype, nn.silu, name="norm2")
        if self.scale_shift:
            h = norm2(h, *jnp.split(emb.astype(jnp.promote_types(emb.dtype, jnp.float32)), 2, axis=-1))
        else:
            h = norm2(h + emb[:, None, None])
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.channels, (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv2")(h)
        x = resample(x)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
        return x + h


CONTEXT = ("context_key", "context_value")


class PixelAttention(nn.Module):
    """Self-attention over pixels whose keys and values are joined by those of the context (GLIDE's added-KV attention).

    Keys are [context, pixels], the context projected as it is, the pixels after GroupNorm; the output starts at zero.
    """

    head_channels: int = 64
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | KV | None, mask: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], context [B, M, K], its keys and values or None, mask bool[B, M] or None (all seen) →
        [B, H, W, C].
        """
        b, height, width, channels = x.shape
        if channels % self.head_channels:
            raise ValueError(f"channels={channels} must be a multiple of head_channels={self.head_channels}")
        split = (channels // self.head_channels, self.head_channels)
        pixels = height * width
        h = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(b, pixels, channels)
        q, k, v = (DenseGeneral(split, dtype=self.dtype, name=n)(h) for n in ("query", "key", "value"))
        if context is not None:
            if not isinstance(context, tuple):
                context = tuple(DenseGeneral(split, dtype=self.dtype, name=n)(context) for n in CONTEXT)
            ck, cv = context
            k, v = jnp.concatenate([ck, k], axis=1), jnp.concatenate([cv, v], axis=1)
            if mask is not None:
                mask = jnp.concatenate([mask, jnp.ones((b, pixels), bool)], axis=1)[:, None, None]
        h = attention(q, k, v, mask)
        h = DenseGeneral(
            channels, axis=(-2, -1), kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out"
        )(h)
        return x + h.reshape(x.shape)


def context_kv(params: Mapping[str, Any], context: jax.Array, dtype: jnp.dtype) -> dict[str, KV]:
    """What every `PixelAttention` among a network's layers makes of a context [B, M, K], by the layer's name.

    It takes that pair in the context's place, so that a network that is run many times on one context projects it once.

    Args:
      params: of the network, {layer: its parameters}.
      dtype: of the computation.

    Returns:
      {layer: (keys, values)}, each [B, M, heads, channels / heads].
    """

    def project(kernel_and_bias):
        layer = DenseGeneral(kernel_and_bias["kernel"].shape[1:], dtype=dtype, parent=None)
        return layer.apply({"params": kernel_and_bias}, context)

    layers = {layer: own for layer, own in params.items() if isinstance(own, Mapping) and CONTEXT[0] in own}
    return {layer: tuple(project(own[n]) for n in CONTEXT) for layer, own in layers.items()}
