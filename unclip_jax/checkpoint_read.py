"""Reading what `checkpoint.Checkpoints` wrote: the weights of a run, its config, and whether a step is sound.

Orbax keeps no checksums: flipped bytes restore silently wrong, so every array read is compared with its fingerprint,
and a damaged newest step gives way to an older one.
"""

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax.errors import UserError
from unclip_jax.fingerprint import fingerprint

FORMAT_VERSION = 1
PARTS = ("ema", "params")  # of a state, which hold weights


class _Raised(logging.Filter):
    """Leaves out tracebacks of Orbax's threads and tasks, one for each array; what went wrong is raised as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.pathname + record.getMessage()
        text += logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        return record.levelno < logging.ERROR or "orbax" not in text


def _quiet() -> None:
    """Keeps what Orbax and its reader print of an error that they raise as well: of damage, one for each array."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_Raised())
    plain = sys.unraisablehook

    def hook(found):  # of reads that end after the first that failed, when nobody waits for them any more
        if str(found.exc_value) != "Event loop is closed":
            plain(found)

    sys.unraisablehook = hook


_quiet()


class Damaged(Exception):
    """A step that cannot be read back as it was written."""


def load_params(path: str | os.PathLike, which: str = "ema", step: int | None = None):
    """The weights of a run, without its config file: (params, config, step, tokenizer JSON or None).

    Only the wanted part of the newest sound step (or of `step`) is read. Arrays lie on the default device.

    Args:
      path: the run's workdir, or the `checkpoints` folder in it.
      which: "ema" (averaged weights, or the last ones where the run keeps no average) or "params" (the last ones).

    Raises:
      UserError: no checkpoint there, no such step, damaged, no weights in it, or a newer format.
    """
    if which not in PARTS:
        raise UserError(f"which={which!r} must be 'ema' or 'params'")
    directory, steps = _find(path)

    def read(number: int):
        meta = read_meta(directory / str(number))
        trees = {part: _nested([name for name in meta["arrays"] if name.startswith(f"{part}/")]) for part in PARTS}
        part = which if trees[which] else "params"
        if not (tree := trees[part]):
            raise UserError(f"checkpoint {directory / str(number)} holds no weights")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return read_arrays(directory / str(number), tree, as_numpy), meta

    (state, meta), found = newest_sound(directory, steps, step, read)
    (params,) = state.values()
    return params, configs.from_json(meta.get("config", ""), f"the config in {directory}"), found, meta.get("tokenizer")


def peek(path: str | os.PathLike) -> tuple[ConfigDict, int]:
    """(config, newest step) of a run; reads no arrays."""
    directory, steps = _find(path)
    (_, meta), step = newest_sound(directory, steps, None, lambda number: ({}, read_meta(directory / str(number))))
    return configs.from_json(meta.get("config", ""), f"the config in {directory}"), step


def _nested(paths: Sequence[str]) -> dict:
    tree = {}
    for path in paths:
        *blocks, name = path.split("/")
        inner = tree
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[name] = 0
    return tree


def newest_sound(
    directory: epath.Path, steps: Sequence[int], step: int | None, read: Callable[[int], tuple[Any, dict]]
) -> tuple[tuple[Any, dict], int]:
    """(read(n), n) for n = `step`, or for the newest of `steps` that is not damaged; all hosts call it, and agree.

    Args:
      read: number -> (arrays, meta); the arrays are compared with the fingerprints in meta.

    Raises:
      UserError: `step` is absent or damaged, or all of `steps` are damaged.
    """
    if step is not None:
        if step not in steps:
            raise UserError(f"step {step} is not in {directory}", f"steps there: {_listed(steps)}")
        try:
            return _sound(read, step), step
        except Damaged as error:
            others = [n for n in steps if n != step]
            fix = f"use another step: {_listed(others)}" if others else ""
            raise UserError(f"checkpoint {directory / str(step)} is damaged ({error})", fix) from error
    reasons = []
    for number in sorted(steps, reverse=True):
        try:
            result = _sound(read, number)
        except Damaged as error:
            reasons.append(f"step {number}: {error}")
            continue
        if reasons:
            what = "; ".join(reasons)
            warnings.warn(f"damaged checkpoints in {directory} ({what}); step {number} is used", stacklevel=3)
        return result, number
    raise UserError(
        f"every checkpoint in {directory} is damaged ({'; '.join(reasons)})",
        "restore the folder from a copy, or start in another workdir",
    )


def _sound(read: Callable[[int], tuple[Any, dict]], number: int) -> tuple[Any, dict]:
    """read(number), its arrays as they were written; Damaged on all hosts where it is not so on one.

    Hosts agree before the fingerprints, which they take together: one that went on to another step would be awaited.
    """
    try:
        found, why = read(number), ""
    except Damaged as error:
        found, why = None, str(error)
    if jax.process_count() > 1:
        unread = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(why))))
        if len(unread):
            why = why or f"process {unread[0]} cannot read it"
    if why:
        raise Damaged(why)
    arrays, meta = found
    prints = fingerprint(arrays)
    bad = [path for path, value in prints.items() if meta["arrays"][path][0] != value]
    if bad:
        raise Damaged(f"{len(bad)} of {len(prints)} arrays differ from their fingerprint, first {bad[0]}")
    return found


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _find(path: str | os.PathLike) -> tuple[epath.Path, list[int]]:
    """The `checkpoints` folder of a workdir and its finished steps, at least one."""
    path = epath.Path(os.fspath(path)).expanduser().resolve()
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    if not directory.is_dir():
        state = "does not exist" if not path.exists() else "is a file"
        if path.is_dir():
            stack = (path / "stack.json").exists()
            state = "is a stack of exported weights" if stack else "has no checkpoints/ folder"
        expected = "expected the workdir of a training run, a folder with checkpoints/ in it"
        raise UserError(f"{path} {state}; {expected}", "give the folder that `unclip train --workdir` wrote to")
    steps = sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and _finished(p))
    if not steps:
        raise UserError(f"{directory} holds no finished checkpoint", "train until the first one is saved")
    return directory, steps


def _finished(step: epath.Path) -> bool:
    return step.is_dir() and ocp.path.step.is_path_finalized(step)


def sealed(meta: dict) -> dict:
    """`meta` with its own checksum."""
    try:
        text = json.dumps(meta, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must hold JSON values only ({error})") from None
    return {**meta, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_meta(step: epath.Path) -> dict:
    """What a step says of itself. Raises Damaged, or UserError for a newer format."""
    try:
        meta = json.loads((step / "meta" / "metadata").read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"its metadata cannot be read: {error}") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {step} has format version {version}; this unclip_jax reads up to {FORMAT_VERSION}",
            "update unclip_jax",
        )
    seal = meta.pop("sha256", None)
    if sealed(meta)["sha256"] != seal:
        raise Damaged("its metadata differs from its checksum")
    if not isinstance(meta.get("arrays"), dict) or not isinstance(meta.get("config", ""), str):
        raise Damaged("its metadata is not what is written here")
    return meta


def read_arrays(step: epath.Path, tree, how):
    """The arrays of a step that `tree` has, and no others, read as `how` says (Orbax's RestoreArgs); Damaged."""
    args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
    reader = ocp.PyTreeCheckpointHandler()  # alone: a Checkpointer waits for other hosts, and they might not come
    try:
        return jax.tree.map(jnp.asarray, reader.restore(step / "state", args=args))
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):  # none of which is damage
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Damaged(f"{type(error).__name__}: {lines[0][:200] if lines else ''}") from error
    finally:
        reader.close()
