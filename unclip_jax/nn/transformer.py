"""The pre-LN Transformer that CLIP's towers, the prior and the caption encoder share.

By default the layers are a scan: one block is compiled whatever the depth, and parameters carry a leading axis
[layers]. On a GPU the loop is unrolled, because a loop would copy each layer's weights and saved activations;
`remat="full"` keeps the scan, for the least memory. Where the Transformer itself runs in a loop, as in sampling,
`nn.drawing` cuts the weights into layers before it.
With layers so cut, `return_kv` returns a prefix's keys and values and `kv` takes them back, which is exact under a
causal mask: the prefix is not run again. They come in parts, which are not copied together. A sequence that is drawn
token by token has its own in a buffer, into which each token's are written in its place (`at`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import KV, Part, attention, attention_in_parts
from unclip_jax.nn.device import in_order, platform
from unclip_jax.nn.layers import Dense, DenseGeneral
from unclip_jax.nn.remat import named, remat
from unclip_jax.nn.rows import rows


def pointwise(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function, computed in f32 at least, of which the backward pass keeps x and nothing else."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731

    def plain(x):
        return function(wide(x)).astype(x.dtype)

    def backward(x, g):
        return (jax.vjp(function, wide(x))[1](wide(g))[0].astype(x.dtype),)

    of = jax.custom_vjp(plain)
    of.defvjp(lambda x: (plain(x), x), backward)
    return of


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": pointwise(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))),  # jax's own takes erfc, at twice the time
    "gelu_tanh": pointwise(lambda x: nn.gelu(x, approximate=True)),
    "quick_gelu": pointwise(lambda x: x * nn.sigmoid(1.702 * x)),
}
APART = "block{}"  # parameters of a layer that is no part of a stack; see `nn.drawing`
PROJECTIONS, JOINED = ("query", "key", "value"), "query_key_value"  # of a block's tokens, each by itself or all as one
Read = int | jax.Array  # a token of each row: the place of all, or i32[B]
COPY = 64  # tokens through one layer that take as long as copying a layer's weights and their gradient


class LayerNorm(nn.Module):
    """LayerNorm computed in f32 (eps 1e-5) and returned in `dtype`; the backward pass keeps x and computes it again."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        norm = nn.remat(nn.LayerNorm, prevent_cse=False)
        return norm(epsilon=1e-5, dtype=wide, name="norm")(x).astype(self.dtype)


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
        self,
        x: jax.Array,
        kv: Sequence[Part],
        mask: jax.Array | None,
        at: jax.Array | None = None,
        read: Read | None = None,
    ) -> tuple[jax.Array, KV]:
        """x [B, N, W], kv parts [B', P, H, D] to look back on, mask bool [B|1, 1, N, P+N] → (x, x's own (k, v)).

        With `at` the last part is a buffer, mask bool [B|1, 1, N, P] → (x, it with x's own written into it). With
        `read`: x [B, 1, W].
        """
        split = (self.heads, self.width // self.heads)
        dense = nn.initializers.normal(self.width**-0.5)
        small = nn.initializers.normal(self.out_std)
        x = in_order(rows(x))
        h = LayerNorm(self.dtype, name="norm1")(x)
        if self.has_variable("params", JOINED):
            all_heads = (3 * self.heads, split[1])
            q, k, v = jnp.split(DenseGeneral(all_heads, dtype=self.dtype, name=JOINED)(h), 3, axis=2)
            q, own = q if read is None else _only(q, read, 1), (k, v)
        else:
            query, key, value = (
                DenseGeneral(split, kernel_init=dense, dtype=self.dtype, name=name) for name in PROJECTIONS
            )
            q, own = query(h if read is None else _only(h, read, 1)), (key(h), value(h))
        if read is not None:
            x = _only(x, read, 1)
            mask = mask if mask is None or mask.shape[-2] == 1 else _only(mask, read, 2)
        if at is not None:
            (*kv, (buffer,)), write = kv, jax.lax.dynamic_update_slice_in_dim
            own = tuple(write(past, now.astype(past.dtype), at, 1) for past, now in zip(buffer, own, strict=True))
        h = attention_in_parts(q, [*kv, [own]], mask) if kv else attention(q, *own, mask)
        x = x + DenseGeneral(self.width, axis=(-2, -1), kernel_init=small, dtype=self.dtype, name="out")(h)
        h = LayerNorm(self.dtype, name="norm2")(x)
        h = Dense(int(self.width * self.mlp_ratio), kernel_init=dense, dtype=self.dtype, name="fc1")(h)
        h = Dense(self.width, kernel_init=small, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](h))
        return x + h, own


def _only(x: jax.Array, read: Read, axis: int) -> jax.Array:
    """Of each row of x [B|1, …] the place `read` of an axis, which is kept."""
    if isinstance(read, int):
        return jax.lax.index_in_dim(x, read, axis)
    places = read.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(jnp.broadcast_to(x, (len(read), *x.shape[1:])), places, axis)


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
        kv: Sequence[Sequence[Part]] | None = None,
        return_kv: bool = False,
        at: jax.Array | None = None,
        read: Read | None = None,
    ) -> Any:
        """Runs the blocks.

        Args:
          x: [B, N, W].
          mask: bool, broadcastable to [B, heads, N, P + N], or to [B, heads, N, P] with `at`; None lets all see all.
          kv: for each layer the keys and values of what precedes x, in parts as of `attention_in_parts`: pairs of
            [B, P, heads, W / heads], as `return_kv` gave them. Both are for layers that lie apart.
          at: i32[], the place in `kv`'s last part, one pair, that x's own overwrite; None: they follow after it.
          read: the one token of each row whose output is asked for, a place or i32[B]. The last block then computes no
            other's, where that is worth more than cutting its weights from the stack.

        Returns:
          [B, N, W], or [B, W] with `read`; with `return_kv` a pair of that and, of each layer, x's own keys and values,
          or with `at` the last part with them.
        """
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        policy, out_std = named(self.remat), (2 * self.layers * self.width) ** -0.5
        of = (self.width, self.heads, self.mlp_ratio, self.activation, out_std, jnp.dtype(self.dtype))
        x, block = x.astype(self.dtype), Block(*of, parent=None)
        if self.is_initializing():
            stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.layers)
            stack(*of, name="blocks")(x, (), None)

        params, last, own = self.variables["params"], self.layers - 1, ()
        if APART.format(0) in params:
            for i in range(self.layers):
                layer, past = {"params": params[APART.format(i)]}, () if kv is None else kv[i]
                x, kept = block.apply(layer, x, past, mask, at, read if i == last else None)
                own += (kept,)
        elif kv is not None or return_kv:
            raise ValueError("keys and values are those of layers that lie apart; see nn.drawing.layers_apart")
        else:
            unroll = platform() == "gpu" and policy != "full"
            part = lambda at: jax.tree.map(lambda a: a[at], params["blocks"])  # noqa: E731
            run = lambda x, layer, read=None: block.apply({"params": layer}, x, (), mask, None, read)[0]  # noqa: E731
            cut = read is not None and (unroll or x.shape[0] * x.shape[1] >= COPY * self.layers)
            body = remat(run, policy, prevent_cse=unroll)
            over = part(slice(last if cut else None))
            x, _ = jax.lax.scan(lambda x, layer: (body(x, layer), None), x, over, unroll=unroll)
            if cut:
                x = remat(functools.partial(run, read=read), policy)(x, part(last))
        if read is not None:
            x = (_only(x, read, 1) if x.shape[1] > 1 else x)[:, 0]
        return (x, own) if return_kv else x
