"""The ADM UNet (Dhariwal & Nichol 2021, arXiv 2105.05233) as GLIDE and unCLIP use it.

Levels go down in resolution by residual blocks that pool, and up by residual blocks that repeat pixels. Every block's
output on the way down, the stem's and the pooled ones' included, is concatenated behind the features on the way up.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import KV
from unclip_jax.nn.device import platform
from unclip_jax.nn.embed import TimeEmbedding
from unclip_jax.nn.layers import Conv
from unclip_jax.nn.remat import named, remat
from unclip_jax.nn.unet_blocks import GroupNorm, PixelAttention, ResBlock


def fold(x: jax.Array, patch: int) -> jax.Array:
    """Blocks of pixels into channels: [B, H, W, C] → [B, H / patch, W / patch, patch² C]."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unfold(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `fold`."""
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


def widen(kernel: jax.Array, patch: int, extra: int) -> jax.Array:
    """A convolution's kernel [h, w, patch² C, O] with zeros for `extra` more channels of each folded pixel."""
    *sides, rows, out = kernel.shape
    kernel = kernel.reshape(*sides, patch**2, rows // patch**2, out)
    kernel = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, extra), (0, 0)])
    return kernel.reshape(*sides, -1, out)


def without_effect(extra: int, patch: int = 1):
    """Flax's own initialiser of kernels, as for inputs without each pixel's `extra` last channels, which get zeros."""
    usual = nn.initializers.lecun_normal()

    def init(key, shape, dtype=jnp.float32):
        *sides, rows, out = shape
        return widen(usual(key, (*sides, rows - patch**2 * extra, out), dtype), patch, extra)

    return init


def stacked(trees: Sequence[Any]) -> Any:
    """Equal trees of arrays as one, on a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Own(NamedTuple):
    """What layers in a loop have of their own, stacked: by layer parameters, and keys and values of the context if it
    is given so; keys of dropout.
    """

    params: Mapping[str, Any]
    kv: Mapping[str, KV] | None
    rngs: Mapping[str, jax.Array]


class Layers(NamedTuple):
    """A UNet's residual and attention blocks by name, all of which see one time and context.

    Attributes:
      net: the UNet, whose method this is used in.
      time: [B, 4 channels], embedded, with the conditioning vector.
      context, context_mask, train: as of `UNet`.
      own: in a loop, what the layers of this turn have of their own; None: they are the network's.
    """

    net: "UNet"
    time: jax.Array
    context: jax.Array | Mapping[str, KV] | None
    context_mask: jax.Array | None
    train: bool
    own: Own | None = None

    def block(self, h: jax.Array, channels: int, name: str, resample: str = "") -> jax.Array:
        """A residual block."""
        net, kind = self.net, remat(ResBlock, self.net.remat, static_argnums=(3,))
        settings = (channels, resample, net.scale_shift, net.groups, net.dropout, jnp.dtype(net.dtype))
        return self._called(kind, settings, name)(h, self.time, self.train)

    def attend(self, h: jax.Array, name: str) -> jax.Array:
        """An attention block."""
        context = self.context if self.own is None or self.own.kv is None else self.own.kv
        seen = context[name] if isinstance(context, Mapping) else context
        settings = (self.net.head_channels, self.net.groups, jnp.dtype(self.net.dtype))
        return self._called(remat(PixelAttention, self.net.remat), settings, name)(h, seen, self.context_mask)

    def unit(self, h: jax.Array, skip: jax.Array | None, channels: int, names: tuple[str, str]) -> jax.Array:
        """A residual block over h with `skip` behind it, and attention where this resolution has it."""
        h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
        h = self.block(h, channels, names[0])
        return self.attend(h, names[1]) if h.shape[1] in self.net.attention else h

    def level(self, h: jax.Array, skips: Sequence[jax.Array | None], channels: int, name: str) -> list[jax.Array]:
        """A level's units, each of which takes one of `skips` → what each puts out; equal neighbours may be a loop."""
        names = [(f"{name}_block{i}", f"{name}_attn{i}") for i in range(len(skips))]
        takes = [(channels if i else h.shape[-1], getattr(skip, "shape", None)) for i, skip in enumerate(skips)]
        out = [h]
        for _, alike in itertools.groupby(range(len(skips)), takes.__getitem__):
            first, *others = alike = list(alike)
            if others and self.net.loops(self.train):

                def step(h, each, names=names[first]):
                    h = self._replace(own=each[1]).unit(h, each[0], channels, names)
                    return h, h

                each = stacked([(skips[i], self._own(names[i], names[first])) for i in alike])
                out.extend(jax.lax.scan(step, out[-1], each)[1])
            else:
                for i in alike:
                    out.append(self.unit(out[-1], skips[i], channels, names[i]))
        return out[1:]

    def _called(self, kind, settings: tuple, name: str):
        if self.own is None:
            return kind(*settings, name=name)
        params, rngs = {"params": self.own.params[name]}, self.own.rngs
        return lambda *args: kind(*settings, parent=None).apply(params, *args, rngs=rngs)

    def _own(self, names: tuple[str, str], called: tuple[str, str]) -> Own:
        """What a residual block and its attention have of their own, by what a loop calls them."""
        of = lambda found: {called[i]: found[name] for i, name in enumerate(names) if name in found}  # noqa: E731
        rngs = {"dropout": self.net.make_rng("dropout")} if self.net.dropout else {}
        kv = of(self.context) if isinstance(self.context, Mapping) else None
        return Own(of(self.net.variables["params"]), kv, rngs)


class UNet(nn.Module):
    """x_t and time (and a conditioning vector, and context tokens) → a prediction of x_0, eps or v.

    Attributes:
      channels: of the first level; level i has channels * multipliers[i].
      blocks: residual blocks per level down; one more per level up.
      attention: resolutions (heights in pixels) with attention after each block; the middle has it where any are given,
        and alone where no level is so high, as with (1,).
      head_channels: channels per attention head.
      out_channels: 3, or 6 where the variance is learned.
      scale_shift: how the embedding enters the blocks; see `ResBlock`.
      groups: of every GroupNorm (the paper: 32; must divide all channel counts).
      remat: what the backward pass recomputes of each residual and each attention block; see `nn.remat`. With "full",
        which asks for the least memory, training runs neighbours of a level that are equal in a loop over their
        weights, so that no two of them are recomputed at a time; the weights and their names are the same. Not on
        GPUs, where it held more as compiled (docs/scaling.md): the weights are stacked, beside their own.
      patch: side of the pixel blocks folded into channels before the stem and unfolded after the last layer; 1 in the
        paper, 2 makes a laptop-sized network four times cheaper ("simple diffusion", Hoogeboom et al. 2023, 3.3).
        Levels and `attention` count folded pixels.
      outer: channels of a level around all that at full resolution, for folded pixels: a stem beside the fold and,
        after the unfolding, a residual block over both. In folded pixels every place within a block is learned by
        itself; these few convolutions see pixels alike wherever they lie, which edges need. 0: none.
      positions: adds a learned vector at every place after the stem. The paper's network knows places by what its
        convolutions pad with alone, which in few folded pixels is slow to become "in the top left corner".
      extra: so many of the input's channels, the last ones, start without effect, their weights being zero.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...] = ()
    head_channels: int = 64
    out_channels: int = 6
    dropout: float = 0.0
    scale_shift: bool = True
    groups: int = 32
    remat: str | bool = "none"
    patch: int = 1
    outer: int = 0
    positions: bool = False
    extra: int = 0
    dtype: jnp.dtype = jnp.float32

    @property
    def emb_width(self) -> int:
        """Width of the time embedding, to which conditioning vectors are added."""
        return 4 * self.channels

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | Mapping[str, KV] | None = None,
        context_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the network.

        Args:
          x: f32[B, H, W, C], H and W divisible by patch 2^(levels - 1).
          time: [B], in schedule steps.
          emb: f32[B, 4 channels], added to the embedded time.
          context: f32[B, M, K], tokens that every attention layer sees; or their `context_kv`.
          context_mask: bool[B, M], True where a token is seen; None: all.

        Returns:
          f32[B, H, W, out_channels].
        """
        dtype = jnp.dtype(self.dtype)
        factor = self.patch * 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"image {x.shape[1]}x{x.shape[2]} must be divisible by {factor}")
        if self.channels % self.groups or self.outer % self.groups:
            raise ValueError(f"groups={self.groups} must divide channels={self.channels}, outer={self.outer}")
        t = TimeEmbedding(self.emb_width, self.channels, dtype, name="time")(time)
        t = t if emb is None else t + emb.astype(dtype)
        layers = Layers(self, t, context, context_mask, train)

        init = without_effect(self.extra, self.patch)
        stem = Conv(self.channels, (3, 3), kernel_init=init, dtype=dtype, name="stem")
        h = stem(fold(x, self.patch).astype(dtype))
        if self.positions:
            h = h + self.param("positions", nn.initializers.normal(0.1), h.shape[1:])[None].astype(dtype)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            skips += layers.level(skips[-1], [None] * self.blocks, self.channels * multiplier, f"down{level}")
            if level < len(self.multipliers) - 1:
                skips.append(layers.block(skips[-1], self.channels * multiplier, f"down{level}_pool", "down"))

        h = layers.block(skips[-1], skips[-1].shape[-1], "mid_block0")
        if self.attention:
            h = layers.attend(h, "mid_attn")
        h = layers.block(h, h.shape[-1], "mid_block1")

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            left = [skips.pop() for _ in range(self.blocks + 1)]
            h = layers.level(h, left, self.channels * multiplier, f"up{level}")[-1]
            if level:
                h = layers.block(h, self.channels * multiplier, f"up{level}_repeat", "up")

        patch = self.patch
        if self.outer:
            init = without_effect(self.extra)
            stem = Conv(self.outer, (3, 3), kernel_init=init, dtype=dtype, name="outer_stem")(x.astype(dtype))
            h = Conv(self.outer * patch**2, (1, 1), dtype=dtype, name="outer_in")(h)
            h = layers.block(jnp.concatenate([unfold(h, patch), stem], axis=-1), self.outer, "outer_block")
            patch = 1
        h = GroupNorm(self.groups, dtype, nn.silu, name="out_norm")(h)
        width, wide = self.out_channels * patch**2, jnp.promote_types(dtype, jnp.float32)
        h = Conv(width, (3, 3), kernel_init=nn.initializers.zeros, dtype=wide, name="out")(h)
        return unfold(h, patch)

    def loops(self, train: bool) -> bool:
        """Whether equal neighbours run in a loop; see `remat`."""
        return train and named(self.remat) == "full" and platform() != "gpu" and not self.is_initializing()
