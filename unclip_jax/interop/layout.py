"""One table per network says where each array lies here and there; `read` and `write` go along it both ways.

A network here is a flat dict of arrays by path ("transformer/blocks/query/kernel"), there a flat dict by name
("encoder.layers.3.self_attn.q_proj.weight"). Layers that are scanned here lie in one array [layers, …] and there one
by one: their name holds "{}" in the place of the layer's number.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError

SHOWN = 10  # names in an error message


class Turn(NamedTuple):
    """How one array changes its axes.

    here: (their array, shape here) → our array; None where the name holds nothing we keep. there: our array → theirs;
    None where it cannot be written (a part of a fused array).
    """

    here: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    there: Callable[[np.ndarray], np.ndarray] | None


class Entry(NamedTuple):
    """One array: its path here, its name there, its turn."""

    path: str
    name: str
    turn: Turn


# [O, I] there; here [I, O], or [I, heads, D].
DENSE = Turn(lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(a.shape[0], -1).T)
# [O, I] there; here [heads, D, O].
DENSE_OUT = Turn(lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]).T)
# [O, I, H, W] there; here [H, W, I, O].
CONV = Turn(lambda a, shape: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
# The same numbers in the same order: vectors, embeddings; a bias by heads here is flat there.
SAME = Turn(lambda a, shape: a.reshape(shape), lambda a: a)
FLAT = Turn(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1))
# One leading axis of 1 there.
ROW = Turn(lambda a, shape: a.reshape(shape), lambda a: a[None])


def part(turn: Turn, index: int, count: int) -> Turn:
    """Part `index` of `count` equal ones along the first axis there, as in a fused query, key and value; read only."""
    return Turn(lambda a, shape: turn.here(np.split(a, count)[index], shape), None)


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
    wanted = {name for entry in table for name in _names(entry, shapes[entry.path])}
    _refuse(wanted - names, "lacks", "it may be of another size or version than its config says")
    _refuse(names - wanted - set(ignored), "has unknown", "give the config that belongs to these weights")
    return {entry.path: _here(entry, shapes[entry.path], take) for entry in table}


def write(table: Iterable[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their arrays by name, turned from ours; `read` gives `arrays` back, bit for bit."""
    return {name: np.ascontiguousarray(array) for name, array in views(table, arrays).items()}


def views(table: Iterable[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `write` gives, as views of `arrays` in any order of memory: nothing is copied."""
    out = {}
    for path, name, turn in table:
        if turn.there is None:
            raise AssertionError(f"{path} cannot be written as {name}")
        layers = enumerate(arrays[path]) if "{}" in name else [(0, arrays[path])]
        for k, array in layers:
            out[name.format(k)] = turn.there(array)
    return out


def prefixed(prefix_here: str, prefix_there: str, table: Iterable[Entry]) -> list[Entry]:
    """The table of a network that is part of a larger one."""
    return [Entry(prefix_here + path, prefix_there + name, turn) for path, name, turn in table]


def _names(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    return [entry.name.format(k) for k in range(shape[0])] if "{}" in entry.name else [entry.name]


def _here(entry: Entry, shape: tuple[int, ...], take) -> np.ndarray:
    stacked = "{}" in entry.name
    one = shape[1:] if stacked else shape
    whole = None
    for k, name in enumerate(_names(entry, shape)):
        theirs = take(name)
        try:
            ours = entry.turn.here(theirs, one)
        except ValueError:
            ours = None
        if ours is None or ours.shape != one:
            raise UserError(
                f"{name} has the shape {theirs.shape}, which does not fit {entry.path} {one}",
                "give the config that belongs to these weights",
            )
        if not stacked:
            return ours
        if whole is None or np.result_type(whole, ours) != whole.dtype:
            whole = np.empty(shape, ours.dtype) if whole is None else whole.astype(np.result_type(whole, ours))
        whole[k] = ours  # one by one: a list of all and their stack would be twice the memory
    return whole


def _refuse(names: set[str], what: str, fix: str) -> None:
    if names:
        listed = ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise UserError(f"the file {what} {len(names)} of the network's arrays: {listed}", fix)
