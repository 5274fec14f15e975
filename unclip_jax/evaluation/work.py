"""A folder of arrays computed block by block, so that an interrupted evaluation goes on where it stopped.

    real-77aa01b2c3d4e5f6.json         what decides the numbers: data, resizing, weights, settings
    real-77aa01b2c3d4e5f6-00003.npz    the arrays of block 3

The hash is of what decides, so evaluations share a folder, and each finds what another has computed of the same
pictures by the same networks. Blocks do not depend on each other: among several processes each computes its own, and
all read them in the end.
"""

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from unclip_jax.errors import UserError
from unclip_jax.storage import check_writable, digest, write_text, writing

BLOCK = 256  # pictures
_OWN = re.compile(r"(real|drawn)-[0-9a-f]{16}(-\d{5}\.npz|\.json)")


class Work:
    """The folder at `path`, made where it is not there; UserError where it cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_writable(path)
        except OSError as error:
            raise UserError(f"work={str(path)!r} is not writable ({error.strerror or error})") from None

    def clear(self) -> None:
        """Removes what evaluations left here and, where that was all, the folder."""
        for file in self.path.iterdir():
            if _OWN.fullmatch(file.name):
                file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def series(self, name: str, decides: dict, total: int) -> "Series":
        """What `decides` (JSON values) decides of `total` pictures, begun or not."""
        decides = {**decides, "total": total, "block": BLOCK}
        name = f"{name}-{digest(decides)}"
        about = self.path / f"{name}.json"
        if jax.process_index() == 0 and not about.exists():
            write_text(about, json.dumps(decides, indent=2) + "\n")
        return Series(self.path, name, total)


@dataclasses.dataclass(frozen=True)
class Series:
    """Arrays of `total` pictures in files of one block each."""

    path: Path
    name: str
    total: int

    def fill(self, make: Callable[[int, int], dict[str, np.ndarray]]) -> None:
        """Computes whatever blocks are not there yet: make(start, stop) → arrays of one block."""
        starts = range(0, self.total, BLOCK)
        own = [k for k in range(len(starts)) if k % jax.process_count() == jax.process_index()]
        for k in tqdm(own, desc=self.name.split("-")[0], unit="block", leave=False, disable=None):
            if _read(self._file(k)) is None:
                _save(self._file(k), make(starts[k], min(starts[k] + BLOCK, self.total)))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(self.name)

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of every block in order, one block in memory at once."""
        for k in range(-(-self.total // BLOCK)):
            arrays = _read(self._file(k))
            if arrays is None:
                raise UserError(f"{self._file(k)} is missing or damaged", "run the same command again")
            yield arrays

    def whole(self, key: str) -> np.ndarray:
        """The array `key` of all blocks, one after the other."""
        return np.concatenate([block[key] for block in self.blocks()])

    def _file(self, k: int) -> Path:
        return self.path / f"{self.name}-{k:05d}.npz"


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None where it is not there or not whole (zip has a checksum of each)."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with writing(file) as stream:
        np.savez(stream, **arrays)
