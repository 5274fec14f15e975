"""Where each captioned picture lies in tar shards, found once by reading the headers alone and kept in a folder.

    index.json       which shards, their sizes and when each was written, what was passed over, and some of it by name
    train-HASH.npy   ENTRY[N], mapped into memory, so that opening takes no longer for more records
    test-HASH.npy    the records held out, two in a hundred by the hash of their key

What a record is, `tar_scan` says.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.data.images import SUFFIXES
from unclip_jax.data.shards import Files
from unclip_jax.data.tar_scan import UNREAD, Missed, scan
from unclip_jax.errors import UserError
from unclip_jax.storage import new_file, user_cache

VERSION = 3  # 2: kinds were what follows the last dot
_OWN = re.compile(r"(train|test)-[0-9a-f]{24}\.npy|index\.json|\..*\.tmp")  # what is there while others write it
SPLITS = ("train", "test")


class Index(NamedTuple):
    """The shards' addresses, the records of both splits, how many were passed over for which reason, and the first
    LISTED of these as [where, reason]."""

    shards: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    passed_over: dict[str, int]
    listed: list[list[str]]


def open_index(files: Files, shards: Sequence[str], folder: str | os.PathLike | None = None) -> Index:
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
    except (OSError, ValueError, KeyError, EOFError, RecursionError):
        pass  # none yet, or one of another version or other shards
    return _make(files, shards, folder, wanted)


def _make(files, shards, folder: Path, wanted: dict) -> Index:
    """Reads all headers, several shards at once, and keeps the index."""
    missed = Missed()
    parts: dict[str, list] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(8) as pool:
        for rows, held, here in pool.map(lambda pair: scan(files, *pair), enumerate(shards)):
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
    facts = {"passed_over": dict(missed.counts), "listed": missed.listed()}
    try:
        _keep(folder, wanted, arrays, facts)
    except OSError as e:
        raise UserError(f"the index cannot be written to {folder} ({e.strerror or e})", "set data.index=DIR") from e
    return Index(tuple(shards), arrays["train"], arrays["test"], **facts)


def _keep(folder: Path, wanted: dict, arrays: dict[str, np.ndarray], facts: dict) -> None:
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
    except (ValueError, KeyError, RecursionError):
        earlier = set()
        if folder.parent != user_cache():  # where nobody else writes
            raise UserError(f"data.index={str(folder)!r} holds another index.json", "give another folder") from None
    for split, rows in arrays.items():
        with new_file(folder / _name(split, wanted)) as stream:
            np.save(stream, rows)
    with new_file(folder / "index.json") as stream:
        stream.write(json.dumps({**wanted, **facts}).encode())
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
