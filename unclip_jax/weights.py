"""A trained stack as one directory: what sampling needs, in files that hold no code.

    stack.json             format version, and of each stage its config, step, dtype and SHA-256
    <stage>.safetensors    its weights, flat by path ("block/kernel")
    tokenizer.json

Written whole or not at all: into a temporary folder beside it, then renamed.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

import unclip_jax
from unclip_jax import config as configs
from unclip_jax import tensors, tokenizer
from unclip_jax.errors import UserError, suggest
from unclip_jax.storage import new_directory, read_text, sha256
from unclip_jax.tensors import read_array, read_header, write_arrays

BUNDLED = Path(__file__).parent / "bundled"
FORMAT_VERSION = 1
COPY = "copy the whole stack directory again"
FLOATS = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}  # of a stack, by name
# Few numbers that scale everything else: rounding them to 8 bits of mantissa would show.
STATISTICS = frozenset({"mean", "std", "components", "dots", "logit_scale", "logit_bias", "x0_variance"})
_STAGE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Stage(NamedTuple):
    """One trained network: weights (nested dict of arrays, as stored), config, training step, other facts."""

    params: dict
    config: ConfigDict
    step: int
    extra: dict


class Stack(NamedTuple):
    """The stages of a stack by name, the tokenizer's JSON text and the directory they came from."""

    stages: dict[str, Stage]
    tokenizer_json: str
    path: Path


def save_stack(
    out: str | os.PathLike,
    stages: Mapping[str, tuple] | Iterable[tuple[str, tuple]],
    tokenizer_json: str,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Path:
    """Writes a stack directory and returns its path.

    Args:
      out: the directory to make.
      stages: {name: (params, config, step, extra)}, `extra` a dict of JSON values; names like
        "prior_diffusion". Pairs of the two may come one by one, so that one stage at a time is in memory.
      tokenizer_json: `Tokenizer.to_json()`.
      dtype: "bfloat16" or "float32" for floating arrays; those named in STATISTICS stay f32.
      overwrite: replace a stack that is there; anything else at `out` is never replaced.

    Raises:
      UserError: `out` exists, is not writable, or a stage has no arrays or a NaN or infinite one.
    """
    out = Path(out).expanduser().resolve()
    if dtype not in FLOATS:
        raise UserError(f"dtype={dtype!r} is unknown", suggest(dtype, FLOATS))
    pairs = stages.items() if isinstance(stages, Mapping) else stages
    with new_directory(out, "stack", "stack.json", overwrite) as temporary:
        index = {
            "format_version": FORMAT_VERSION,
            "unclip_jax": unclip_jax.__version__,
            "created_by": "unclip_jax.weights.save_stack",
            "stages": {},
        }
        for name, (params, config, step, extra) in pairs:
            index["stages"][name] = _write_stage(temporary, name, params, config, step, extra, dtype)
            del params  # or they would lie beside those of the stage that comes next
        if not index["stages"]:
            raise UserError("a stack must have at least one stage")
        (temporary / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (temporary / "stack.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out


def load_stack(
    path: str | os.PathLike, stages: Iterable[str] | None = None, dtype: str | None = None
) -> Stack:
    """Reads a stack, or only the named `stages` of it.

    Args:
      path: its directory, or the name of a bundled one (`located`).
      dtype: "float32" or "bfloat16" of the floating arrays, each converted as it is read, but for `STATISTICS`; None
        keeps their stored dtype.

    Raises:
      UserError: no stack there, a missing stage or file, a wrong checksum, a malformed file, or a newer
        format.
    """
    return _stack(path, stages, dtype, _read_stage)


def load_one(path: str | os.PathLike, stage: str) -> tuple[str, Stage]:
    """(the tokenizer's JSON text, one stage of a stack); raises as `load_stack`."""
    stack = load_stack(path, [stage])
    return stack.tokenizer_json, stack.stages[stage]


def describe_stack(
    path: str | os.PathLike, stages: Iterable[str] | None = None, dtype: str | None = None
) -> Stack:
    """`load_stack` with ShapeDtypeStructs in place of the arrays, no weights read; raises as that does."""
    return _stack(path, stages, dtype, _describe_stage)


def tasks_of(path: str | os.PathLike) -> dict[str, str]:
    """{stage: task} of a stack, its weights left unread. UserError: no stack there, or malformed."""
    stages = _index(located(path).resolve())["stages"]
    return {name: str(entry["config"].get("task")) for name, entry in stages.items()}


def dtype_in(name: str, kind: np.dtype, dtype: str) -> np.dtype:
    """What an array of dtype `kind` is in a stack of `dtype`: that if floating and not of STATISTICS, which are f32."""
    if not jnp.issubdtype(kind, jnp.floating):
        return np.dtype(kind)
    return np.dtype(jnp.float32 if name in STATISTICS else FLOATS[dtype])


def bundled() -> dict[str, Path]:
    """The stacks in the package, by name."""
    return {file.parent.name: file.parent for file in sorted(BUNDLED.glob("*/stack.json"))}


def located(path: str | os.PathLike) -> Path:
    """The directory of a bundled stack by its name, unless a stack or a run of that name is there; others as given."""
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"stack {path!r} must be a path or a bundled stack's name", "write UnCLIP.load('shapes')")
    path = Path(path).expanduser()
    return path if is_stack(path) or is_run(path) else bundled().get(str(path), path)


def is_stack(path: str | os.PathLike) -> bool:
    """Whether a directory holds a stack."""
    return (Path(path).expanduser() / "stack.json").is_file()


def is_run(path: Path) -> bool:
    """Whether a directory is a run's workdir, or the checkpoints in it."""
    return (path / "checkpoints").is_dir() or (path.name == "checkpoints" and path.is_dir())


def _stack(path: str | os.PathLike, stages: Iterable[str] | None, dtype: str | None, read: Callable) -> Stack:
    """The named stages, by default all, each by `read`."""
    path = located(path).resolve()
    index = _index(path)
    wanted = list(index["stages"]) if stages is None else list(stages)
    for name in wanted:
        if name not in index["stages"]:
            raise UserError(f"stack {path} has no stage {name!r}", suggest(name, index["stages"]))
    found = {name: read(path, name, index["stages"][name], dtype) for name in wanted}
    return Stack(found, read_text(path / "tokenizer.json", "a tokenizer", tokenizer.MAX_JSON_BYTES, COPY), path)


def _write_stage(folder: Path, name: str, params, config, step: int, extra, dtype: str) -> dict:
    """Writes <name>.safetensors; returns the stage's entry of stack.json."""
    if not _STAGE.fullmatch(name):
        raise UserError(f"stage name {name!r} must be lower-case letters, digits and _")
    arrays = _flat(params, name)
    try:
        kinds = {path: dtype_in(path.split("/")[-1], array.dtype, dtype) for path, array in arrays.items()}
        sha256 = write_arrays(folder / f"{name}.safetensors", arrays, kinds)
    except ValueError as error:
        raise UserError(f"stage {name}: {error}", "use an earlier step") from None
    config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return {
        "config": config,
        "step": int(step),
        "sha256": sha256,
        "dtype": dtype,
        "extra": dict(extra or {}),
    }


def _flat(params, stage: str) -> dict[str, np.ndarray | jax.Array]:
    """The arrays of a nested dict by path."""
    flat = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if not names or any(not part or "/" in part for part in names):
            raise UserError(f"stage {stage}: array path {names!r} must be of names without '/'")
        flat["/".join(names)] = array if isinstance(array, jax.Array) else np.asarray(array)
    if not flat:
        raise UserError(f"stage {stage} has no arrays")
    return flat


def _index(path: Path) -> dict:
    """stack.json, checked as far as names, types and version go."""
    if not is_stack(path):
        state = (
            "does not exist" if not path.exists() else "is a file" if path.is_file() else "has no stack.json"
        )
        if is_run(path):
            state = "is the workdir of one training run"
        raise UserError(
            f"{path} {state}; expected a stack directory (stack.json and <stage>.safetensors)",
            f"give a directory written by `unclip export`, or the name of a bundled stack: {', '.join(bundled())}",
        )
    try:
        index = json.loads(read_text(path / "stack.json", "an index of stages", fix=COPY))
        version, stages = index["format_version"], index["stages"]
        entries = [(entry["config"], entry["step"], entry["sha256"]) for entry in stages.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / 'stack.json'} is malformed ({error!r})", COPY) from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"stack {path} has format version {version}; this version of unclip_jax reads up to "
            f"{FORMAT_VERSION}",
            "update unclip_jax",
        )
    sound = all(type(c) is dict and type(s) is int and type(h) is str for c, s, h in entries)
    sound = sound and all(type(entry.get("extra", {})) is dict for entry in stages.values())
    if not sound or not all(_STAGE.fullmatch(name) for name in stages):
        raise UserError(f"{path / 'stack.json'} is malformed (stage names, configs, steps or checksums)", COPY)
    return index


def _describe_stage(path: Path, name: str, entry: dict, dtype: str | None) -> Stage:
    """The stage with the shapes of its arrays in place of them."""
    file = path / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(
            f"{file} is missing, though stack.json lists it", COPY
        )
    config = configs.from_values(entry["config"], f"stack.json of {path}: the config of {name}")
    with _no_valid(file):
        places = read_header(file).items()
        shapes = {key: jax.ShapeDtypeStruct(place.shape, _kind(key, place, dtype)) for key, place in places}
        return Stage(unflatten_dict(shapes, sep="/"), config, entry["step"], entry.get("extra", {}))


def _read_stage(path: Path, name: str, entry: dict, dtype: str | None) -> Stage:
    described = _describe_stage(path, name, entry, dtype)
    file = path / f"{name}.safetensors"
    if sha256(file) != entry["sha256"]:
        raise UserError(f"{file} differs from its SHA-256 in stack.json", COPY)
    arrays = {}
    with _no_valid(file):
        for key, place in read_header(file).items():
            array = read_array(file, place).astype(_kind(key, place, dtype), copy=False)  # by numpy: nothing to compile
            arrays[key] = jax.block_until_ready(jax.device_put(array))  # or copies of many would be held at once
        return described._replace(params=unflatten_dict(arrays, sep="/"))


def _kind(key: str, place: tensors.Place, dtype: str | None) -> np.dtype:
    """What a stage's array is read as where its weights are asked for in `dtype`."""
    if place.dtype not in tensors.DTYPES:
        raise ValueError(f"{key} is of dtype {place.dtype}, which must be one of {', '.join(tensors.DTYPES)}")
    stored = jax.dtypes.canonicalize_dtype(tensors.DTYPES[place.dtype])
    return stored if dtype is None else dtype_in(key.split("/")[-1], stored, dtype)


@contextlib.contextmanager
def _no_valid(file: Path) -> Iterator[None]:
    """Says so of a file that cannot be understood."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is no valid safetensors file ({error})") from None
