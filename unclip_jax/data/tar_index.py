"""Where each captioned picture lies in tar shards, found once by reading the headers alone and kept in a folder.

    index.json       which shards, their sizes and when each was written, what was passed over
    train-HASH.npy   ENTRY[N], mapped into memory, so that opening takes no longer for more records
    test-HASH.npy    the records held out, two in a hundred by the hash of their key

Members `a.jpg` and `a.txt` (or `a.json` with the caption under a key) are one record, as img2dataset and WebDataset
write them. Nothing is extracted, and names serve as keys only, so a member called `../x` does no harm.
"""

import hashlib
import io
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
from unclip_jax.storage import new_file, user_cache

VERSION = 2
ENTRY = np.dtype(
    [("shard", "<u4"), ("image", "<u8"), ("image_size", "<u4"), ("text", "<u8"), ("text_size", "<u4"), ("json", "?")]
)
_OWN = re.compile(r"(train|test)-[0-9a-f]{24}\.npy|index\.json|\..*\.tmp")  # what is there while others write it
TEXTS = (".txt", ".json")
MAX_TEXT = 1 << 20
SPLITS = ("train", "test")
STAMPS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


class Index(NamedTuple):
    """The shards' addresses, the records of both splits, and how many were passed over for which reason."""

    shards: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    passed_over: dict[str, int]


def open_index(files: "Files", shards: Sequence[str], folder: str | os.PathLike | None = None) -> Index:
    """The index of these shards, read from `folder` where it is there and fits, else made and kept there.

    Args:
      files: reads the shards.
      shards: addresses, sorted.
      folder: None: below the user's cache folder, one for each set of shards.
    """
    with ThreadPoolExecutor(8) as pool:
        states = [[shard, *state] for shard, state in zip(shards, pool.map(files.state, shards), strict=True)]
    wanted = {"version": VERSION, "shards": states}
    folder = Path(folder).expanduser() if folder else user_cache() / _hash(wanted)
    try:
        found = _read_json(folder)
        passed_over = found.pop("passed_over")
        if found == wanted:
            arrays = (np.load(folder / _name(split, wanted), mmap_mode="r") for split in SPLITS)
            return Index(tuple(shards), *arrays, passed_over)
    except (OSError, ValueError, KeyError):
        pass  # none yet, or one of another version or other shards
    return _make(files, shards, folder, wanted)


def _make(files, shards, folder: Path, wanted: dict) -> Index:
    """Reads all headers, several shards at once, and keeps the index."""
    passed_over: Counter = Counter()
    parts: dict[str, list] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(8) as pool:
        for rows, held, missed in pool.map(lambda pair: _scan(files, *pair), enumerate(shards)):
            parts["train"].append(rows[~held])
            parts["test"].append(rows[held])
            passed_over.update(missed)
    arrays = {split: np.concatenate(part) for split, part in parts.items()}
    if not sum(map(len, arrays.values())):
        why = ", ".join(f"{count} {reason}" for reason, count in passed_over.items()) or "they are empty"
        raise UserError(
            f"no captioned pictures in {len(shards)} shards from {shards[0]} on: {why}",
            f"a record is a picture ({', '.join(SUFFIXES)}) and a .txt or .json of the same name, one after the other",
        )
    try:
        _keep(folder, wanted, arrays, dict(passed_over))
    except OSError as e:
        raise UserError(f"the index cannot be written to {folder} ({e.strerror or e})", "set data.index=DIR") from e
    return Index(tuple(shards), arrays["train"], arrays["test"], dict(passed_over))


def _keep(folder: Path, wanted: dict, arrays: dict[str, np.ndarray], passed_over: dict[str, int]) -> None:
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
        stream.write(json.dumps({**wanted, "passed_over": passed_over}).encode())
    for name in earlier - {_name(split, wanted) for split in SPLITS}:
        (folder / name).unlink(missing_ok=True)


def _read_json(folder: Path) -> dict:
    """An index.json of ours; OSError, ValueError or KeyError where it is none."""
    found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.keys() != {"version", "shards", "passed_over"}:
        raise ValueError("no index of shards")
    return found


def _name(split: str, wanted: dict) -> str:
    return f"{split}-{_hash(wanted)}.npy"


def _hash(wanted: dict) -> str:
    return hashlib.sha256(json.dumps(wanted["shards"]).encode()).hexdigest()[:24]


def _scan(files, number: int, shard: str) -> tuple[np.ndarray, np.ndarray, Counter]:
    """ENTRY[n] of one shard, whether each is held out bool[n], and what was passed over."""
    rows, held, missed = [], [], Counter()
    for key, members in _groups(files, shard, missed):
        image, text = members.get("image"), members.get(".txt") or members.get(".json")
        if not image or not text:
            missed["without a " + ("picture" if text else "caption")] += 1
        else:
            rows.append((number, *image, *text, ".txt" not in members))
            held.append(held_out(key))
    return np.array(rows, ENTRY), np.array(held, bool), missed


def _groups(files, shard: str, missed: Counter) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {"image" | ".txt" | ".json": (offset, size)}) of each record, in the order of the shard."""
    key, members = None, {}
    try:
        with files.open(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # else it keeps them all
                folder, _, name = member.name.rpartition("/")
                stem, suffix = (folder, name.partition(".")[0]), os.path.splitext(name)[1].lower()
                kind = "image" if suffix in SUFFIXES else suffix if suffix in TEXTS else None
                if kind is None:
                    continue
                if not member.isreg() or member.issparse():
                    missed["not plain files"] += 1
                elif not 0 < member.size <= (MAX_BYTES if kind == "image" else MAX_TEXT):
                    missed["empty or too large"] += 1
                else:
                    if members and stem != key:
                        yield "/".join(key), members
                        members = {}
                    key = stem
                    members.setdefault(kind, (member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as e:
        missed[f"cut off in {shard} ({e})"] += 1
    if members:
        yield "/".join(key), members


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
