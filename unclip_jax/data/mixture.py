"""Several sources as one, each with its share of the records."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip_jax.data.source import Source, hashed
from unclip_jax.errors import UserError, is_number

PERIOD = 1000  # records after which the pattern of parts comes again


class Mixture(Source):
    """Record i is of the part that a fixed pattern names, whose records follow one another; shorter parts repeat.

    An epoch ends when no part has an unseen record. In every 1000 records each part has its weight's share, rounded.

    Args:
      parts: blocks as `data` itself, each with `source`, `weight` > 0 and that source's own arguments; `size` and
        `split` are the mixture's.
      split: of every part.
      size: side in pixels.
      seed: of the pattern, and of parts that draw by chance.
    """

    name = "mixture"

    def __init__(self, parts: Sequence[Mapping] = (), split: str = "train", size: int = 64, seed: int = 0):
        from unclip_jax.data import make

        if not parts:
            raise UserError("the source 'mixture' needs data.parts", "set it to (dict(source=…, weight=…), …)")
        if len(parts) > PERIOD:
            raise UserError(f"data.parts are {len(parts)}, and each needs a place among {PERIOD} records", "join some")
        self.parts, weights = [], []
        for number, part in enumerate(parts):
            if not isinstance(part, Mapping) or "source" not in part:
                raise UserError(f"data.parts[{number}]={part!r} must be a dict with 'source' and 'weight'")
            own = {"seed": seed, **part}
            weight = own.pop("weight", 1.0)
            if not (is_number(weight, 0) and weight > 0):
                raise UserError(f"data.parts[{number}].weight={weight!r} must be a number above 0")
            if own["source"] == "mixture":
                raise UserError(f"data.parts[{number}] is a mixture itself", "put its parts into the one mixture")
            self.parts.append(make(**{**own, "split": split, "size": size}))
            weights.append(weight)
        self.clip_identity = self._same_kind()
        self.split, self.size = split, size
        self.licence = "; ".join(dict.fromkeys(part.licence for part in self.parts))
        self.max_bad = max(part.max_bad for part in self.parts)
        counts = _shares(np.array(weights))
        pattern = np.repeat(np.arange(len(counts)), counts)
        self.pattern = np.random.default_rng(seed).permutation(pattern)
        # rank[s]: how many of the slots before s are of the same part
        self.rank = np.zeros(PERIOD, np.int64)
        for part in range(len(counts)):
            self.rank[self.pattern == part] = np.arange(counts[part])
        self.counts = counts
        self.length = PERIOD * max(-(-len(part) // int(c)) for part, c in zip(self.parts, counts, strict=True))

    def _same_kind(self) -> str | None:
        """The CLIP whose embeddings all parts hold; None where all hold pictures."""
        kinds = {part.clip_identity for part in self.parts}
        if len(kinds) > 1:
            what = "pictures and embeddings" if None in kinds else "embeddings of several CLIPs"
            raise UserError(f"data.parts mix {what}", "give parts of one kind: pictures, or embeddings of one CLIP")
        return kinds.pop()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        part, number = self._place(i)
        return part[number]

    def caption(self, i: int) -> str:
        part, number = self._place(i)
        return part.caption(number)

    def digest(self, num: int) -> str:
        return hashed(part.digest(num) for part in self.parts)

    def _place(self, i: int) -> tuple[Source, int]:
        """(the part that record i is of, its number there)."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        period, slot = divmod(i, PERIOD)
        part = int(self.pattern[slot])
        number = period * int(self.counts[part]) + int(self.rank[slot])
        return self.parts[part], number % len(self.parts[part])


def _shares(weights: np.ndarray) -> np.ndarray:
    """Whole shares of PERIOD, at least 1 each, by largest remainders."""
    exact = weights / weights.sum() * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    order = np.argsort(counts - exact)
    for k in range(PERIOD - int(counts.sum())):
        counts[order[k % len(order)]] += 1
    while counts.sum() > PERIOD:
        counts[counts.argmax()] -= 1
    return counts
