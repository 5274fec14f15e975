"""The one training loop, for every task.

    state, metrics = step(state, frozen, batch)          until num_steps, a stop signal, or a number that is not finite

All randomness of a step comes from (seed, step) and all data from (seed, step), so a resumed run repeats the uninterrupted
one bit for bit on the same devices.
"""

import contextlib
import fcntl
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax import checkpoint, config as configs, data, distributed, optim, sharding, tasks
from unclip_jax.data import images, loader
from unclip_jax.errors import UserError
from unclip_jax.tokenizer import Tokenizer

# Settings that may differ when a run goes on: none of them changes what the weights are.
MAY_CHANGE = ("num_steps", "every", "keep", "mesh", "rules", "loader", "eval", "clip", "sampler")
TOKENIZER_CAPTIONS = 20_000
PREEMPTED = 75  # exit code after a checkpoint on SIGTERM: EX_TEMPFAIL, "try again"


class TrainState(NamedTuple):
    """What a checkpoint holds: the step, the parameters, their moving average, the optimizer's state."""

    step: jax.Array
    params: Any
    ema: Any
    opt: Any


def init_state(task: tasks.Task, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    params = task.init(rng)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), tx.init(params))


def make_train_step(task: tasks.Task, tx: optax.GradientTransformation, ema_decay: float, seed: int) -> Callable:
    """(state, frozen, batch) → (state, metrics), pure.

    The average is ema += (1 - d) (params - ema) with d = min(ema_decay, (1 + step) / (10 + step)), so that a short run is not
    held back by its random start. Where loss or gradient is not finite the state stays as it was, and metrics["loss"] tells.
    """

    def step(state: TrainState, frozen: Mapping, batch: Mapping) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = task.encode(frozen, batch)
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, batch, rng)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, ema, opt)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, {"loss": jnp.where(jnp.isfinite(norm), loss, jnp.nan), "grad_norm": norm, **metrics}

    return step


class Run(NamedTuple):
    """All that a training run is made of."""

    config: ConfigDict
    workdir: Path
    tokenizer: Tokenizer | None
    task: tasks.Task
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    frozen: Mapping
    shardings: TrainState
    shapes: TrainState


def make_run(config: ConfigDict, workdir: str | Path) -> Run:
    """Checks the config against devices, CLIP, data and an earlier run in `workdir`, and builds what the loop needs.

    Nothing is written. The config that comes back is complete: vocabulary and CLIP identity are filled in.

    Raises:
      UserError: whatever does not fit, before anything is compiled.
    """
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    _check_numbers(config)
    config = config.copy_and_resolve_references()
    clip = tasks.load_clip(config.clip) if config.clip else None
    text = clip.tokenizer_json if clip else _own_tokenizer(config, workdir)
    tokenizer = Tokenizer.from_json(text) if text else None
    with config.unlocked():
        config.clip_identity = clip.identity if clip else ""
        if tokenizer:
            config.tokenizer.update(vocab_size=tokenizer.vocab_size, max_len=tokenizer.max_len)
    task = tasks.make(config, clip.model if clip else None)
    tx = optim.make(config.num_steps, **config.optim)
    stored = Path(workdir) / "config.json"
    if stored.is_file():
        _check_same_run(config, configs.from_json(stored.read_text(), str(stored)), workdir)
    try:
        shapes = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(config.seed)))
    except ValueError as e:
        raise UserError(f"the network of {config.task} cannot be built: {e}", "correct config.model") from e
    shardings = sharding.infer(shapes, config.rules, mesh)
    frozen = {"clip": jax.device_put(clip.params, sharding.replicated(mesh))} if clip else {}
    return Run(config, Path(workdir), tokenizer, task, tx, mesh, frozen, shardings, shapes)


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains to `config.num_steps`, resuming what is in `workdir`. Returns an exit code: 0, or 75 after a stop signal.

    Writes checkpoints/, config.json, tokenizer.json, metrics.jsonl, tb/ and previews/ into `workdir`.
    """
    distributed.initialize()
    run = make_run(config, workdir)
    config, task = run.config, run.task
    source = data.make(**config.data)
    batch_sharding = sharding.batch_sharding(run.mesh)

    def batches(start, stream=source, size=config.batch_size, **over):
        settings = {**config.loader, **over}
        made = loader.batches(stream, run.tokenizer, size, seed=config.seed, start_step=start, **settings)
        return (sharding.put_batch(b, batch_sharding) for b in made)

    with _locked(run.workdir), checkpoint.Checkpoints(run.workdir, config.keep) as saved, run.mesh:
        _write_once(run)
        restored = saved.restore(sharding.abstract(run.shapes, run.shardings))
        state = restored[0] if restored else _fresh(run, batches)
        start = int(state.step)
        if start >= config.num_steps:
            logging.info("already finished: %d of %d steps", start, config.num_steps)
            return 0
        step_fn = make_train_step(task, run.tx, config.ema_decay, config.seed)
        step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(run.shardings, None))
        logs = Logs(run, start)
        checks = Checks(run, batches)
        meta = {
            "config": configs.to_json(config),
            "tokenizer": run.tokenizer.to_json() if run.tokenizer else None,
            "clip_identity": config.clip_identity,
        }
        stop = distributed.install_signal_handlers()
        every, stream = config.every, batches(start)
        try:
            for number in range(start + 1, config.num_steps + 1):
                state, metrics = step_fn(state, run.frozen, next(stream))
                logs.add(metrics)
                last = number == config.num_steps
                preempted = distributed.reached_preemption(number)
                if number % every.log == 0 or last or preempted or number % every.save == 0:
                    if not logs.write(number):
                        good = int(state.step)
                        saved.save(good, state, {**meta, "data_step": good})
                        raise UserError(
                            f"loss or gradient at step {good + 1} is not a finite number; the state of step {good} is saved",
                            "lower optim.lr, raise optim.warmup, or compute in float32",
                        )
                if number % every.save == 0 or last or preempted:
                    saved.save(number, state, {**meta, "data_step": number})
                if preempted and not last:
                    saved.wait()
                    logging.warning("stop signal: saved step %d; the same command goes on from there", number)
                    return PREEMPTED
                if every.preview and (number % every.preview == 0 or last):
                    checks.preview(state, number)
                if every.eval and (number % every.eval == 0 or last):
                    logs.record(number, checks.evaluate(state))
        finally:
            stop()
            logs.close()
    return 0


class Logs:
    """Progress bar, metrics.jsonl and TensorBoard; written by the main process.

    Metrics stay on the device until they are written, so that no step waits for the host.
    """

    def __init__(self, run: Run, start: int):
        self.pending: list[dict] = []
        self.batch_size = run.config.batch_size
        self.rate = optim.learning_rate(run.config.num_steps, **run.config.optim)
        self.clock, self.number = time.perf_counter(), start
        self.main = distributed.is_main()
        self.bar = tqdm(
            total=run.config.num_steps, initial=start, desc=run.config.task, unit="step", disable=not self.main, mininterval=1
        )
        if self.main:
            from tensorboardX import SummaryWriter

            path = run.workdir / "metrics.jsonl"
            _keep_until(path, start)
            self.file = path.open("a")
            self.board = SummaryWriter(str(run.workdir / "tb"), purge_step=start + 1)

    def add(self, metrics: dict) -> None:
        """Takes one step's metrics, still on the device."""
        self.pending.append(metrics)

    def write(self, number: int) -> bool:
        """Means since the last time; waits for the device. False where a step's loss was not finite."""
        if not self.pending:
            return True
        fetched = jax.device_get(self.pending)
        self.pending = []
        now = time.perf_counter()
        steps = number - self.number
        means = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
        means["images_per_second"] = steps * self.batch_size / (now - self.clock)
        means["learning_rate"] = float(self.rate(number))
        self.clock, self.number = now, number
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {means['images_per_second']:.0f} images/s")
        self.bar.update(steps)
        self.record(number, means)
        return bool(np.isfinite([m["loss"] for m in fetched]).all())

    def record(self, number: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars for TensorBoard."""
        if self.main:
            self.file.write(json.dumps({"step": number, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, number)

    def close(self) -> None:
        """Ends the bar and the files."""
        self.bar.close()
        if self.main:
            self.file.close()
            self.board.close()


class Checks:
    """Previews and metrics of the averaged weights on held-out data, while training."""

    def __init__(self, run: Run, batches: Callable):
        self.run, self.batches = run, batches
        self.settings = run.config.eval
        self._draw = None

    @property
    def source(self):
        """The evaluation split, uncropped."""
        return data.make(**{**self.run.config.data, "split": self.settings.split})

    def preview(self, state: TrainState, number: int) -> None:
        """Writes previews/step_N.png: the same held-out examples and noise each time."""
        task, config = self.run.task, self.run.config
        if self._draw is None:
            stream = self.batches(0, self.source, self.settings.preview, crop=None, num_workers=0, shuffle=False)
            self.batch = next(iter(stream))

            def draw(params, frozen, batch):
                return images.to_uint8(task.preview(params, task.encode(frozen, batch), jax.random.key(config.seed)))

            self._draw = jax.jit(draw, out_shardings=sharding.replicated(self.run.mesh))
        pictures = np.asarray(self._draw(state.ema, self.run.frozen, self.batch))
        if distributed.is_main():
            path = self.run.workdir / "previews" / f"step_{number:07d}.png"
            path.parent.mkdir(exist_ok=True)
            images.save_png(path, images.grid(pictures, min(len(pictures), self.settings.preview)), {"step": str(number)})

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """{"eval/metric": value} over `eval.batches` batches of the evaluation split."""
        stream = self.batches(0, self.source, self.run.config.batch_size, num_workers=0)
        measured = tasks.measure(self.run.task, self.run.frozen, state.ema, stream, self.settings.batches)
        return {f"eval/{name}": value for name, value in measured.items()}


def _fresh(run: Run, batches: Callable) -> TrainState:
    """The first state, with what `task.prepare` measures on the training data."""
    make = lambda: init_state(run.task, run.tx, jax.random.key(run.config.seed))  # noqa: E731
    state = jax.jit(make, out_shardings=run.shardings)()
    params = run.task.prepare(run.frozen, state.params, batches(0))
    if params is state.params:
        return state
    params = jax.device_put(params, run.shardings.params)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


def _own_tokenizer(config: ConfigDict, workdir: str | Path) -> str | None:
    """The tokenizer of a stage without CLIP: none, the run's own, one given by path, or one trained on the captions."""
    if config.tokenizer is None:
        return None
    if (Path(workdir) / "tokenizer.json").is_file():
        return Tokenizer.load(Path(workdir) / "tokenizer.json").to_json()
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path).to_json()
    source = data.make(**config.data)
    captions = (source[i]["caption"] for i in itertools.islice(range(len(source)), TOKENIZER_CAPTIONS))
    return Tokenizer.train(captions, config.tokenizer.vocab_size, config.tokenizer.max_len).to_json()


def _check_numbers(config: ConfigDict) -> None:
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay={config.ema_decay} must be in [0, 1)")
    for name in ("log", "save"):
        if config.every[name] < 1:
            raise UserError(f"every.{name}={config.every[name]} must be at least 1 (steps)")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be in 0 … 2**32 - 1")


def _check_same_run(config: ConfigDict, stored: ConfigDict, workdir: str | Path) -> None:
    changed = [c for c in configs.diff(stored, config) if c.split(":")[0].split(".")[0] not in MAY_CHANGE]
    if changed:
        raise UserError(
            f"workdir {workdir} holds a run with another config: {'; '.join(changed[:5])}",
            "use another --workdir, or the config that this one was started with",
        )


def _write_once(run: Run) -> None:
    """config.json and tokenizer.json; both by rename, so a reader never sees half a file."""
    if not distributed.is_main():
        return
    files = {"config.json": configs.to_json(run.config)}
    if run.tokenizer:
        files["tokenizer.json"] = run.tokenizer.to_json()
    for name, text in files.items():
        temporary = run.workdir / f".{name}.tmp"
        temporary.write_text(text)
        temporary.rename(run.workdir / name)


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    path.write_text("".join(kept))


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
        raise UserError(f"workdir {workdir} is in use by another run", "wait for it or choose another --workdir") from e
    try:
        yield
    finally:
        if file:
            file.close()
