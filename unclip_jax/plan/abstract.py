"""A run as shapes: what a config trains, on devices that are not here, checked as training checks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import data, optim, sharding, tasks
from unclip_jax.data import loader
from unclip_jax.errors import UserError
from unclip_jax.models.clip import CLIP
from unclip_jax.run import building, check_attention, check_embeddable, check_values
from unclip_jax.train_step import TrainState, init_state, step_of


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


def abstract(config: ConfigDict, devices, clip: ConfigDict | None = None, like: Abstract | None = None) -> Abstract:
    """The run of a config on `devices`: a slice's that is not here, or a number of them, for arithmetic alone.

    Args:
      clip: config of the CLIP that prior and decoder learn against; its weights are not needed.
      like: another run of them, which differs in mesh, batch and remat policies alone; its arrays are not traced again.

    Raises:
      UserError: what does not fit, as training would say it.
    """
    config = configs.from_json(configs.to_json(config), "config")
    if tasks.needs_clip(config) and (clip is None or clip.task != "clip"):
        raise UserError(f"task {config.task} learns against a CLIP", "give its config by --clip configs/…/clip.py")
    check_values(config, tasks.needs_clip(config))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    sharding.check_batch(config.batch_size, mesh)
    tx = optim.make(config.num_steps, **config.optim)
    _check_data(config)
    teacher = tasks.make(clip) if tasks.needs_clip(config) else None
    task = tasks.make(config, teacher and teacher.model)
    check_attention(config, task)
    shapes, frozen = (like.state, like.frozen) if like else (None, {})
    if not like:
        with building(config):
            shapes = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0), config.ema_decay))
    if teacher and not like:
        with building(clip):
            frozen = {"clip": jax.eval_shape(teacher.init, jax.random.key(0))}
    state = sharding.abstract(shapes, sharding.infer(shapes, config.rules, mesh))
    frozen = sharding.abstract(frozen, sharding.infer_frozen(frozen, mesh))
    batch = split(_batch(config, task, teacher and teacher.model), mesh)
    return Abstract(config, task, mesh, state, frozen, batch, step_of(config, task, tx))


def _check_data(config: ConfigDict) -> None:
    """UserError for what the blocks `data` and `loader` say wrong, as far as it can be told without the data."""
    data.named(**config.data)
    size = config.data.size
    if _embedded(config.data):
        check_embeddable(config)
        size = None
    loader.check_pictures(size, **{k: config.loader[k] for k in ("crop", "degrade", "factor") if k in config.loader})


def _batch(config: ConfigDict, task: tasks.Task, clip: CLIP | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader gives: pictures, or embeddings where they were worked out before (`data/embeddings.py`)."""
    b, batch = config.batch_size, {}
    length = clip.text["max_len"] if clip else config.tokenizer and config.tokenizer.max_len
    if length:
        batch = {name: jax.ShapeDtypeStruct((b, length), kind) for name, kind in (("tokens", "i4"), ("mask", "?"))}
    if not _embedded(config.data):
        side = config.loader.crop or config.data.size
        return {**batch, "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32)}
    batch |= {name: jax.ShapeDtypeStruct((b, clip.embed_dim), jnp.float32) for name in ("z_img", "z_txt")}
    if not task.model.vocab_size:
        batch["states"] = jax.ShapeDtypeStruct((b, length, clip.text["width"]), jnp.float32)
    return batch


def _embedded(data: Mapping) -> bool:
    """Whether a config's block `data` names embeddings, or a mixture of them."""
    return data.get("source") == "embeddings" or any(map(_embedded, data.get("parts") or ()))


def split(batch: Mapping, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`batch` with the shardings of batches on `mesh`."""
    rows = sharding.batch_sharding(mesh)
    return sharding.abstract(batch, jax.tree.map(lambda _: rows, batch))
