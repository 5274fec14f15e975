"""Every format that `unclip convert` knows, by name."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from unclip_jax import weights
from unclip_jax.errors import UserError, suggest
from unclip_jax.interop import glide, hf_clip, hf_clip_write, inception, karlo, open_clip
from unclip_jax.interop.files import Source, check_sha256, locate
from unclip_jax.interop.stages import Converted
from unclip_jax.storage import check_new, read_json

# (where the weights lie, a tokenizer's folder or None) → what `weights.save_stack` takes.
READERS: dict[str, Callable[[Source, str | None], Converted]] = {
    "hf-clip": hf_clip.read,
    "open-clip": open_clip.read,
    "karlo": karlo.read_stack,
    "glide": glide.read_stack,
}
# (stack, directory to make, dtype, overwrite) → its path.
WRITERS: dict[str, Callable[..., Path]] = {
    "hf-clip": hf_clip_write.write,
    "karlo": karlo.write_stack,
}
# Networks that are no stage of a stack: (where the weights lie, directory to make, overwrite) → its path.
ALONE: dict[str, Callable[..., Path]] = {"inception": inception.convert}


def convert_in(
    name: str,
    source: str,
    out: str | os.PathLike,
    tokenizer: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    sha256: str | None = None,
) -> Path:
    """Writes the stack directory `out` from weights of the format `name`; returns its path.

    Args:
      name: one of `READERS`, or of `ALONE`, whose directory is no stack and holds float32.
      source: a local file or directory, or a hub's "org/name".
      tokenizer: a folder with the tokenizer, where there is none beside the weights.
      dtype: "float32" or "bfloat16", of the stored weights.
      overwrite: replace a stack that is there.
      sha256: what the file of weights must have, where `source` is one file.

    Raises:
      UserError: whatever keeps the weights from being read, understood or written, in one line.
    """
    if name not in (*READERS, *ALONE):
        raise UserError(f"format {name!r} is unknown", suggest(name, [*READERS, *ALONE]))
    if name in ALONE and (tokenizer is not None or dtype != "float32"):
        raise UserError(f"{name} has no tokenizer, and is kept in float32", "leave out --tokenizer and --dtype")
    if name in READERS:
        check_new(Path(out).expanduser(), "stack", "stack.json", overwrite)  # before gigabytes are read
    found = locate(source)
    if sha256 is not None:
        check_sha256(found.path, sha256)
    if name in ALONE:
        return ALONE[name](found, Path(out), overwrite)
    likely = _formats_of(found.path)
    if likely and name not in likely:
        raise UserError(f"{source} is in another format than {name}", f"give --from {likely[0]}")
    stages, words = READERS[name](found, tokenizer)
    return weights.save_stack(out, stages, words, dtype, overwrite)


def convert_out(
    name: str, stack: str | os.PathLike, out: str | os.PathLike, dtype: str = "float32", overwrite: bool = False
) -> Path:
    """Writes the directory `out` in the format `name`, one of `WRITERS`, from a stack; returns its path."""
    if name not in WRITERS:
        raise UserError(f"format {name!r} is unknown", suggest(name, WRITERS))
    return WRITERS[name](stack, out, dtype, overwrite)


def _formats_of(path: Path) -> list[str]:
    """The formats that the files of a directory are of, as far as their names and config.json tell."""
    if not path.is_dir():
        return []
    marks = {"karlo": ("model_index.json",), "open-clip": ("open_clip_config.json",)}
    marks["glide"] = ("base.pt", "base.safetensors")
    found = [name for name, files in marks.items() if any((path / file).is_file() for file in files)]
    with contextlib.suppress(UserError):  # a config.json that cannot be read is no mark
        if read_json(path / "config.json").get("model_type") in hf_clip.KINDS:
            found.append("hf-clip")
    return found
