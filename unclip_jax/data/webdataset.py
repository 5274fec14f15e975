"""Captioned pictures in tar shards, as img2dataset and WebDataset write them, read at random by an index.

The shards may lie on disks or in object storage. A record's key is its name up to the first dot (`tar_index`). No
other member is ever read, nothing is unpickled, and no command is run (a `pipe:` address is refused).
"""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unclip_jax.data.folder import SPLITS
from unclip_jax.data.images import BadImage, center_crop_resize, decode_image
from unclip_jax.data.shards import Files
from unclip_jax.data.source import EmptySplit, Source, check_arguments, hashed
from unclip_jax.data.tar_index import open_index
from unclip_jax.data.tar_scan import CUT, DOTTED, SEEN, UNREAD
from unclip_jax.errors import UserError


class WebDataset(Source):
    """Pictures of tar shards, cut to their central square and resized.

    Args:
      path: a shard, a folder of shards, or a pattern: "shards/{00000..00099}.tar", "gs://bucket/laion/*.tar".
      split: "train", 98 %; "test" or "heldout", the other 2 %, by the hash of a record's key; "all".
      size: side in pixels. seed: has no effect.
      index: folder for the index of the shards (`tar_index`); "": below the user's cache folder.
      caption_key: of the caption in .json members, where a record has no .txt.
      max_bad: the loader gives up when more than this part of the pictures cannot be read.

    Raises:
      UserError: no such shards, none with captioned pictures, an empty split.
    """

    name = "webdataset"
    licence = "as the shards' maker says"

    def __init__(
        self,
        path: str = "",
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        *,
        index: str = "",
        caption_key: str = "caption",
        max_bad: float = 0.1,
    ):
        check_arguments("webdataset", "tar shards: shards/{0000..0099}.tar", path, split, SPLITS, max_bad)
        if path.startswith("pipe:") or "::" in path:
            raise UserError(f"data.path={path!r} asks for a command or a chain", "give paths or addresses of tar files")
        self.split, self.size, self.caption_key, self.max_bad = split, size, caption_key, max_bad
        self.files = Files(path)
        shards = self.files.expand(path)
        packed = self.files.compressed(path)
        if not shards:
            what = f", but {len(packed)} compressed: {packed[0]}; unpack them" if packed else ""
            raise UserError(f"data.path={path!r} names no tar file{what}")
        self.index = open_index(self.files, shards, index)
        self._warn(path, packed)
        self._parts = {"train": ("train",), "all": ("train", "test")}.get(split, ("test",))
        if not len(self):
            raise EmptySplit(f"the split '{split}' of {path} is empty", "add shards, or take the split 'all'")

    def __len__(self) -> int:
        return sum(len(getattr(self.index, part)) for part in self._parts)

    def __getitem__(self, i: int) -> dict:
        shard, entry = self._entry(i)
        where = f"{shard} at byte {entry['image']}"
        data = self._read(shard, int(entry["image"]), int(entry["image_size"]))
        caption = self._caption(shard, entry)
        image = decode_image(data, where)
        return {"image": center_crop_resize(image, self.size), "caption": caption, "file": where, "pixels": image.size}

    def caption(self, i: int) -> str:
        return self._caption(*self._entry(i))

    def digest(self, num: int) -> str:
        """Of the pictures' and captions' bytes."""

        def of_record(i: int) -> str:
            shard, entry = self._entry(i)
            try:
                return hashed(self._read(shard, int(entry[k]), int(entry[f"{k}_size"])) for k in ("image", "text"))
            except BadImage:
                return ""

        with ThreadPoolExecutor(8) as pool:
            return hashed(pool.map(of_record, range(min(num, len(self)))))

    def _warn(self, path: str, packed: list[str]) -> None:
        """Tells of shards and records that whoever made them will miss."""
        total, reasons = len(self.index.shards), self.index.passed_over
        if packed:
            what = f"{len(packed)} compressed files in {path} are not read: {', '.join(packed[:10])}; unpack them"
            warnings.warn(what, stacklevel=3)
        if cut := [reason for reason in reasons if reason.startswith(CUT)]:
            warnings.warn(f"{len(cut)} of {total} shards end too early: {cut[0]}", stacklevel=3)
        if unread := [reason.removeprefix(UNREAD).strip() for reason in reasons if reason.startswith(UNREAD)]:
            warnings.warn(f"{len(unread)} of {total} shards cannot be read: {unread[0]}", stacklevel=3)
        for reason in (SEEN, DOTTED):
            if reason in reasons:
                first = next((where for where, why in self.index.listed if why == reason), "")
                what = f"passed over in {path}: {reasons[reason]} {reason}, such as {first}"
                warnings.warn(f"{what}; a record's key is its name up to the first dot", stacklevel=3)

    def _entry(self, i: int) -> tuple[str, np.void]:
        """(record i's shard, its ENTRY)."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        first = getattr(self.index, self._parts[0])
        entry = first[i] if i < len(first) else self.index.test[i - len(first)]
        return self.index.shards[entry["shard"]], entry

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        try:
            data = self.files.read(shard, offset, size)
        except OSError as e:
            raise BadImage(f"{shard} cannot be read at byte {offset} ({e.strerror or e})") from e
        if len(data) != size:
            raise BadImage(f"{shard} ends before byte {offset + size}")
        return data

    def _caption(self, shard: str, entry) -> str:
        where = f"{shard} at byte {entry['text']}"
        data = self._read(shard, int(entry["text"]), int(entry["text_size"]))
        try:
            text = data.decode("utf-8-sig")
            text = json.loads(text).get(self.caption_key) if entry["json"] else text
        except (ValueError, AttributeError, RecursionError) as e:
            raise BadImage(f"{where} is no caption ({type(e).__name__}: {str(e)[:80]})") from e
        caption = " ".join(text.split()) if isinstance(text, str) else ""
        if not caption or any("\ud800" <= c <= "\udfff" for c in caption):
            raise BadImage(f"{where} holds no caption" + (f" under {self.caption_key!r}" if entry["json"] else ""))
        return caption
