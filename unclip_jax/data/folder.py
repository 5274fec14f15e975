"""A folder of pictures with captions, the user's own data.

Captions come from the first of these that is there:

    captions.jsonl   {"file": "sub/a.png", "caption": "…"} a line; a file may have several lines
    captions.csv     a table with the columns file and caption
    a.txt            beside a.png, the whole text being one caption

One picture in fifty is held out of training, chosen by its name, so that adding pictures moves no other one.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from unclip_jax.data.images import SUFFIXES, center_crop_resize, open_image
from unclip_jax.data.source import EmptySplit, Source, check_arguments, digest
from unclip_jax.errors import UserError
from unclip_jax.storage import read_text, sha256

SPLITS = ("train", "test", "heldout", "all")
HELD_OUT_PERCENT = 2
MAX_CAPTION_BYTES = 64 << 10
MAX_TABLE_BYTES = 1 << 30


class Folder(Source):
    """Pictures below `path`, cut to their central square and resized, in the order of their names.

    Args:
      path: the folder.
      split: "train", 98 %; "test" or "heldout", the other 2 %; "all".
      size: side in pixels.
      seed: has no effect; there is nothing to draw.
      captions: False takes every picture with an empty caption, for stages without text (the upsamplers).
      max_bad: the loader gives up when more than this part of the pictures cannot be read.
    Raises:
      UserError: nothing there, no captions, captions that are not UTF-8, an empty split. A damaged picture
        is found only when it is read: `folder[i]` raises BadImage, and the loader passes over it.
    """

    name = "folder"
    licence = "the user's own"

    def __init__(
        self,
        path: str = "",
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        *,
        captions: bool = True,
        max_bad: float = 0.1,
    ):
        check_arguments("folder", "a folder of pictures", path, split, SPLITS, max_bad)
        self.path, self.split, self.size, self.max_bad = Path(path), split, size, max_bad
        if not self.path.is_dir():
            raise UserError(f"data.path='{path}' is not a folder", "give a folder that holds pictures")
        records = _records(self.path) if captions else [(file, "") for file in _pictures(self.path)]
        if split != "all":
            records = [r for r in records if held_out(r[0]) == (split != "train")]
        if not records:
            raise EmptySplit(
                f"the split '{split}' of {path} is empty", "add pictures, or take the split 'all'"
            )
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        file, caption = self.records[i]
        image = open_image(self.path / file)
        return {
            "image": center_crop_resize(image, self.size), "caption": caption, "file": file, "pixels": image.size,
        }  # fmt: skip


    def caption(self, i: int) -> str:
        return self.records[i][1]

    def digest(self, num: int) -> str:
        """Of names, captions and the bytes of the files."""
        records = self.records[:num]
        return digest(itertools.chain(*records, contents([self.path / file for file, _ in records])))


def contents(files: Sequence[Path]) -> list[bytes]:
    """Each file's SHA-256, as bytes; nothing of one that cannot be read, which is told of when its picture is."""

    def told(file: Path) -> bytes:
        try:
            return bytes.fromhex(sha256(file))
        except OSError:
            return b""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(told, files))


def held_out(file: str) -> bool:
    """Whether a file name, with "/" between its parts, belongs to the two per cent held out."""
    number = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()[:4]
    return int.from_bytes(number, "big") % 100 < HELD_OUT_PERCENT


def _pictures(root: Path) -> list[str]:
    """Names of all pictures below the folder, relative to it and sorted; not the hidden ones."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                found.append((Path(folder) / file).relative_to(root).as_posix())
    if not found:
        raise UserError(f"no pictures in {root}", f"it must hold files that end in {', '.join(SUFFIXES)}")
    return sorted(found)


def _records(root: Path) -> list[tuple[str, str]]:
    """(file, caption) of every picture that has a caption, sorted by file."""
    for name, read in (("captions.jsonl", _from_jsonl), ("captions.csv", _from_csv)):
        if (root / name).is_file():
            return _checked(root, root / name, read(root / name))
    records, without = [], []
    for file in _pictures(root):
        text = (root / file).with_suffix(".txt")
        caption = " ".join(read_text(text, "a caption", MAX_CAPTION_BYTES).split()) if text.is_file() else ""
        if caption:
            records.append((file, caption))
        else:
            without.append(file)
    if not records:
        raise UserError(
            f"none of the {len(without)} pictures in {root} has a caption",
            f"write {Path(without[0]).with_suffix('.txt')} for {without[0]} and so on, or a captions.jsonl; "
            "stages without text take data.captions=False",
        )
    if without:
        first = ", ".join(without[:10])
        warnings.warn(f"{len(without)} pictures in {root} have no caption, left out: {first}", stacklevel=3)
    return records


def _checked(root: Path, table: Path, lines: Iterator[tuple[int, str, str]]) -> list[tuple[str, str]]:
    """The lines of a table of captions, every file of which must exist below the folder."""
    records, missing = [], []
    for number, file, caption in lines:
        where = PurePosixPath(file)
        if where.is_absolute() or ".." in where.parts or "\0" in file:
            raise UserError(
                f"{table}:{number}: '{file}' is outside the folder", "give names relative to the folder"
            )
        caption = " ".join(caption.split())
        if any("\ud800" <= c <= "\udfff" for c in file + caption):
            raise UserError(f"{table}:{number} holds half of a surrogate pair, which is no text")
        if not caption:
            raise UserError(f"{table}:{number}: '{file}' has an empty caption")
        if (root / file).is_file():
            records.append((where.as_posix(), caption))
        else:
            missing.append(file)
    if not records:
        raise UserError(
            f"{table} names no picture that exists" + (f"; the first: {missing[0]}" if missing else "")
        )
    if missing:
        warnings.warn(
            f"{table} names {len(missing)} files that do not exist: {', '.join(missing[:10])}", stacklevel=4
        )
    return sorted(records)


def _from_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(read_text(path, "a table of captions", MAX_TABLE_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(
                f'{path}:{number} is not {{"file": …, "caption": …}} ({type(e).__name__}: {e})'
            ) from e
        if not (isinstance(file, str) and isinstance(caption, str)):
            raise UserError(f"{path}:{number}: file and caption must be texts")
        yield number, file, caption


def _from_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(io.StringIO(read_text(path, "a table of captions", MAX_TABLE_BYTES), newline=""))
    try:
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path} has the columns {reader.fieldnames}, needed are file and caption")
        for row in reader:
            yield reader.line_num, row["file"] or "", row["caption"] or ""
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num} is not a line of a table ({e})") from e
