"""CLIP (Radford et al. 2021, arXiv 2103.00020): a vision and a causal caption Transformer that meet in one space."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.text import TextEncoder
from unclip_jax.nn.layers import Dense
from unclip_jax.nn.rows import rows
from unclip_jax.nn.transformer import LayerNorm, Transformer

HALF = (0.5, 0.5, 0.5)


class VisionTransformer(nn.Module):
    """Image → the class token's state after the last LayerNorm.

    Dosovitskiy et al. 2020, with CLIP's extra LayerNorm first.

    Attributes:
      image_size: side in pixels, a multiple of `patch`.
      mean, std: of pixels in [0, 1] by channel, with which the network wants them normalised: public ones want those
        of their training set. One half each is [-1, 1], as pictures come here.
    """

    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    activation: str = "gelu"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    remat: str | bool = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """image f32[B, S, S, 3] → [B, width]."""
        if image.shape[1:3] != (self.image_size, self.image_size):
            wanted, got = f"{self.image_size}x{self.image_size}", f"{image.shape[1]}x{image.shape[2]}"
            raise ValueError(f"CLIP takes {wanted} images, got {got}")
        if (self.mean, self.std) != (HALF, HALF):
            mean, std = (np.asarray(numbers)[None, None, None] for numbers in (self.mean, self.std))
            image = (image - (2 * mean - 1).astype(image.dtype)) / (2 * std).astype(image.dtype)
        patches = (self.patch, self.patch)
        x = nn.Conv(self.width, patches, patches, use_bias=False, dtype=self.dtype, name="patches")(image)
        x = x.reshape(x.shape[0], -1, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        cls = self.param("class", init, (self.width,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls[None, None], (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("position", init, (x.shape[1], self.width))[None].astype(x.dtype)
        x = LayerNorm(self.dtype, name="first_norm")(x)
        x = Transformer(
            self.width, self.layers, self.heads, 4.0, self.activation, self.remat, self.dtype, name="transformer"
        )(x, read=0)
        return LayerNorm(self.dtype, name="final_norm")(x)


class CLIP(nn.Module):
    """Both towers, their projections and the learned temperature.

    Attributes:
      embed_dim: D, of the shared space.
      vision: keywords of `VisionTransformer`; None: captions only, as a stack that draws needs them.
      text: keywords of `TextEncoder`.
      norm: the length that every embedding leaves with; the unCLIP paper's prior works at 17.2 (App. C), which gives
        components of unit size. None leaves embeddings as projected, as the public Karlo stack uses them. This is the
        only place where embeddings are scaled, in training and in sampling alike.
      bias: a learned bias of all similarities, as the sigmoid loss wants it, which starts at -10, and the temperature
        at 1/10 (Zhai et al. 2023, section 3.1). Without, the temperature starts at 0.07.
    """

    embed_dim: int
    vision: Mapping[str, Any] | None
    text: Mapping[str, Any]
    norm: float | None = 17.2
    bias: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.vision is not None:
            self.visual = VisionTransformer(**self.vision, dtype=self.dtype)
            self.image_projection = Dense(self.embed_dim, use_bias=False)
        self.textual = TextEncoder(**self.text, dtype=self.dtype)
        self.text_projection = Dense(self.embed_dim, use_bias=False)
        start = jnp.log(10.0 if self.bias else 1 / 0.07)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(start), ())
        if self.bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def _leave(self, z: jax.Array) -> jax.Array:
        z = rows(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
        return z if self.norm is None else z * self.norm * jax.lax.rsqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-12)

    def embed_image(self, image: jax.Array) -> jax.Array:
        """image f32[B, S, S, 3] in [-1, 1] → z_img f32[B, D]."""
        if self.vision is None:
            raise ValueError("this CLIP has no image tower (vision=None)")
        return self._leave(self.image_projection(self.visual(image)))

    def embed_text(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens i32[B, L], mask bool[B, L] → z_txt f32[B, D], read at EOS, the last True; and the states [B, L, W]."""
        states = self.textual(tokens, mask)
        at_eos = jnp.take_along_axis(states, _eos(mask)[:, None, None], axis=1)[:, 0]
        return self._leave(self.text_projection(at_eos)), states

    def __call__(self, image: jax.Array, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """→ z_img f32[B, D], z_txt f32[B, D], and the temperature's inverse exp(min(s, ln 100)), a scalar."""
        scale = jnp.exp(_capped(self.logit_scale))
        z_txt = self._leave(self.text_projection(self.textual(tokens, mask, _eos(mask))))
        return self.embed_image(image), z_txt, scale


@jax.custom_vjp
def _capped(s: jax.Array) -> jax.Array:
    """min(s, ln 100), whose gradient above that lets s fall again and rise no further: s itself is kept within."""
    return jnp.minimum(s, jnp.log(100.0))


def _capped_back(s, g):
    return (jnp.where(s > jnp.log(100.0), jnp.maximum(g, 0), g),)  # descent follows -g


_capped.defvjp(lambda s: (_capped(s), s), _capped_back)


def _eos(mask: jax.Array) -> jax.Array:
    """The place of the last True, or 0: bool[B, L] → i32[B]."""
    return jnp.maximum(mask.sum(-1) - 1, 0)
