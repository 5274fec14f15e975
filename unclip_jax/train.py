"""The one training loop, for every task.

    state, metrics = step(state, frozen, batch, index)    until num_steps, a stop signal, or a number that is not finite

All randomness of a step comes from (seed, step) and all data from (seed, step), so a resumed run repeats the
uninterrupted one bit for bit on the same devices.
"""

import contextlib
import fcntl
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import checkpoint, distributed, sharding, tasks
from unclip_jax import config as configs
from unclip_jax.compiling import compiled, trim
from unclip_jax.cost import jaxpr_flops
from unclip_jax.data import loader
from unclip_jax.errors import UserError
from unclip_jax.fingerprint import by_path
from unclip_jax.logs import Checks, Logs, Stopped, Trace, say
from unclip_jax.meter import Meter
from unclip_jax.run import Run, fitting, make_run
from unclip_jax.storage import write_text
from unclip_jax.train_step import TrainState, compile_step, init_state, step_of

LOCKS = "mount it with locks (Lustre: -o flock), or choose another --workdir"
PREEMPTED = 75  # exit code after a checkpoint on SIGTERM: EX_TEMPFAIL, "try again"


def train(config: ConfigDict, workdir: str | Path, profile: str | Path | None = None) -> int:
    """Trains to `config.num_steps`, resuming what is in `workdir`. Returns an exit code: 0, or 75 after a stop signal.

    Writes checkpoints/, config.json, tokenizer.json, metrics.jsonl, tb/ and previews/ into `workdir`, and a profiler's
    trace of a few steps into the folder `profile` if there is one.

    Raises:
      UserError: a config that does not fit, with nothing written; a workdir in use; a loss that is not finite, with
        the state before it saved.
    """
    meter = Meter()
    distributed.initialize()
    run = make_run(config, workdir)
    config, every = run.config, run.config.every
    batches = functools.partial(_batches, run)
    traced = _rehearse(run, batches)
    checkpoints = functools.partial(checkpoint.Checkpoints, run.workdir, config.keep)
    with _locked(run.workdir), contextlib.ExitStack() as stack, checkpoints() as saved:
        _write_once(run)
        restored = saved.restore(sharding.abstract(run.shapes, run.shardings))
        start = int(restored[0].step) if restored else 0
        if start >= config.num_steps:
            say(f"already finished: {run.workdir} is at step {start} of {config.num_steps}")
            return 0
        meter.lap("start")
        stop = stack.enter_context(distributed.StopSignals())
        step_fn, meter.flops = _compile(run, traced)
        del traced
        meter.lap("compile")
        state = restored[0] if restored else _fresh(run, batches)
        trim()
        meter.go_on(restored[1] if restored else {})
        logs, checks = Logs(config, run.workdir, start, meter), Checks(run, batches, stop)
        trace = Trace(profile and Path(profile).expanduser(), start, config.num_steps)
        store = functools.partial(_store, saved, meter, _meta(run))
        log = functools.partial(_log, saved, logs, store)
        stream = batches(start)
        meter.lap("start")
        try:
            for number in range(start + 1, config.num_steps + 1):
                batch = next(stream)
                meter.lap("input")
                trace.before(number)
                state, metrics = step_fn(state, run.frozen, batch, number - 1)
                logs.add(metrics)
                trace.after(number, metrics)
                last = number == config.num_steps
                preempted = stop.reached()
                save = number % every.save == 0 or last or preempted
                if number % every.log == 0 or save:
                    log(number, state)
                if save:
                    store(number, state)
                    meter.lap("checkpoint")
                try:
                    if preempted and not last:
                        raise Stopped
                    if checks.due(state.averaged, number, last, logs):
                        meter.lap("checks")
                except Stopped:
                    if not save:
                        log(number, state)
                        store(number, state)
                    saved.wait()
                    return _stopped(number, last)
                meter.lap("step")
        except Exception:
            _rescue(store, state)
            raise
        finally:
            trace.close()
            logs.close()
            stream.close()
    return 0


def _store(saved: checkpoint.Checkpoints, meter: Meter, meta: dict, step: int, state: TrainState) -> None:
    saved.save(step, state, {**meta, **meter.stored()})


def _log(saved: checkpoint.Checkpoints, logs: Logs, store: Callable, number: int, state: TrainState) -> None:
    """Writes the metrics up to step `number`; UserError where one was not finite, or a checkpoint was not written."""
    saved.check()
    if logs.write(number):
        return
    good = int(state.step)
    store(good, state)
    what = f"loss or gradient at step {good + 1} is not a finite number; step {good} is saved"
    raise UserError(what, "lower optim.lr, raise optim.warmup, or compute in float32, in another --workdir")


def _rescue(store: Callable, state: TrainState) -> None:
    """Saves what was trained when the loop breaks off, such as by the end of a reader; what broke it is told."""
    if jax.process_count() == 1:  # others would not come to save with this one
        with contextlib.suppress(Exception):
            store(int(state.step), state)


def _stopped(step: int, last: bool) -> int:
    """Tells of a stop signal after which `step` is saved, and gives the exit code; after the last all is done."""
    then = "it was the last, and its checks were broken off" if last else "the same command goes on from there"
    say(f"stop signal: step {step} is saved; {then}")
    return 0 if last else PREEMPTED


def _compile(run: Run, traced: jax.stages.Traced) -> tuple[Callable, float]:
    """(the train step, which gives up its state; its FLOPs on each device, without recomputation)."""
    plain = tasks.without_remat(run.task, run.config)
    if plain is run.task:
        flops = jaxpr_flops(traced.jaxpr)
    else:
        flops = jaxpr_flops(_trace(run, plain, traced.args_info[0][2]).jaxpr)
    return compiled(traced.lower()), flops / run.mesh.size


def _trace(run: Run, task: tasks.Task, batch: Any) -> jax.stages.Traced:
    """`task`'s train step on the run's mesh for batches of such shapes."""
    step = compile_step(step_of(run.config, task, run.tx), run.mesh, run.shardings)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((run.config.batch_size, *a.shape[1:]), a.dtype), batch)
    place = jax.tree.map(lambda _: sharding.batch_sharding(run.mesh), batch)
    return step.trace(sharding.abstract(run.shapes, run.shardings), run.frozen, sharding.abstract(batch, place), 0)


def _batches(run: Run, start: int, source=None, size: int = 0, **over) -> Iterator[dict[str, jax.Array]]:
    """Batches on the run's devices from number `start` on, of its own source and size unless others are given."""
    settings = {"seed": run.config.seed, "start_step": start, **run.config.loader, **over}
    source = run.source if source is None else source
    size, place = size or run.config.batch_size, sharding.batch_sharding(run.mesh)
    made = loader.batches(source, run.tokenizer, size, rows=sharding.own_rows(place, size), **settings)
    with contextlib.closing(made):
        for batch in made:
            yield sharding.put_batch(batch, place, size)


def _rehearse(run: Run, batches: Callable) -> jax.stages.Traced:
    """The train step, traced; evaluation and preview are tried so as well. UserError for what does not fit."""
    task, config, key = run.task, run.config, jax.random.key(0)
    few = sharding.parts_of_batch(run.mesh)

    def check(params, batch):
        batch = task.encode(run.frozen, batch)
        return task.evaluate(params, batch, key), task.preview(params, batch, key)

    batch = next(batches(0, size=few, num_workers=0))
    held_out = run.held_out and next(batches(0, run.held_out, few, crop=None, num_workers=0))
    with fitting(config):
        if run.held_out:
            jax.eval_shape(check, run.shapes.params, held_out)
        return _trace(run, task, batch)


def _fresh(run: Run, batches: Callable) -> TrainState:
    """The first state: the weights of `config.init`, or random ones with what `task.prepare` measures on the data."""
    make = lambda: init_state(run.task, run.tx, jax.random.key(run.config.seed), run.config.ema_decay)  # noqa: E731
    state = compiled(jax.jit(make, out_shardings=run.shardings).lower())()
    given = run.initial or {}
    params = state.params
    if len(given) < len(jax.tree.leaves(params)):
        params = run.task.prepare(run.frozen, params, batches(0))
    if given:
        params = _over(params, given)
    if params is state.params:
        return state
    params = jax.device_put(params, run.shardings.params)
    return state._replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _over(params: Any, named: dict[str, Any]) -> Any:
    """`params` with the arrays of `named` in place of those of the same names."""
    return jax.tree.unflatten(jax.tree.structure(params), [named.get(k, a) for k, a in by_path(params)])


def _meta(run: Run) -> dict:
    """What a checkpoint says of itself."""
    tokenizer = run.tokenizer.to_json() if run.tokenizer else None
    return {"config": configs.to_json(run.config), "tokenizer": tokenizer, "clip_identity": run.config.clip_identity}


def _write_once(run: Run) -> None:
    """config.json and tokenizer.json; both by rename, so a reader never sees half a file."""
    if not distributed.is_main():
        return
    files = {"config.json": configs.to_json(run.config)}
    if run.tokenizer:
        files["tokenizer.json"] = run.tokenizer.to_json()
    for name, text in files.items():
        write_text(run.workdir / name, text)


@contextlib.contextmanager
def _locked(workdir: Path):
    """One run per workdir: held by the main process until it ends, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w") if distributed.is_main() else None
    except OSError as e:
        raise UserError(f"workdir {workdir} must be writable ({e.strerror})", "choose another --workdir") from e
    try:
        if file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(f"workdir {workdir} is in use by another run", "wait for it or choose another --workdir") from e
    except OSError as e:
        file.close()
        raise UserError(f"workdir {workdir} is where no file can be locked ({e.strerror})", LOCKS) from e
    try:
        distributed.check_shared(workdir)
        yield
    finally:
        if file:
            file.close()
