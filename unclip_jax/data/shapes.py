"""The shapes source: pictures of the procedural world with captions, endless in kind and exact in truth.

`shapes_world` holds what can be seen, `shapes_text` what can be said, `shapes_parse` what was meant. Splits:
"train" never holds a held-out (shape, colour) pair, nor does "test" (other scenes); every scene of "heldout"
holds at least one.
"""

from __future__ import annotations

from random import Random

from unclip_jax.data.shapes_parse import parse
from unclip_jax.data.shapes_text import Claim, Thing, describe
from unclip_jax.data.shapes_world import HELD_OUT, PAIRS, Object, Scene, is_held_out, render, sample_scene
from unclip_jax.data.source import Source
from unclip_jax.errors import UserError, suggest

__all__ = ["HELD_OUT", "LENGTHS", "PAIRS", "Claim", "Object", "Scene", "Shapes", "Thing", "describe",
           "is_held_out", "parse", "prompts", "render", "sample_scene"]

LENGTHS = {"train": 1_000_000, "test": 10_000, "heldout": 10_000}
_SPLITS = tuple(LENGTHS)


class Shapes(Source):
    """Pictures u8[size, size, 3] of one to three flat shapes, with an English caption.

    Args:
      split: "train", "test" or "heldout".
      size: side in pixels, at least 16; the scene and the caption do not depend on it.
      seed: another seed is another set.
      length: number of records; None for the split's own.
    """

    name = "shapes"
    licence = "CC0-1.0"

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0, length: int | None = None):
        if split not in LENGTHS:
            raise UserError(f"split={split!r} is not a split of shapes", suggest(split, LENGTHS))
        if size < 16:
            raise UserError(f"size={size} must be at least 16: smaller shapes cannot be told apart")
        if seed < 0:
            raise UserError(f"seed={seed} must be at least 0")
        if length is not None and length < 1:
            raise UserError(f"length={length} must be at least 1")
        self.split, self.size, self.seed = split, size, seed
        self.length = LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self.length

    def _rng(self, i: int) -> Random:
        if not 0 <= i < self.length:
            raise IndexError(f"record {i} of {self.length}")
        return Random((self.seed << 66) | (_SPLITS.index(self.split) << 64) | int(i))

    def scene(self, i: int) -> Scene:
        """What record i shows."""
        return sample_scene(self._rng(i), held_out=self.split == "heldout")

    def caption(self, i: int) -> str:
        rng = self._rng(i)
        return describe(sample_scene(rng, held_out=self.split == "heldout"), rng)[0]

    def __getitem__(self, i: int) -> dict:
        rng = self._rng(i)
        scene = sample_scene(rng, held_out=self.split == "heldout")
        return {"image": render(scene, self.size), "caption": describe(scene, rng)[0]}


def prompts(kind: str, heldout: bool, n: int, seed: int = 0) -> list[str]:
    """Distinct evaluation prompts that name the shape and colour of every object, in varied grammar.

    Args:
      kind: "one" or "two" objects.
      heldout: whether each prompt holds a held-out pair, or none does.
      n: how many. seed: the same prompts for the same seed.
    """
    if kind not in ("one", "two"):
        raise UserError(f"kind={kind!r} must be 'one' or 'two'")
    count = ("one", "two").index(kind) + 1
    # A stream apart from every split's records: the fourth value of their two bits.
    rng = Random((seed << 66) | (3 << 64) | (count << 1) | heldout)
    found: dict[str, None] = {}
    while len(found) < n:
        found[describe(sample_scene(rng, heldout, count), rng, full=True)[0]] = None
    return list(found)
