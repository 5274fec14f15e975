"""Drawn pictures on disk: safe names, a labelled grid, and a folder that appears whole or not at all.

    grid.png                                     every picture with its label
    000-a-red-circle-1f2e3d4c-00.png             row 000, its words, a hash of them, picture 00
    pictures.json                                what each file shows and how it was drawn
    index.html                                   all of it as one page without other files, where asked for
    animation.webp, animation.gif                where the pictures are frames

A name holds only a-z, 0-9 and "-", starts with a digit and has fewer than 80 characters, whatever the prompt;
the prompt itself is in pictures.json and in each PNG's metadata. The same pictures give the same bytes.
"""

import base64
import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import unclip_jax
from unclip_jax.errors import UserError
from unclip_jax.storage import check_writable, write_text, writing

INDEX = "pictures.json"
GRID = "grid.png"
PAGE = "index.html"
ANIMATIONS = ("animation.webp", "animation.gif")
GRID_PIXELS = 36_000_000  # a larger grid shows the first rows only, of a row beyond it the first pictures
GRID_LEAST = 8  # pictures of a row that are shown in any case; rows of one picture stand side by side
LEAST_CELL = 160  # pixels across; a narrower picture leaves no room for its label
FRAME_MS, HOLD_MS = 120, 720  # of an animation; its ends are held
PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>unclip_jax</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>
body { font: 14px/1.4 sans-serif; margin: 1.5em; color: #222 }
section { display: flex; flex-wrap: wrap; gap: 1em; margin-bottom: 1.5em }
figure { margin: 0; width: 168px } img { width: 160px; image-rendering: pixelated; border: 1px solid #ccc }
figcaption { overflow-wrap: anywhere } dl { color: #666; font-size: 11px; margin: .3em 0 }
dt { float: left; margin-right: .4em } dt::after { content: ":" } dd { margin: 0 }
</style></head><body>
"""
PAGE_END = "</body></html>\n"
ROW, ROW_END = "<section>\n", "</section>\n"


class Picture(NamedTuple):
    """One picture of a folder: u8[H, W, 3], the label under it, and JSON facts of its own ({"prompt": …})."""

    image: np.ndarray
    label: str
    about: Mapping[str, Any] = {}


def file_name(words: str, row: int, index: int) -> str:
    """The name of picture `index` of a row, such as "000-a-red-circle-1f2e3d4c-00.png"."""
    ascii_ = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_)[:48].strip("-") or "prompt"
    digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{row:03d}-{slug}-{digest}-{index:02d}.png"


def check_folder(out: str | os.PathLike, overwrite: bool = False) -> Path:
    """The folder to write, known to be absent, empty or given up to be overwritten; makes nothing.

    Raises:
      UserError: it is a file, holds something, or cannot be written.
    """
    out = _writable(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={str(out)!r} is a file, and a folder is needed", "give another --out")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise UserError(f"out={str(out)!r} exists and is not empty", "give another --out, or add --overwrite")
    return out


def check_file(out: str | os.PathLike, suffix: str, overwrite: bool = False) -> Path:
    """The file to write, known to be absent or given up to be overwritten; makes nothing."""
    out = _writable(out)
    if out.suffix.lower() != suffix:
        raise UserError(f"out={str(out)!r} must end in {suffix}")
    if out.is_dir():
        raise UserError(
            f"out={str(out)!r} is a folder, and a file is needed", f"name a file ending in {suffix}"
        )
    if out.exists() and not overwrite:
        raise UserError(f"out={str(out)!r} exists", "give another name, or add --overwrite")
    return out


def write_image(path: Path, image: np.ndarray, metadata: Mapping | None = None) -> None:
    """Writes u8[H, W, 3] as PNG, whole or not at all; its folder is made."""
    from unclip_jax.data import images

    content = images.png(image, metadata)
    with writing(path) as stream:
        stream.write(content)


def data_uri(image: np.ndarray) -> str:
    """u8[H, W, 3] as the address of a PNG that is in itself."""
    from unclip_jax.data import images

    return "data:image/png;base64," + base64.b64encode(images.png(image)).decode()


def write(
    out: Path,
    rows: Iterable[tuple[str, Iterable[Picture]]],
    facts: Mapping,
    *,
    page: bool = False,
    animated: bool = False,
    overwrite: bool = True,
) -> list[Path]:
    """Writes a folder of pictures and returns the new files.

    In a folder that is there, what an earlier call wrote (by its pictures.json) is replaced, and other files are
    left alone. Where `rows` breaks off, by an error or a stop signal, the folder holds the pictures before, a warning
    says so, and what broke it off is raised; without a picture before it, nothing is written.

    Args:
      rows: (words for the files' names, pictures side by side), of which one picture is held at a time, beside those
        that the grid shows; all rows as long, all pictures of one size.
      facts: JSON values that hold for every picture: seed, model, settings.
      page: with index.html.
      animated: with the pictures as frames of a WebP and a GIF.
      overwrite: False where `out` was absent or empty: filled by others since, it is left alone, and the pictures go to
        a folder beside it.
    """
    with _told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    filled = _Filled(fresh, {"unclip_jax": unclip_jax.__version__, **facts}, page, animated, overwrite)
    try:
        try:
            for number, (words, row) in enumerate(rows):
                for index, picture in enumerate(row):
                    with _told(out, fresh):
                        filled.add(words, number, index, picture)
        except BaseException:
            if filled.pictures:
                where = filled.publish(out)[0].parent
                warnings.warn(f"broken off; the pictures that were finished before are in {where}", stacklevel=2)
            raise
        return filled.publish(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def labelled_grid(pictures: Sequence[Picture], columns: int) -> np.ndarray:
    """One contact sheet, each picture with its label under it; rows of one picture each stand side by side."""
    from unclip_jax.data.images import grid

    height, width, _ = pictures[0].image.shape
    scale = max(1, -(-LEAST_CELL // width))
    room = GRID_PIXELS // (height * width * scale**2)
    shown = pictures[: room // columns * columns or max(room, min(columns, GRID_LEAST))]
    images, labels = np.stack([picture.image for picture in shown]), [picture.label for picture in shown]
    return grid(images, columns if columns > 1 else GRID_LEAST, labels=labels, scale=scale, pad=4)


def _figure(picture: Picture, facts: Mapping) -> str:
    """One picture of the page: as data, every text escaped."""
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in {**picture.about, **facts}.items())
    return (
        f'<figure><img alt="{_text(picture.label)}" src="{data_uri(picture.image)}">'
        f"<figcaption><bdi>{_text(picture.label)}</bdi><dl>{rows}</dl></figcaption></figure>\n"
    )


class _Filled:
    """An empty folder that is filled picture by picture, and then becomes another's content."""

    def __init__(self, folder: Path, facts: Mapping, page: bool, animated: bool, overwrite: bool):
        self.folder, self.facts, self.page, self.animated = folder, facts, page, animated
        self.pictures, self.labels, self.shown, self.frames = [], [], [], []
        self.columns = 0  # of the first row
        self.overwrite = overwrite

    def add(self, words: str, row: int, index: int, picture: Picture) -> None:
        """Writes one picture more, the next of its row or the first of the next one."""
        file = file_name(words, row, index)
        write_image(self.folder / file, picture.image, {**picture.about, **self.facts})
        if self.page:
            before = "" if index else ROW_END + ROW if row else PAGE_HEAD + ROW
            with (self.folder / PAGE).open("a", encoding="utf-8") as stream:
                stream.write(before + _figure(picture, self.facts))
        if len(self.shown) < max(GRID_LEAST, -(-GRID_PIXELS // picture.image[..., 0].size)):
            self.shown.append(picture)
        self.frames += [picture.image] * self.animated
        self.columns += row == 0
        self.labels.append({"label": picture.label, **picture.about})
        self.pictures.append({"file": file, **picture.about})

    def publish(self, out: Path) -> list[Path]:
        """Writes what shows all rows, the index last, and moves everything to `out`.

        To a folder beside it where somebody has filled that since, which nobody has given up to be overwritten, or
        where a folder there has a file's name.
        """
        with _told(out, self.folder):
            extra = [PAGE] * self.page + list(ANIMATIONS) * self.animated
            names = [GRID, *(picture["file"] for picture in self.pictures), *extra, INDEX]
            for file in self.folder.iterdir():
                if file.name not in names:  # of a picture that was broken off
                    file.unlink()
            about = {**self.facts, "pictures": self.labels}
            write_image(self.folder / GRID, labelled_grid(self.shown, self.columns), about)
            if self.page:
                with (self.folder / PAGE).open("a", encoding="utf-8") as stream:
                    stream.write(ROW_END + PAGE_END)
            if self.animated:
                _animate(self.folder, self.frames)
            index = {**self.facts, "pictures": self.pictures, "also": extra}
            write_text(self.folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            self.folder.chmod(0o755)
            folders = [name for name in names if (out / name).is_dir()]
            if folders or not self.overwrite and out.is_dir() and any(out.iterdir()):
                taken, number = out, 2
                while (out := taken.with_name(f"{taken.name}-{number}")).exists():
                    number += 1
                why = f"holds a folder named {folders[0]}" if folders else "was filled meanwhile"
                warnings.warn(f"{taken} {why}; the pictures are in {out}", stacklevel=3)
            if not out.exists():
                self.folder.rename(out)
            else:
                for name in set(_earlier(out)) - set(names):
                    (out / name).unlink(missing_ok=True)
                for name in names:  # the index last: it names only what is there
                    os.replace(self.folder / name, out / name)
        return [out / name for name in names]


@contextlib.contextmanager
def _told(out: Path, fresh: Path | None = None):
    """What cannot be written, as a UserError that names `out`, and no folder beside it that will soon be gone."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be written ({error.strerror or error})") from error
    except UserError as error:
        raise UserError(str(error).replace(str(fresh), str(out))) from error


def _animate(folder: Path, images: Sequence[np.ndarray]) -> None:
    """Frames there and back, without end; small pictures enlarged by whole pixels."""
    from PIL import Image

    scale = max(1, -(-LEAST_CELL // images[0].shape[1]))
    frames = [Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)) for image in images]
    times = [HOLD_MS, *[FRAME_MS] * (len(frames) - 2), HOLD_MS][: len(frames)]
    frames, times = frames + frames[-2:0:-1], times + times[-2:0:-1]
    webp, gif = (folder / name for name in ANIMATIONS)
    frames[0].save(webp, save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True)
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)


def _text(value) -> str:
    """A value as HTML text; what is not printable, such as marks that turn the direction of writing, as its code."""
    value = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in value))


def _earlier(out: Path) -> list[str]:
    """What an earlier call wrote into `out` by its index: plain PNG names, and its page and animations."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        names = [picture["file"] for picture in index["pictures"]]
        own = [name for name in names if re.fullmatch(r"\d+-[a-z0-9-]+\.png", name)]
        return own + [name for name in (PAGE, *ANIMATIONS) if name in index.get("also", ())]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _writable(out: str | os.PathLike) -> Path:
    """The path, once its nearest existing ancestor is known to be a writable folder."""
    if not str(out) or "\0" in str(out):
        raise UserError(f"out={str(out)!r} must be a path")
    path = Path(out).expanduser()
    if path.is_symlink() and not path.exists():
        raise UserError(f"out={str(out)!r} is a link to nothing", "give another --out, or remove the link")
    try:
        check_writable(path if path.is_dir() else path.absolute().parent)
    except NotADirectoryError as error:
        what = f"out={str(out)!r} cannot be made: {error.filename} is a file"
        raise UserError(what, "give another --out") from error
    except OSError as error:
        raise UserError(
            f"out={str(out)!r} is not writable ({error.strerror or error})", "give another --out"
        ) from error
    return path
