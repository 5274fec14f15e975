"""unCLIP's decoder (section 2.1): GLIDE conditioned on a CLIP image embedding.

The embedding is projected and added to the timestep embedding, and projected into four extra context tokens that are
concatenated with the output sequence of GLIDE's caption Transformer. Without the embedding it is GLIDE itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.text import TextEncoder
from unclip_jax.models.unet import UNet
from unclip_jax.nn.attention import KV
from unclip_jax.nn.layers import Dense
from unclip_jax.nn.transformer import LayerNorm
from unclip_jax.nn.unet_blocks import context_kv


class Condition(NamedTuple):
    """What every denoising step of a sample shares."""

    emb: jax.Array  # f32[B, E], added to the timestep embedding
    context: jax.Array  # [B, M, W], tokens that the attention layers see
    mask: jax.Array | None  # bool[B, M] or None: all seen
    kv: Mapping[str, KV] | None = None  # of the context in each attention layer, [B, M, …]; None: not projected yet


class Decoder(nn.Module):
    """Image UNet with unCLIP's conditioning, or without its image embedding (GLIDE).

    Attributes:
      embed_dim: D of CLIP; 0: no CLIP, the caption Transformer alone conditions (GLIDE).
      unet: keywords of `UNet`.
      text: keywords of `TextEncoder` for GLIDE's own caption Transformer, trained with the decoder; None: the caption
        enters as CLIP's frozen text states (Karlo).
      context_width: of the context tokens.
      image_tokens: extra context tokens made of the CLIP image embedding (the paper: 4).
      add_text_embedding: adds the projected CLIP text embedding to the timestep embedding too (Karlo).
    """

    embed_dim: int
    unet: Mapping[str, Any]
    text: Mapping[str, Any] | None
    context_width: int
    image_tokens: int = 4
    add_text_embedding: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.net = UNet(**self.unet, dtype=self.dtype)
        width = self.net.emb_width
        if self.embed_dim:
            self.null_image = self.param("null_image", nn.initializers.normal(0.02), (self.embed_dim,))
            self.image_to_time = Dense(width)
            self.image_to_tokens = Dense(self.image_tokens * self.context_width)
        if self.text is None:
            self.states_in = Dense(self.context_width, dtype=self.dtype)
            self.states_norm = LayerNorm(self.dtype)
        else:
            settings = {"causal": False, "learned_padding": True, **self.text}
            self.caption = TextEncoder(**settings, width=self.context_width, dtype=self.dtype)
            self.caption_to_time = Dense(width)
        if self.add_text_embedding:
            self.text_to_time = Dense(width)

    def condition(
        self,
        z_img: jax.Array | None,
        keep_image: jax.Array | None,
        tokens: jax.Array,
        mask: jax.Array,
        keep_text: jax.Array | None,
        z_txt: jax.Array | None = None,
        states: jax.Array | None = None,
    ) -> Condition:
        """Encodes what a sample is drawn from, down to each attention layer's keys and values of the context.

        Independent of timestep and noise.

        Args:
          z_img: f32[B, D], CLIP image embedding; replaced by a learned vector where `keep_image` is False. Not read
            without CLIP, no more than `keep_image`.
          keep_image: bool[B].
          tokens: i32[B, L].
          mask: bool[B, L], True through EOS; a dropped caption is all padding.
          keep_text: bool[B]; None: all kept, a dropped caption being one that the caller made empty (Karlo).
          z_txt: f32[B, D], needed with `add_text_embedding`.
          states: f32[B, L, W'], CLIP's text states, needed without an own caption Transformer.
        """
        mask = mask if keep_text is None else mask & keep_text[:, None]
        emb = jnp.zeros((mask.shape[0], self.net.emb_width))
        if self.text is None:
            context, seen = self.states_norm(self.states_in(states)), mask
        else:
            context, seen = self.caption(tokens, mask), None  # a learned vector stands in every padded place
            emb = emb + self.caption_to_time(context[:, -1])
        if self.embed_dim:
            z = jnp.where(keep_image[:, None], z_img, self.null_image[None])
            emb = emb + self.image_to_time(z)
            image_tokens = self.image_to_tokens(z).reshape(-1, self.context_width, self.image_tokens).swapaxes(1, 2)
            context = jnp.concatenate([image_tokens.astype(context.dtype), context], axis=1)
            seen = seen if seen is None else jnp.pad(seen, ((0, 0), (self.image_tokens, 0)), constant_values=True)
        if self.add_text_embedding:
            z_txt = z_txt if keep_text is None else jnp.where(keep_text[:, None], z_txt, 0.0)
            emb = emb + self.text_to_time(z_txt)
        kv = None if self.is_initializing() else context_kv(self.net.variables["params"], context, self.dtype)
        return Condition(emb, context, seen, kv)

    def denoise(self, xt: jax.Array, time: jax.Array, cond: Condition, train: bool = False) -> jax.Array:
        """xt f32[B, H, W, C], time [B] → f32[B, H, W, 3], the prediction; or 6, with the variance's place in [-1, 1].

        xt has 3 channels; 6 with a smaller picture, enlarged, behind the noised one (upsamplers); 7 with the known
        picture and where it is known (inpainting).
        """
        context = cond.context if cond.kv is None else cond.kv
        return self.net(xt, time, cond.emb, context, cond.mask, train)

    def __call__(self, xt, time, z_img, keep_image, tokens, mask, keep_text, z_txt=None, states=None, train=False):
        """`condition` and `denoise` in one, as in training."""
        return self.denoise(
            xt, time, self.condition(z_img, keep_image, tokens, mask, keep_text, z_txt, states), train
        )
