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
from unclip_jax.plan_count import Collective, count_flops, read_hlo
from unclip_jax.train import TrainState, compile_step, init_state, step_of

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

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the lock guards a TPU, and none is used
    extra = {"num_slices": slices} if slices > 1 else {}
    if math.prod(map(int, shape.split("x"))) == 1:
        extra["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except Exception as error:  # jax raises several kinds; a missing libtpu is a RuntimeError
        why = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        fix = f'pip install "jax[tpu]=={jax.__version__}" (libtpu, no TPU needed), and a slice that exists'
        raise UserError(f"topology={topology!r} cannot be compiled for ({why})", fix) from error


def abstract(config: ConfigDict, devices, clip: ConfigDict | None = None) -> Abstract:
    """The run of a config on `devices`: a slice's that is not here, or a number of them, for arithmetic alone.

    Args:
      clip: config of the CLIP that prior and decoder learn against; its weights are not needed.

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
    shapes = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0)))
    state = sharding.abstract(shapes, sharding.infer(shapes, config.rules, mesh))
    alike = lambda tree, one: sharding.abstract(tree, jax.tree.map(lambda _: one, tree))  # noqa: E731
    frozen = {"clip": jax.eval_shape(teacher.init, jax.random.key(0))} if teacher else {}
    frozen = alike(frozen, sharding.replicated(mesh))
    batch = alike(_batch(config, teacher), sharding.batch_sharding(mesh))
    return Abstract(config, task, mesh, state, frozen, batch, step_of(config, task, tx))


def _batch(config: ConfigDict, teacher) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader gives."""
    b, side = config.batch_size, config.loader.crop or config.data.size
    batch = {"image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32)}
    length = teacher.model.text["max_len"] if teacher else config.tokenizer and config.tokenizer.max_len
    if length:
        batch["tokens"] = jax.ShapeDtypeStruct((b, length), jnp.int32)
        batch["mask"] = jax.ShapeDtypeStruct((b, length), jnp.bool_)
    return batch


class Counts(NamedTuple):
    """What a train step does, all devices together: the same on every mesh."""

    flops: float
    model_flops: float  # of them, without recomputation
    residuals: float  # bytes that the forward pass keeps for the backward pass, without the parameters; 0: not asked


def count_train(run: Abstract, residuals: bool = True) -> Counts:
    """By tracing the step, its gradient without recomputation, and, for `residuals`, its forward pass."""
    plain = tasks.without_remat(run.task, run.config)
    batch, key = _encoded(run)
    gradient = jax.value_and_grad(plain.loss, has_aux=True)
    kept = 0.0
    if residuals:
        pull = lambda p, b, k: jax.vjp(lambda q: run.task.loss(q, b, k)[0], p)[1]  # noqa: E731
        trees = jax.eval_shape(pull, run.state.params, batch, key), run.state.params
        total, own = (sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in trees)
        kept = max(total - own, 0.0)
    flops = count_flops(run.step, *_step_args(run))
    return Counts(flops, count_flops(gradient, run.state.params, batch, key), kept)


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
        counts.flops, counts.model_flops, held, None, CHIPS[chip].memory,
    )  # fmt: skip
    if not compiled:
        gradients, parts = held["parameters"], run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        peak = sum(held.values()) + gradients + counts.residuals / parts + _held(run.batch)
        return dataclasses.replace(base, peak=peak)
    shardings = jax.tree.map(lambda a: a.sharding, run.state)
    return _compile(base, compile_step(run.step, run.mesh, shardings), _step_args(run))


def plan_sample(run: Abstract, chip: str, compiled: bool = True) -> Report:
    """What drawing one batch takes, `config.batch_size` outputs, all sampling steps in it."""
    params = run.state.ema
    held = {"parameters": _held(params), "frozen CLIP": _held(run.frozen)}

    def draw(params, frozen, batch):
        keys = jax.random.split(jax.random.key(0), run.config.batch_size)
        return run.task.sample(params, run.task.encode(frozen, batch), keys)

    args = (params, run.frozen, run.batch)
    flops = count_flops(draw, *args)
    base = Report("sample", run.mesh.size, chip, dict(run.mesh.shape), run.config.batch_size, compiled,
                  flops, flops, held, None, CHIPS[chip].memory)  # fmt: skip
    if not compiled:
        return dataclasses.replace(base, peak=sum(held.values()) + _held(run.batch))
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
    moved = read_hlo(compiled.as_text())
    return dataclasses.replace(report, peak=float(peak), collectives=moved.collectives, traffic=moved.bytes)


def _held(tree) -> float:
    """Bytes of a tree of shapes with shardings on one device."""
    sizes = (math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))
    return float(sum(sizes))


def _encoded(run: Abstract):
    """Shapes of an encoded batch and of a random key: the other arguments of `loss`."""
    return jax.eval_shape(run.task.encode, run.frozen, run.batch), jax.eval_shape(lambda: jax.random.key(0))


def search(
    config: ConfigDict, devices, chip: str, clip: ConfigDict | None = None, compile_best: int = 3
) -> list[Report]:
    """Train steps over all meshes (data, fsdp) of the devices and 1, 1/2 and 1/4 of the config's batch, fastest first.

    Ranked by predicted seconds a picture by arithmetic on shapes; of those that seem to fit the best are compiled.
    """
    count, found, known = devices if isinstance(devices, int) else len(devices), [], {}
    for fsdp in [n for n in range(1, count + 1) if count % n == 0]:
        for share in (1, 2, 4):
            changed = config.copy_and_resolve_references()
            with changed.unlocked():
                changed.mesh.update(data=-1, fsdp=fsdp, tensor=1)
                changed.batch_size = config.batch_size // share
            try:
                run = abstract(changed, devices, clip)
            except UserError:  # such as a batch that does not divide
                continue
            size = changed.batch_size
            known[size] = known.get(size) or count_train(run)
            found.append((plan_train(run, chip, compiled=False, counts=known[size]), run))
    if not found:
        raise UserError(f"no mesh of {count} devices divides batch_size={config.batch_size}", "change the batch size")
    # Fewer copies over data cost gathers, so the least split that fits comes first, then the largest batch.
    found.sort(key=lambda pair: (not pair[0].fits, pair[0].mesh["fsdp"], -pair[0].batch_size))
    tried = found[:compile_best] if chip in TPUS else []
    best = [plan_train(run, chip, counts=known[run.config.batch_size]) for _, run in tried]
    return sorted(best, key=lambda r: (not r.fits, _per_picture(r))) + [report for report, _ in found[len(best):]]


def _per_picture(report: Report) -> float:
    return max(report.seconds.values()) / report.batch_size


def table(reports: list[Report], title: str = "") -> str:
    """Reports for reading; every time is a prediction."""
    lines = [title] if title else []
    for r in reports:
        mesh = " x ".join(f"{name} {size}" for name, size in r.mesh.items() if size > 1) or "one device"
        source = "compiled ahead of time" if r.compiled else "arithmetic on shapes, nothing compiled: a rough estimate"
        lines += [
            f"{r.what} step on {r.devices} x {r.chip} ({mesh}), batch {r.batch_size} ({source})",
            *(f"  {name:24}{size / GIB:10.3f} GiB a device" for name, size in r.held.items() if size),
            f"  {'peak':24}{_gib(r.peak)} of {r.limit / GIB:.1f} GiB: {'fits' if r.fits else 'DOES NOT FIT'}",
            f"  {'FLOPs, all devices':24}{r.flops:10.3e}, {r.model_flops:.3e} without recomputation",
        ]
        for c in r.collectives or ():
            lines.append(f"  {c.kind + ' of ' + str(c.group):24}{c.bytes / GIB:10.3f} GiB a device in {c.count}")
        if r.peak is not None:
            times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in r.seconds.items())
            lines.append(f"  {'predicted, each alone':24}{times}")
            if r.what == "train":
                lines.append(f"  {'predicted MFU ceiling':24}{100 * r.mfu_ceiling:10.1f} %")
        if r.error:
            lines.append(f"  the compiler says: {r.error}")
            lines.append("  what would help: more devices in mesh.fsdp, a smaller batch_size, remat; or try --search")
    return "\n".join(lines)


def _gib(size: float | None) -> str:
    return "   unknown" if size is None else f"{size / GIB:10.3f}"


def gpu_devices(spec: str):
    """ "h100:8" → ("h100", 8)."""
    chip, colon, count = spec.partition(":")
    if chip not in GPUS or (colon and not (count.isdecimal() and 0 < int(count) <= 65536)):
        raise UserError(f"device={spec!r} must be GPU or GPU:COUNT", suggest(chip, GPUS))
    return chip, int(count or 1)
