"""Large pictures in tiles: at each denoising step the network sees one tile after the other, and overlaps are blended.

As MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): one noised picture, of which every step averages the tiles'
predictions. Not the paper's, which draws 1024 pixels at once; for pictures whose activations do not fit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError, is_whole


def check_tiles(tile: int, overlap: int, align: int) -> None:
    """Raises UserError unless tiles are multiples of `align` pixels that advance by at least that."""
    for name, value, least in (("tile", tile, 1), ("overlap", overlap, 0)):
        if not is_whole(value, least):
            raise UserError(f"{name}={value!r} must be a whole number of at least {least} pixels")
    if tile % align:
        raise UserError(f"tile={tile} must be a multiple of the network's {align} pixels")
    if tile - overlap < align:
        raise UserError(f"overlap={overlap} must be at most {tile - align} with tile={tile}, for tiles to advance")


def places(size: int, tile: int, overlap: int, align: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles begin along a side, i32[N], and their weights f64[N, tile], which sum to 1 at every pixel.

    A weight is 0 within a quarter of the overlap from the tile's edge, where the network sees too little, rises evenly
    to 1 at three quarters of it, and is then divided by the sum; the picture's own edges count fully.
    """
    stride = (tile - overlap) // align * align
    starts = np.append(np.arange(0, size - tile, stride), size - tile)
    middle = np.arange(tile) + 0.5
    ramp = lambda d: np.clip((d - overlap / 4) / max(overlap / 2, 1e-9), 0, 1)  # noqa: E731
    weights = np.ones((len(starts), tile))
    weights[1:] *= ramp(middle)
    weights[:-1] *= ramp(tile - middle)
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    weights = np.stack([w / total[s : s + tile] for s, w in zip(starts, weights, strict=True)])
    return starts.astype(np.int32), weights


def tiled(network: Callable, tile: int, overlap: int, align: int = 1) -> Callable:
    """`network` (x f32[B, H, W, C], time) -> f32[B, H, W, D], run on square tiles, one after the other.

    The activations held are one tile's. Equal to the untiled network where that looks no farther than overlap / 4; a
    GroupNorm looks everywhere, so a real network's tiles are normalised each by itself, as the crops it was trained on.

    Args:
      tile, overlap: in pixels; a picture within one tile is run as it is.
      align: tiles begin at multiples of it; of a network that pools: its whole factor.
    """
    check_tiles(tile, overlap, align)

    def run(x, time):
        if max(x.shape[1:3]) <= tile:
            return network(x, time)
        if min(x.shape[1:3]) < tile or x.shape[1] % align or x.shape[2] % align:
            raise UserError(f"a picture of {x.shape[1]} x {x.shape[2]} pixels cannot be cut into tiles of {tile}")
        (ys, wy), (xs, wx) = (places(size, tile, overlap, align) for size in x.shape[1:3])
        y, x_ = (a.ravel() for a in np.meshgrid(np.arange(len(ys)), np.arange(len(xs)), indexing="ij"))
        shape = jax.eval_shape(network, jnp.zeros((x.shape[0], tile, tile, x.shape[3]), x.dtype), time)
        total = jnp.zeros((*x.shape[:3], shape.shape[-1]), float)

        def add(total, at):
            top, left, down, across = at
            part = jax.lax.dynamic_slice(x, (0, top, left, 0), (x.shape[0], tile, tile, x.shape[3]))
            part = network(part, time) * (down[:, None] * across[None])[None, :, :, None]
            corner = (0, top, left, 0)
            return jax.lax.dynamic_update_slice(
                total, jax.lax.dynamic_slice(total, corner, part.shape) + part, corner
            ), None

        tables = (ys[y], xs[x_], jnp.asarray(wy[y], float), jnp.asarray(wx[x_], float))
        return jax.lax.scan(add, total, tables)[0]

    return run
