"""The diffusion prior (unCLIP, section 2.2): a causal Transformer over

    [caption states, L] [CLIP text embedding] [timestep] [noised CLIP image embedding] [query]

whose output at the query predicts the unnoised CLIP image embedding. Nothing before the timestep can see the timestep
or the noised embedding, so a sampler runs that prefix once (`prefix`) and three tokens a step (`step`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import caption_mask
from unclip_jax.nn.embed import TimeEmbedding
from unclip_jax.nn.transformer import KV, LayerNorm, Transformer

SUFFIX = 3  # timestep, noised embedding, query


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
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.normal(0.02)
        if self.vocab_size:
            self.token_embed = nn.Embed(self.vocab_size, self.width, embedding_init=init)
        else:
            self.states_in = nn.Dense(self.width)
        self.text_in = nn.Dense(self.width)
        self.time = TimeEmbedding(self.width, dtype=self.dtype)
        self.image_in = nn.Dense(self.width)
        self.query = self.param("query", init, (self.width,))
        if self.learned_null:
            self.null_text = self.param("null_text", init, (self.embed_dim,))
        self.position = self.param("position", nn.initializers.normal(0.01), (self.max_len + 1 + SUFFIX, self.width))
        self.transformer = Transformer(
            self.width, self.layers, self.heads, 4.0, self.activation, self.remat, self.dtype
        )
        self.final_norm = LayerNorm(self.dtype)
        self.out = nn.Dense(self.embed_dim)

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

    def _suffix(self, xt, time):
        query = jnp.broadcast_to(self.query[None, None], (xt.shape[0], 1, self.width))
        x = jnp.concatenate([self.time(time)[:, None], self.image_in(xt)[:, None], query], axis=1)
        return x + self.position[None, -SUFFIX:]

    def prefix(
        self, caption: jax.Array, mask: jax.Array, z_txt: jax.Array, keep: jax.Array | None
    ) -> tuple[KV, jax.Array]:
        """What all steps of a sample share: keys and values [layers, B, L+1, heads, W/heads], and the mask [B, L]."""
        x, mask = self._prefix(caption, mask, z_txt, keep)
        queries = self.max_len + 1
        visible = self._mask(mask, self.max_len + 1 + SUFFIX)[:, :, :queries, :queries]
        return self.transformer(x, visible, return_kv=True)[1], mask

    def step(self, xt: jax.Array, time: jax.Array, kv: KV, mask: jax.Array) -> jax.Array:
        """One denoising step against the shared prefix: xt f32[B, D], time [B] → f32[B, D]."""
        x = self.transformer(self._suffix(xt, time), self._mask(mask, SUFFIX), kv)
        return self._read(x)

    def _read(self, x):
        return self.out(self.final_norm(x[:, -1])).astype(jnp.promote_types(x.dtype, jnp.float32))

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
        suffix = self._suffix(xt, time)
        x = jnp.concatenate([prefix, suffix], axis=1)
        return self._read(self.transformer(x, self._mask(mask, x.shape[1])))
