"""Weights of others, read array by array from safetensors or torch files; nothing in a file is ever run.

    with open_weights("clip-vit-large-patch14") as weights:
        weights.shapes                     # {name: shape}
        weights.take("logit_scale")        # one array

Torch files are read by torch's own restricted reader or not at all (torch >= 2.6; before it, the restriction could be
got round: CVE-2025-32434).
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.storage import MAX_JSON_BYTES, read_json, refuse_stand_in, sha256
from unclip_jax.tensors import DTYPES, Place, read_array, read_header

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model", "open_clip_pytorch_model")
TORCH = (".bin", ".pt", ".pth", ".ckpt")
TORCH_SINCE = (2, 6)
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
        readers |= {name: (part.shapes[name], lambda name=name, part=part: part.take(name)) for name in part.names}
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


def open_weights(path: str | Path, variant: str | None = None) -> Weights:
    """Opens the weights of a file, or of a directory: safetensors if it has them, else a torch file.

    Args:
      path: with "model.safetensors", "diffusion_pytorch_model.bin" or such, whole or in shards with an index.
      variant: such as "fp16" for "model.fp16.safetensors"; None takes the one without.

    Raises:
      UserError: no weights there, or a file that is not what it should be, in one line.
    """
    file = _file(Path(path).expanduser(), variant)
    readers = _sharded(file) if file.suffix == ".json" else _readers(file)
    if readers and all(name.startswith("module.") for name in readers):
        warnings.warn(f"the arrays of {file.name} are named 'module.…', as DDP does; read without that", stacklevel=2)
        readers = {name.removeprefix("module."): reader for name, reader in readers.items()}
    return Weights(readers)


def spare_others(out: Path, marker: str, own: str, overwrite: bool) -> None:
    """UserError where `out` would be overwritten and is not ours: its file `marker`, JSON, lacks the key `own`."""
    if overwrite and out.exists() and not ((out / marker).is_file() and own in read_json(out / marker)):
        raise UserError(f"{out} is the work of others, so it is not overwritten", "choose another directory")


def _file(path: Path, variant: str | None) -> Path:
    """The file of weights, or the index of its shards."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist", "give a directory or a file of weights")
    dot = f".{variant}" if variant else ""
    for suffix in (".safetensors", ".bin", ".pt", ".pth"):
        for stem in STEMS:
            names = [f"{stem}{dot}{suffix}", f"{stem}{suffix}.index{dot}.json", f"{stem}{dot}{suffix}.index.json"]
            found = [path / name for name in names if (path / name).is_file()]
            if found:
                return found[0]
    for suffixes in ((".safetensors",), TORCH):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes and not variant)
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise UserError(f"{path} holds several files of weights: {names}", "give one of the files")
        if found:
            return found[0]
    raise UserError(*_no_weights(path, variant))


def _no_weights(path: Path, variant: str | None) -> tuple[str, str]:
    names = {entry.name for entry in path.iterdir()}
    if "stack.json" in names:
        return f"{path} is a stack of unclip_jax already", "use it as it is, or convert it with --to"
    if names & {"checkpoints", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding", "commit_success.txt"}:
        return f"{path} is a training run's checkpoint of Orbax", "make a stack of it with `unclip export`"
    if "model_index.json" in names:
        return f"{path} is a whole pipeline of diffusers, not one network", "give --from karlo, or one of its folders"
    of = f" of the variant {variant!r}" if variant else ""
    return f"{path} holds no weights{of}", "give a directory with model.safetensors or pytorch_model.bin"


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
        return dict(_torch(file))
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise UserError(f"{file} is a pickle, which could run code when read", "give safetensors instead")
    if file.suffix != ".safetensors" and start[8:9] != b"{":
        raise UserError(f"{file} is of an unknown format", "give a safetensors or a torch file")
    return dict(_safetensors(file, read_header(file)))


def _safetensors(file: Path, places: dict[str, Place]) -> Iterator[tuple]:
    for name, place in places.items():
        if place.dtype not in DTYPES:
            _refuse_dtype(file, name, place.dtype)
        yield name, (place.shape, lambda place=place: read_array(file, place))


def _torch(file: Path) -> Iterator[tuple]:
    try:
        import torch
    except ImportError:
        fix = "pip install 'unclip_jax[torch]', or give the same weights as safetensors"
        raise UserError(f"{file} is a torch file, and torch is not installed", fix) from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < TORCH_SINCE:
        raise UserError(f"torch {torch.__version__} reads torch files unsafely", "install torch 2.6 or newer")
    _check_zip(file)
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        content = None if unsafe else _mapped(file)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError and others
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read as weights ({what})", "give the same weights as safetensors") from None
    if unsafe:
        what = f"{file} holds more than weights: {', '.join(unsafe[:5])}; reading it could run code"
        raise UserError(what, "give safetensors, or a file that torch.save made of a state_dict alone")
    state = _state(file, content)
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or kind not in _TORCH_DTYPES:
            _refuse_dtype(file, name, kind)
    shapes, taker = {name: tuple(tensor.shape) for name, tensor in state.items()}, _Taker(file)
    del content, state, tensor
    yield from ((name, (shape, lambda name=name: taker.take(name))) for name, shape in shapes.items())


def _mapped(file: Path):
    """What a torch file holds, its tensors mapped from it."""
    import torch

    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


class _Taker:
    """Copies of a torch file's tensors by name. Pages of a mapped file that were read count as memory of the process as
    long as it is mapped, so after every `LIMIT` bytes it is mapped anew."""

    LIMIT = 2**28

    def __init__(self, file: Path):
        self.file, self.state, self.read = file, None, 0

    def take(self, name: str) -> np.ndarray:
        if self.state is None:
            self.state = _state(self.file, _mapped(self.file))
        array = _array(self.state[name])
        self.read += array.nbytes
        if self.read > self.LIMIT:
            self.state, self.read = None, 0
        return array


_TORCH_DTYPES = {str(dtype) for dtype in DTYPES.values()}


def _array(tensor) -> np.ndarray:
    """A copy of a tensor: numbers outlive the file they were mapped from."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["BF16"]).copy()
    return tensor.detach().numpy().copy()


def _check_zip(file: Path) -> None:
    """Refuses by its directory a zip that is damaged, compressed (torch's are not) or a program."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"{file} is truncated or no torch file", "copy it again") from None
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", entry.filename) for entry in entries):
        raise UserError(f"{file} is a TorchScript program, not weights", "give safetensors of the same network")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{file} is a zip, but no torch file", "give a safetensors or a torch file")
    whole = sum(entry.file_size for entry in entries)
    if any(entry.compress_type for entry in entries) or whole > file.stat().st_size:
        raise UserError(f"{file} is compressed to a part of its size, which torch never does", "do not trust it")
    if pickles[0].file_size > MAX_JSON_BYTES:
        raise UserError(f"{file} has a directory of {pickles[0].file_size} bytes, more than {MAX_JSON_BYTES} allowed")


def _state(file: Path, content) -> dict:
    """The one dict of tensors in what a torch file holds."""

    def sound(value) -> bool:
        return isinstance(value, dict) and bool(value) and all(hasattr(v, "layout") for v in value.values())

    inner = {k: v for k, v in content.items() if sound(v)} if isinstance(content, dict) else {}
    if sound(content):
        return content
    if len(inner) > 1:
        what = f"{file} holds several sets of weights: {', '.join(map(str, sorted(inner, key=str)))}"
        raise UserError(what, "save the one that is wanted (averaged or not) in a file of its own")
    if not inner:
        raise UserError(f"{file} holds no dict of arrays", "save a state_dict with torch.save")
    return next(iter(inner.values()))


def _refuse_dtype(file: Path, name: str, dtype: str):
    known = "float32, float16, bfloat16, float64 or whole numbers"
    raise UserError(f"{file}: {name} is of dtype {dtype}; expected {known}", "give the weights unquantised")
