"""Files and directories that are there whole or not at all, and texts read with a bound on their size."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unclip_jax.errors import UserError

WEIGHTS = (".json", ".safetensors")  # files of what `new_directory` makes
MAX_JSON_BYTES = 16 * 2**20  # a safetensors header or an index; real ones are below 4 MB


def user_cache() -> Path:
    """The folder of what can be made anew, $XDG_CACHE_HOME/unclip_jax or ~/.cache/unclip_jax; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unclip_jax"


def sha256(file: Path) -> str:
    """A file's SHA-256, 64 hexadecimal digits; OSError where it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_new(out: Path, kind: str, marker: str, overwrite: bool = False) -> None:
    """Raises UserError where `new_directory` would because of what is at `out`."""
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise UserError(f"{out} exists", "choose another directory, or ask to replace it (--overwrite)")
    if (out.exists() or out.is_symlink()) and not (out / marker).is_file():
        raise UserError(f"{out} exists and is not a {kind}, so it is not overwritten", "choose another directory")
    if foreign := [file for file in sorted(out.rglob("*")) if not file.is_dir() and file.suffix not in WEIGHTS]:
        what = f"{out} holds {foreign[0].relative_to(out)}, which is no part of a {kind}, so it is not overwritten"
        raise UserError(what, "move that elsewhere, or choose another directory")


@contextlib.contextmanager
def new_directory(out: Path, kind: str, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `out` to fill; it is renamed to `out` at the end, or removed if that fails.

    Args:
      out: the directory to make.
      kind: what it will be, such as "stack"; for the messages.
      marker: the file that tells such a directory; only one that has it is overwritten.
      overwrite: replace the one that is there, if it holds nothing else.

    Raises:
      UserError: `out` exists, or cannot be written.
    """
    check_new(out, kind, marker, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out.parent} must be a writable folder ({error.strerror})") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        _swap_in(temporary, out)
    except OSError as error:
        raise UserError(f"{kind} {out} could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises OSError unless files can be written into a folder or, where it is not there, above it; makes nothing."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    with tempfile.TemporaryFile(dir=there):  # permissions alone do not tell, least of all to root
        pass


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a temporary file in the folder of `path` to fill; it is renamed to `path`, or removed if that fails.

    Raises:
      OSError: the folder is not there or not writable, or writing fails.
    """
    path = Path(path)
    descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def digest(values) -> str:
    """16 hexadecimal digits that tell these JSON values from others."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_text(file: Path, what: str = "a text", most: int = MAX_JSON_BYTES, fix: str = "") -> str:
    """The text of a UTF-8 file; a byte order mark at its beginning is left out.

    Args:
      what: what the file is to be, for the messages.
      most: bytes that it may have.
      fix: the remedy, where it is missing, too large or no text.

    Raises:
      UserError: it is missing, no file, larger, not UTF-8, or cannot be read.
    """
    try:
        if not file.exists():
            raise UserError(f"{file} is missing; expected {what}", fix)
        if not file.is_file():
            raise UserError(f"{file} cannot be read: it is no file; expected {what}", fix)
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    refuse_stand_in(file, content[:64])
    if len(content) > most:
        raise UserError(f"{file} is too large: {what} has at most {most} bytes", fix)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{file} is not UTF-8 text ({where})", fix or "save it as UTF-8") from error


def read_json(file: Path, what: str = "a config", most: int = MAX_JSON_BYTES, fix: str = "") -> dict:
    """The JSON object in a file; UserError as of `read_text`, or where it holds none."""
    return json_object(read_text(file, what, most, fix), str(file))


def json_object(text: str, where: str) -> dict:
    """The JSON object that a text is; UserError where it is none, `where` naming the text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(content).__name__}")
    return content


def write_text(file: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all, and makes its folder; UserError where that fails."""
    with writing(file) as stream:
        stream.write(text.encode(errors="backslashreplace"))  # a folder's name may be no text; JSON gives it back


@contextlib.contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """`new_file`, in a folder that is made where it is not there; UserError where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error})") from error


def refuse_stand_in(file: Path, start: bytes) -> None:
    """Raises UserError where the first bytes are of what is often found in a file's place."""
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, not the file itself", "run git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{file} is a web page, not the file itself", "download the file that the page offers")


def _swap_in(temporary: Path, out: Path) -> None:
    """Renames `temporary` to `out`; what was there is put back if that fails, else removed."""
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        temporary.rename(out)
    except BaseException:  # a signal too
        if not out.exists():
            (old / out.name).rename(out)
        raise
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
