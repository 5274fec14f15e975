"""The autoregressive prior (unCLIP, section 2.2): a causal Transformer over

    [caption, L] [CLIP text embedding] [dot product] [code 1] … [code K - 1]

whose outputs from the dot product on predict codes 1 … K, the CLIP image embedding's principal components in buckets.
A sampler runs caption and text embedding once (`prefix`), then a token for each code (`step`), each against the keys
and values of all before it, of which those of the codes lie in a buffer (`room`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.text import TextEncoder
from unclip_jax.nn.attention import KV, caption_mask
from unclip_jax.nn.layers import Dense
from unclip_jax.nn.rows import in_parts, repeated
from unclip_jax.nn.transformer import LayerNorm, Transformer


class Prefix(NamedTuple):
    """What precedes the codes of B captions.

    Attributes:
      before: of each layer keys and values [B, L+1, heads, W/heads].
      mask: bool[B, L], of the captions' tokens.
    """

    before: tuple[KV, ...]
    mask: jax.Array


class PriorAR(nn.Module):
    """Predicts each code of a CLIP image embedding from a caption, its CLIP text embedding and the codes before it.

    One table embeds the tokens of all places, and one matrix reads all outputs: the codes count standard deviations, so
    they mean the same in each place, which the learned positions tell apart. Tables for each of 319 places would
    hold more parameters than the Transformer. Only a bias is each place's own: how often it has each code.

    Attributes:
      embed_dim: D of CLIP.
      max_len: L of the captions.
      dims: K, codes of an embedding.
      buckets: values of a code.
      dot_buckets: values of the dot product of text and image embedding.
      vocab_size: the caption enters as its own token embeddings; 0: as CLIP's frozen text states.
      text: keywords of `TextEncoder` for an own encoder of the caption, whose outputs enter instead of its tokens (the
        paper's table 3); None: none.
    """

    embed_dim: int
    max_len: int
    dims: int
    buckets: int
    width: int
    layers: int
    heads: int
    dot_buckets: int = 32
    vocab_size: int = 0
    text: Mapping[str, Any] | None = None
    activation: str = "gelu"
    remat: str | bool = "none"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.normal(0.02)
        if self.text is not None:
            settings = {"causal": False, "learned_padding": True, **self.text}
            self.encoder = TextEncoder(self.vocab_size, self.max_len, dtype=self.dtype, **settings)
        if self.text is None and self.vocab_size:
            self.word_embed = nn.Embed(self.vocab_size, self.width, embedding_init=init)
        else:
            self.states_in = Dense(self.width)
        self.text_in = Dense(self.width)
        self.null_text = self.param("null_text", init, (self.embed_dim,))
        self.token_embed = nn.Embed(self.buckets + self.dot_buckets + 1, self.width, embedding_init=init)
        positions = (self.max_len + 1 + self.dims, self.width)
        self.position = self.param("position", nn.initializers.normal(0.01), positions)
        self.transformer = Transformer(
            self.width, self.layers, self.heads, 4.0, self.activation, self.remat, self.dtype
        )
        self.final_norm = LayerNorm(self.dtype)
        self.out = Dense(self.buckets, use_bias=False, kernel_init=init)
        self.bias = self.param("bias", nn.initializers.zeros, (self.dims, self.buckets))

    def first(self, dot: jax.Array | None, rows: int = 0) -> jax.Array:
        """The token of a dot product's bucket i32[B]; of None for `rows` captions, the one that says it is unknown."""
        unknown = self.buckets + self.dot_buckets
        return jnp.full((rows,), unknown, jnp.int32) if dot is None else self.buckets + dot

    def _prefix(self, caption, mask, z_txt, keep):
        """The first L+1 tokens [B, L+1, W] and the mask of real ones; without the caption where `keep` is False."""
        mask = mask & keep[:, None]
        if self.text is not None:
            x = self.states_in(self.encoder(caption, mask))
            mask = jnp.ones_like(mask)  # a learned vector stands in every padded place
        else:
            x = self.word_embed(caption) if self.vocab_size else self.states_in(caption)
        z_txt = jnp.where(keep[:, None], z_txt, self.null_text[None])
        x = jnp.concatenate([x, self.text_in(z_txt)[:, None]], axis=1)
        return x + self.position[None, : x.shape[1]], mask

    def _read(self, x):
        """[B, N, W] → logits before the places' own biases, at least f32[B, N, buckets]."""
        x = self.final_norm(x)
        return self.out(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    def prefix(
        self, caption: jax.Array, mask: jax.Array, z_txt: jax.Array, keep: jax.Array, sizes: Sequence[int]
    ) -> tuple[Prefix, ...]:
        """What all codes of a sample follow; `sizes` of the prefixes the batch is cut into: see `rows.in_parts`."""

        def run(*given):
            x, mask = self._prefix(*given)
            return Prefix(self.transformer(x, caption_mask(mask, *[x.shape[1]] * 2), return_kv=True)[1], mask)

        return tuple(in_parts(run, sizes, caption, mask, z_txt, keep))

    def room(self, rows: int) -> tuple[KV, ...]:
        """Of each layer a buffer of keys and values [rows, K, heads, W/heads], for the K tokens to come."""
        empty = jnp.zeros((rows, self.dims, self.heads, self.width // self.heads), self.dtype)
        return ((empty, empty),) * self.layers

    def step(
        self, token: jax.Array, place: jax.Array, prefixes: Sequence[Prefix], own: tuple[KV, ...]
    ) -> tuple[jax.Array, tuple[KV, ...]]:
        """One code more.

        Args:
          token: i32[B], that of `first` at place 0, then the last code.
          place: i32[], how many codes there are.
          prefixes: the batch is cut into as many equal parts; part i is told prefixes[i]. Where that has k captions,
            each is told to a k-th of the part's rows, one run of rows after the other.
          own: of `room`, or of the step before.

        Returns:
          Logits f32[B, buckets] of the next code, and `own` with the token's keys and values.
        """
        at = self.max_len + 1 + place
        x = self.token_embed(token)[:, None] + jax.lax.dynamic_slice_in_dim(self.position, at, 1)[None]
        mask = repeated([p.mask for p in prefixes], token.shape[0])
        past = jnp.arange(self.max_len + 1 + self.dims) <= at
        seen = jnp.pad(mask, ((0, 0), (0, 1 + self.dims)), constant_values=True) & past[None]
        kv = tuple((pairs, (buffer,)) for *pairs, buffer in zip(*(p.before for p in prefixes), own, strict=True))
        x, own = self.transformer(x, seen[:, None, None], kv, return_kv=True, at=place)
        return self._read(x)[:, 0] + jax.lax.dynamic_slice_in_dim(self.bias, place, 1), own

    def __call__(
        self,
        codes: jax.Array,
        dot: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
        z_txt: jax.Array,
        keep: jax.Array,
    ) -> jax.Array:
        """The whole sequence at once, as in training.

        Args:
          codes: i32[B, K] in [0, buckets); the last of them is only predicted.
          dot: i32[B] in [0, dot_buckets).
          caption: i32[B, L] tokens, or f32[B, L, W'] CLIP text states where `vocab_size` is 0.
          mask: bool[B, L], True through EOS.
          z_txt: f32[B, D], the CLIP text embedding.
          keep: bool[B], False drops the caption, its embedding and the dot product (classifier-free guidance).

        Returns:
          Logits f32[B, K, buckets] of each code given those before it.
        """
        prefix, mask = self._prefix(caption, mask, z_txt, keep)
        first = jnp.where(keep, self.first(dot), self.first(None, len(dot)))
        tokens = jnp.concatenate([first[:, None], codes[:, :-1]], axis=1)
        x = self.token_embed(tokens) + self.position[None, -self.dims :]
        x = jnp.concatenate([prefix, x], axis=1)
        x = self.transformer(x, caption_mask(mask, x.shape[1], x.shape[1]))
        return self._read(x[:, -self.dims :]) + self.bias[None]
