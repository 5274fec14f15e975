"""What CLIP says of a data set, worked out once (`unclip data embed`): records for training a prior, without pictures.

    embeddings.json              fields and their shapes, the CLIP's identity, statistics of z_img
    train-00000.arrayrecord …    records of fixed size: the fields' bytes, little-endian, one after the other
"""

import math
import re
from pathlib import Path

import numpy as np

from unclip_jax.data.images import BadImage
from unclip_jax.data.source import EmptySplit, Source, hashed
from unclip_jax.errors import UserError, is_whole, suggest
from unclip_jax.storage import read_json

META = "embeddings.json"
VERSION = 1
MOST = 2**28  # numbers of a field


class Embeddings(Source):
    """Arrays z_img f32[D], z_txt f32[D], tokens i32[L], mask bool[L], and states f32[L, W] where they were kept.

    Args:
      path: the folder that `unclip data embed` wrote.
      split: "train", "test", …: those embedded; "heldout" is "test" where there is no other.
      size: has no effect, nor has seed.
    """

    name = "embeddings"
    licence = "as the pictures'"
    max_bad = 0.0

    def __init__(self, path: str = "", split: str = "train", size: int = 64, seed: int = 0):
        if not path:
            raise UserError("the source 'embeddings' needs data.path", "make one with: unclip data embed")
        self.folder = Path(path).expanduser()
        meta = read_meta(self.folder)
        self.clip_identity, self.fields = meta["clip_identity"], meta["fields"]
        splits = meta["splits"]
        split = "test" if split == "heldout" and split not in splits else split
        if split not in splits:
            raise EmptySplit(f"data.split={split!r} was not embedded in {path}", suggest(split, splits))
        self.split, self.length = split, splits[split]
        self.files = sorted(str(file) for file in self.folder.glob(f"{split}-*.arrayrecord"))
        self._records = None
        try:
            found = len(self.records)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path} holds no records of '{split}' that can be read ({why})", "make it anew") from None
        if found != self.length:
            raise UserError(
                f"{path} holds {found} records of '{split}', and {self.length} were written", "make it anew"
            )

    def __getstate__(self):
        return {**self.__dict__, "_records": None}

    @property
    def records(self):
        """Random access to the records' bytes; opened where it is used, for workers."""
        if self._records is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._records = ArrayRecordDataSource(self.files) if self.files else ()
        return self._records

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.length:
            raise IndexError(i)
        try:
            data, arrays, at = self.records[i], {}, 0
        except RuntimeError as error:
            why = " ".join(str(error).split())[:120]
            raise BadImage(f"record {i} of {self.folder} cannot be read ({why})") from error
        for name, (dtype, shape) in self.fields.items():
            kind = np.dtype(dtype)
            count = int(np.prod(shape, dtype=np.int64))
            if len(data) < at + count * kind.itemsize:
                raise BadImage(f"record {i} of {self.folder} is too short")
            arrays[name] = np.frombuffer(data, kind, count, at).reshape(shape)
            at += count * kind.itemsize
        return arrays

    def digest(self, num: int) -> str:
        """Of the records' bytes."""

        def read(i: int) -> bytes:
            try:
                return self.records[i]
            except RuntimeError:
                return b""  # told of when it is asked for

        return hashed(map(read, range(min(num, self.length))))


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """One record's bytes, the fields in their order."""
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())


def read_meta(folder: Path) -> dict:
    """The checked contents of embeddings.json."""
    file = folder / META
    if not file.is_file():
        raise UserError(f"{folder} holds no embeddings", "make them with: unclip data embed")
    meta = read_json(file, "what `unclip data embed` writes", fix="make it anew")
    if meta.get("version") != VERSION:
        raise UserError(f"{file} has version {meta.get('version')!r}, and {VERSION} is read here", "make it anew")
    if not _is_sound(meta):
        raise UserError(f"{file} is not what `unclip data embed` writes", "make it anew")
    return meta


def _is_sound(meta: dict) -> bool:
    try:
        dtypes, shapes = zip(*meta["fields"].values(), strict=True)
        sizes = all(is_whole(n, 1) for shape in shapes for n in shape)
        lengths = all(is_whole(n, 0) for n in meta["splits"].values())
        known = all(re.fullmatch(r"<f[248]|<i[248]|\|[bi]1", dtype) for dtype in dtypes)
        small = all(len(shape) <= 8 and math.prod(shape) <= MOST for shape in shapes)
        return known and sizes and small and lengths and isinstance(meta["clip_identity"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
