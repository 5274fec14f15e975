"""The procedural world of shapes: what a scene is, how one is drawn by chance, and how it is rendered.

Not in the paper; chosen because a scene is known exactly, so that a picture made from a caption can be judged
right or wrong (`unclip_jax.metrics.shapes_oracle`), and because whole (shape, colour) pairs can be held out.

Coordinates are fractions of the side, x to the right and y downwards. Chance comes from `Random.random()`
alone: the one method whose stream Python promises to keep, and many times cheaper than numpy's scalars.
"""

from __future__ import annotations

import dataclasses
import math
from random import Random

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 135, 15),
    "yellow": (250, 225, 30),
    "green": (30, 160, 60),
    "cyan": (50, 205, 220),
    "blue": (35, 70, 220),
    "purple": (145, 50, 175),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "beige": (226, 206, 166),
}
# Radius by the number of objects in the scene; "medium" is a size of lone objects, for want of room.
RADII = {
    1: {"small": 0.15, "medium": 0.23, "large": 0.33},
    2: {"small": 0.135, "large": 0.205},
    3: {"small": 0.125, "large": 0.175},
}
MARGIN = 0.03  # least distance of an object's box from the picture's edge: 1 px at 32
GAP = 0.075  # least distance between two objects' boxes along one axis: 2.4 px at 32
CLEAR = 1.8  # a relation is clear when the offset along its axis is this many times the other offset
COUNTS = (0.45, 0.40, 0.15)  # share of scenes with one, two, three objects


@dataclasses.dataclass(frozen=True)
class Object:
    """One object; its outline's bounding box is centred on (x, y) and reaches at most r along each axis."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    r: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One to three objects that do not touch, on a plain background."""

    objects: tuple[Object, ...]
    background: str


def is_held_out(shape: str, colour: str) -> bool:
    """The rule of the held-out pairs: (shape index + 2 colour index) mod 7 = 3, which is one in seven.

    They are: red star, orange square, green cross, cyan triangle, blue circle, purple ring.
    """
    return (SHAPES.index(shape) + 2 * list(COLOURS).index(colour)) % 7 == 3


PAIRS = tuple((s, c) for s in SHAPES for c in COLOURS if not is_held_out(s, c))
HELD_OUT = tuple((s, c) for s in SHAPES for c in COLOURS if is_held_out(s, c))


def pick(rng: Random, options):
    """One of a sequence, evenly."""
    return options[int(rng.random() * len(options))]


def relation(subject, other, clear: float = CLEAR) -> str | None:
    """How `subject` lies to `other` (lists of things with x and y): "above", "below", "left", "right", None.

    The dominant offset between the mean centres must be more than `clear` times the other offset, and every
    subject must lie on that side of every other.
    """
    dx = sum(o.x for o in subject) / len(subject) - sum(o.x for o in other) / len(other)
    dy = sum(o.y for o in subject) / len(subject) - sum(o.y for o in other) / len(other)
    if abs(dy) > clear * abs(dx):
        offsets = [a.y - b.y for a in subject for b in other]
        names = ("above", "below")
    elif abs(dx) > clear * abs(dy):
        offsets = [a.x - b.x for a in subject for b in other]
        names = ("left", "right")
    else:
        return None
    return names[0] if max(offsets) < 0 else names[1] if min(offsets) > 0 else None


def position(x: float, y: float, r: float) -> tuple[float, float]:
    """Where a lone object lies: (u, v) in [-1, 1], 0 the centre and 1 as far as it can go.

    Relative to the free room, so that a large object can be "in the top left corner" too. The middle is
    |u| < 0.5.
    """
    room = 0.5 - r - MARGIN
    return (x - 0.5) / room, (y - 0.5) / room


def sample_scene(rng: Random, held_out: bool = False, count: int | None = None) -> Scene:
    """A scene by chance. Its pairs follow the training rule or, with `held_out`, at least one does not."""
    u = rng.random()
    n = count or (1 if u < COUNTS[0] else 2 if u < COUNTS[0] + COUNTS[1] else 3)
    pairs = [pick(rng, PAIRS) for _ in range(n)]
    if held_out:
        pairs[0] = pick(rng, HELD_OUT)
    if n > 1 and rng.random() < 0.08:  # otherwise "two red circles" would hardly ever be said
        pairs = [pairs[0]] * n
    sizes = [pick(rng, list(RADII[n])) for _ in range(n)]
    radii = [RADII[n][s] * (0.97 + 0.06 * rng.random()) for s in sizes]
    centres = (_place_one, _place_two, _place_three)[n - 1](rng, *radii)
    objects = [Object(s, c, size, x, y, r)
               for (s, c), size, r, (x, y) in zip(pairs, sizes, radii, centres, strict=True)]
    return Scene(tuple(objects), pick(rng, list(BACKGROUNDS)))


def _place_one(rng, r):
    """One of nine places, always a clear one: each coordinate near the middle or near an edge."""
    room = 0.5 - r - MARGIN
    zones = [pick(rng, (-0.9, 0.0, 0.9)) + 0.1 * (2 * rng.random() - 1) for _ in range(2)]
    return [(0.5 + room * zones[0], 0.5 + room * zones[1])]


def _along(rng, ra, rb):
    """Two centres along one axis with a gap between the boxes, the room left over split by chance."""
    room = 1 - 2 * MARGIN - 2 * ra - 2 * rb - GAP
    before, after = sorted((rng.random() * room, rng.random() * room))
    return MARGIN + ra + before, 1 - MARGIN - rb - (room - after)


def _near(rng, centre, reach, r):
    """A coordinate within `reach` of `centre` that keeps radius r inside the picture."""
    low, high = max(MARGIN + r, centre - reach), min(1 - MARGIN - r, centre + reach)
    return low + (high - low) * rng.random()


def _place_two(rng, ra, rb):
    """One beside the other or one above the other, clearly."""
    swap, flip = rng.random() < 0.5, rng.random() < 0.5
    a, b = _along(rng, ra, rb)
    across_a = _near(rng, 0.5, 1.0, ra)
    across_b = _near(rng, across_a, (b - a) / (CLEAR + 0.1), rb)
    return _turn([(a, across_a), (b, across_b)], swap, flip)


def _place_three(rng, ra, rb, rc):
    """A pair side by side and the third above or below both; or the same, turned."""
    swap, flip = rng.random() < 0.5, rng.random() < 0.5
    a, b = _along(rng, ra, rb)
    strip = max(ra, rb)
    pair, third = _along(rng, strip, rc)
    ya, yb = (pair + (strip - r) * (2 * rng.random() - 1) for r in (ra, rb))
    reach = (third - (ya + yb) / 2) / (CLEAR + 0.1)
    xc = _near(rng, (a + b) / 2, reach, rc)
    return _turn([(a, ya), (b, yb), (xc, third)], swap, flip)


def _turn(centres, swap, flip):
    """Exchange the axes, and mirror both, as told: four arrangements from one."""
    if swap:
        centres = [(y, x) for x, y in centres]
    if flip:
        centres = [(1 - x, 1 - y) for x, y in centres]
    return centres


def _star(x, y):
    """Five points up, inner radius 0.45 of the outer: fold the angle to one edge, then its half plane."""
    outer, inner, half = 1.05, 0.45 * 1.05, math.pi / 5
    y = y - 0.1  # centres the box: the points reach farther up than down
    angle = np.abs(np.mod(np.arctan2(x, -y) + half, 2 * half) - half)
    rho = np.hypot(x, y)
    ex, ey = inner * math.cos(half) - outer, inner * math.sin(half)
    return ((rho * np.cos(angle) - outer) * ey - rho * np.sin(angle) * ex) / math.hypot(ex, ey)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline (negative inside), near the outline; x and y in units of the radius."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "star":
        return _star(x, y)
    x = np.abs(x)
    if shape == "triangle":
        return np.maximum(y - 0.9, (1.8 * x - y - 0.9) / math.hypot(1.8, 1))
    y = np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - 0.88
    arm = 0.34  # cross
    return np.minimum(np.maximum(x - 1, y - arm), np.maximum(x - arm, y - 1))


def coverage(shape: str, x: float, y: float, r: float, size: int) -> tuple[np.ndarray, slice, slice]:
    """How much of each pixel an object covers, f64[h, w] in [0, 1], with the rows and columns of that box."""
    left, right = max(0, int((x - r) * size - 1)), min(size, int((x + r) * size + 2))
    top, bottom = max(0, int((y - r) * size - 1)), min(size, int((y + r) * size + 2))
    px = (np.arange(left + 0.5, right) / size - x) / r
    py = (np.arange(top + 0.5, bottom) / size - y) / r
    inside = 0.5 - distance(shape, px[None, :], py[:, None]) * (r * size)
    return np.minimum(np.maximum(inside, 0), 1), slice(top, bottom), slice(left, right)


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture u8[size, size, 3], antialiased: coverage falls linearly over one pixel at the outline."""
    image = np.empty((size, size, 3), np.uint8)
    background = np.array(BACKGROUNDS[scene.background], np.float64)
    image[:] = background
    for o in scene.objects:
        inside, rows, cols = coverage(o.shape, o.x, o.y, o.r, size)
        box = image[rows, cols]
        box[:] = box + inside[..., None] * (np.array(COLOURS[o.colour]) - box) + 0.5
    return image
