"""Where pictures to measure come from: a stack that draws captions, a folder of drawn ones, a source of real ones.

Each is a sequence that is read block by block, so that no more than a block of pictures is ever in memory.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from unclip_jax import data, gallery
from unclip_jax.data import folder as data_folder
from unclip_jax.data.images import FORMATS, SUFFIXES, BadImage, center_crop_resize, open_image
from unclip_jax.data.source import hashed
from unclip_jax.errors import UserError
from unclip_jax.storage import read_json

MAX_BAD = 0.01  # share of the pictures to be measured that may be unreadable; of real ones their source says it
MAX_INDEX_BYTES = 256 << 20


class PictureBlock(NamedTuple):
    """Pictures u8[n, S, S, 3], their captions (None where there are none), and how many were unreadable."""

    images: np.ndarray
    captions: list[str] | None
    bad: int = 0


class Pictures(Protocol):
    """What the protocol measures."""

    about: dict[str, Any]  # JSON values that decide every pixel
    size: int

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> PictureBlock:
        """Pictures start … stop - 1."""


class DrawnPictures:
    """Pictures that a stack draws, picture i decided by caption i, its index, the seed and the settings alone.

    Args:
      draw: (captions, index of the first) → u8[N, S, S, 3].
      captions: one for each picture.
      size: S.
      about: JSON values that decide, with the captions, what is drawn: the model's identity, seed, settings.
    """

    def __init__(self, draw: Callable[[Sequence[str], int], np.ndarray], captions: Sequence[str], size: int, about):
        self.draw, self.captions, self.size = draw, list(captions), size
        self.about = {**about, "captions": hashed(self.captions)}

    def __len__(self) -> int:
        return len(self.captions)

    def block(self, start: int, stop: int) -> PictureBlock:
        texts = self.captions[start:stop]
        return PictureBlock(self.draw(texts, start), texts)


class RealPictures:
    """The first `num` pictures of a data source; `about`: what decides which source it is."""

    def __init__(self, source, num: int, about: dict):
        if num > len(source):
            raise UserError(f"num={num} is more than the {len(source)} pictures of '{source.name}'", "lower --num")
        self.source, self.num, self.size = source, num, source.size
        own = source.digest(num)
        self.about = {**about, "num": num, **({"records": own} if own else {})}

    def __len__(self) -> int:
        return self.num

    def block(self, start: int, stop: int) -> PictureBlock:
        def read(i):
            record = self.source[i]
            return record["image"], record["caption"]

        return _readable(read, start, stop, self.num, max(MAX_BAD, self.source.max_bad))

    def captions(self) -> list[str]:
        """Of all but those that cannot be read."""
        return list(self.source.captions(self.num))


class PictureFolder:
    """Pictures in a folder, all of one size: as `unclip sample` wrote them, or any, with captions or without.

    Args:
      path: the folder. Captions come from pictures.json (of `unclip sample`), or as the data source "folder" has them.
      num: the first so many; None: all.
      asked: whether captions are asked of them: where some pictures have one, those without are left out.

    Raises:
      UserError: no pictures, of several sizes, one named twice, or fewer than `num`.
    """

    def __init__(self, path: str | os.PathLike, num: int | None = None, asked: bool = False):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"images={str(path)!r} is not a folder", "give a folder of pictures")
        self.files, self.captions = _listed(self.path, asked)
        if doubled := [file for file, count in Counter(self.files).items() if count > 1]:
            raise UserError(f"{self.path} names {doubled[0]} more than once", "measure each picture once")
        if num is not None and num > len(self.files):
            raise UserError(f"num={num} is more than the {len(self.files)} pictures in {path}", "lower --num")
        self.files = self.files[:num]
        self.size = self._look()
        contents = data_folder.contents([self.path / file for file in self.files])
        self.about = {"images": self.path.resolve().name, "files": hashed(self.files), "records": hashed(contents)}

    def _look(self) -> int:
        """The side of the middle squares, from the files' headers."""
        sizes = {}
        for file in self.files:
            try:
                with Image.open(self.path / file, formats=FORMATS) as image:
                    sizes.setdefault(image.size, file)
            except Exception:  # decoders raise nearly anything; it is counted when the picture is read
                continue
        if not sizes:
            raise UserError(f"none of the {len(self.files)} pictures in {self.path} can be read")
        if len(sizes) > 1:
            (a, first), (b, second) = list(sizes.items())[:2]
            what = f"{self.path} holds pictures of several sizes: {first} has {a[0]}x{a[1]}, {second} {b[0]}x{b[1]}"
            raise UserError(what, "bring all to one size before they are measured")
        return min(next(iter(sizes)))

    def __len__(self) -> int:
        return len(self.files)

    def block(self, start: int, stop: int) -> PictureBlock:
        def read(i):
            image = center_crop_resize(open_image(self.path / self.files[i]), self.size)
            return image, self.captions[i] if self.captions else None

        block = _readable(read, start, stop, len(self), MAX_BAD)
        return block if self.captions else block._replace(captions=None)


def source(name: str, size: int, seed: int = 0, path: str | None = None, asked: bool = True) -> tuple[Any, dict]:
    """The data source "NAME" or "NAME:SPLIT" (the split "test", of a folder "all"), and what decides its pictures.

    asked: whether captions are; where not, a folder's pictures need none.
    """
    name, _, split = name.partition(":")
    split = split or ("all" if name == "folder" else "test")
    more = ({} if path is None else {"path": path}) | ({"uncaptioned": not asked} if name == "folder" else {})
    opened = data.make(name, split, size=size, seed=seed, **more)
    about = {"data": name, "split": split, "size": size, "seed": seed, "length": len(opened)}
    if path is not None:
        about["path"] = path if "://" in path else Path(path).resolve().name
    if opened.clip_identity:
        raise UserError(f"data={name!r} holds embeddings, and pictures are measured", "give a source of pictures")
    return opened, about


def _listed(path: Path, asked: bool) -> tuple[list[str], list[str] | None]:
    """(files, captions or None) of a folder."""
    if (path / gallery.INDEX).is_file():
        return _from_index(path)
    names = [p.name for p in path.iterdir()]
    if not any(n.lower().endswith(SUFFIXES) for n in names) and not any((path / n).is_dir() for n in names):
        what = "is empty" if not names else f"holds no pictures, but {', '.join(sorted(names)[:3])}"
        raise UserError(f"{path} {what}", f"pictures end in {', '.join(SUFFIXES)}")
    found = data_folder.Folder(str(path), "all", size=1, uncaptioned=True).records
    if not any(caption for _, caption in found):
        return [file for file, _ in found], None
    if asked:
        found = data_folder.Folder(str(path), "all", size=1).records
    return [file for file, _ in found], [caption for _, caption in found]


def _from_index(path: Path) -> tuple[list[str], list[str] | None]:
    """Files and their prompts, as they are drawn; None where some are of no prompt (variations, edits)."""
    index = path / gallery.INDEX
    facts = read_json(index, "the index of drawn pictures", MAX_INDEX_BYTES)
    try:
        entries = [entry for entry in facts["pictures"] if entry.get("role") != "input"]
        files, prompts = [str(entry["file"]) for entry in entries], [entry.get("prompt") for entry in entries]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{index} is not as `unclip sample` writes it", "draw the folder again") from None
    if unsafe := [file for file in files if Path(file).name != file]:
        raise UserError(f"{index} names {unsafe[0]!r}, which is outside the folder", "do not trust it")
    if any("\ud800" <= c <= "\udfff" for text in (*files, *map(str, prompts)) for c in text):
        raise UserError(f"{index} holds half of a surrogate pair, which is no text", "draw the folder again")
    if missing := [file for file in files if not os.path.isfile(path / file)]:
        what = f"{index} has captions of {len(files)} pictures, and {len(missing)} are missing: {missing[0]}"
        raise UserError(what, "copy the whole folder again")
    if not files:
        raise UserError(f"{index} names no pictures")
    return files, None if None in prompts else [str(prompt) for prompt in prompts]


def _readable(read: Callable[[int], tuple], start: int, stop: int, total: int, max_bad: float) -> PictureBlock:
    """The pictures that can be read; UserError where more than the share `max_bad` of all `total` cannot."""
    images, captions, bad = [], [], []
    for i in range(start, stop):
        try:
            image, caption = read(i)
            images.append(image)
            captions.append(caption)
        except BadImage as error:
            bad.append(str(error))
    if bad:
        if len(bad) > max_bad * total or not images:
            raise UserError(
                f"{len(bad)} of {stop - start} pictures cannot be read, more than {max_bad:.0%} of all; one: {bad[0]}",
                "remove them or mend them",
            )
        warnings.warn(f"{len(bad)} pictures left out; one: {bad[0]}", stacklevel=2)
    return PictureBlock(np.stack(images), captions, len(bad))
