"""Drawn pictures on disk: safe names, a labelled grid, and a folder that appears whole or not at all.

    grid.png                                     every picture with its prompt
    000-a-red-circle-1f2e3d4c-00.png             prompt 000, its words, a hash of it, picture 00
    pictures.json                                what each file shows and how it was drawn

A name holds only a-z, 0-9 and "-", starts with a digit and has fewer than 80 characters, whatever the prompt;
the prompt itself is in pictures.json and in each PNG's metadata. The same pictures give the same bytes.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import unclip_jax
from unclip_jax.errors import UserError

INDEX = "pictures.json"
GRID = "grid.png"
GRID_PIXELS = 36_000_000  # a larger grid shows the first prompts only
LEAST_CELL = 160  # pixels across; a narrower picture leaves no room for its label


def file_name(prompt: str, prompt_index: int, index: int) -> str:
    """The name of picture `index` of a prompt, such as "000-a-red-circle-1f2e3d4c-00.png"."""
    ascii_ = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_)[:48].strip("-") or "prompt"
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{prompt_index:03d}-{slug}-{digest}-{index:02d}.png"


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
    from unclip_jax.data.images import save_png

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image, metadata)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all; its folder is made."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def write(
    out: Path, images: np.ndarray, prompts: Sequence[str], facts: Mapping, ncols: int | None = None
) -> list[Path]:
    """Writes the folder of `images` u8[len(prompts) * num, H, W, 3], prompt by prompt; returns the new files.

    In a folder that is there, the pictures of an earlier call (those its pictures.json names) are replaced,
    and other files are left alone.

    Args:
      facts: JSON values that hold for every picture: seed, model, settings.
      ncols: of the grid; None as of `labelled_grid`.
    """
    num = len(images) // len(prompts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be written ({error.strerror or error})") from error
    try:
        names = _fill(fresh, images, prompts, num, facts, ncols)
        fresh.chmod(0o755)
        if not out.exists():
            fresh.rename(out)
        else:
            for name in set(_earlier(out)) - set(names):
                (out / name).unlink(missing_ok=True)
            for name in names:  # the index last: it names only what is there
                os.replace(fresh / name, out / name)
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return [out / name for name in names]


def labelled_grid(images: np.ndarray, prompts: Sequence[str], num: int, ncols: int | None = None) -> np.ndarray:
    """One contact sheet, each picture with its prompt under it; `ncols` a row, or a prompt's pictures side by side."""
    from unclip_jax.data.images import grid

    scale = max(1, -(-LEAST_CELL // images.shape[2]))
    room = max(num, GRID_PIXELS // (images.shape[1] * images.shape[2] * scale**2) // num * num)
    labels = [prompt for prompt in prompts for _ in range(num)]
    ncols = ncols or (num if num > 1 else min(8, len(prompts)))
    return grid(images[:room], ncols, labels=labels[:room], scale=scale, pad=4)


def _fill(folder: Path, images, prompts, num: int, facts: Mapping, ncols: int | None) -> list[str]:
    """Writes grid, pictures and index into an empty folder; their names, the index last."""
    facts = {"unclip_jax": unclip_jax.__version__, **facts}
    write_image(folder / GRID, labelled_grid(images, prompts, num, ncols), {**facts, "prompts": list(prompts)})
    pictures = []
    for k, image in enumerate(images):
        p, i = divmod(k, num)
        name = file_name(prompts[p], p, i)
        write_image(folder / name, image, {"prompt": prompts[p], "prompt_index": p, "index": i, **facts})
        pictures.append({"file": name, "prompt": prompts[p], "prompt_index": p, "index": i})
    index = {**facts, "num": num, "pictures": pictures}
    write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    return [GRID, *(picture["file"] for picture in pictures), INDEX]


def _earlier(out: Path) -> list[str]:
    """The pictures that an earlier call wrote into `out`: plain PNG names in its index."""
    try:
        pictures = json.loads((out / INDEX).read_text(encoding="utf-8"))["pictures"]
        names = [picture["file"] for picture in pictures]
        return [name for name in names if re.fullmatch(r"\d+-[a-z0-9-]+\.png", name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _writable(out: str | os.PathLike) -> Path:
    """The path, once its nearest existing ancestor is known to be a writable folder."""
    if not str(out) or "\0" in str(out):
        raise UserError(f"out={str(out)!r} must be a path")
    path = Path(out).expanduser()
    try:
        above = path if path.is_dir() else path.absolute().parent
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise UserError(f"out={str(out)!r} cannot be made: {above} is a file", "give another --out")
        with tempfile.TemporaryFile(dir=above):  # permissions alone do not tell, least of all to root
            pass
    except OSError as error:
        raise UserError(
            f"out={str(out)!r} is not writable ({error.strerror or error})", "give another --out"
        ) from error
    return path
