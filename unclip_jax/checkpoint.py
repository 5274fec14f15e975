"""Training checkpoints: Orbax steps in `workdir/checkpoints`, self-describing and checked when read.

A step holds `state` (the arrays) and `meta` (JSON: format version, config, tokenizer, whatever the caller
adds, and a fingerprint of every array). Orbax keeps no checksums: flipped bytes restore silently wrong, so
every restored array is compared with its fingerprint, and a damaged newest step gives way to an older one.
"""

import contextlib
import hashlib
import json
import logging
import os
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
from unclip_jax.fingerprint import by_path, fingerprint

FORMAT_VERSION = 1
PARTS = ("ema", "params")  # of a state, which hold weights


class _Raised(logging.Filter):
    """Leaves out tracebacks of Orbax's threads and tasks, one for each array; what went wrong is raised as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = record.pathname + record.getMessage()
        told += logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        return record.levelno < logging.ERROR or "orbax" not in told


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_Raised())


class _Damaged(Exception):
    """A step that cannot be read back as it was written."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` kept; the one that writes them. All hosts call every method.

    Args:
      workdir: folder of the run, local or gs://; `checkpoints/` is made in it.
      keep: steps kept, >= 1.
      async_: write while training goes on; `save` returns once the arrays are copied to the host.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, async_: bool = True):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise UserError(f"keep={keep!r} must be a whole number >= 1 (checkpoints)")
        self.directory = epath.Path(os.fspath(workdir)).expanduser().resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=async_, cleanup_tmp_directories=True
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"workdir {os.fspath(workdir)!r} must be writable ({reason})") from None

    def steps(self) -> list[int]:
        """Finished steps, oldest first; one being written, or cut off while it was, is not among them."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, meta: dict) -> bool:
        """Writes one step; False where it is there already.

        Args:
          step: its number, >= 0.
          state: any tree of arrays, on any sharding; no PRNG keys (randomness comes from (seed, step)).
          meta: JSON values; "config" and "tokenizer" (JSON texts) are what `load_params` hands out.
        """
        step = int(step)
        self.check()
        if step in self._manager.all_steps():
            return False
        prints = fingerprint(state)
        arrays = {path: [prints[path], str(x.dtype), list(x.shape)] for path, x in by_path(state)}
        meta = _sealed({**meta, "format_version": FORMAT_VERSION, "arrays": arrays})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            return bool(self._manager.save(step, args=args, force=True))

    def check(self) -> None:
        """Raises UserError where what is written in the background could not be."""
        with self._writing():
            self._manager.check_for_errors()

    def restore(self, abstract, step: int | None = None):
        """(state, meta, step) of the newest sound step, or of `step`; None where nothing was saved.

        Newer steps found damaged are named in a warning and moved to `workdir/damaged`, so that training can
        write their numbers again.

        Args:
          abstract: tree of ShapeDtypeStructs with shardings, which need not be those it was saved with.

        Raises:
          UserError: `step` is absent or damaged, no step is sound, the state has other arrays than
            `abstract`, or a newer format. An average is left unread where `abstract` has none.
        """
        self.wait()
        steps = self.steps()
        if not steps and step is None:
            return None

        def read(number: int):
            meta = _read_meta(self.directory / str(number))
            _check_same_arrays(abstract, meta, self.directory / str(number))
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
            return _arrays(self.directory / str(number), abstract, how), meta

        (state, meta), found = _newest_sound(self.directory, steps, step, read)
        if step is None:
            self._set_aside([number for number in steps if number > found])
        return state, meta, found

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; UserError where that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the writer's threads."""
        with self._writing():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self):
        """What Orbax raises, in kinds of its own and of others, as a UserError; but not a want of memory."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError, UserError):
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            what = f"a checkpoint could not be written in {self.directory} ({type(error).__name__}: {why})"
            fix = "see to the disk's room and rights; then the same command goes on from the last one that was"
            raise UserError(what, fix) from error

    def _set_aside(self, damaged: Sequence[int]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self.directory.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in damaged:
                number = next(n for n in range(1, 10**6) if not (aside / f"{step}.{n}").exists())
                (self.directory / str(step)).rename(aside / f"{step}.{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unclip_jax damaged checkpoints set aside")
        self._manager.reload()


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
        meta = _read_meta(directory / str(number))
        trees = {part: _nested([name for name in meta["arrays"] if name.startswith(f"{part}/")]) for part in PARTS}
        part = which if trees[which] else "params"
        if not (tree := trees[part]):
            raise UserError(f"checkpoint {directory / str(number)} holds no weights")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return _arrays(directory / str(number), tree, as_numpy), meta

    (state, meta), found = _newest_sound(directory, steps, step, read)
    (params,) = state.values()
    return params, configs.from_json(meta.get("config", ""), f"the config in {directory}"), found, meta.get("tokenizer")


def peek(path: str | os.PathLike) -> tuple[ConfigDict, int]:
    """(config, newest step) of a run; reads no arrays."""
    directory, steps = _find(path)
    (_, meta), step = _newest_sound(directory, steps, None, lambda number: ({}, _read_meta(directory / str(number))))
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


def _newest_sound(
    directory: epath.Path, steps: Sequence[int], step: int | None, read: Callable[[int], tuple[Any, dict]]
):
    """(read(n), n), which is (arrays, meta), for n = `step`, or for the newest of `steps` that is not damaged."""
    if step is not None:
        if step not in steps:
            raise UserError(f"step {step} is not in {directory}", f"steps there: {_listed(steps)}")
        try:
            return _sound(read, step), step
        except _Damaged as error:
            others = [n for n in steps if n != step]
            fix = f"use another step: {_listed(others)}" if others else ""
            raise UserError(f"checkpoint {directory / str(step)} is damaged ({error})", fix) from error
    reasons = []
    for number in sorted(steps, reverse=True):
        try:
            result = _sound(read, number)
        except _Damaged as error:
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
    """read(number), its arrays as they were written; _Damaged on all hosts where it is not so on one.

    Hosts agree before the fingerprints, which they take together: one that went on to another step would be awaited.
    """
    try:
        found, why = read(number), ""
    except _Damaged as error:
        found, why = None, str(error)
    if jax.process_count() > 1:
        unread = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(why))))
        if len(unread):
            why = why or f"process {unread[0]} cannot read it"
    if why:
        raise _Damaged(why)
    arrays, meta = found
    prints = fingerprint(arrays)
    bad = [path for path, value in prints.items() if meta["arrays"][path][0] != value]
    if bad:
        raise _Damaged(f"{len(bad)} of {len(prints)} arrays differ from their fingerprint, first {bad[0]}")
    return found


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _find(path: str | os.PathLike) -> tuple[epath.Path, list[int]]:
    """The `checkpoints` folder of a workdir and its finished steps, at least one."""
    path = epath.Path(os.fspath(path)).expanduser().resolve()
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    if not directory.is_dir():
        expected = "expected the workdir of a training run, a folder with checkpoints/ in it"
        state = (
            "does not exist"
            if not path.exists()
            else "is a file"
            if not path.is_dir()
            else (
                "is a stack of exported weights"
                if (path / "stack.json").exists()
                else "has no checkpoints/ folder"
            )
        )
        raise UserError(
            f"{path} {state}; {expected}", "give the folder that `unclip train --workdir` wrote to"
        )
    steps = sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and _finished(p))
    if not steps:
        raise UserError(f"{directory} holds no finished checkpoint", "train until the first one is saved")
    return directory, steps


def _finished(step: epath.Path) -> bool:
    return step.is_dir() and ocp.path.step.is_path_finalized(step)


def _sealed(meta: dict) -> dict:
    try:
        text = json.dumps(meta, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must hold JSON values only ({error})") from None
    return {**meta, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_meta(step: epath.Path) -> dict:
    try:
        meta = json.loads((step / "meta" / "metadata").read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"its metadata cannot be read: {error}") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {step} has format version {version}; this unclip_jax reads up to {FORMAT_VERSION}",
            "update unclip_jax",
        )
    seal = meta.pop("sha256", None)
    if _sealed(meta)["sha256"] != seal:
        raise _Damaged("its metadata differs from its checksum")
    return meta


def _arrays(step: epath.Path, tree, how):
    """The arrays of a step that `tree` has, and no others, read as `how` says (Orbax's RestoreArgs); _Damaged."""
    args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
    reader = ocp.PyTreeCheckpointHandler()  # alone: a Checkpointer waits for other hosts, and they might not come
    try:
        return jax.tree.map(jnp.asarray, reader.restore(step / "state", args=args))
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):  # none of which is damage
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise _Damaged(f"{type(error).__name__}: {lines[0][:200] if lines else ''}") from error
    finally:
        reader.close()


def _check_same_arrays(abstract, meta: dict, where: epath.Path) -> None:
    wanted = {path: [str(x.dtype), list(x.shape)] for path, x in by_path(abstract)}
    stored = {path: kind[1:] for path, kind in meta["arrays"].items()}
    if not any(path.startswith("ema/") for path in wanted):  # an average that is no longer kept may stay unread
        stored = {path: kind for path, kind in stored.items() if not path.startswith("ema/")}
    if wanted == stored:
        return
    differing = [
        f"{path} is {_spelled(stored.get(path))} there, {_spelled(wanted.get(path))} here"
        for path in sorted(wanted.keys() | stored.keys())
        if wanted.get(path) != stored.get(path)
    ]
    raise UserError(
        f"checkpoint {where} holds another state: {'; '.join(differing[:3])}"
        + (f" and {len(differing) - 3} more" if len(differing) > 3 else ""),
        "use the config it was trained with, or another workdir",
    )


def _spelled(kind) -> str:
    return "absent" if kind is None else f"{kind[0]}{kind[1]}"
