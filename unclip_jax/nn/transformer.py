"""The pre-LN Transformer that CLIP's towers, the prior and the caption encoder share.

Layers are scanned: one block is compiled whatever the depth, and its parameters carry a leading axis [layers].
Keys and values of a sequence can be kept (`return_kv`) and given back (`kv`) as a prefix that is not run again:
exact wherever the prefix cannot see what follows it, as under a causal mask. It may come in parts, which are not copied
together. Where a sequence is drawn token by token they live in a buffer of its full length, into which each token's are
written in its place (`at`).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import attention, attention_in_parts
from unclip_jax.nn.remat import remat
from unclip_jax.nn.rows import rows

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
KV = tuple[jax.Array, jax.Array]


class LayerNorm(nn.Module):
    """LayerNorm computed in f32 (eps 1e-5) and returned in `dtype`."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return nn.LayerNorm(epsilon=1e-5, dtype=wide, name="norm")(x).astype(self.dtype)


class Block(nn.Module):
    """x += Attn(LN x); x += MLP(LN x). Fields as in `Transformer`."""

    width: int
    heads: int
    mlp_ratio: float
    activation: str
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, kv: KV | tuple[KV, ...] | None, mask: jax.Array | None, at: jax.Array | None
    ) -> tuple[jax.Array, KV]:
        """x [B, N, W], kv pairs [B', P, H, D] to look back on, mask bool [B|1, 1, N, P+N] → (x, x's own (k, v)).

        With `at`: one pair, mask bool [B|1, 1, N, P] → (x, kv with x's own written into it).
        """
        split = (self.heads, self.width // self.heads)
        dense = nn.initializers.normal(self.width**-0.5)
        small = nn.initializers.normal(self.out_std)
        x = rows(x)
        h = LayerNorm(self.dtype, name="norm1")(x)
        names = ("query", "key", "value")
        q, k, v = (nn.DenseGeneral(split, kernel_init=dense, dtype=self.dtype, name=n)(h) for n in names)
        own = (k, v)
        if at is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            own = tuple(write(past, now.astype(past.dtype), at, 1) for past, now in zip(kv, own, strict=True))
        if at is not None or kv is None:
            h = attention(q, *own, mask)
        else:
            h = attention_in_parts(q, [*(kv if isinstance(kv[0], tuple) else [kv]), own], mask)
        x = x + nn.DenseGeneral(self.width, axis=(-2, -1), kernel_init=small, dtype=self.dtype, name="out")(h)
        h = LayerNorm(self.dtype, name="norm2")(x)
        h = nn.Dense(int(self.width * self.mlp_ratio), kernel_init=dense, dtype=self.dtype, name="fc1")(h)
        h = nn.Dense(self.width, kernel_init=small, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](h))
        return x + h, own


class Transformer(nn.Module):
    """`layers` pre-LN blocks, without embedding or final norm.

    Attributes:
      width: W, a multiple of heads.
      activation: "gelu" (erf), "gelu_tanh" or "quick_gelu" (OpenAI's CLIP).
      remat: what the backward pass recomputes of each block; see `nn.remat`.
      dtype: of the computation; parameters are f32.
    """

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    remat: str | bool = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        kv: KV | tuple[KV, ...] | None = None,
        return_kv: bool = False,
        at: jax.Array | None = None,
    ) -> Any:
        """Runs the blocks.

        Args:
          x: [B, N, W].
          mask: bool, broadcastable to [B, heads, N, P + N], or to [B, heads, N, P] with `at`; None lets all see all.
          kv: keys and values of a prefix, each [layers, B', P, heads, W / heads], as `return_kv` gave them, or several
            such pairs, one after another; runs of B / B' samples share one's.
          at: i32[], the place in `kv` that x's own keys and values overwrite; None: they follow after it.

        Returns:
          [B, N, W]; with `return_kv` a pair of that and x's own keys and values, or with `at` all of `kv` with them.
        """
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        block = remat(Block, self.remat, prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.layers,
        )
        out_std = (2 * self.layers * self.width) ** -0.5
        blocks = scanned(
            self.width, self.heads, self.mlp_ratio, self.activation, out_std, jnp.dtype(self.dtype), name="blocks"
        )
        x, own = blocks(x.astype(self.dtype), kv, mask, at)
        return (x, own) if return_kv else x
