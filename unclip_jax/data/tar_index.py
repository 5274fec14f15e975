"""Where each captioned picture lies in tar shards, found once by reading the headers alone and kept in a folder.

    index.json       which shards, their sizes and when each was written, what was passed over, and some of it by name
    train-HASH.npy   ENTRY[N], mapped into memory, so that opening takes no longer for more records
    test-HASH.npy    the records held out, two in a hundred by the hash of their key

Members `a.jpg` and `a.txt` (or `a.json` with the caption under a key) are one record, as img2dataset and WebDataset
write them. A key ends at the first dot of the name, and the kind is all that follows: `a.depth.png` is no picture, but
of a kind that is not read. Of a key's members of one kind the first counts. Nothing is extracted, and names serve as
keys only, so a member called `../x` does no harm.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.data.folder import held_out
from unclip_jax.data.images import MAX_BYTES, SUFFIXES
from unclip_jax.errors import UserError
from unclip_jax.storage import new_file, refuse_stand_in, user_cache

VERSION = 3  # 2: kinds were what follows the last dot
ENTRY = np.dtype(
    [("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("json", "?")]
)
_OWN = re.compile(r"(train|test)-[0-9a-f]{24}\.npy|index\.json|\..*\.tmp")  # what is there while others write it
TEXTS = (".txt", ".json")
LISTED = 100  # records passed over that an index names
SEEN, DOTTED = "of a key seen before", "with a second dot in the name"
CUT, UNREAD = "cut off in", "shard unread:"  # begin what is said of whole shards
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_TEXT = 1 << 20
SPLITS = ("train", "test")
STAMPS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


class Index(NamedTuple):
    """The shards' addresses, the records of both splits, how many were passed over for which reason, and the first
    LISTED of these as [where, reason]."""

    shards: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    passed_over: dict[str, int]
    listed: list[list[str]]


def open_index(files: "Files", shards: Sequence[str], folder: str | os.PathLike | None = None) -> Index:
    """The index of these shards, read from `folder` where it is there and fits, else made and kept there.

    Args:
      files: reads the shards.
      shards: addresses, sorted.
      folder: None: below the user's cache folder, one for each set of shards.
    """
    try:
        with ThreadPoolExecutor(8) as pool:
            states = [[shard, *state] for shard, state in zip(shards, pool.map(files.state, shards), strict=True)]
    except OSError as e:
        raise UserError(f"a shard cannot be read ({e})") from e
    wanted = {"version": VERSION, "shards": states}
    folder = Path(folder).expanduser() if folder else user_cache() / _hash(wanted)
    try:
        found = _read_json(folder)
        passed_over, listed = found.pop("passed_over"), found.pop("listed", [])
        if found == wanted:
            arrays = (np.load(folder / _name(split, wanted), mmap_mode="r") for split in SPLITS)
            return Index(tuple(shards), *arrays, passed_over, listed)
    except (OSError, ValueError, KeyError):
        pass  # none yet, or one of another version or other shards
    return _make(files, shards, folder, wanted)


def _make(files, shards, folder: Path, wanted: dict) -> Index:
    """Reads all headers, several shards at once, and keeps the index."""
    missed = Missed()
    parts: dict[str, list] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(8) as pool:
        for rows, held, here in pool.map(lambda pair: _scan(files, *pair), enumerate(shards)):
            parts["train"].append(rows[~held])
            parts["test"].append(rows[held])
            missed.update(here)
    arrays = {split: np.concatenate(part) for split, part in parts.items()}
    if not sum(map(len, arrays.values())):
        reasons = [f"{count} {reason}" for reason, count in missed.counts.items()] or ["they are empty"]
        what = f"no captioned pictures in {len(shards)} shards from {shards[0]} on: {', '.join(reasons[:10])}"
        names = f"a record is a picture ({', '.join(SUFFIXES)}) and a .txt or .json of the same name"
        fix = f"{names}, one after the other; the name ends at its first dot"
        raise UserError(what, "" if all(reason.startswith(UNREAD) for reason in missed.counts) else fix)
    told = {"passed_over": dict(missed.counts), "listed": missed.listed()}
    try:
        _keep(folder, wanted, arrays, told)
    except OSError as e:
        raise UserError(f"the index cannot be written to {folder} ({e.strerror or e})", "set data.index=DIR") from e
    return Index(tuple(shards), arrays["train"], arrays["test"], **told)


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


def _keep(folder: Path, wanted: dict, arrays: dict[str, np.ndarray], told: dict) -> None:
    """Writes the index, index.json last: whoever reads that finds its arrays, though others write at the same time.

    Of what the folder holds the arrays of an earlier index are removed, and nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        earlier = {_name(split, _read_json(folder)) for split in SPLITS}
    except FileNotFoundError:
        earlier = set()
        if not all(_OWN.fullmatch(file.name) for file in folder.iterdir()):
            raise UserError(f"data.index={str(folder)!r} holds something else", "give another folder") from None
    except (ValueError, KeyError):
        earlier = set()
        if folder.parent != user_cache():  # where nobody else writes
            raise UserError(f"data.index={str(folder)!r} holds another index.json", "give another folder") from None
    for split, rows in arrays.items():
        with new_file(folder / _name(split, wanted)) as stream:
            np.save(stream, rows)
    with new_file(folder / "index.json") as stream:
        stream.write(json.dumps({**wanted, **told}).encode())
    for name in earlier - {_name(split, wanted) for split in SPLITS}:
        (folder / name).unlink(missing_ok=True)


def _read_json(folder: Path) -> dict:
    """An index.json of ours, before VERSION 3 without `listed`; OSError, ValueError or KeyError where it is none."""
    found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.keys() - {"listed"} != {"version", "shards", "passed_over"}:
        raise ValueError("no index of shards")
    return found


def _name(split: str, wanted: dict) -> str:
    return f"{split}-{_hash(wanted)}.npy"


def _hash(wanted: dict) -> str:
    return hashlib.sha256(json.dumps(wanted["shards"]).encode()).hexdigest()[:24]


def _scan(files, number: int, shard: str) -> tuple[np.ndarray, np.ndarray, Missed]:
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
    except (tarfile.TarError, EOFError) as e:
        missed.add(f"{CUT} {shard} ({e})")
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


class Files:
    """Reads parts of files, on disks by their paths, elsewhere by fsspec's addresses (gs://…, s3://…, https://…)."""

    def __init__(self, root: str):
        self.root, self.local = root, "://" not in root

    @property
    def _system(self):
        import fsspec

        return fsspec.core.url_to_fs(self.root)[0]

    def expand(self, pattern: str) -> list[str]:
        """Addresses that a pattern with {00..99} and * stands for; of a folder, all its .tar files."""
        import fsspec

        names = _braces(pattern)
        try:
            parts = [self._glob(fsspec, one) for one in names]
        except (OSError, ImportError, ValueError) as e:
            raise UserError(f"data.path={pattern!r} cannot be listed ({e})") from e
        if len(names) > 1 and (missing := [name for name, found in zip(names, parts, strict=True) if not found]):
            what = f"data.path={pattern!r} names {len(names)} shards, and {len(missing)} are not there: {missing[0]}"
            raise UserError(what, "name those that are there, or all by *")
        return sorted({part for found in parts for part in found})

    def _glob(self, fsspec, pattern: str) -> list[str]:
        system, path = fsspec.core.url_to_fs(pattern)
        if system.isdir(path):
            path = path.rstrip("/") + "/*.tar"
        found = system.glob(path) if any(c in path for c in "*?[") else [path] if system.exists(path) else []
        return [name if self.local else system.unstrip_protocol(name) for name in found]

    def compressed(self, folder: str) -> list[str]:
        """Names of compressed tars in a folder; none of what is no folder."""
        import fsspec

        system, path = fsspec.core.url_to_fs(folder)
        names = system.ls(path, detail=False) if system.isdir(path) else []
        return sorted(name.rpartition("/")[2] for name in names if name.lower().endswith(COMPRESSED_NAMES))

    def state(self, address: str) -> tuple[int, str]:
        """A file's size in bytes, and what is another once it is written anew: its time, elsewhere ETag or the like."""
        if self.local:
            found = os.stat(address)
            return found.st_size, str(found.st_mtime_ns)
        found = self._system.info(address)
        return int(found["size"]), str(next((found[name] for name in STAMPS if found.get(name)), ""))

    def open(self, address: str) -> io.IOBase:
        return open(address, "rb") if self.local else self._system.open(address, "rb", block_size=1 << 20)

    def read(self, address: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer at the end. Safe for threads."""
        if not self.local:
            return self._system.cat_file(address, start=offset, end=offset + size)
        with open(address, "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), size, offset)


def _braces(pattern: str) -> list[str]:
    """ "a{08..10}.tar" → a08.tar, a09.tar, a10.tar; several braces multiply."""
    head, brace, rest = pattern.partition("{")
    inner, closing, tail = rest.partition("}")
    low, dots, high = inner.partition("..")
    if not brace:
        return [pattern]
    if not closing or not (dots and low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise UserError(f"data.path={pattern!r} has braces without a range", "write it as {000..099}")
    if int(high) - int(low) >= 1_000_000:
        raise UserError(f"data.path={pattern!r} names more than a million shards")
    width = len(low)
    return [f"{head}{n:0{width}d}{end}" for n in range(int(low), int(high) + 1) for end in _braces(tail)]
