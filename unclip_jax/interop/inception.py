"""The Inception-v3 that FID is defined with: `pt_inception-2015-12-05-6726825d.pth`, or what was converted of it.

    inception.safetensors    the arrays by their published names
    inception.json           SHA-256 of that file, and where it came from

The first eight digits of a file's SHA-256 are in its published name, as torch's hub has it, and are checked.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

import unclip_jax
from unclip_jax import storage
from unclip_jax.errors import UserError
from unclip_jax.interop.files import Source, locate, open_weights
from unclip_jax.interop.layout import CONV, SAME, Entry, Turn, read
from unclip_jax.metrics.inception import SIZE, Inception
from unclip_jax.tensors import write_arrays

FILE, ABOUT = "inception.safetensors", "inception.json"
TRANSPOSED = Turn(lambda a, shape: a.T.reshape(shape), lambda a: a.T)


class Features(NamedTuple):
    """The network's parameters, and 16 hexadecimal digits that tell these weights from others."""

    params: dict
    identity: str


def table(shapes) -> list[Entry]:
    """Where each array of `metrics.inception` lies in the published file. shapes: its paths."""
    entries = []
    for path in shapes:
        *blocks, last = path.split("/")
        name = ".".join(blocks)
        if last == "fc":
            entries.append(Entry(path, "fc.weight", TRANSPOSED))
        elif last == "kernel":
            entries.append(Entry(path, f"{name}.weight", CONV))
        else:
            entries.append(Entry(path, f"{name}.bn.{last.removeprefix('bn_')}", SAME))
    return entries


@functools.cache
def _shapes(width: float) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(Inception(width).init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return {path: a.shape for path, a in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def load(source: str, width: float = 1.0) -> Features:
    """The network at a path or a hub's "org/name", published or converted.

    Raises:
      UserError: no such weights, of another network, or not those that their name or inception.json speaks of.
    """
    found = locate(str(source))
    file = _checked_file(found.path)
    shapes = _shapes(width)
    with open_weights(file) as weights:
        ignored = [name for name in weights.names if name.endswith("num_batches_tracked") or name == "fc.bias"]
        flat = read(table(shapes), shapes, weights.names, weights.take, ignored)
    digest = hashlib.sha256()
    for path in sorted(flat):
        digest.update(path.encode() + jnp.asarray(flat[path], jnp.float32).tobytes())
    params = {path: jnp.asarray(a, jnp.float32) for path, a in flat.items()}
    return Features(flax.traverse_util.unflatten_dict(params, sep="/"), digest.hexdigest()[:16])


def convert(source: Source, out: Path, overwrite: bool = False, width: float = 1.0) -> Path:
    """Writes the directory `out` from a published file, so that torch is not needed again; returns its path."""
    identity = load(str(source.path), width).identity
    with storage.new_directory(out.expanduser(), "converted Inception", ABOUT, overwrite) as folder:
        with open_weights(_checked_file(source.path)) as weights:
            arrays = {name: weights.take(name) for name in weights.names}
        sha256 = write_arrays(folder / FILE, arrays)
        facts = {"unclip_jax": unclip_jax.__version__, "source": source.name, "sha256": sha256, "identity": identity}
        (folder / ABOUT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return out


def _checked_file(path: Path) -> Path:
    """The file of weights, known to be the one that inception.json or its own name speaks of."""
    if (path / ABOUT).is_file():
        file, wanted = path / FILE, str(storage.read_json(path / ABOUT).get("sha256"))
        if not file.is_file():
            raise UserError(f"{file} is missing, though {ABOUT} is there", "copy the whole directory again")
    else:
        name = re.search(r"-([0-9a-f]{8})\.(pth|safetensors)$", path.name)
        if not name or not path.is_file():
            return path
        file, wanted = path, name[1]
    found = storage.sha256(file)
    if not found.startswith(wanted):
        raise UserError(f"{file} has the SHA-256 {found[:16]}…, expected {wanted[:16]}", "download it again")
    return file
