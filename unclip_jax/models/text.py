"""The caption Transformer, in CLIP's form (causal) and in GLIDE's (all see all, learned vectors for padding)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.transformer import LayerNorm, Transformer


class TextEncoder(nn.Module):
    """Tokens → a state per position, after the final LayerNorm.

    Attributes:
      vocab_size: of the tokenizer.
      max_len: L, tokens per caption, padding included.
      causal: each position sees itself and what precedes it (CLIP); else all positions (GLIDE).
      learned_padding: a padded position enters as its own learned vector, so that it can serve as memory (GLIDE).
    """

    vocab_size: int
    max_len: int
    width: int
    layers: int
    heads: int
    causal: bool = True
    learned_padding: bool = False
    activation: str = "gelu"
    remat: str | bool = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, read: jax.Array | None = None) -> jax.Array:
        """tokens i32[B, L], mask bool[B, L] (True through EOS) → [B, L, width]; with `read` i32[B] the state there."""
        if tokens.shape[1] != self.max_len:
            raise ValueError(f"captions have {tokens.shape[1]} tokens, this encoder takes max_len={self.max_len}")
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="embed")(tokens)
        x = x + self.param("position", nn.initializers.normal(0.01), (self.max_len, self.width))[None]
        if self.learned_padding:
            padding = self.param("padding", init, (self.max_len, self.width))
            x = jnp.where(mask[..., None], x, padding[None])
        blocks = Transformer(
            self.width, self.layers, self.heads, 4.0, self.activation, self.remat, self.dtype, name="transformer"
        )
        x = blocks(x, causal_mask(self.max_len, self.max_len) if self.causal else None, read=read)
        return LayerNorm(self.dtype, name="final_norm")(x)
