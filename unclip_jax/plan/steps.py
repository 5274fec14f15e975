"""What a train or sample step takes on each device: memory, FLOPs, collectives and a predicted time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax import sharding, tasks
from unclip_jax.cost import Collective, count_flops, count_gradient, read_hlo
from unclip_jax.plan.abstract import Abstract, split
from unclip_jax.plan.chips import CHIPS
from unclip_jax.run import fitting
from unclip_jax.train_step import compile_step


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step takes, per device unless said otherwise.

    Attributes:
      what: "train" or "sample". compiled: whether the compiler gave the bytes, or arithmetic on shapes.
      flops: of all devices together, in one step, with recomputation; model_flops: without.
      held: bytes that stay between steps: {"parameters": …, "optimizer": …, "average": …, "frozen CLIP": …}.
      peak: bytes at the highest point; None where the compiler gave up.
      limit: bytes of a device's memory.
      collectives, traffic: of the compiled program; None by arithmetic.
      error: the compiler's own words where it does not fit.
      remat: the policies of a train step's networks.
    """

    what: str
    devices: int
    chip: str
    mesh: dict[str, int]
    batch_size: int
    compiled: bool
    flops: float
    model_flops: float
    held: dict[str, float]
    peak: float | None
    limit: float
    collectives: tuple[Collective, ...] | None = None
    traffic: float | None = None
    error: str = ""
    remat: str = ""

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.limit

    @property
    def seconds(self) -> dict[str, float]:
        """Predicted time of compute, memory and links, each alone; a step takes at least the longest of them."""
        chip = CHIPS[self.chip]
        times = {"compute": self.flops / self.devices / chip.flops}
        if self.traffic is not None:
            times["memory"] = self.traffic / chip.bandwidth
            times["links"] = sum(c.wire_bytes for c in self.collectives) / chip.links
        return times

    @property
    def seconds_a_picture(self) -> float:
        """Predicted, of whatever takes longest."""
        return max(self.seconds.values()) / self.batch_size

    @property
    def mfu_ceiling(self) -> float:
        """The share of peak FLOP/s that useful work can reach if all transfers overlap with compute."""
        return self.model_flops / self.devices / CHIPS[self.chip].flops / max(self.seconds.values())


def _rows(run: Abstract) -> dict[str, jax.ShapeDtypeStruct]:
    """What a stack tells the stage of each output: the caption, and what the stage before it has drawn."""
    b, task = run.config.batch_size, run.task
    if run.config.task == "clip":
        return {"image": run.batch["image"]}
    rows = {name: run.batch[name] for name in ("tokens", "mask") if name in run.batch}
    if run.config.task == "upsampler":
        side = task.image_size // task.factor
        rows["low"] = jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32)
    elif run.config.task == "decoder" and task.clip:
        rows["z_img"] = jax.ShapeDtypeStruct((b, task.clip.embed_dim), jnp.float32)
    return split(rows, run.mesh)


class Counts(NamedTuple):
    """What a train step does, all devices together: the same on every mesh."""

    flops: float
    model_flops: float  # of them, without recomputation
    residuals: float  # bytes that the forward pass keeps for the backward pass, without the parameters; 0: not asked


def count_train(run: Abstract, residuals: bool = True, plain: Counts | None = None) -> Counts:
    """By tracing the step and its gradient.

    Args:
      residuals: ask for them too.
      plain: counts of the same step without recomputation, from which its own follow by its gradient's alone.
    """
    with fitting(run.config):
        batch, key = _encoded(run)
        gradient = lambda task: count_gradient(lambda *a: task.loss(*a)[0], run.state.params, batch, key)  # noqa: E731
        if plain:
            flops, kept = gradient(run.task)
            gradients = 2 if run.config.optim.get("sam_rho") else 1  # of a step
            return Counts(plain.flops + gradients * (flops - plain.model_flops), plain.model_flops, kept)
        bare = tasks.without_remat(run.task, run.config)
        model_flops, kept = gradient(bare)
        if residuals and bare is not run.task:
            kept = gradient(run.task)[1]
        return Counts(count_flops(run.step, *_step_args(run)), model_flops, kept if residuals else 0.0)


def _step_args(run: Abstract):
    return run.state, run.frozen, run.batch, jax.ShapeDtypeStruct((), jnp.int32)


def plan_train(run: Abstract, chip: str, compiled: bool = True, counts: Counts | None = None) -> Report:
    """What a train step takes.

    Args:
      chip: a name in CHIPS, for its data sheet.
      compiled: ask the compiler of the mesh's devices; else arithmetic on shapes.
      counts: of the same step on another mesh, if they are known.
    """
    counts = counts or count_train(run, residuals=not compiled)
    held = {
        "parameters": _held(run.state.params), "average": _held(run.state.ema), "optimizer": _held(run.state.opt),
        "frozen CLIP": _held(run.frozen),
    }  # fmt: skip
    base = Report(
        "train", run.mesh.size, chip, dict(run.mesh.shape), run.config.batch_size, compiled,
        counts.flops, counts.model_flops, held, None, CHIPS[chip].memory, remat=", ".join(tasks.policies(run.config)),
    )  # fmt: skip
    if not compiled:
        copies, parts = 2 if run.config.optim.get("sam_rho") else 1, sharding.parts_of_batch(run.mesh)
        # of the parameters: the gradient, and with SAM the place above, where the second gradient is taken
        peak = sum(held.values()) + copies * held["parameters"] + counts.residuals / parts + _held(run.batch)
        return dataclasses.replace(base, peak=peak)
    shardings = jax.tree.map(lambda a: a.sharding, run.state)
    return _compile(base, compile_step(run.step, run.mesh, shardings), _step_args(run))


def plan_sample(run: Abstract, chip: str, compiled: bool = True) -> Report:
    """What drawing one batch takes as a stack draws it, `config.batch_size` outputs, all sampling steps in it.

    At full size, whatever crops are trained on; of the frozen CLIP captions are asked, though all of it is held.
    """
    params, rows = run.state.averaged, _rows(run)
    held = {"parameters": _held(params), "frozen CLIP": _held(run.frozen)}

    def draw(params, frozen, rows):
        keys = jax.random.split(jax.random.key(0), run.config.batch_size)
        cond = rows if "low" in rows else run.task.encode(frozen, rows)  # an upsampler's makes "low" of pictures
        return run.task.sample(params, cond, keys)

    args = (params, run.frozen, rows)
    with fitting(run.config):
        flops = count_flops(draw, *args)
    base = Report("sample", run.mesh.size, chip, dict(run.mesh.shape), run.config.batch_size, compiled,
                  flops, flops, held, None, CHIPS[chip].memory)  # fmt: skip
    if not compiled:
        return dataclasses.replace(base, peak=sum(held.values()) + _held(rows))
    return _compile(base, jax.jit(sharding.split_rows(draw, run.mesh)), args)


@contextlib.contextmanager
def quick():
    """Within it XLA tries less where programs are scheduled and fitted into memory, which takes much of compiling."""
    options = {"jax_exec_time_optimization_effort": -1.0, "jax_memory_fitting_effort": -1.0}
    if not all(hasattr(jax.config, name) for name in options):  # jax 0.11 has levels in their place
        options = {"jax_optimization_level": "O1", "jax_memory_fitting_level": "O1"}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _compile(report: Report, function, args) -> Report:
    try:
        compiled = function.lower(*args).compile()
    except Exception as error:
        why = str(error)
        if "RESOURCE_EXHAUSTED" not in why and "hbm" not in why.lower():
            raise
        return dataclasses.replace(report, error=" ".join(why.split())[:400])
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or kept + memory.temp_size_in_bytes
    # What the program does not read it does not count, such as a CLIP's image tower; it is on the device all the same.
    idle = jax.tree.map(lambda a, place: None if place else a, args, compiled.input_shardings[0])
    moved = read_hlo(compiled.as_text())
    return dataclasses.replace(report, peak=peak + _held(idle), collectives=moved.collectives, traffic=moved.bytes)


def _held(tree) -> float:
    """Bytes of a tree of shapes with shardings on one device."""
    sizes = (math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))
    return float(sum(sizes))


def _encoded(run: Abstract):
    """Shapes of an encoded batch and of a random key: the other arguments of `loss`."""
    return jax.eval_shape(run.task.encode, run.frozen, run.batch), jax.eval_shape(lambda: jax.random.key(0))
