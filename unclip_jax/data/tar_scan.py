"""The records of one tar shard, found by its headers alone, and what is passed over.

Members `a.jpg` and `a.txt` (or `a.json` with the caption under a key) are one record, as img2dataset and WebDataset
write them. A key ends at the first dot of the name, and the kind is all that follows: `a.depth.png` is no picture, but
of a kind that is not read. Of a key's members of one kind the first counts. Nothing is extracted, and names serve as
keys only, so a member called `../x` does no harm.
"""

import dataclasses
import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unclip_jax.data.folder import held_out
from unclip_jax.data.images import MAX_BYTES, SUFFIXES
from unclip_jax.data.shards import Files
from unclip_jax.errors import UserError
from unclip_jax.storage import refuse_stand_in

ENTRY = np.dtype(
    [("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("json", "?")]
)
TEXTS = (".txt", ".json")
LISTED = 100  # records passed over that an index names
SEEN, DOTTED = "of a key seen before", "with a second dot in the name"
CUT, UNREAD = "cut off in", "shard unread:"  # begin what is said of whole shards
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
MAX_TEXT = 1 << 20
# What tarfile lets through of headers with impossible sizes or numbers, or of a thousand headers for one member.
HOSTILE = (ValueError, OverflowError, MemoryError, RecursionError)


class Missed:
    """What was passed over: how many for each reason, and where the first LISTED of them lie."""

    def __init__(self):
        self.counts: Counter = Counter()
        self.where: dict[str, list[str]] = {}

    def add(self, reason: str, where: str = "", count: int = 1) -> None:
        """Notes `count` records; `where` is "" if the reason itself says it."""
        self.counts[reason] += count
        if where and len(listed := self.where.setdefault(reason, [])) < LISTED:
            listed.append(where)

    def update(self, other: "Missed") -> None:
        """Notes those of another."""
        self.counts.update(other.counts)
        for reason, where in other.where.items():
            self.where[reason] = [*self.where.get(reason, []), *where][:LISTED]

    def listed(self) -> list[list[str]]:
        """At most LISTED of all, as [where, reason], every reason in its turn."""
        pairs = ([[place, reason] for place in where] for reason, where in self.where.items())
        return [pair for turn in itertools.zip_longest(*pairs) for pair in turn if pair][:LISTED]


def scan(files: Files, number: int, shard: str) -> tuple[np.ndarray, np.ndarray, Missed]:
    """ENTRY[n] of one shard, whether each is held out bool[n], and what was passed over, each record once."""
    rows, held, missed = [], [], Missed()
    for key, group in _groups(files, shard, missed):
        image, text = group.members.get("image"), group.members.get(".txt") or group.members.get(".json")
        where = f"{shard}: {key.removeprefix('/')}"
        if image and text:
            rows.append((number, *image, *text, ".txt" not in group.members))
            held.append(held_out(key))
            if group.repeated:
                missed.add(SEEN, where, max(group.repeated.values()))
        elif group.flaw:
            missed.add(group.flaw, where)
        elif group.dotted:
            missed.add(DOTTED, f"{shard}: {group.dotted[0]}", len(group.dotted))
        else:
            missed.add("without a " + ("picture" if text else "caption"), where)
    return np.array(rows, ENTRY), np.array(held, bool), missed


@dataclasses.dataclass
class _Group:
    """The members of one key: (offset, size) of "image", ".txt" and ".json", and what else bears its name.

    `repeated`: how many more there are of each kind; `dotted`: names of pictures of another kind, such as
    `a.depth.png`; `flaw`: why a member cannot be used.
    """

    members: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    repeated: Counter = dataclasses.field(default_factory=Counter)
    dotted: list[str] = dataclasses.field(default_factory=list)
    flaw: str = ""

    def add(self, kind: str, member: tarfile.TarInfo) -> None:
        """Takes a member of a kind of `_kind`."""
        if kind == DOTTED:
            self.dotted.append(member.name)
        elif not member.isreg() or member.issparse():
            self.flaw = self.flaw or "not plain files"
        elif not 0 < member.size <= (MAX_BYTES if kind == "image" else MAX_TEXT):
            self.flaw = self.flaw or "empty or too large"
        elif kind in self.members:
            self.repeated[kind] += 1
        else:
            self.members[kind] = (member.offset_data, member.size)


def _groups(files, shard: str, missed: Missed) -> Iterator[tuple[str, _Group]]:
    """(key, its members) of each record, in the order of the shard."""
    key, group = None, None
    try:
        with files.open(shard) as stream:
            if flaw := _no_tar(shard, stream.read(tarfile.BLOCKSIZE)):
                missed.add(f"{UNREAD} {flaw}")
                return
            stream.seek(0)
            for member in _members(stream):
                folder, _, name = member.name.rpartition("/")
                first, _, kind = name.partition(".")
                kind = _kind("." + kind.lower())
                if kind is None or not first:  # hidden files begin with a dot; macOS adds one to each
                    continue
                if (folder, first) != key:
                    if group:
                        yield "/".join(key), group
                    key, group = (folder, first), _Group()
                group.add(kind, member)
    except (tarfile.TarError, EOFError, *HOSTILE) as e:
        missed.add(f"{CUT} {shard} ({e or type(e).__name__})")
    except OSError as e:
        raise UserError(f"{shard} cannot be read ({e.strerror or e})") from e
    if group:
        yield "/".join(key), group


def _members(stream: io.IOBase) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; TarError or EOFError where it ends too early."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # else it keeps them all
            yield member
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # which tarfile takes for the end
            raise tarfile.ReadError(f"bad header at byte {tar.offset}")


def _kind(suffix: str) -> str | None:
    """ "image", ".txt" or ".json" of what follows a key; DOTTED of a picture with more dots; None: not read."""
    if suffix in SUFFIXES:
        return "image"
    return suffix if suffix in TEXTS else DOTTED if suffix.endswith(SUFFIXES) else None


def _no_tar(shard: str, start: bytes) -> str:
    """What is wrong with a shard that begins with this block; "" where it may be a tar."""
    if not start:
        return f"{shard} is empty"
    for magic, tool in COMPRESSED.items():
        if start.startswith(magic):
            return f"{shard} is compressed; {tool} it"
    try:
        refuse_stand_in(Path(shard), start)
        tarfile.TarInfo.frombuf(start, tarfile.ENCODING, "surrogateescape")
    except UserError as e:
        return str(e)
    except tarfile.EOFHeaderError:
        pass  # a tar of no members
    except tarfile.HeaderError:
        return f"{shard} is no tar file"
    return ""
