"""What a config needs on devices that are not here: memory, FLOPs, collectives and a predicted step time.

For a TPU slice the exact train or sample step is compiled ahead of time by libtpu (extra `[tpu]`), which needs no TPU;
bytes are then the compiler's. For GPUs everything is arithmetic on shapes, and said to be so. Times are predictions
from data sheets, never measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import optim, sharding, tasks
from unclip_jax.errors import UserError, suggest
from unclip_jax.meter import FLOPS
from unclip_jax.models.clip import CLIP
from unclip_jax.plan_count import Collective, count_flops, count_gradient, read_hlo
from unclip_jax.train_step import TrainState, compile_step, init_state, step_of

GIB = 1 << 30


class Chip(NamedTuple):
    """Data sheet of one device: bf16 FLOP/s, bytes of memory, bytes/s of memory and of its links to others."""

    flops: float
    memory: float
    bandwidth: float
    links: float


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (links: all of a chip's, one direction). GPUs: NVIDIA's data
# sheets of the SXM boards, dense bf16, NVLink in one direction.
CHIPS = {
    "v4": Chip(FLOPS["v4"], 32 * GIB, 1.228e12, 0.15e12),
    "v5e": Chip(FLOPS["v5e"], 16 * GIB, 0.819e12, 0.1e12),
    "v5p": Chip(FLOPS["v5p"], 95 * GIB, 2.765e12, 0.3e12),
    "v6e": Chip(FLOPS["v6e"], 32 * GIB, 1.640e12, 0.224e12),
    "a100": Chip(FLOPS["a100"], 80e9, 2.039e12, 0.3e12),
    "h100": Chip(FLOPS["h100"], 80e9, 3.35e12, 0.45e12),
    "h200": Chip(FLOPS["h200"], 141e9, 4.8e12, 0.45e12),
}
TPUS, GPUS = ("v4", "v5e", "v5p", "v6e"), ("a100", "h100", "h200")


@dataclasses.dataclass(frozen=True)
class Abstract:
    """A run without data, weights or devices: everything `jit(step).lower` needs, as shapes with shardings."""

    config: ConfigDict
    task: Any
    mesh: jax.sharding.Mesh
    state: TrainState
    frozen: Mapping
    batch: Mapping
    step: Any


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


def tpu_devices(topology: str, slices: int = 1):
    """The devices of a slice such as "v5p:4x8x8" that need not be here -> (chip's name, devices).

    Raises:
      UserError: libtpu is missing, or does not know the slice.
    """
    chip, colon, shape = topology.partition(":")
    if chip not in TPUS or not colon or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"topology={topology!r} must be CHIP:AxB or CHIP:AxBxC, CHIP one of {', '.join(TPUS)}",
                        "such as v5e:4x4 or v5p:4x8x8")  # fmt: skip
    from jax.experimental import topologies

    # Without them libtpu asks after the TPU that it is on, and complains; the lock guards a TPU, and none is used.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for name, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)
    extra = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":  # whose two cores are one device
        extra["chip_config_name"] = "megacore"
    if math.prod(map(int, shape.split("x"))) == 1:
        extra["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except Exception as error:  # jax raises several kinds; a missing libtpu is a RuntimeError
        why = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        fix = f'pip install "jax[tpu]=={jax.__version__}" (libtpu, no TPU needed), and a slice that exists'
        raise UserError(f"topology={topology!r} cannot be compiled for ({why})", fix) from error


def abstract(config: ConfigDict, devices, clip: ConfigDict | None = None, like: Abstract | None = None) -> Abstract:
    """The run of a config on `devices`: a slice's that is not here, or a number of them, for arithmetic alone.

    Args:
      clip: config of the CLIP that prior and decoder learn against; its weights are not needed.
      like: another run of them, which differs in mesh, batch and remat policies alone; its arrays are not traced again.

    Raises:
      UserError: what does not fit, as training would say it.
    """
    config = configs.from_json(configs.to_json(config), "config")
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    sharding.check_batch(config.batch_size, mesh)
    tx = optim.make(config.num_steps, **config.optim)
    teacher = None
    if tasks.needs_clip(config):
        if clip is None or clip.task != "clip":
            raise UserError(f"task {config.task} learns against a CLIP", "give its config by --clip configs/…/clip.py")
        teacher = tasks.make(clip)
    task = tasks.make(config, teacher and teacher.model)
    shapes = like.state if like else jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0), config.ema_decay))
    state = sharding.abstract(shapes, sharding.infer(shapes, config.rules, mesh))
    frozen = like.frozen if like else {"clip": jax.eval_shape(teacher.init, jax.random.key(0))} if teacher else {}
    frozen = sharding.abstract(frozen, sharding.infer_frozen(frozen, mesh))
    batch = _split(_batch(config, task, teacher and teacher.model), mesh)
    return Abstract(config, task, mesh, state, frozen, batch, step_of(config, task, tx))


def _batch(config: ConfigDict, task: tasks.Task, clip: CLIP | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader gives: pictures, or embeddings where they were worked out before (`data/embeddings.py`)."""
    b, batch = config.batch_size, {}
    length = clip.text["max_len"] if clip else config.tokenizer and config.tokenizer.max_len
    if length:
        batch = {name: jax.ShapeDtypeStruct((b, length), kind) for name, kind in (("tokens", "i4"), ("mask", "?"))}
    if not _embedded(config.data):
        side = config.loader.crop or config.data.size
        return {**batch, "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32)}
    if config.task not in ("prior_diffusion", "prior_ar"):
        raise UserError(f"data.source={config.data.source!r} holds embeddings, and task {config.task} learns from "
                        "pictures", "give a source of pictures; embeddings train priors only")  # fmt: skip
    batch |= {name: jax.ShapeDtypeStruct((b, clip.embed_dim), jnp.float32) for name in ("z_img", "z_txt")}
    if not task.model.vocab_size:
        batch["states"] = jax.ShapeDtypeStruct((b, length, clip.text["width"]), jnp.float32)
    return batch


def _embedded(data: Mapping) -> bool:
    """Whether a config's block `data` names embeddings, or a mixture of them."""
    return data.get("source") == "embeddings" or any(map(_embedded, data.get("parts") or ()))


def _told(run: Abstract) -> dict[str, jax.ShapeDtypeStruct]:
    """What a stack tells the stage of each output: the caption, and what the stage before it has drawn."""
    b, task = run.config.batch_size, run.task
    if run.config.task == "clip":
        return {"image": run.batch["image"]}
    told = {name: run.batch[name] for name in ("tokens", "mask") if name in run.batch}
    if run.config.task == "upsampler":
        side = task.image_size // task.factor
        told["low"] = jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32)
    elif run.config.task == "decoder" and task.clip:
        told["z_img"] = jax.ShapeDtypeStruct((b, task.clip.embed_dim), jnp.float32)
    return _split(told, run.mesh)


def _split(batch: Mapping, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows = sharding.batch_sharding(mesh)
    return sharding.abstract(batch, jax.tree.map(lambda _: rows, batch))


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
    params, told = run.state.averaged, _told(run)
    held = {"parameters": _held(params), "frozen CLIP": _held(run.frozen)}

    def draw(params, frozen, told):
        keys = jax.random.split(jax.random.key(0), run.config.batch_size)
        cond = told if "low" in told else run.task.encode(frozen, told)  # an upsampler's makes "low" of pictures
        return run.task.sample(params, cond, keys)

    args = (params, run.frozen, told)
    flops = count_flops(draw, *args)
    base = Report("sample", run.mesh.size, chip, dict(run.mesh.shape), run.config.batch_size, compiled,
                  flops, flops, held, None, CHIPS[chip].memory)  # fmt: skip
    if not compiled:
        return dataclasses.replace(base, peak=sum(held.values()) + _held(told))
    return _compile(base, jax.jit(sharding.split_rows(draw, run.mesh)), args)


@contextlib.contextmanager
def quick():
    """Within it XLA tries less where programs are scheduled and fitted into memory, which takes much of compiling."""
    names = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name in names:
            jax.config.update(name, -1.0)
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


def gpu_devices(spec: str):
    """ "h100:8" → ("h100", 8)."""
    chip, colon, count = spec.partition(":")
    if chip not in GPUS or (colon and not (count.isdecimal() and 0 < int(count) <= 65536)):
        raise UserError(f"device={spec!r} must be GPU or GPU:COUNT, COUNT in 1 … 65536", suggest(chip, GPUS))
    return chip, int(count or 1)
