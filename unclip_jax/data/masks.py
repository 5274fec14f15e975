"""Holes in pictures: bool[…, H, W], True where a picture is to be painted anew. By chance for training, or given."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.data.images import center_crop_resize, to_float
from unclip_jax.errors import UserError

# Shares of the kinds of hole in training. Not in the papers; most are partial, and with "all" the network draws freely.
KINDS = {"box": 0.4, "strokes": 0.3, "all": 0.2, "none": 0.1}
STROKE_POINTS = 5


def random_holes(rng: jax.Array, batch: int, size: int) -> jax.Array:
    """Holes for training, bool[batch, size, size]: boxes, brush strokes, whole pictures and none, as KINDS says."""

    def one(key):
        kind, box, strokes = jax.random.split(key, 3)
        every = jnp.ones((size, size), bool)
        holes = jnp.stack([_box(box, size), _strokes(strokes, size), every, ~every])
        return holes[jax.random.choice(kind, len(KINDS), p=jnp.array(list(KINDS.values())))]

    return jax.vmap(one)(jax.random.split(rng, batch))


def _box(key, size: int):
    """A box whose sides are 1/8 … 7/8 of the picture's, all of it inside."""
    extent, place = jax.random.uniform(key, (2, 2))
    extent = 0.125 + 0.75 * extent
    low = place * (1 - extent)
    at = (jnp.arange(size) + 0.5) / size
    rows, cols = ((low[k] <= at) & (at < low[k] + extent[k]) for k in range(2))
    return rows[:, None] & cols[None]


def _strokes(key, size: int):
    """All within a brush's radius, 1/32 … 1/8 of the side, of a line through random points."""
    points_key, radius_key = jax.random.split(key)
    points = jax.random.uniform(points_key, (STROKE_POINTS, 2))
    radius = jax.random.uniform(radius_key, (), minval=1 / 32, maxval=1 / 8)
    at = (jnp.arange(size) + 0.5) / size
    pixel = jnp.stack(jnp.meshgrid(at, at, indexing="ij"), -1)[:, :, None]  # [S, S, 1, 2]
    start, along = points[:-1][None, None], (points[1:] - points[:-1])[None, None]
    share = jnp.clip(((pixel - start) * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return (jnp.linalg.norm(pixel - start - share[..., None] * along, axis=-1) < radius).any(-1)


def square_hole(hole: np.ndarray, size: int) -> np.ndarray:
    """The middle square of bool[h, w] as bool[size, size], True where a pixel takes anything of the hole."""
    side = min(hole.shape)
    top, left = (hole.shape[0] - side) // 2, (hole.shape[1] - side) // 2
    square = Image.fromarray(np.uint8(255) * hole[top : top + side, left : left + side])
    method = Image.Resampling.BOX if side >= size else Image.Resampling.NEAREST
    return np.asarray(square.convert("F").resize((size, size), method)) > 0  # in u8 a small share would round to none


def holes_at(images, holes, size: int) -> np.ndarray:
    """`square_hole` of each of some pictures' holes, bool[N, size, size]; UserError for one that is none or empty."""
    if len(holes) != len(images):
        raise UserError(f"{len(holes)} holes for {len(images)} images; one for each is needed")
    squares = []
    for k, (image, hole) in enumerate(zip(images, holes, strict=True)):
        if hole.dtype != bool or hole.shape != np.shape(image)[:2]:
            found, wanted = f"{hole.dtype}{list(hole.shape)}", list(np.shape(image)[:2])
            raise UserError(f"hole {k} is {found}; expected bool{wanted}, as its image")
        squares.append(square_hole(hole, size))
        if not squares[-1].any():
            where = "the middle square of the picture, which is what is painted in" if hole.any() else "the picture"
            raise UserError(f"hole {k} has no pixel in {where}", "mark some of it")
    return np.stack(squares)


def known_at(images: np.ndarray, holes: np.ndarray | None, size: int) -> dict[str, np.ndarray]:
    """What a stage that draws `size` pixels is told of pictures u8[N, S, S, 3] and their holes bool[N, S, S].

    Returns: {"known": f32[N, size, size, 3] in [-1, 1], "keep": f32[N, size, size, 1]}; no "keep" without holes.
    """
    small = np.stack([center_crop_resize(Image.fromarray(image), size) for image in images])
    rows = {"known": to_float(small)}
    if holes is not None:
        rows["keep"] = 1 - np.stack([square_hole(hole, size) for hole in holes])[..., None].astype(np.float32)
    return rows
