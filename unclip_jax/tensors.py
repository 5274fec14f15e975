"""Files of arrays in the safetensors format: 8 bytes with the length of a JSON header, the header {name: dtype, shape,
begin and end of its bytes}, and the bytes.

A file is written here array by array, so that no second copy of a network is ever in memory, and its header is read
here, so that arrays of any dtype NumPy can hold can be fetched one by one.
"""

import errno
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unclip_jax.errors import UserError
from unclip_jax.storage import MAX_JSON_BYTES, refuse_stand_in

CHUNK = 2**22  # elements of a host's array that are turned into bytes, or hashed, at once
MOST_AXES = 64  # of an array
DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{f"I{8 * n}": f"i{n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where an array lies in a file: the name of its dtype there ("BF16"), its shape, its first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def write_arrays(
    file: Path,
    arrays: Mapping,
    dtypes: Mapping[str, np.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a safetensors file array by array; returns its SHA-256.

    Args:
      file: is made, or replaced.
      arrays: {name: NumPy or JAX array}.
      dtypes: {name: dtype to store it in}; the others are stored as they are.
      metadata: texts for the header.

    Raises:
      ValueError: an array holds NaN or an infinite value.
      OSError: the disk has no room for it, found before anything is written; or writing fails.
    """
    kinds = {name: np.dtype((dtypes or {}).get(name, array.dtype)) for name, array in arrays.items()}
    order = sorted(arrays, key=lambda name: (-kinds[name].itemsize, name))  # wide ones first: each starts aligned
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in order:
        begin, shape = end, list(map(int, arrays[name].shape))
        end += math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size, free = 8 + len(text) + end, shutil.disk_usage(file.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f"No space left on device: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        shown = tqdm(order, f"writing {file.name}", unit=" arrays", disable=None, leave=False)
        parts = (part for name in shown for part in _bytes(name, arrays[name], kinds[name]))
        for part in itertools.chain((len(text).to_bytes(8, "little"), text), parts):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def read_header(file: Path) -> dict[str, Place]:
    """{name: its place} of a safetensors file; whatever is wrong with the file is found before an array is read.

    Raises:
      UserError: not such a file, truncated, or one whose header is too long or does not add up.
    """
    length = check_header(file)
    size = file.stat().st_size - 8 - length
    try:
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places, spans = {}, []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape, kind = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or end < begin:
                raise ValueError(f"{name} has impossible numbers")
            if len(shape) > MOST_AXES or math.prod(n or 1 for n in shape) >= 2**60:  # which NumPy does not make
                raise ValueError(f"{name} has an impossible shape")
            if kind is not None and end - begin != math.prod(shape) * kind.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for the shape {shape}")
            places[name] = Place(str(entry["dtype"]), shape, 8 + length + begin)
            spans += [(begin, end)] if end > begin else []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no valid safetensors file ({error})") from None
    # Laid end to end, they begin at 0 and at each other's ends, and the last ends with the file.
    begins, ends = [begin for begin, _ in sorted(spans)], [0, *sorted(end for _, end in spans)]
    if ends[-1] > size:
        raise UserError(f"{file} is truncated: {size} of {ends[-1]} bytes of arrays are there", "copy it again")
    if [*begins, size] != ends:
        raise UserError(f"{file} is no valid safetensors file (its arrays overlap or leave gaps)")
    return places


def check_header(file: Path) -> int:
    """The length of a safetensors file's header, known by its first bytes to be possible before anything is read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
    header = int(np.frombuffer(start[:8], "<u8")[0]) if len(start) >= 8 else -1
    refuse_stand_in(file, start)
    if not 2 <= header <= size - 8:
        raise UserError(f"{file} is truncated or no safetensors file ({size} bytes)", "copy it again")
    if header > MAX_JSON_BYTES:
        raise UserError(f"{file} has a header of {header} bytes, more than the {MAX_JSON_BYTES} allowed")
    return header


def read_array(file: Path, place: Place) -> np.ndarray:
    """The array at `place` of a file whose header was read; a copy, in its stored dtype, which must be of `DTYPES`."""
    kind = DTYPES[place.dtype]
    size = math.prod(place.shape) * kind.itemsize
    data = np.fromfile(file, np.uint8, size, offset=place.begin)
    if len(data) != size:
        raise UserError(f"{file} has become shorter while it was read", "copy it again, and then read it")
    return data.view(kind).reshape(place.shape)


def by_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """A large array some rows at a time, about CHUNK elements; a small one, or a vector, whole."""
    rows = max(1, CHUNK * len(array) // max(1, array.size)) if array.ndim > 1 else 0
    return (array[k : k + rows] for k in range(0, len(array), rows)) if rows else iter([array])


def _bytes(name: str, array, kind: np.dtype) -> Iterator[memoryview]:
    """An array's bytes in `kind`, some rows at a time, so that there is no second copy of a large one."""
    for part in by_rows(np.asarray(array)):
        if part.dtype.kind not in "biu" and not np.isfinite(part).all():
            raise ValueError(f"array {name} holds NaN or infinite values")
        yield memoryview(np.ascontiguousarray(part, kind).reshape(-1).view(np.uint8))
