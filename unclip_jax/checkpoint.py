"""Training checkpoints: Orbax steps in `workdir/checkpoints`, self-describing and checked when read.

A step holds `state` (the arrays) and `meta` (JSON: format version, config, tokenizer, whatever the caller
adds, and a fingerprint of every array). What is read of them without a run is in `checkpoint_read`.
"""

import contextlib
import os
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from unclip_jax.checkpoint_read import FORMAT_VERSION, newest_sound, read_arrays, read_meta, sealed
from unclip_jax.errors import UserError, is_whole
from unclip_jax.fingerprint import by_path, fingerprint


class Checkpoints:
    """The checkpoints of one run, newest `keep` kept; the one that writes them. All hosts call every method.

    Args:
      workdir: folder of the run; `checkpoints/` is made in it.
      keep: steps kept, >= 1.
      async_: write while training goes on; `save` returns once the arrays are copied to the host.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, async_: bool = True):
        if not is_whole(keep, 1):
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
        meta = sealed({**meta, "format_version": FORMAT_VERSION, "arrays": arrays})
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
            meta = read_meta(self.directory / str(number))
            _check_same_arrays(abstract, meta, self.directory / str(number))
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
            return read_arrays(self.directory / str(number), abstract, how), meta

        (state, meta), found = newest_sound(self.directory, steps, step, read)
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
