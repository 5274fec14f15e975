"""One step of training, for every task: loss and gradient, the optimizer, the moving average; pure, and compiled."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip_jax import optim, sharding, tasks
from unclip_jax.nn.device import platform


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
    task: tasks.Task, tx: optax.GradientTransformation, ema_decay: float, seed: int,
    sam_rho: float = 0.0, accumulate: int = 1,
) -> Callable:
    """(state, frozen, batch, index) → (state, metrics), pure; the batch is number `index` of the run, from 0.

    At each update of the parameters, of number n = step // accumulate, the average is ema += (1 - d) (params - ema)
    with d = min(ema_decay, (1 + n) / (10 + n)), so that a short run is not held back by its random start. Where loss or
    gradient is not finite the state stays as it was, and metrics["loss"] tells; it stays so for all later batches too,
    whose index is no longer its step.
    """

    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, frozen: Mapping, batch: Mapping, index: jax.Array) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = task.encode(frozen, batch)
        gradient = jax.value_and_grad(lambda params: task.loss(params, batch, rng), has_aux=True)
        (loss, metrics), grads = optim.sharpness_aware(gradient, sam_rho)(state.params)
        norm = optax.global_norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.step == index)

        def updated(state: TrainState) -> TrainState:
            updates, opt = tx.update(grads, state.opt, state.params, norm=norm)
            params = optax.apply_updates(state.params, updates)
            n, last = state.step // accumulate, (state.step + 1) % accumulate == 0
            rate = jnp.where(last, 1 - jnp.minimum(ema_decay, (1 + n) / (10 + n)), 0.0)
            ema = None if state.ema is None else jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
            return TrainState(state.step + 1, params, ema, opt)

        if platform() == "gpu":  # where the host would wait for the device before a branch
            new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), updated(state), state)
        else:  # in place; both kept for a choice would be as large as the state
            new = jax.lax.cond(sound, updated, lambda state: state, state)
        return new, {"loss": jnp.where(jnp.isfinite(norm), loss, jnp.nan), "grad_norm": norm, **metrics}

    return step


def compile_step(step: Callable, mesh: jax.sharding.Mesh, shardings: TrainState) -> Callable:
    """A train step for jax: split over the mesh, its state's buffers used again."""
    return jax.jit(sharding.split_rows(step, mesh), donate_argnums=0, out_shardings=(shardings, None))


def step_of(config: ConfigDict, task: tasks.Task, tx: optax.GradientTransformation) -> Callable:
    """`make_train_step` with the numbers of a config."""
    more = {name: config.optim[name] for name in ("sam_rho", "accumulate") if name in config.optim}
    return make_train_step(task, tx, config.ema_decay, config.seed, **more)
