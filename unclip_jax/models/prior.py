"""The diffusion prior (unCLIP, section 2.2): a causal Transformer over

    [caption states, L] [CLIP text embedding] [timestep] [noised CLIP image embedding] [query]

whose output at the query predicts the unnoised CLIP image embedding. Nothing before the noised embedding can see it, so
a sampler runs all that once, with the timestep tokens of all its steps (`prefix`), and two tokens a step (`step`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import KV, caption_mask
from unclip_jax.nn.embed import TimeEmbedding
from unclip_jax.nn.layers import Dense
from unclip_jax.nn.rows import in_parts, repeated
from unclip_jax.nn.transformer import LayerNorm, Transformer

SUFFIX = 3  # timestep, noised embedding, query


class Prefix(NamedTuple):
    """What precedes the noised embedding of B captions.

    Attributes:
      before: of each layer keys and values [B, L+1, heads, W/heads] of what precedes the timestep.
      times: those of all timesteps' tokens [B, S, heads, W/heads], none of which sees another.
      mask: bool[B, L], of the captions' tokens.
    """

    before: tuple[KV, ...]
    times: tuple[KV, ...]
    mask: jax.Array


class Prior(nn.Module):
    """Predicts a CLIP image embedding from a caption, its CLIP text embedding, and a noised image embedding.

    Attributes:
      embed_dim: D of CLIP.
      max_len: L of the captions.
      vocab_size: the caption enters as its own token embeddings (the paper); 0: as CLIP's frozen text states (Karlo).
      learned_null: a dropped caption is padding, and a learned vector in the place of its embedding. False: it is the
        empty caption as CLIP encodes it (Karlo); the caller passes that, and `keep` is None.
    """

    embed_dim: int
    max_len: int
    width: int
    layers: int
    heads: int
    vocab_size: int = 0
    learned_null: bool = True
    activation: str = "gelu"
    remat: str | bool = "none"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.normal(0.02)
        if self.vocab_size:
            self.token_embed = nn.Embed(self.vocab_size, self.width, embedding_init=init)
        else:
            self.states_in = Dense(self.width)
        self.text_in = Dense(self.width)
        self.time = TimeEmbedding(self.width, dtype=self.dtype)
        self.image_in = Dense(self.width)
        self.query = self.param("query", init, (self.width,))
        if self.learned_null:
            self.null_text = self.param("null_text", init, (self.embed_dim,))
        self.position = self.param("position", nn.initializers.normal(0.01), (self.max_len + 1 + SUFFIX, self.width))
        self.transformer = Transformer(
            self.width, self.layers, self.heads, 4.0, self.activation, self.remat, self.dtype
        )
        self.final_norm = LayerNorm(self.dtype)
        self.out = Dense(self.embed_dim)

    def _mask(self, mask: jax.Array, queries: int) -> jax.Array:
        return caption_mask(mask, queries, self.max_len + 1 + SUFFIX)

    def _prefix(self, caption, mask, z_txt, keep):
        """The first L+1 tokens [B, L+1, W] and the mask of real ones; without the caption where `keep` is False."""
        if self.learned_null != (keep is not None):
            raise ValueError("keep must be None without a learned null, and only then")
        mask = mask if keep is None else mask & keep[:, None]
        x = self.token_embed(caption) if self.vocab_size else self.states_in(caption)
        if keep is not None:
            z_txt = jnp.where(keep[:, None], z_txt, self.null_text[None])
        x = jnp.concatenate([x, self.text_in(z_txt)[:, None]], axis=1)
        return x + self.position[None, : x.shape[1]], mask

    def _times(self, times):
        """Timestep tokens [S, W]."""
        return self.time(times) + self.position[None, -SUFFIX]

    def _suffix(self, xt):
        """The noised embedding and the query, [B, 2, W]."""
        query = jnp.broadcast_to(self.query[None, None], (xt.shape[0], 1, self.width))
        return jnp.concatenate([self.image_in(xt)[:, None], query], axis=1) + self.position[None, 1 - SUFFIX :]

    def prefix(
        self,
        caption: jax.Array,
        mask: jax.Array,
        z_txt: jax.Array,
        keep: jax.Array | None,
        times: jax.Array,
        sizes: Sequence[int],
    ) -> tuple[Prefix, ...]:
        """What the steps of a sample at `times` [S] share: all tokens before the noised embedding, in one pass.

        Args:
          sizes: of the prefixes that the batch is cut into; see `rows.in_parts`.
        """
        first = self.max_len + 1

        def run(caption, mask, z_txt, keep):
            x, mask = self._prefix(caption, mask, z_txt, keep)
            tokens = self._times(times)
            x = jnp.concatenate([x, jnp.broadcast_to(tokens[None], (x.shape[0], *tokens.shape))], axis=1)
            place = jnp.arange(x.shape[1])
            other_time = (place[None] >= first) & (place[None] != place[:, None])
            visible = caption_mask(mask, len(place), len(place)) & ~other_time[None, None]
            kv = self.transformer(x, visible, return_kv=True)[1]
            before, after = (jax.tree.map(lambda a, at=at: a[:, at], kv) for at in (slice(first), slice(first, None)))
            return Prefix(before, after, mask)

        return tuple(in_parts(run, sizes, caption, mask, z_txt, keep))

    def step(self, xt: jax.Array, prefixes: Sequence[Prefix], place: jax.Array) -> jax.Array:
        """One denoising step: xt f32[B, D] → f32[B, D].

        Args:
          prefixes: the batch is cut into as many equal parts; part i is told prefixes[i]. Where that has k captions,
            each is told to a k-th of the part's rows, one run of rows after the other.
          place: i32[], of the step's time among the prefixes' times.
        """
        now = (jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, place, 1, 1), p.times) for p in prefixes)
        of_layers = (zip(*part, strict=True) for part in ((p.before for p in prefixes), now))
        parts = tuple(zip(*of_layers, strict=True))
        mask = repeated([p.mask for p in prefixes], xt.shape[0])
        return self._read(self._suffix(xt), self._mask(mask, SUFFIX - 1), parts)

    def _read(self, x, *given):
        """Tokens that end with the query, and what else the Transformer is given → f32[B, D]."""
        x = self.final_norm(self.transformer(x, *given, read=-1))
        return self.out(x.astype(jnp.promote_types(x.dtype, jnp.float32)))  # never rounded to the weights' dtype

    def __call__(
        self,
        xt: jax.Array,
        time: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
        z_txt: jax.Array,
        keep: jax.Array | None,
    ) -> jax.Array:
        """The whole sequence at once, as in training.

        Args:
          xt: f32[B, D], the noised embedding, in the units that the schedule noises (unit variance).
          time: [B], in schedule steps.
          caption: i32[B, L] tokens, or f32[B, L, W'] CLIP text states where `vocab_size` is 0.
          mask: bool[B, L], True through EOS.
          z_txt: f32[B, D], the CLIP text embedding.
          keep: bool[B], False drops the caption and its embedding (classifier-free guidance); None: see `learned_null`.

        Returns:
          f32[B, D], the predicted unnoised embedding.
        """
        prefix, mask = self._prefix(caption, mask, z_txt, keep)
        x = jnp.concatenate([prefix, self._times(time)[:, None], self._suffix(xt)], axis=1)
        return self._read(x, self._mask(mask, x.shape[1]))
