"""A folder of pictures with captions, the user's own data.

Captions come from the first of these that is there:

    captions.jsonl   {"file": "sub/a.png", "caption": "…"} a line; a file may have several lines
    captions.csv     a table with the columns file and caption, separated by commas
    a.txt            beside a.png, the whole text being one caption
    metadata.jsonl, metadata.csv   the same tables as Hugging Face's imagefolder writes them: file_name and text

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
from unclip_jax.data.source import EmptySplit, Source, check_arguments, hashed
from unclip_jax.errors import UserError
from unclip_jax.storage import read_text, sha256

SPLITS = ("train", "test", "heldout", "all")
HELD_OUT_PERCENT = 2
MAX_CAPTION_BYTES = 64 << 10
MAX_TABLE_BYTES = 1 << 30
OWN, HUGGING_FACE = ("file", "caption"), ("file_name", "text")  # what tables call a picture's file and its caption
TABLES = {"captions.jsonl": OWN, "captions.csv": OWN, "metadata.jsonl": HUGGING_FACE, "metadata.csv": HUGGING_FACE}


class Folder(Source):
    """Pictures below `path`, cut to their central square and resized, in the order of their names.

    Args:
      path: the folder; "~" is the user's own.
      split: "train", 98 %; "test" or "heldout", the other 2 %; "all".
      size: side in pixels.
      seed: has no effect; there is nothing to draw.
      captions: False takes every picture with an empty caption, for stages without text (the upsamplers).
      uncaptioned: takes pictures without a caption as well, unless a table says which there are.
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
        uncaptioned: bool = False,
        max_bad: float = 0.1,
    ):
        check_arguments("folder", "a folder of pictures", path, split, SPLITS, max_bad)
        self.path, self.split, self.size, self.max_bad = Path(os.path.expanduser(path)), split, size, max_bad
        if not self.path.is_dir():
            raise UserError(f"data.path='{path}' is not a folder", "give a folder that holds pictures")
        records = _records(self.path, uncaptioned) if captions else [(file, "") for file in _pictures(self.path)]
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
        square = center_crop_resize(image, self.size)
        return {"image": square, "caption": caption, "file": file, "pixels": image.size}

    def caption(self, i: int) -> str:
        return self.records[i][1]

    def digest(self, num: int) -> str:
        """Of names, captions and the bytes of the files."""
        records = self.records[:num]
        return hashed(itertools.chain(*records, contents([self.path / file for file, _ in records])))


def contents(files: Sequence[Path]) -> list[bytes]:
    """Each file's SHA-256, as bytes; nothing of one that cannot be read, which is told of when its picture is."""

    def content(file: Path) -> bytes:
        try:
            return bytes.fromhex(sha256(file)) if file.is_file() else b""  # a device has no end
        except OSError:
            return b""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(content, files))


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


def _records(root: Path, every: bool) -> list[tuple[str, str]]:
    """(file, caption) of every picture that has a caption, or of every one, sorted by file."""
    there = [name for name in TABLES if (root / name).is_file()]
    if there and TABLES[there[0]] == OWN:
        return _from_table(root, root / there[0])
    records, without = [], []
    for file in _pictures(root):
        text = (root / file).with_suffix(".txt")
        caption = " ".join(read_text(text, "a caption", MAX_CAPTION_BYTES).split()) if text.is_file() else ""
        if caption:
            records.append((file, caption))
        else:
            without.append(file)
    if not records and there:
        return _from_table(root, root / there[0])
    if every:
        return sorted([*records, *((file, "") for file in without)])
    if not records:
        raise UserError(
            f"none of the {len(without)} pictures in {root} has a caption",
            f"write {Path(without[0]).with_suffix('.txt')} for {without[0]} and so on, or a captions.jsonl; "
            "stages without text take data.captions=False",
        )
    if without:
        more = f"; {there[0]} is not read where there are .txt files" if there else ""
        what = f"{len(without)} pictures in {root} have no caption, left out: {_first(without)}{more}"
        warnings.warn(what, stacklevel=3)
    return records


def _from_table(root: Path, table: Path) -> list[tuple[str, str]]:
    """The lines of a table that have a caption; every file must lie below the folder, and some must exist."""
    read = _from_jsonl if table.suffix == ".jsonl" else _from_csv
    records, missing, empty = [], [], []
    for number, file, caption in read(table, *TABLES[table.name]):
        where = PurePosixPath(file)
        if where.is_absolute() or ".." in where.parts or "\0" in file:
            raise UserError(
                f"{table}:{number}: '{file}' is outside the folder", "give names relative to the folder"
            )
        caption = " ".join(caption.split())
        if any("\ud800" <= c <= "\udfff" for c in file + caption):
            raise UserError(f"{table}:{number} holds half of a surrogate pair, which is no text")
        if not caption:
            empty.append(f"{table.name}:{number}")
        elif os.path.isfile(root / file):  # of Path's, 3.11 raises for a name that is too long
            records.append((where.as_posix(), caption))
        else:
            missing.append(file)
    fix = "write / between folder and file, not \\" if any("\\" in file for file in missing) else ""
    if not records and missing:
        raise UserError(f"{table} names no picture that exists; the first: {missing[0]}", fix)
    if not records:
        what = f"; {len(empty)} have an empty caption: {_first(empty)}" if empty else ""
        raise UserError(f"{table} names no picture with a caption{what}")
    if missing:
        what = f"{table} names {len(missing)} files that do not exist: {_first(missing)}"
        warnings.warn(f"{what}; {fix}" if fix else what, stacklevel=4)
    if empty:
        what = f"{len(empty)} lines of {table} have an empty caption, left out: {_first(empty)}"
        warnings.warn(what, stacklevel=4)
    return sorted(records)


def _first(names: list[str]) -> str:
    return ", ".join(names[:10])


def _from_jsonl(path: Path, file_key: str, caption_key: str) -> Iterator[tuple[int, str, str]]:
    """(number of the line, file, caption) of each line."""
    for number, line in enumerate(read_text(path, "a table of captions", MAX_TABLE_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, caption = entry[file_key], entry[caption_key]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            form = f'{{"{file_key}": …, "{caption_key}": …}}'
            raise UserError(f"{path}:{number} is not {form} ({type(e).__name__}: {e})") from e
        if not (isinstance(file, str) and isinstance(caption, str)):
            raise UserError(f"{path}:{number}: {file_key} and {caption_key} must be texts")
        yield number, file, caption


def _from_csv(path: Path, file_key: str, caption_key: str) -> Iterator[tuple[int, str, str]]:
    """(number of the last line, file, caption) of each row."""
    text = read_text(path, "a table of captions", MAX_TABLE_BYTES)
    # strict: else a quote that is never closed takes the rest of the table for one caption
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if not {file_key, caption_key} <= set(columns):
            other = next((c for c in ";\t|" if {file_key, caption_key} <= set("".join(columns).split(c))), None)
            fix = f"separate the columns by commas, not by {other!r}" if other else "begin with a line of these names"
            raise UserError(f"{path} has the columns {columns}, needed are {file_key} and {caption_key}", fix)
        for row in reader:
            surplus = row.pop(None, [])
            if any(field.strip() for field in surplus):
                what = f"{path}:{reader.line_num} has {len(columns) + len(surplus)} fields, and there are "
                fix = 'put captions with commas in quotes: a.png,"a dog, and a cat"'
                raise UserError(f"{what}{len(columns)} columns", fix)
            if not any(field and field.strip() for field in row.values()):
                continue
            if row[file_key] is None or row[caption_key] is None:
                what = f"{path}:{reader.line_num} has fewer fields than the {len(columns)} columns {', '.join(columns)}"
                raise UserError(what, "give every line all of them")
            yield reader.line_num, row[file_key], row[caption_key]
    except csv.Error as e:
        fix = "close every quote, and write a quote within quotes twice"
        raise UserError(f"{path}:{reader.line_num + 1} is not a line of a table ({e})", fix) from e
