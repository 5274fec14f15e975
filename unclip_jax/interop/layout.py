"""One table per network says where each array lies here and there; `read` and `views` go along it both ways.

A network here is a flat dict of arrays by path ("transformer/blocks/query/kernel"), there a flat dict by name
("encoder.layers.3.self_attn.q_proj.weight"). Layers that are scanned here lie in one array [layers, …] and there one
by one: their name holds "{}" in the place of the layer's number.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError

SHOWN = 10  # names in an error message
_UNET_PART = re.compile(r"(down|mid|up)(\d*)_(block|attn|pool|repeat)(\d*)")


class Turn(NamedTuple):
    """How one array changes its axes.

    here: (their array, shape here) → our array. there: our array → theirs, and so the shape that theirs must have.
    parts: of how many equal ones along the first axis there ours is one, as in a fused query, key and value; read only.
    """

    here: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    there: Callable[[np.ndarray], np.ndarray]
    parts: int = 1


class Entry(NamedTuple):
    """One array: its path here, its name there, its turn."""

    path: str
    name: str
    turn: Turn


class UNetPart(NamedTuple):
    """Where in a `UNet` a path leads: "down", "mid" or "up"; the level; "block", "attn", "pool" or "repeat"; which one.

    What has no level or number in its name has 0.
    """

    way: str
    level: int
    kind: str
    index: int


# [O, I] there; here [I, O], or [I, heads, D].
DENSE = Turn(lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(a.shape[0], -1).T)
# [O, I] there; here [heads, D, O].
DENSE_OUT = Turn(lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]).T)
# [O, I, H, W] there; here [H, W, I, O].
CONV = Turn(lambda a, shape: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
# The same numbers in the same order: vectors, embeddings; a bias by heads here is flat there.
SAME = Turn(lambda a, shape: a.reshape(shape), lambda a: a)
FLAT = Turn(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1))
# DENSE as a convolution over a sequence: [O, I, 1] there.
DENSE_CONV = Turn(lambda a, shape: DENSE.here(a[..., 0], shape), lambda a: DENSE.there(a)[..., None])
DENSE_OUT_CONV = Turn(lambda a, shape: DENSE_OUT.here(a[..., 0], shape), lambda a: DENSE_OUT.there(a)[..., None])
# One leading axis of 1 there.
ROW = Turn(lambda a, shape: a.reshape(shape), lambda a: a[None])


def part(turn: Turn, index: int, count: int) -> Turn:
    """Part `index` of `count` that lie one after the other: all queries, all keys, all values."""
    return Turn(lambda a, shape: turn.here(np.split(a, count)[index], shape), turn.there, count)


def interleaved(turn: Turn, index: int, count: int) -> Turn:
    """Part `index` of `count` that take turns head by head: query, key and value of head 0, then those of head 1."""

    def here(a, shape):
        heads, width = shape[-2:]
        own = a.reshape(heads, count, width, *a.shape[1:])[:, index]
        return turn.here(own.reshape(heads * width, *a.shape[1:]), shape)

    return Turn(here, turn.there, count)


def read(
    table: Iterable[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    take: Callable[[str], np.ndarray],
    ignored: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Our arrays by path, turned from theirs.

    Args:
      table: of the network.
      shapes: {path: shape here}, which is also what must be there: from `jax.eval_shape`.
      names: all that the file holds.
      take: name → array; called once for each name of an entry, so that a file can be read array by array.
      ignored: names that hold no weights, such as stored position indices.

    Raises:
      UserError: a name of the table is missing, one of the file unknown, or an array of another shape; names them.
    """
    table, names = list(table), set(names)
    if {entry.path for entry in table} != set(shapes):
        wrong = sorted({entry.path for entry in table} ^ set(shapes))
        raise AssertionError(f"table and network differ in {wrong[:SHOWN]}")
    layers = max((shapes[entry.path][0] for entry in table if "{}" in entry.name), default=0)
    if layers > len(names):  # known before that many names are made
        what = f"the config has {layers} layers, and the file {len(names)} arrays"
        raise UserError(what, "give the config that belongs to these weights")
    wanted = expected(table, shapes)
    _refuse(set(wanted) - names, "lacks", "it may be of another size or version than its config says")
    _refuse(names - set(wanted) - set(ignored), "has unknown", "give the config that belongs to these weights")
    return {entry.path: _here(entry, shapes[entry.path], take, wanted) for entry in table}


def expected(table: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all that a network's file must hold, for arrays of these shapes here."""
    out = {}
    for path, name, turn in table:
        # A turn only views its array, so none is made; nor is room for one, as its sizes are a config's.
        shape = turn.there(np.broadcast_to(np.int8(0), _one(name, shapes[path]))).shape
        shape = shape if turn.parts == 1 else (turn.parts * shape[0], *shape[1:])
        out |= dict.fromkeys(_names(name, shapes[path]), shape)
    return out


def views(table: Iterable[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their arrays by name, turned from ours: views, in any order of memory. `read` gives `arrays` back bit for bit."""
    out = {}
    for path, name, turn in table:
        if turn.parts > 1:
            raise AssertionError(f"{path} cannot be written as {name}")
        layers = enumerate(arrays[path]) if "{}" in name else [(0, arrays[path])]
        for k, array in layers:
            out[name.format(k)] = turn.there(array)
    return out


def prefixed(prefix_here: str, prefix_there: str, table: Iterable[Entry]) -> list[Entry]:
    """The table of a network that is part of a larger one."""
    return [Entry(prefix_here + path, prefix_there + name, turn) for path, name, turn in table]


def layer(path: str, name: str, kernel: Turn = DENSE, bias: Turn = FLAT) -> list[Entry]:
    """Kernel and bias of a layer; a name that ends with "_" goes on without a dot."""
    name = name if name.endswith("_") else f"{name}."
    return [Entry(f"{path}/kernel", f"{name}weight", kernel), Entry(f"{path}/bias", f"{name}bias", bias)]


def norm(path: str, name: str) -> list[Entry]:
    """Scale and bias of a norm."""
    return [Entry(f"{path}/scale", f"{name}.weight", SAME), Entry(f"{path}/bias", f"{name}.bias", SAME)]


def blocks(path: str, name: str, theirs: Mapping[str, str], fused: Callable | None = None) -> list[Entry]:
    """The scanned blocks of a `Transformer`.

    Args:
      path, name: of the blocks here, and there with "{}" for the number.
      theirs: {layer of ours: its name there in the block}.
      fused: `part` or `interleaved`, where "query", "key" and "value" are one array there.
    """
    table = norm(f"{path}/norm1/norm", f"{name}.{theirs['norm1']}")
    table += norm(f"{path}/norm2/norm", f"{name}.{theirs['norm2']}")
    for k, ours in enumerate(("query", "key", "value")):
        turns = [fused(turn, k, 3) if fused else turn for turn in (DENSE, FLAT)]
        table += layer(f"{path}/{ours}", f"{name}.{theirs[ours]}", *turns)
    for ours, turn in (("out", DENSE_OUT), ("fc1", DENSE), ("fc2", DENSE)):
        table += layer(f"{path}/{ours}", f"{name}.{theirs[ours]}", turn)
    return table


def unet_part(path: str) -> UNetPart | None:
    """The part of a `UNet` that a path leads into; None at its ends, such as "stem/kernel"."""
    match = _UNET_PART.match(path)
    return match and UNetPart(match[1], int(match[2] or 0), match[3], int(match[4] or 0))


def unet_levels(paths: Iterable[str]) -> int:
    """How many levels the `UNet` with these paths has."""
    return 1 + max(part.level for path in paths if (part := unet_part(path)))


def _names(name: str, shape: tuple[int, ...]) -> list[str]:
    return [name.format(k) for k in range(shape[0])] if "{}" in name else [name]


def _one(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape here of what one name holds."""
    return shape[1:] if "{}" in name else shape


def _here(entry: Entry, shape: tuple[int, ...], take, wanted: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    one, whole = _one(entry.name, shape), None
    for k, name in enumerate(_names(entry.name, shape)):
        theirs = take(name)
        if theirs.shape != wanted[name]:
            what = f"{name} has the shape {theirs.shape}, which does not fit {entry.path} {one}: {wanted[name]} does"
            raise UserError(what, "give the config that belongs to these weights")
        ours = entry.turn.here(theirs, one)
        if one is shape:
            return ours
        if whole is None or np.result_type(whole, ours) != whole.dtype:
            whole = np.empty(shape, ours.dtype) if whole is None else whole.astype(np.result_type(whole, ours))
        whole[k] = ours  # one by one: a list of all and their stack would be twice the memory
    return whole


def _refuse(names: set[str], what: str, fix: str) -> None:
    if names:
        listed = ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise UserError(f"the file {what} {len(names)} of the network's arrays: {listed}", fix)
