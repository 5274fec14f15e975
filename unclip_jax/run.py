"""What a training run is made of, built from its config and checked against its data, devices, CLIP and folder."""

import contextlib
import inspect
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import unclip_jax
from unclip_jax import config as configs
from unclip_jax import data, distributed, optim, sharding, tasks, track
from unclip_jax.data import loader
from unclip_jax.data.source import EmptySplit, Source
from unclip_jax.errors import UserError, is_number, is_whole, said_of, suggest
from unclip_jax.fingerprint import fingerprint
from unclip_jax.initial import starting_weights
from unclip_jax.meter import GIB
from unclip_jax.storage import read_text
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.train_step import TrainState, init_state

# What may differ when a run goes on: for how long, on which devices, and what is told and kept on the way.
MAY_CHANGE = ("num_steps:", "every.", "keep:", "mesh.", "rules:", "eval.", "clip:", "init:", "init_partly:", "sampler.")
MAY_CHANGE += ("objective.chunk:", "loader.num_workers:", "loader.num_threads:", "loader.prefetch:", "model.remat:")
MAY_CHANGE += ("model.vision.remat:", "model.text.remat:", "model.unet.remat:", "track:", "loader.factor: (absent)")
# What configs of older versions did not say, and what was done without.
UNSAID = {"optim.sam_rho": 0.0, "model.dtype": "float32", "loader.degrade": None, "objective.blur_share": 0.5}
MOVED = ("data.path:", "data.data_dir:")  # may differ where the records are the same
TOKENIZER_CAPTIONS = 20_000
COMPARED = 64  # records by which data are known, beside their number
MOST_STEPS = 2**31 - 1  # the step is an i32
PRIORS = ("prior_diffusion", "prior_ar")
SIZES = {"width", "layers", "heads", "patch", "image_size", "channels", "multipliers", "groups", "head_channels"}


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
    check_values(config, bool(config.clip))
    if distributed.is_main():
        track.check(config.get("track"))
    told = lambda: f"{unclip_jax.__version__} {jax.__version__} {configs.to_json(config)}"  # noqa: E731
    distributed.check_same("the config, or the version of unclip_jax or jax,", told)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    tx = optim.make(config.num_steps, **config.optim)
    source = data.make(**config.data)
    known = source.digest(COMPARED)
    distributed.check_same("config.data", lambda: f"{len(source)} {known}")
    checked = config.every.preview or config.every.eval
    held_out = _held_out(config) if checked else None
    clip = tasks.load_clip(config.clip) if config.clip else None
    _check_source(source, config, clip)
    begun = tasks.load_stage(config.init, config.task, config.data.size) if config.init and not earlier else None
    text = clip.tokenizer_json if clip else _own_tokenizer(config, source, workdir if earlier else None, begun)
    told = lambda: f"{clip and clip.identity} {begun and fingerprint(begun.params)} {text}"  # noqa: E731
    distributed.check_same("what config.clip or config.init names, or the tokenizer,", told)
    tokenizer = Tokenizer.from_json(text) if text else None
    with config.unlocked():
        config.clip_identity = clip.identity if clip else ""
        config.data_identity = f"{len(source)} records {known}" if known else ""
        if tokenizer:
            config.tokenizer.update(vocab_size=tokenizer.vocab_size, max_len=tokenizer.max_len)
    if earlier:
        _check_same_run(config, earlier, workdir)
    task = tasks.make(config, clip.model if clip else None)
    check_attention(config, task)
    with building(config):
        shapes = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(config.seed), config.ema_decay))
    shardings = sharding.infer(shapes, config.rules, mesh)
    _check_memory(shapes, shardings, mesh)
    frozen = {"clip": clip.params} if clip else {}
    frozen = jax.device_put(frozen, sharding.infer_frozen(frozen, mesh))
    initial = starting_weights(config, task, shapes.params, begun, tokenizer) if begun else None
    return Run(config, workdir, source, held_out, tokenizer, task, tx, mesh, frozen, shardings, shapes, initial)


def _held_out(config: ConfigDict) -> Source:
    """What a run is measured on while it trains."""
    try:
        held_out = data.make(**{**config.data, "split": config.eval.split})
        if config.every.eval and len(held_out) < config.batch_size:
            few = f"eval.split={config.eval.split!r} has {len(held_out)} examples, fewer than a batch"
            warnings.warn(f"{few}: metrics are of examples that come several times", stacklevel=2)
        return held_out
    except EmptySplit as error:
        what = f"nothing to measure on, eval.split={config.eval.split!r}: {str(error).split('. Fix:')[0]}"
        fix = "set --config.eval.split=train, or measure nothing: --config.every.eval=0 --config.every.preview=0"
        raise UserError(what, fix) from error


def _earlier_run(workdir: str | Path) -> tuple[Path, ConfigDict | None]:
    """The folder, and the config of the run that saved a checkpoint in it, or None."""
    if not str(workdir) or "://" in str(workdir):
        raise UserError(f"workdir {str(workdir)!r} must be a folder", "mount a bucket, and give the folder")
    workdir = Path(workdir).expanduser()
    stored = workdir / "config.json"
    if not any(step.name.isdecimal() for step in (workdir / "checkpoints").glob("*")):
        return workdir, None
    if not stored.is_file():
        what = f"workdir {workdir} holds checkpoints, and no config.json of the run that saved them"
        raise UserError(what, "copy the whole workdir again, or give another --workdir")
    return workdir, configs.from_json(read_text(stored, "a config"), str(stored))


def _check_same_run(config: ConfigDict, earlier: ConfigDict, workdir: Path) -> None:
    """UserError where an earlier run's config is another; a warning where only what its data hold is."""
    before, after = earlier.get("data_identity", ""), config.data_identity
    same = {f"{key}: (absent) -> {value!r}" for key, value in {**UNSAID, "data_identity": after}.items()}
    may_change = MAY_CHANGE + (MOVED if before and before == after else ())
    changed = [line for line in configs.diff(earlier, config) if not line.startswith(may_change) and line not in same]
    others = [line for line in changed if not line.startswith("data_identity:")]
    if changed and not others:
        what = f"the data of workdir {workdir} have changed: they were {before}, and are {after}"
        warnings.warn(f"{what}; the run goes on with other batches than it would have had", stacklevel=2)
    elif others:
        fix = "use another --workdir, or the config that this one was started with"
        if all(line.startswith("clip_identity:") for line in others):
            fix = f"clip={config.clip!r} was trained on or replaced: give the CLIP as it was, or another --workdir, "
            fix += f"which may begin with --config.init={workdir}"
        raise UserError(f"workdir {workdir} holds a run with another config: {'; '.join(changed[:5])}", fix)


def _own_tokenizer(config: ConfigDict, source: Source, workdir: Path | None, begun) -> str | None:
    """The tokenizer of a stage without CLIP: none, the earlier run's, one given by path, that of the weights it begins
    with, which know no other words by their numbers, or one trained on captions."""
    if config.tokenizer is None:
        return None
    if workdir or config.tokenizer.path:
        return Tokenizer.load(workdir / "tokenizer.json" if workdir else config.tokenizer.path).to_json()
    if begun:
        return begun.tokenizer_json
    captions = source.captions(min(len(source), TOKENIZER_CAPTIONS))
    return Tokenizer.train(captions, config.tokenizer.vocab_size, config.tokenizer.max_len).to_json()


def check_values(config: ConfigDict, has_clip: bool) -> None:
    """Raises UserError for what can be told wrong without building anything."""
    tasks.check(config, has_clip)
    if config.clip and not tasks.needs_clip(config):
        raise UserError(f"clip={config.clip!r} is of no use to the task '{config.task}'", "leave it out")
    for block, function in (("mesh", sharding.make_mesh), ("optim", optim.make), ("loader", loader.batches)):
        known = list(inspect.signature(function).parameters)
        for key in config[block]:
            if key not in known:
                raise UserError(f"config has no key '{block}.{key}'", suggest(key, known))
    flat = configs.flatten(config)
    loader.check_settings(**{name: config.loader[name] for name in loader.MOST if name in config.loader})
    for name, value in flat.items():
        size = name.startswith("model.") and name.split(".")[-1] in SIZES
        if (size or (config.task, name) == ("clip", "model.embed_dim")) and value is not None:
            sizes = value if isinstance(value, tuple) else (value,)
            if not sizes or not all(is_whole(n, 1) for n in sizes):
                raise UserError(f"{name}={value!r} must be of whole numbers of at least 1")
    norm = flat.get("model.norm")
    if config.task == "clip" and norm is not None and not (is_number(norm, 0) and norm > 0):
        raise UserError(f"model.norm={norm!r} must be a number above 0, or None for embeddings as projected")
    if not is_whole(config.num_steps, 1, MOST_STEPS):
        raise UserError(f"num_steps={config.num_steps!r} must be a whole number in 1 … {MOST_STEPS}")
    for name in ("keep", "every.log", "every.save", "every.preview", "every.eval", "eval.batches", "eval.preview"):
        value, least = flat[name], 0 if name in ("every.preview", "every.eval") else 1
        if not is_whole(value, least):
            raise UserError(f"{name}={value!r} must be a whole number >= {least}")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay={config.ema_decay} must be in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be in 0 … 2**32 - 1")


def building(config: ConfigDict):
    """What a stage's network raises as it is first traced is told as a UserError."""
    return said_of(f"the network of {config.task} cannot be built", "correct config.model")


def fitting(config: ConfigDict):
    """What a stage raises as it is traced over a batch is told as a UserError."""
    return said_of(f"task {config.task} does not fit its data", "compare config.model and config.data with configs/")


def check_attention(config: ConfigDict, task: tasks.Task) -> None:
    """UserError for attention at heights that no level of a stage's UNet has; 1 stands for its middle."""
    name = "model.unet" if "unet" in config.model else "model"
    unet = config.model.get("unet", config.model)
    if not unet.get("attention"):
        return
    sides = [task.image_size // unet.get("patch", 1) >> level for level in range(len(unet.multipliers))]
    if not {*unet.attention} <= {*sides, 1}:
        what = f"{name}.attention={unet.attention} must be of the heights that the UNet's levels have: {sides}"
        raise UserError(what, "take of these, or (1,) for attention in the middle alone")


def _check_memory(shapes: TrainState, shardings: TrainState, mesh: jax.sharding.Mesh) -> None:
    """UserError where a device cannot hold its part of the state and of the gradient, whatever else a step takes."""

    def held(shapes, shardings) -> int:
        part = lambda a, place: math.prod(place.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize  # noqa: E731
        return sum(jax.tree.leaves(jax.tree.map(part, shapes, shardings)))

    needed, there = held(shapes, shardings) + held(shapes.params, shardings.params), _memory(mesh)
    if there is not None and needed > there:
        raise UserError(
            f"network, average, optimizer and gradient take {needed / GIB:,.2f} GiB of each device, "
            f"which has {there / GIB:,.2f} GiB",
            "make config.model smaller, or split it over more devices by mesh.fsdp; `unclip plan` says what fits where",
        )


def _memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a device of this host has for a run; a CPU's devices share what is free. None: it does not tell."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return (device.memory_stats() or {}).get("bytes_limit")
        return None
    with contextlib.suppress(OSError):
        free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
        return free and 1024 * int(free[1]) // len(mesh.local_devices)
    return None


def check_embeddable(config: ConfigDict) -> None:
    """UserError where a stage cannot learn from embeddings, which its data are."""
    if config.task not in PRIORS:
        what = f"data.source={config.data.source!r} holds embeddings, and the task {config.task} learns from pictures"
        raise UserError(what, "give a source of pictures; embeddings train priors only")


def _check_source(source: Source, config: ConfigDict, clip) -> None:
    """UserError where a source holds embeddings, and the stage learns from pictures or against another CLIP.

    Of pictures, what `tasks.check_sees` says.
    """
    identity = source.clip_identity
    if identity:
        check_embeddable(config)
    elif clip:
        tasks.check_sees(clip, config.clip, config.data.size)
    if identity and (clip is None or clip.identity != identity):
        other = f"clip={config.clip!r} is {clip.identity}" if clip else "there is none"
        what = f"the embeddings that data names are of the CLIP {identity}, and {other}"
        raise UserError(what, "set --config.clip to the CLIP they were made with, or embed anew: unclip data embed")
