"""The English of the shapes world: what a caption can claim, and `describe`, which says what is in a scene.

What a caption does not mention, it does not claim; only the number of objects is always claimed.
`shapes_parse` is the inverse.
"""

from __future__ import annotations

import dataclasses
from random import Random

from unclip_jax.data.shapes_world import SHAPES, Scene, pick, position, relation


@dataclasses.dataclass(frozen=True)
class Thing:
    """What is claimed of one object; None where nothing is."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    position: str | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a caption claims: as many objects as `things`, in no order.

    Each relation is (subjects, word, others): indices into `things` on both sides of "above", "below", "left"
    or "right". Each position is a key of POSITION_WORDS.
    """

    things: tuple[Thing, ...]
    relations: tuple[tuple[tuple[int, ...], str, tuple[int, ...]], ...] = ()
    background: str | None = None


# A word that stands twice is said twice as often.
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
SHAPE_WORDS = {s: (s,) for s in SHAPES}
SHAPE_WORDS |= {"circle": ("circle",) * 5 + ("disc",), "cross": ("cross",) * 5 + ("plus",)}
ANY_WORDS = ("shape", "object", "thing")
NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATION_WORDS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
}
_SIDE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "top": ("at the top", "near the top"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom": ("at the bottom", "near the bottom"),
    "center": ("in the center", "in the middle"),
}
_CORNER_WORDS = {
    f"{v} {h}": (f"in the {v} {h} corner", f"in the {v} {h}", f"in the {w} {h} corner", f"at the {v} {h}")
    for v, w in (("top", "upper"), ("bottom", "lower")) for h in ("left", "right")
}
POSITION_WORDS = _SIDE_WORDS | _CORNER_WORDS
PREFIXES = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "this is ",
            "a picture with ", "a simple picture of ", "we see ")
BACKGROUND_WORDS = ("on a {} background", "on {}", "with a {} background", "against a {} background")


def describe(scene: Scene, rng: Random, full: bool = False) -> tuple[str, Claim]:
    """A caption by chance, true of the scene, and what it claims.

    With `full` every object's shape and colour are named, and a lone object's place in a third of the captions.
    Otherwise 8% leave shape or colour out, and two thirds name the place: what no caption says, CLIP does not look at.
    """
    order = sorted(range(len(scene.objects)), key=lambda _: rng.random())
    objects = [scene.objects[k] for k in order]
    things = _things(objects, rng, full)
    if len(objects) == 1:
        body, claim = _one(objects, things, rng, 0.35 if full else 0.65)
    else:
        body, claim = (_two if len(objects) == 2 else _three)(objects, things, rng)
    prefix = pick(rng, PREFIXES)
    text = body if " is " in body.replace(" that is ", " ") else prefix + body  # a sentence needs no "there is"
    if rng.random() < 0.4:
        claim = dataclasses.replace(claim, background=scene.background)
        text += ("," if "," in body else "") + " " + pick(rng, BACKGROUND_WORDS).format(scene.background)
    return text, claim


def _things(objects, rng, full):
    """What is said of each object by itself."""
    shapes = colours = True
    if not full and rng.random() < 0.08:
        shapes = rng.random() < 0.5
        colours = not shapes
    sized = rng.random() < 0.5  # sizes, in half of the captions
    things = []
    for o in objects:
        size = o.size if sized and rng.random() < (0.3 if o.size == "medium" else 0.7) else None
        things.append(Thing(o.shape if shapes else None, o.colour if colours else None, size))
    return things


def _noun(thing, rng, number=1):
    """A noun phrase: "a red circle", "two small shapes", "an orange star", "a ring that is blue"."""
    noun = pick(rng, SHAPE_WORDS[thing.shape] if thing.shape else ANY_WORDS)
    if number > 1:
        noun += "es" if noun in ("cross", "plus") else "s"
    adjectives = [pick(rng, SIZE_WORDS[thing.size])] if thing.size else []
    after = ""
    if thing.colour and number == 1 and rng.random() < 0.06:
        after = pick(rng, (" that is ", " colored ")) + thing.colour
    elif thing.colour:
        adjectives.append(thing.colour)
    phrase = " ".join([*adjectives, noun]) + after
    if number > 1:
        return f"{NUMBERS[number]} {phrase}"
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _one(objects, things, rng, placed):
    """One object, with its place in a share `placed` of the captions."""
    body = ("one object: " if rng.random() < 0.03 else "") + _noun(things[0], rng)
    if rng.random() < placed:
        u, v = position(objects[0].x, objects[0].y, objects[0].r)
        names = [*(["top"] if v < -0.5 else ["bottom"] if v > 0.5 else []),
                 *(["left"] if u < -0.5 else ["right"] if u > 0.5 else [])]
        place = " ".join(names) or "center"
        things = [dataclasses.replace(things[0], position=place)]
        body += " " + pick(rng, POSITION_WORDS[place])
    return body, Claim(tuple(things))


def _two(objects, things, rng):
    """Two objects: joined, related, each at its side, or as "two …" where they are alike."""
    word = relation(objects[:1], objects[1:])
    alike = things[0] == things[1]
    u = rng.random()
    if alike and rng.random() < 0.8:
        body, relations = _noun(things[0], rng, 2), ()
        if u < 0.5:
            body += " one above the other" if word in ("above", "below") else " side by side"
            relations = (((0,), "above" if word in ("above", "below") else "left", (1,)),)
        return body, Claim(tuple(things), relations)
    a, b = (_noun(t, rng) for t in things)
    if u < 0.3:
        head = "two objects: " if rng.random() < 0.15 else ""
        return f"{head}{a} {pick(rng, ('and', 'and', 'with'))} {b}", Claim(tuple(things))
    if u < 0.4:
        sideways = word in ("left", "right")
        ends = ("left", "right") if sideways else ("top", "bottom")
        off = [(o.x if sideways else o.y) - 0.5 for o in objects]
        if min(off) < -0.1 and max(off) > 0.1:
            places = [ends[d > 0] for d in off]
            things = [dataclasses.replace(t, position=p) for t, p in zip(things, places, strict=True)]
            a, b = (f"{noun} {_SIDE_WORDS[p][0]}" for noun, p in zip((a, b), places, strict=True))
            return f"{a} and {b}", Claim(tuple(things))
    if u < 0.5 and word in ("above", "below"):
        back = "below" if word == "above" else "above"
        return f"{a} with {b} {back} it", Claim(tuple(things), (((1,), back, (0,)),))
    verb = "is " if rng.random() < 0.1 else ""
    return f"{a} {verb}{pick(rng, RELATION_WORDS[word])} {b}", Claim(tuple(things), (((0,), word, (1,)),))


def _three(objects, things, rng):
    """Three objects: listed, as "three …", or a related pair and the third to both."""
    if things[0] == things[1] == things[2] and rng.random() < 0.8:
        return _noun(things[0], rng, 3), Claim(tuple(things))
    if rng.random() < 0.6:
        for c in range(3):
            a, b = (k for k in range(3) if k != c)
            pair = relation([objects[a]], [objects[b]])
            third = relation([objects[c]], [objects[a], objects[b]])
            if pair and third:
                first, second, last = (_noun(things[k], rng) for k in (a, b, c))
                body = (f"{first} {pick(rng, RELATION_WORDS[pair])} {second}, and {last} "
                        f"{pick(rng, RELATION_WORDS[third])} them")
                claim = Claim((things[a], things[b], things[c]), (((0,), pair, (1,)), ((2,), third, (0, 1))))
                return body, claim
    head = "three objects: " if rng.random() < 0.2 else ""
    first, second, last = (_noun(t, rng) for t in things)
    return f"{head}{first}, {second} and {last}", Claim(tuple(things))
