"""Weights of others, read array by array from safetensors or torch files; nothing in a file is ever run.

    with open_weights("clip-vit-large-patch14") as weights:
        weights.shapes                     # {name: shape}
        weights.take("logit_scale")        # one array
"""

import functools
import re
import warnings
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.interop import torch_files
from unclip_jax.storage import read_json, refuse_stand_in, sha256
from unclip_jax.tensors import DTYPES, read_array, read_header
from unclip_jax.weights import is_stack

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model", "open_clip_pytorch_model")
TORCH = (".bin", ".pt", ".pth", ".ckpt")
HUB_FILES = ("*.safetensors", "*.json", "merges.txt", "*/merges.txt", "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Weights:
    """The arrays of one network by name, each read when it is taken. A context manager.

    Attributes:
      shapes: {name: shape} of all.
    """

    def __init__(self, readers: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]):
        self.shapes = {name: shape for name, (shape, _) in readers.items()}
        self._readers = readers

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arrays."""
        return tuple(self.shapes)

    def take(self, name: str) -> np.ndarray:
        """The array, in its stored dtype; UserError where it holds NaN or infinite values."""
        array = self._readers[name][1]()
        if array.dtype.kind not in "biu" and not np.isfinite(array).all():
            raise UserError(f"array {name} holds NaN or infinite values", "give weights that training left sound")
        return array

    def close(self) -> None:
        """Lets go of the files."""
        self._readers = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def joined(*parts: Weights, **arrays: np.ndarray) -> Weights:
    """The arrays of several as one, and `arrays` that are in none of them; closing the parts is left to the caller."""
    readers = {name: (array.shape, lambda array=array: array) for name, array in arrays.items()}
    for part in parts:
        readers |= {name: (part.shapes[name], functools.partial(part.take, name)) for name in part.names}
    return Weights(readers)


class Source(NamedTuple):
    """Where weights lie here, and what to call them: a hub's "org/name", or the name of the folder or file."""

    path: Path
    name: str


def locate(source: str) -> Source:
    """A local path as it is; else a hub's "org/name", of which the safe files are fetched (or found in its cache).

    Raises:
      UserError: no such path, and no such repository or no network.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Source(path, path.resolve().name)
    if not _HUB_ID.fullmatch(str(source)) or path.parent.exists():
        raise UserError(f"{source} does not exist", "give a directory or a file of weights, or a hub's org/name")
    from huggingface_hub import snapshot_download

    try:
        return Source(Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES))), str(source))
    except Exception as error:  # network, proxy, authentication, HTTP and cache errors of several packages
        what = f"{source} is no local path, and the hub did not give it ({type(error).__name__})"
        raise UserError(what, "download it where there is a network, and give its directory") from None


def check_sha256(file: Path, wanted: str) -> None:
    """Raises UserError unless `file` is one file, of that SHA-256 in 64 hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise UserError(f"sha256={wanted!r} must be 64 hexadecimal digits")
    if not file.is_file():
        raise UserError(f"{file} is a directory, and a SHA-256 is of one file", "give the file, or no SHA-256")
    found = sha256(file)
    if found != wanted.lower():
        raise UserError(f"{file} has the SHA-256 {found}, not {wanted}", "download it again, and do not trust this one")


def open_weights(path: str | Path) -> Weights:
    """Opens the weights of a file, or of a directory: safetensors if it has them, else a torch file.

    Args:
      path: with "model.safetensors", "diffusion_pytorch_model.bin" or such, whole or in shards with an index.

    Raises:
      UserError: no weights there, or a file that is not what it should be, in one line.
    """
    file = _file(Path(path).expanduser())
    readers = _sharded(file) if file.suffix == ".json" else _readers(file)
    if readers and all(name.startswith("module.") for name in readers):
        warnings.warn(f"the arrays of {file.name} are named 'module.…', as DDP does; read without that", stacklevel=2)
        readers = {name.removeprefix("module."): reader for name, reader in readers.items()}
    return Weights(readers)


def spare_others(out: Path, marker: str, own: str, overwrite: bool) -> None:
    """UserError where `out` would be overwritten and is not ours: its file `marker`, JSON, lacks the key `own`."""
    if overwrite and out.exists() and not ((out / marker).is_file() and own in read_json(out / marker)):
        raise UserError(f"{out} is the work of others, so it is not overwritten", "choose another directory")


def _file(path: Path) -> Path:
    """The file of weights, or the index of its shards."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist", "give a directory or a file of weights")
    for suffix in (".safetensors", ".bin", ".pt", ".pth"):
        for name in (f"{stem}{suffix}{index}" for stem in STEMS for index in ("", ".index.json")):
            if (path / name).is_file():
                return path / name
    for suffixes in ((".safetensors",), TORCH):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise UserError(f"{path} holds several files of weights: {names}", "give one of the files")
        if found:
            return found[0]
    raise UserError(*_no_weights(path))


def _no_weights(path: Path) -> tuple[str, str]:
    names = {entry.name for entry in path.iterdir()}
    if is_stack(path):
        return f"{path} is a stack of unclip_jax already", "use it as it is, or convert it with --to"
    if names & {"checkpoints", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding", "commit_success.txt"}:
        return f"{path} is a training run's checkpoint of Orbax", "make a stack of it with `unclip export`"
    if "model_index.json" in names:
        return f"{path} is a whole pipeline of diffusers, not one network", "give --from karlo, or one of its folders"
    return f"{path} holds no weights", "give a directory with model.safetensors or pytorch_model.bin"


def _sharded(index: Path) -> dict:
    """Readers of all arrays that an index tells of; its shards are files beside it and nowhere else."""
    table = read_json(index, "an index of shards").get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} is no index of shards: it has no weight_map")
    shards = {}
    for name in sorted(set(map(str, table.values()))):
        if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
            raise UserError(f"{index} names the shard {name!r}, which is outside its directory", "do not trust it")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, though {index.name} lists it", "copy all shards")
        shards[name] = _readers(index.parent / name)
    absent = [name for name, shard in table.items() if name not in shards[str(shard)]]
    if absent:
        raise UserError(f"{index} lists {absent[0]} in {table[absent[0]]}, which has no such array", "copy it again")
    return {name: shards[str(shard)][name] for name, shard in table.items()}


def _readers(file: Path) -> dict:
    """{name: (shape, function that reads it)} of one file, told by its first bytes, whatever its name."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    refuse_stand_in(file, start)
    if start.startswith(b"PK"):
        return _checked(file, torch_files.arrays(file), torch_files.KINDS)
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise UserError(f"{file} is a pickle, which could run code when read", "give safetensors instead")
    if file.suffix != ".safetensors" and start[8:9] != b"{":
        raise UserError(f"{file} is of an unknown format", "give a safetensors or a torch file")
    places = read_header(file).items()
    arrays = [(name, at.dtype, at.shape, functools.partial(read_array, file, at)) for name, at in places]
    return _checked(file, arrays, DTYPES)


def _checked(file: Path, arrays: Iterable[tuple], kinds: Container[str]) -> dict:
    """`_readers` of (name, dtype's name, shape, function that reads it); UserError for a dtype not of `kinds`."""
    readers = {}
    for name, kind, shape, take in arrays:
        if kind not in kinds:
            known = "float32, float16, bfloat16, float64 or whole numbers"
            raise UserError(f"{file}: {name} is of dtype {kind}; expected {known}", "give the weights unquantised")
        readers[name] = (shape, take)
    return readers
