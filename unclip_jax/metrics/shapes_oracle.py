"""Judges pictures of the shapes world by sight: which objects are there, and does a caption hold.

Every pixel is explained as a mixture of the background and one of the world's colours, which keeps blurred
edges readable; connected regions of one colour are objects; an object's shape is the one whose own rendering,
of the same area and centroid, overlaps it best. A stain of less than half a colour's strength is overlooked.
Nothing is learned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from unclip_jax.data.shapes_parse import parse
from unclip_jax.data.shapes_text import Claim, Thing
from unclip_jax.data.shapes_world import BACKGROUNDS, COLOURS, RADII, SHAPES, coverage, position, relation

_PALETTE = np.array(list(COLOURS.values()), np.float64)
SPECK = 6 / 32**2  # regions below this share of the picture are no objects; the least object has 4 times that
OFF_COLOUR = 60.0  # farther than this (of 255, Euclidean) from every mixture is no colour of the world
MIN_FIT = 0.65  # overlap (intersection over union) below which it is no shape; true pictures have 0.73 up


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object as read: shape or colour is None where nothing in the world is near.

    `x`, `y`, `r` are fractions of the side, as in `Object`; `fit` is the overlap with the shape, in [0, 1].
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    r: float
    fit: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is in a picture, the largest object first; `background` is None if it is none of the world's."""

    objects: tuple[Seen, ...]
    background: str | None


def read(image: np.ndarray) -> Reading:
    """What is in a picture u8[S, S, 3], S at least 16."""
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.shape[0] < 16:
        raise ValueError(f"image of shape {image.shape} must be [S, S, 3] with S at least 16")
    if image.dtype != np.uint8:
        raise ValueError(f"image of dtype {image.dtype} must be uint8 in 0..255")
    size = image.shape[0]
    pixels = image.astype(np.float64)
    ground = _border_colour(pixels)
    shades = np.array(list(BACKGROUNDS.values()), np.float64)
    apart = np.linalg.norm(shades - ground, axis=1)
    background = list(BACKGROUNDS)[apart.argmin()] if apart.min() < OFF_COLOUR else None

    share, error = _mixtures(pixels - ground, _PALETTE - ground)
    colour = error.argmin(-1)
    nearest = np.take_along_axis(error, colour[..., None], -1)[..., 0]
    amount = np.take_along_axis(share, colour[..., None], -1)[..., 0]
    solid = (amount > 0.5) | (nearest > OFF_COLOUR)
    labels = components(np.where(solid, colour + 1, 0))
    kept = _objects(labels, max(1, round(size / 32)))
    seen = []
    for k in kept:
        mask = labels == k
        c = int(colour[mask][0])
        strange = np.median(nearest[mask]) > OFF_COLOUR
        reach = _grow(mask, max(1, round(size / 32))) & ~(np.isin(labels, kept) & ~mask)
        weight = np.where(reach, mask if strange else np.clip(share[..., c], 0, 1), 0.0)
        shape, x, y, r, fit = _outline(weight)
        name = None if strange else list(COLOURS)[c]
        seen.append(Seen(shape if fit >= MIN_FIT else None, name, x, y, r, fit))
    return Reading(tuple(seen), background)


def _border_colour(pixels):
    """The median colour of the outermost ring, f64[3]: no object of the world reaches it."""
    ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(ring, axis=0)


def _mixtures(offset, lines):
    """Each pixel as background mixed with each colour: the colour's share, the distance left; f64[S, S, C].

    Args:
      offset: f64[S, S, 3], pixels less the background. lines: f64[C, 3], colours less the background.
    """
    length = (lines**2).sum(-1)
    share = offset @ lines.T / np.maximum(length, 1)
    near = np.clip(share, 0, 1)
    # |offset - near line|^2, expanded so that no [S, S, C, 3] array is made
    square = (offset**2).sum(-1)[..., None] - 2 * near * share * length + near**2 * length
    return share, np.sqrt(np.maximum(square, 0))


def components(classes: np.ndarray) -> np.ndarray:
    """Regions of equal nonzero class that touch by side or corner, numbered from 1; int[H, W], 0 the background.

    Args:
      classes: int[H, W]; 0 is background.
    """
    from scipy.ndimage import label

    labels = np.zeros(classes.shape, np.int64)
    for one in np.unique(classes[classes != 0]):
        found, _ = label(classes == one, np.ones((3, 3)))
        labels = np.where(found, labels.max() + found, labels)
    return labels


def _objects(labels, pixel):
    """The labels that are objects, largest first: no specks, and no thin fringes of a larger one's edge."""
    names, first, areas = np.unique(labels, return_index=True, return_counts=True)
    large = [k for k in np.lexsort((first, -areas)) if names[k] and areas[k] >= SPECK * labels.size]
    kept = []
    for name in names[large]:
        mask = labels == name
        touches = (np.isin(labels, kept) & _grow(mask, 1)).any()
        thin = _grow(~mask, pixel).all()
        if not (touches and thin):
            kept.append(name)
    return kept


def _grow(mask, steps):
    """The mask and all within `steps` pixels of it (in the maximum norm)."""
    from scipy.ndimage import maximum_filter

    return maximum_filter(mask, 2 * steps + 1, mode="constant")


@functools.cache
def _moments(shape):
    """Area in units of r^2, and how far below the box's centre the centroid lies in units of r."""
    weight, rows, _ = coverage(shape, 0.5, 0.5, 0.45, 512)
    y = (np.arange(rows.start, rows.stop) + 0.5) / 512
    area = weight.sum() / 512**2
    return area / 0.45**2, ((weight.sum(1) * y).sum() / weight.sum() - 0.5) / 0.45


def _outline(weight):
    """(shape, x, y, r, overlap) of the shape that covers `weight` f64[S, S] best."""
    size = weight.shape[0]
    total = weight.sum()
    steps = (np.arange(size) + 0.5) / size
    cx, cy = (weight.sum(0) * steps).sum() / total, (weight.sum(1) * steps).sum() / total
    best = None
    for shape in SHAPES:
        area, low = _moments(shape)
        r = math.sqrt(total / area) / size
        template, rows, cols = coverage(shape, cx, cy - low * r, r, size)
        both = np.minimum(weight[rows, cols], template).sum()
        fit = both / (total + template.sum() - both)
        if best is None or fit > best[-1]:
            best = (shape, float(cx), float(cy - low * r), r, float(fit))
    return best


def size_class(r: float, count: int) -> str:
    """The nearest size, by ratio, of the sizes that objects have in scenes of `count` objects."""
    return min(RADII[count], key=lambda s: abs(math.log(r / RADII[count][s])))


def in_place(seen: Seen, place: str, alone: bool) -> bool:
    """Whether an object is at a position such as "top left"; "left" says nothing of up and down."""
    if alone:
        u, v = position(seen.x, seen.y, min(seen.r, 0.45))
        edge = 0.5
    else:
        u, v = 2 * seen.x - 1, 2 * seen.y - 1
        edge = 0.1
    if place == "center":
        return max(abs(u), abs(v)) < (0.5 if alone else 0.35)
    holds = {"left": u < -edge, "right": u > edge, "top": v < -edge, "bottom": v > edge}
    return all(holds[word] for word in place.split())


def score(image: np.ndarray | Reading, caption: str | Claim) -> dict[str, bool]:
    """Which of a caption's claims hold for a picture u8[S, S, 3].

    Keys: "count" always; "shape", "colour", "size", "position" where claimed of any object, true if they hold
    of every object they are claimed of; "relation", "background" where claimed; "right": all of these hold.
    Objects are matched to the caption's in the way that fulfils most.
    """
    claim = parse(caption) if isinstance(caption, str) else caption
    reading = image if isinstance(image, Reading) else read(image)
    n = len(claim.things)
    # At most six candidates: with more the count is wrong anyway. None stands for an object that is missing.
    candidates = [*reading.objects[:6], *[None] * max(0, n - len(reading.objects))]
    best = max((_verdicts(claim, seen) for seen in itertools.permutations(candidates, n)),
               key=lambda v: sum(holds for _, holds in v))
    result = {"count": len(reading.objects) == n}
    for key, holds in best:
        result[key] = result.get(key, True) and holds
    if claim.background:
        result["background"] = reading.background == claim.background
    result["right"] = all(result.values())
    return result


def _verdicts(claim, seen):
    """Every claim about objects as (key, whether it holds), for one way of matching them."""
    n = len(claim.things)
    verdicts = [v for thing, s in zip(claim.things, seen, strict=True) for v in _of_one(thing, s, n)]
    for subjects, word, others in claim.relations:
        a, b = [seen[k] for k in subjects], [seen[k] for k in others]
        verdicts.append(("relation", None not in a + b and relation(a, b, clear=1.0) == word))
    return verdicts


def _of_one(thing: Thing, seen: Seen | None, count: int):
    """The claims about one object as (key, whether it holds)."""
    tests = {
        "shape": lambda: seen.shape == thing.shape,
        "colour": lambda: seen.colour == thing.colour,
        "size": lambda: size_class(seen.r, count) == thing.size,
        "position": lambda: in_place(seen, thing.position, count == 1),
    }
    return [(key, seen is not None and test()) for key, test in tests.items() if getattr(thing, key)]
