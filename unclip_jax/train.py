"""The one training loop, for every task.

    state, metrics = step(state, frozen, batch, index)    until num_steps, a stop signal, or a number that is not finite

All randomness of a step comes from (seed, step) and all data from (seed, step), so a resumed run repeats the
uninterrupted one bit for bit on the same devices.
"""

import contextlib
import fcntl
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip_jax import checkpoint, data, distributed, optim, sharding, tasks
from unclip_jax import config as configs
from unclip_jax.data import loader
from unclip_jax.data.source import Source
from unclip_jax.errors import UserError, suggest
from unclip_jax.logs import Checks, Logs, Stopped, Trace, say
from unclip_jax.meter import Meter
from unclip_jax.plan_count import jaxpr_flops
from unclip_jax.tokenizer import Tokenizer

# What may differ when a run goes on: for how long, on which devices, and what is told and kept on the way.
MAY_CHANGE = ("num_steps:", "every.", "keep:", "mesh.", "rules:", "eval.", "clip:", "init:", "init_partly:", "sampler.")
MAY_CHANGE += ("objective.chunk:", "loader.num_workers:", "loader.num_threads:", "loader.prefetch:", "model.remat:")
MAY_CHANGE += ("model.vision.remat:", "model.text.remat:", "model.unet.remat:")
TOKENIZER_CAPTIONS = 20_000
PREEMPTED = 75  # exit code after a checkpoint on SIGTERM: EX_TEMPFAIL, "try again"


class TrainState(NamedTuple):
    """What a checkpoint holds: the step, the parameters, their moving average if one is kept, the optimizer's state."""

    step: jax.Array
    params: Any
    ema: Any
    opt: Any

    @property
    def averaged(self) -> Any:
        """What is evaluated and drawn with: the average, or the parameters where none is kept."""
        return self.params if self.ema is None else self.ema


def init_state(task: tasks.Task, tx: optax.GradientTransformation, rng: jax.Array, ema_decay: float) -> TrainState:
    """The state before the first step; the average starts at the parameters, with `ema_decay=0` there is none."""
    params = task.init(rng)
    average = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, average, tx.init(params))


def make_train_step(
    task: tasks.Task, tx: optax.GradientTransformation, ema_decay: float, seed: int, sam_rho: float = 0.0
) -> Callable:
    """(state, frozen, batch, index) → (state, metrics), pure; the batch is number `index` of the run, from 0.

    The average is ema += (1 - d) (params - ema) with d = min(ema_decay, (1 + step) / (10 + step)), so that a short run
    is not held back by its random start. Where loss or gradient is not finite the state stays as it was, and
    metrics["loss"] tells; it stays so for all later batches too, whose index is no longer its step.
    """

    def step(state: TrainState, frozen: Mapping, batch: Mapping, index: jax.Array) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = task.encode(frozen, batch)
        gradient = jax.value_and_grad(lambda params: task.loss(params, batch, rng), has_aux=True)
        (loss, metrics), grads = optim.sharpness_aware(gradient, sam_rho)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = None if state.ema is None else jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
        norm = optax.global_norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.step == index)
        new = TrainState(state.step + 1, params, ema, opt)
        new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
        return new, {"loss": jnp.where(jnp.isfinite(norm), loss, jnp.nan), "grad_norm": norm, **metrics}

    return step


def compile_step(step: Callable, mesh: jax.sharding.Mesh, shardings: TrainState) -> Callable:
    """A train step for jax: split over the mesh, its state's buffers used again."""
    return jax.jit(sharding.split_rows(step, mesh), donate_argnums=0, out_shardings=(shardings, None))


def step_of(config: ConfigDict, task: tasks.Task, tx: optax.GradientTransformation) -> Callable:
    """`make_train_step` with the numbers of a config."""
    return make_train_step(task, tx, config.ema_decay, config.seed, config.optim.get("sam_rho", 0.0))


class Run(NamedTuple):
    """All that a training run is made of."""

    config: ConfigDict
    workdir: Path
    source: Source
    held_out: Source | None
    tokenizer: Tokenizer | None
    task: tasks.Task
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    frozen: Mapping
    shardings: TrainState
    shapes: TrainState
    initial: dict[str, jax.Array] | None  # the weights that config.init names, by name


def make_run(config: ConfigDict, workdir: str | Path) -> Run:
    """Checks the config against devices, CLIP, data and an earlier run in `workdir`, and builds what the loop needs.

    Nothing is written. The config that comes back is complete: vocabulary and CLIP identity are filled in.

    Raises:
      UserError: whatever does not fit, before anything is compiled.
    """
    config = configs.from_json(configs.to_json(config), "config")
    workdir, earlier = _earlier_run(workdir)
    _check_values(config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    tx = optim.make(config.num_steps, **config.optim)
    source = data.make(**config.data)
    checked = config.every.preview or config.every.eval
    held_out = data.make(**{**config.data, "split": config.eval.split}) if checked else None
    clip = tasks.load_clip(config.clip) if config.clip else None
    _check_embedded(source, clip)
    text = clip.tokenizer_json if clip else _own_tokenizer(config, source, workdir if earlier else None)
    tokenizer = Tokenizer.from_json(text) if text else None
    with config.unlocked():
        config.clip_identity = clip.identity if clip else ""
        if tokenizer:
            config.tokenizer.update(vocab_size=tokenizer.vocab_size, max_len=tokenizer.max_len)
    if earlier:
        _check_same_run(config, earlier, workdir)
    task = tasks.make(config, clip.model if clip else None)
    with _said_of(f"the network of {config.task} cannot be built", "correct config.model"):
        shapes = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(config.seed), config.ema_decay))
    shardings = sharding.infer(shapes, config.rules, mesh)
    frozen = {"clip": clip.params} if clip else {}
    frozen = jax.device_put(frozen, sharding.infer_frozen(frozen, mesh))
    initial = None if earlier or not config.init else _initial(config, task, shapes.params)
    return Run(config, workdir, source, held_out, tokenizer, task, tx, mesh, frozen, shardings, shapes, initial)


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
    with _locked(run.workdir), checkpoint.Checkpoints(run.workdir, config.keep) as saved:
        _write_once(run)
        restored = saved.restore(sharding.abstract(run.shapes, run.shardings))
        state = restored[0] if restored else _fresh(run, batches)
        start = int(state.step)
        if start >= config.num_steps:
            say(f"already finished: {run.workdir} is at step {start} of {config.num_steps}")
            return 0
        meter.go_on(restored[1] if restored else {})
        logs, checks, meta = Logs(config, run.workdir, start, meter), Checks(run, batches), _meta(run)
        trace = Trace(profile and Path(profile).expanduser(), start, config.num_steps)

        def store(step, state):
            saved.save(step, state, {**meta, **meter.stored(), "data_step": step})

        stop = distributed.install_signal_handlers()
        stream = batches(start)
        meter.lap("start")
        try:
            for number in range(start + 1, config.num_steps + 1):
                batch = next(stream)
                meter.lap("input")
                if number == start + 1:
                    step_fn, meter.flops = _compile(run, traced)
                    meter.lap("compile")
                trace.before(number)
                state, metrics = step_fn(state, run.frozen, batch, number - 1)
                logs.add(metrics)
                trace.after(number, metrics)
                last = number == config.num_steps
                preempted = distributed.reached_preemption()
                save = number % every.save == 0 or last or preempted
                if (number % every.log == 0 or save) and not logs.write(number):
                    good = int(state.step)
                    store(good, state)
                    what = f"loss or gradient at step {good + 1} is not a finite number; step {good} is saved"
                    fix = "lower optim.lr, raise optim.warmup, or compute in float32, in another --workdir"
                    raise UserError(what, fix)
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
                        store(number, state)
                    saved.wait()
                    return _stopped(number, last)
                meter.lap("step")
        finally:
            stop()
            trace.close()
            logs.close()
            stream.close()
    return 0


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
    return traced.lower().compile(), flops / run.mesh.size


def _trace(run: Run, task: tasks.Task, batch: Any) -> jax.stages.Traced:
    """`task`'s train step on the run's mesh for batches of such shapes."""
    step = compile_step(step_of(run.config, task, run.tx), run.mesh, run.shardings)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((run.config.batch_size, *a.shape[1:]), a.dtype), batch)
    place = jax.tree.map(lambda _: sharding.batch_sharding(run.mesh), batch)
    return step.trace(sharding.abstract(run.shapes, run.shardings), run.frozen, sharding.abstract(batch, place), 0)


def _check_embedded(source: Source, clip) -> None:
    """UserError where a source holds another CLIP's embeddings than the one trained against."""
    identity = getattr(source, "clip_identity", None)
    if identity and (clip is None or clip.identity != identity):
        what = f"the embeddings in data.path are of the CLIP {identity}, and config.clip is another or none"
        raise UserError(what, "set --config.clip to the CLIP they were made with; they train priors only")


def _batches(run: Run, start: int, source=None, size: int = 0, **over) -> Iterator[dict[str, jax.Array]]:
    """Batches on the run's devices from number `start` on, of its own source and size unless others are given."""
    settings = {"seed": run.config.seed, "start_step": start, **run.config.loader, **over}
    source = run.source if source is None else source
    made = loader.batches(source, run.tokenizer, size or run.config.batch_size, **settings)
    place = sharding.batch_sharding(run.mesh)
    with contextlib.closing(made):
        for batch in made:
            yield sharding.put_batch(batch, place)


def _rehearse(run: Run, batches: Callable) -> jax.stages.Traced:
    """The train step, traced; evaluation and preview are tried so as well. UserError for what does not fit."""
    task, config, key = run.task, run.config, jax.random.key(0)
    few = run.mesh.shape["data"] * run.mesh.shape["fsdp"]

    def check(params, batch):
        batch = task.encode(run.frozen, batch)
        return task.evaluate(params, batch, key), task.preview(params, batch, key)

    batch = next(batches(0, size=few, num_workers=0))
    held_out = run.held_out and next(batches(0, run.held_out, few, crop=None, num_workers=0))
    with _said_of(f"task {config.task} does not fit its data", "compare config.model and config.data with configs/"):
        if run.held_out:
            jax.eval_shape(check, run.shapes.params, held_out)
        return _trace(run, task, batch)


def _fresh(run: Run, batches: Callable) -> TrainState:
    """The first state: the weights of `config.init`, or random ones with what `task.prepare` measures on the data."""
    make = lambda: init_state(run.task, run.tx, jax.random.key(run.config.seed), run.config.ema_decay)  # noqa: E731
    state = jax.jit(make, out_shardings=run.shardings)()
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


def _initial(config: ConfigDict, task: tasks.Task, shapes: Any) -> Any:
    """The weights at `config.init`, in f32; UserError unless they are a network of just these arrays.

    With `config.init_partly` those arrays alone that both networks have; UserError unless there are any, each of the
    same shape.
    """
    params = tasks.adopt(task, tasks.load_stage(config.init, config.task).params)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    found, wanted = (dict(checkpoint.by_path(tree)) for tree in (params, shapes))
    both = found.keys() & wanted.keys()
    for name in sorted(both if config.get("init_partly") and both else found.keys() | wanted.keys()):
        here, there = (str(side[name].shape) if name in side else "no array" for side in (wanted, found))
        if here != there:
            raise UserError(
                f"init={config.init!r} holds another network: {name} is {there}, and config.model asks for {here}",
                "take the config.model that those weights were trained with, or, where that network has more arrays or "
                "fewer but those of one name have one shape, --config.init_partly=True",
            )
    return {name: found[name] for name in both}


def _over(params: Any, named: dict[str, Any]) -> Any:
    """`params` with the arrays of `named` in place of those of the same names."""
    return jax.tree.unflatten(jax.tree.structure(params), [named.get(k, a) for k, a in checkpoint.by_path(params)])


def _own_tokenizer(config: ConfigDict, source: Source, workdir: Path | None) -> str | None:
    """The tokenizer of a stage without CLIP: none, the earlier run's, one given by path, or one trained on captions."""
    if config.tokenizer is None:
        return None
    if workdir or config.tokenizer.path:
        return Tokenizer.load(workdir / "tokenizer.json" if workdir else config.tokenizer.path).to_json()
    captions = (source[i]["caption"] for i in itertools.islice(range(len(source)), TOKENIZER_CAPTIONS))
    return Tokenizer.train(captions, config.tokenizer.vocab_size, config.tokenizer.max_len).to_json()


def _check_values(config: ConfigDict) -> None:
    """Raises UserError for what can be told wrong without building anything."""
    tasks.check(config, bool(config.clip))
    if config.clip and not tasks.needs_clip(config):
        raise UserError(f"clip={config.clip!r} is of no use to the task '{config.task}'", "leave it out")
    for block, function in (("mesh", sharding.make_mesh), ("optim", optim.make), ("loader", loader.batches)):
        known = list(inspect.signature(function).parameters)
        for key in config[block]:
            if key not in known:
                raise UserError(f"config has no key '{block}.{key}'", suggest(key, known))
    flat = configs.flatten(config)
    for name in ("keep", "every.log", "every.save", "every.preview", "every.eval", "eval.batches", "eval.preview"):
        value, least = flat[name], 0 if name in ("every.preview", "every.eval") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}={value!r} must be a whole number >= {least}")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay={config.ema_decay} must be in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be in 0 … 2**32 - 1")


@contextlib.contextmanager
def _said_of(what: str, fix: str):
    """Whatever is raised inside, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{what}: {(why.strip().splitlines() or [''])[0][:300]}", fix) from e


def _earlier_run(workdir: str | Path) -> tuple[Path, ConfigDict | None]:
    """The folder, and the config of the run that saved a checkpoint in it, or None."""
    if not str(workdir) or "://" in str(workdir):
        raise UserError(f"workdir {str(workdir)!r} must be a folder", "mount a bucket, and give the folder")
    workdir = Path(workdir).expanduser()
    stored = workdir / "config.json"
    saved = any(step.name.isdecimal() for step in (workdir / "checkpoints").glob("*"))
    return workdir, configs.from_json(stored.read_text(), str(stored)) if saved and stored.is_file() else None


def _check_same_run(config: ConfigDict, earlier: ConfigDict, workdir: Path) -> None:
    changed = [line for line in configs.diff(earlier, config) if not line.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            f"workdir {workdir} holds a run with another config: {'; '.join(changed[:5])}",
            "use another --workdir, or the config that this one was started with",
        )


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
        temporary = run.workdir / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(run.workdir / name)


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
    except OSError as e:
        file.close()
        raise UserError(f"workdir {workdir} is in use by another run", "wait for it or choose another --workdir") from e
    try:
        yield
    finally:
        if file:
            file.close()
