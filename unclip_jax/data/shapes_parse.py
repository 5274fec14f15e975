"""What a caption of the shapes world claims: `parse`, the inverse of `shapes_text.describe`.

Lenient about fillers and strict about words: it takes the longest known phrase at every place, and a word
outside the world is an error that names it.
"""

from __future__ import annotations

import difflib
import re

from unclip_jax.data.shapes_text import (
    ANY_WORDS,
    BACKGROUND_WORDS,
    NUMBERS,
    POSITION_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Claim,
    Thing,
)
from unclip_jax.data.shapes_world import BACKGROUNDS, COLOURS


def _phrases() -> dict[str, tuple]:
    """Every phrase that `parse` knows, to its (kind, value)."""
    table: dict[str, tuple] = {w: ("filler", None) for w in (
        "a an the is are this that's it's of picture image photo drawing painting illustration scene simple "
        "there we see showing shows containing plain placed located").split()}
    table |= {w: ("and", None) for w in ("and", "with", "next to", "beside", "near", "&")}
    table |= {"that is": ("post", None), "which is": ("post", None), "colored": ("post", None),
              "coloured": ("post", None), ",": ("comma", None), ":": ("colon", None), "it": ("pronoun", "it"),
              "them": ("pronoun", "them"), "both": ("pronoun", "them"), "side by side": ("pair", "left"),
              "next to each other": ("pair", "left"), "one above the other": ("pair", "above"),
              "on top of each other": ("pair", "above")}
    numbers = {1: ("one", "1", "single"), 2: ("two", "2", "pair"), 3: ("three", "3")}
    table |= {w: ("number", n) for n, words in numbers.items() for w in words}
    table |= {w: ("size", s) for s, words in SIZE_WORDS.items() for w in words}
    table |= {c: ("colour", c) for c in COLOURS}
    nouns = {w: s for s, words in SHAPE_WORDS.items() for w in words}
    nouns |= {"disk": "circle", "plus sign": "cross"} | dict.fromkeys((*ANY_WORDS, "figure"))
    for word, shape in nouns.items():
        table[word] = ("noun", shape)
        table[word + ("es" if word in ("cross", "plus") else "s")] = ("nouns", shape)
    table |= {w: ("relation", r) for r, words in RELATION_WORDS.items() for w in words}
    table |= {"on top of": ("relation", "above"), "underneath": ("relation", "below"),
              "on the left of": ("relation", "left"), "on the right of": ("relation", "right")}
    for where, words in POSITION_WORDS.items():
        extra = (f"{start} {where}" for start in ("in the", "at", "at the", "on the", "to the"))
        for w in (*words, *extra):
            table |= {w.replace("center", c): ("position", where) for c in ("center", "centre")}
    table |= {w: ("position", "center") for w in ("centered", "centred")}
    for colour in BACKGROUNDS:
        for word in {colour, colour.replace("gray", "grey")}:
            phrases = [*BACKGROUND_WORDS, "on a plain {} background", "on the {} background", "{} background"]
            table |= {s.format(word): ("background", colour) for s in phrases}
    return table


PHRASES = _phrases()
_LONGEST = max(len(p.split()) for p in PHRASES)


def _tokens(caption: str) -> list[tuple]:
    """(kind, value, text) of each phrase, the longest that fits; ValueError names the first unknown word."""
    words = re.findall(r"[^\s,;:.!]+|[,:;]", caption.lower().replace("medium sized", "medium-sized"))
    words = ["," if w == ";" else w for w in words]
    found, k = [], 0
    while k < len(words):
        for n in range(min(_LONGEST, len(words) - k), 0, -1):
            text = " ".join(words[k : k + n])
            if text in PHRASES:
                found.append((*PHRASES[text], text))
                k += n
                break
        else:
            raise ValueError(_unknown(words[k], caption))
    return [t for t in found if t[0] != "filler"]


def _unknown(word, caption):
    if word in BACKGROUNDS or word == "grey":
        return f"'{word}' in '{caption}' is a colour of backgrounds only; objects are {', '.join(COLOURS)}"
    known = sorted({w for p in PHRASES for w in p.split() if w.isalpha() and len(w) > 2})
    near = difflib.get_close_matches(word, known, n=1)
    hint = f": did you mean '{near[0]}'?" if near else ""
    return f"'{word}' in '{caption}' is not a word of the shapes world{hint}"


class _Reader:
    """The state of `parse`: what has been read so far and what waits for its noun."""

    def __init__(self):
        self.things: list[dict] = []
        self.group: tuple[int, ...] = ()  # the latest noun phrase's things
        self.relations: list[tuple] = []
        self.background: str | None = None
        self.declared: int | None = None  # by "two objects:"
        self.waiting: dict = {}  # attributes and number before their noun
        self.relation: tuple | None = None  # (subjects, word) before its other side
        self.post = False  # after "that is"

    def attribute(self, name, value):
        if self.post and self.group and name != "number":
            for k in self.group:
                self.things[k][name] = value
            self.post = False
        elif name in self.waiting:
            raise ValueError(f"two words of {name} ('{self.waiting[name]}', '{value}') for one object")
        else:
            self.waiting[name] = value

    def place(self, where):
        if not self.group:
            self.waiting["position"] = where
        for k in self.group:
            self.things[k]["position"] = where

    def noun(self, shape, plural):
        number = self.waiting.pop("number", 2 if plural else 1)
        if plural and number == 1 or not plural and number > 1:
            raise ValueError(f"{NUMBERS[number]} does not go with the noun's number")
        first = len(self.things)
        self.things += [{"shape": shape} | self.waiting for _ in range(number)]
        self.waiting, self.group = {}, tuple(range(first, first + number))
        if self.relation:
            self.relations.append((*self.relation, self.group))
            self.relation = None

    def header(self):
        if len(self.group) != len(self.things) or any(v for t in self.things for v in t.values()):
            raise ValueError("':' belongs after a count such as 'two objects:'")
        self.declared, self.things, self.group = len(self.things), [], ()

    def pronoun(self, word):
        if not self.relation or len(self.group) == len(self.things):
            raise ValueError(f"'{word}' refers to nothing before it")
        before = tuple(range(self.group[0]))
        self.relations.append((*self.relation, before[-1:] if word == "it" else before))
        self.relation = None

    def pair(self, word):
        if len(self.group) != 2:
            raise ValueError("'side by side' and 'one above the other' are said of two objects")
        self.relations.append((self.group[:1], word, self.group[1:]))


def parse(caption: str) -> Claim:
    """What a caption claims; ValueError names the word or the construction that is outside the world.

    Takes everything `describe` says, and what a person would type: "Two red circles.", "a blue square under
    a yellow ring on grey", "2 red stars, one above the other".
    """
    reader = _Reader()
    for kind, value, text in _tokens(caption):
        if kind in ("number", "size", "colour"):
            reader.attribute(kind, value)
        elif kind in ("noun", "nouns"):
            reader.noun(value, kind == "nouns")
        elif kind == "position":
            reader.place(value)
        elif kind == "relation":
            if not reader.group or reader.relation:
                raise ValueError(f"'{text}' in '{caption}' needs an object before it")
            reader.relation = (reader.group, value)
        elif kind == "background":
            reader.background = value
        elif kind == "colon":
            reader.header()
        elif kind == "post":
            reader.post = True
        elif kind in ("pronoun", "pair"):
            getattr(reader, kind)(value)
    if reader.waiting or reader.relation or reader.post:
        raise ValueError(f"'{caption}' ends before its object: name a shape, or say 'shape'")
    n = len(reader.things)
    if not 1 <= n <= 3:
        raise ValueError(f"'{caption}' names {n} objects; pictures of shapes hold one to three")
    if n > 1 and any(t.get("size") == "medium" for t in reader.things):
        raise ValueError(f"'medium' in '{caption}' is a size of lone objects; with others, small or large")
    if reader.declared not in (None, n):
        raise ValueError(f"'{caption}' announces {reader.declared} objects and names {n}")
    return Claim(tuple(Thing(**t) for t in reader.things), tuple(reader.relations), reader.background)
