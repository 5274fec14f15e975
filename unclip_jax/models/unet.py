"""The ADM UNet (Dhariwal & Nichol 2021, arXiv 2105.05233) as GLIDE and unCLIP use it.

Levels go down in resolution by residual blocks that pool, and up by residual blocks that repeat pixels. Every block's
output on the way down, the stem's and the pooled ones' included, is concatenated behind the features on the way up.
"""

from collections.abc import Mapping

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.conv import KV, GroupNorm, PixelAttention, ResBlock
from unclip_jax.nn.embed import TimeEmbedding
from unclip_jax.nn.layers import Conv
from unclip_jax.nn.remat import remat


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


class UNet(nn.Module):
    """x_t and time (and a conditioning vector, and context tokens) → a prediction of x_t's shape.

    Attributes:
      channels: of the first level; level i has channels * multipliers[i].
      blocks: residual blocks per level down; one more per level up.
      attention: resolutions (heights in pixels) with attention after each block; the middle has it if any level has.
      head_channels: channels per attention head.
      out_channels: 3, or 6 where the variance is learned.
      scale_shift: how the embedding enters the blocks; see `ResBlock`.
      groups: of every GroupNorm (the paper: 32; must divide all channel counts).
      remat: what the backward pass recomputes of each residual and each attention block; see `nn.remat`.
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
          x: f32[B, H, W, C], H and W divisible by 2^(levels - 1).
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
        t = TimeEmbedding(self.emb_width, self.channels, dtype, name="time")(time)
        t = t if emb is None else t + emb.astype(dtype)
        res_block = remat(ResBlock, self.remat, static_argnums=(3,))
        attention = remat(PixelAttention, self.remat)

        def block(h, channels, name, resample=""):
            make = res_block(channels, resample, self.scale_shift, self.groups, self.dropout, dtype, name=name)
            return make(h, t, train)

        def attend(h, name):
            seen = context[name] if isinstance(context, Mapping) else context
            return attention(self.head_channels, self.groups, dtype, name=name)(h, seen, context_mask)

        init = without_effect(self.extra, self.patch)
        stem = Conv(self.channels, (3, 3), kernel_init=init, dtype=dtype, name="stem")
        h = stem(fold(x, self.patch).astype(dtype))
        if self.positions:
            h = h + self.param("positions", nn.initializers.normal(0.1), h.shape[1:])[None].astype(dtype)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                h = block(h, self.channels * multiplier, f"down{level}_block{i}")
                if h.shape[1] in self.attention:
                    h = attend(h, f"down{level}_attn{i}")
                skips.append(h)
            if level < len(self.multipliers) - 1:
                h = block(h, self.channels * multiplier, f"down{level}_pool", "down")
                skips.append(h)

        h = block(h, h.shape[-1], "mid_block0")
        if self.attention:
            h = attend(h, "mid_attn")
        h = block(h, h.shape[-1], "mid_block1")

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, self.channels * multiplier, f"up{level}_block{i}")
                if h.shape[1] in self.attention:
                    h = attend(h, f"up{level}_attn{i}")
            if level:
                h = block(h, self.channels * multiplier, f"up{level}_repeat", "up")

        patch = self.patch
        if self.outer:
            init = without_effect(self.extra)
            stem = Conv(self.outer, (3, 3), kernel_init=init, dtype=dtype, name="outer_stem")(x.astype(dtype))
            h = Conv(self.outer * patch**2, (1, 1), dtype=dtype, name="outer_in")(h)
            h = block(jnp.concatenate([unfold(h, patch), stem], axis=-1), self.outer, "outer_block")
            patch = 1
        h = nn.silu(GroupNorm(self.groups, dtype, name="out_norm")(h))
        width, wide = self.out_channels * patch**2, jnp.promote_types(dtype, jnp.float32)
        h = Conv(width, (3, 3), kernel_init=nn.initializers.zeros, dtype=wide, name="out")(h)
        return unfold(h, patch)
