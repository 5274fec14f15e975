"""What every data source is: pictures with captions, by index."""

from __future__ import annotations

import abc


class Source(abc.ABC):
    """Random access to pictures with captions, the same for the same (seed, split, i).

    A record is `{"image": u8[S, S, 3], "caption": str}`, plus whatever else the source knows of it: "captions" where it
    has several, "file" and "pixels" (width, height) of the picture it was made of. A record without "image" holds
    arrays that go to the network as they are.
    """

    name: str
    licence: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abc.abstractmethod
    def __getitem__(self, i: int) -> dict:
        """Record i in [0, len); IndexError outside."""
