"""What every data source is: pictures with captions, by index."""

from __future__ import annotations

import abc
import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence

from unclip_jax.data.images import BadImage
from unclip_jax.errors import UserError, is_number, suggest


class EmptySplit(UserError):
    """A split that holds no record."""


class Source(abc.ABC):
    """Random access to pictures with captions, the same for the same (seed, split, i).

    A record is `{"image": u8[S, S, 3], "caption": str}`, plus whatever else the source knows of it: "captions" where it
    has several, "file" and "pixels" (width, height) of the picture it was made of. A record without "image" holds
    arrays that go to the network as they are.

    Attributes:
      name: what `data.make` calls it. licence: of its pictures.
      split: the part of the data that it is, such as "train".
      size: side of the pictures in pixels; None where there are none.
      max_bad: the part of the records that may be unreadable; beyond it the loader gives up.
      clip_identity: of the CLIP whose embeddings the records hold; None where they hold pictures.
    """

    name: str
    licence: str
    split: str
    size: int | None = None
    max_bad: float = 0.1
    clip_identity: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abc.abstractmethod
    def __getitem__(self, i: int) -> dict:
        """Record i in [0, len); IndexError outside."""

    def caption(self, i: int) -> str:
        """The caption of record i, its picture left undecoded where that can be."""
        return self[i]["caption"]

    def captions(self, num: int) -> Iterator[str]:
        """The captions of the first `num` records, without those that cannot be read."""
        for i in range(num):
            with contextlib.suppress(BadImage):
                yield self.caption(i)

    def digest(self, num: int) -> str:
        """16 hexadecimal digits of what, beside its arguments, decides the first `num` records; "" if nothing does."""
        return ""


def hashed(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits of a SHA-256 of texts and bytes one after the other, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def check_arguments(name: str, what: str, path: str, split: str, splits: Sequence[str], max_bad: float) -> None:
    """Raises UserError for what sources of files do not take; `splits` empty: any split.

    Args:
      name: of the source. what: what its path is to be.
    """
    if not path:
        raise UserError(f"the source '{name}' needs data.path", f"set it, or --path of a command, to {what}")
    if splits and split not in splits:
        raise UserError(f"data.split='{split}' is not a split of '{name}'", suggest(split, splits))
    if not is_number(max_bad, 0, 1):
        raise UserError(f"data.max_bad={max_bad} must be in 0 … 1")
