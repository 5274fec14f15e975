"""A stack directory opened for sampling: its stages in the order they run, their weights read when asked for."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import tasks as task_registry
from unclip_jax.errors import UserError, said_of
from unclip_jax.nn.drawing import foreseen, placed
from unclip_jax.settings import PRIORS, role_of, upsampler_names
from unclip_jax.weights import COPY, Stage, describe_stack, load_stack

ROLES = {name: name for name in ("clip", "prior_ar", "decoder", "upsampler")} | {"prior": "prior_diffusion"}


class Opened(NamedTuple):
    """A stack by stage: "clip", "prior", "prior_ar" where there are such, "decoder", upsamplers, as they run."""

    tokenizer_json: str
    tasks: Mapping[str, Any]
    configs: Mapping[str, ConfigDict]
    params: "OnDemand"


class OnDemand(Mapping):
    """{stage: its parameters on the device, as it draws with them}, read anew each time, and kept by nobody here.

    Args:
      path: of the stack.
      names: {stage: its name in the stack}.
      dtype: of the weights, "float32" or "bfloat16"; None as stored.
    """

    def __init__(self, path: Path, names: Mapping[str, str], dtype: str | None):
        self._path, self._names, self._dtype = path, dict(names), dtype

    def __getitem__(self, stage: str) -> Mapping:
        return self.read(stage, jax.local_devices()[0])

    def read(self, stage: str, where: jax.Device | jax.sharding.Sharding) -> Mapping:
        """The same on other devices than the first."""
        name = self._names[stage]
        with jax.default_device(_host()):
            params = load_stack(self._path, [name], self._dtype).stages[name].params
        return placed(jax.tree.map(np.asarray, params), where)  # cut by the host: held once

    def shapes(self, stage: str, where: jax.Device | jax.sharding.Sharding) -> Mapping:
        """ShapeDtypeStructs of `read`, with which its programs can be compiled before it."""
        name = self._names[stage]
        return foreseen(describe_stack(self._path, [name], self._dtype).stages[name].params, where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_stack(path: str | Path, dtype: str | None = None) -> Opened:
    """Opens a stack directory, or the bundled stack of that name; no weights are read yet.

    Args:
      path: "shapes", or a directory written by `unclip export` or `unclip convert`.
      dtype: as of `OnDemand`.

    Raises:
      UserError: no stack there, one that is damaged as far as can be told, or stages that do not belong together.
    """
    described = describe_stack(path)
    with said_of(f"stack {described.path}: its configs make no stages", COPY):  # which anybody may have written
        names, made = chain(described.path, described.stages)
    configs = {stage: described.stages[name].config for stage, name in names.items()}
    return Opened(described.tokenizer_json, made, configs, OnDemand(described.path, names, dtype))


def chain(path: Path, stages: Mapping[str, Stage]) -> tuple[dict[str, str], dict[str, Any]]:
    """({stage: its name among `stages`}, {stage: Task}) as they run; UserError for those that do not belong together.

    Args:
      path: of the stack that they are of, for errors.
    """
    names = _chain({name: stage.config for name, stage in stages.items()}, path)
    ordered = {stage: stages[name] for stage, name in names.items()}
    _check_same_clip(path, ordered)
    made = _make_tasks({name: stage.config for name, stage in ordered.items()})
    _check_sizes(path, made)
    return names, made


def identity(path: str | Path) -> str:
    """16 hexadecimal digits of stack.json, which holds the SHA-256 of all weights: tells a stack from others."""
    return hashlib.sha256((describe_stack(path, []).path / "stack.json").read_bytes()).hexdigest()[:16]


def _host() -> jax.Device | None:
    """The device whose memory is the host's; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _chain(configs: Mapping[str, ConfigDict], path: Path) -> dict[str, str]:
    """{"clip": …, "prior": …, "prior_ar": …, "decoder": …, "upsampler": …, …} -> their names in the stack."""
    by_task: dict[str, list[str]] = {}
    for name in sorted(configs):
        by_task.setdefault(str(configs[name].get("task")), []).append(name)
    clip = any(map(task_registry.needs_clip, configs.values()))
    needed = {"clip": clip, **dict.fromkeys(PRIORS.values(), False), "decoder": True}
    chain = {}
    for role in needed:
        found = by_task.pop(ROLES[role], [])
        if not found and not needed[role]:
            continue  # a prior is enough, or none as in Karlo's stack for variations; no CLIP, as in GLIDE's
        if len(found) != 1:
            raise UserError(
                f"stack {path} has {len(found) or 'no'} stages of the task '{ROLES[role]}', and 1 is needed",
                "export a whole stack: unclip export --clip … --prior … --decoder …",
            )
        chain[role] = found[0]
    upsamplers = sorted(by_task.pop("upsampler", []), key=lambda name: configs[name].data.size)
    if by_task:
        raise UserError(f"stack {path}: task {sorted(by_task)[0]!r} is unknown", "update unclip_jax")
    chain |= zip(upsampler_names(len(upsamplers)), upsamplers, strict=True)
    return chain


def _check_same_clip(path: Path, stages: Mapping[str, Stage]) -> None:
    """Embeddings mean something to the CLIP alone that they were learned from."""
    if "clip" not in stages:
        return
    width, identity = stages["clip"].config.model.embed_dim, stages["clip"].extra.get("clip_identity")
    for name, statistic in (("prior", "mean"), ("prior_ar", "mean"), ("decoder", "null_image")):
        if name not in stages or not task_registry.needs_clip(stages[name].config):
            continue
        own, known = stages[name].config.get("clip_identity"), stages[name].params.get(statistic)
        if getattr(known, "shape", None) != (width,) or (own and identity and own != identity):
            raise UserError(
                f"stack {path}: its {name} was trained with another CLIP than the one in the stack",
                "export stages that were trained with the same --config.clip",
            )


def _check_sizes(path: Path, made: Mapping[str, Any]) -> None:
    """Each upsampler draws what the one before it, times its factor, has for a side."""
    side = made["decoder"].image_size
    for name, task in made.items():
        if role_of(name) == "upsampler":
            if task.image_size != side * task.factor:
                made_of = f"makes {task.factor * side} pixels of {side}, and was made for {task.image_size}"
                raise UserError(f"stack {path}: {name} {made_of}", "export stages whose sizes follow each other")
            side = task.image_size


def _make_tasks(configs: Mapping[str, ConfigDict]) -> dict[str, Any]:
    """Each stage's Task; the priors and the decoder know the CLIP they were trained on, which comes first."""
    made, clip = {}, None
    for name, config in configs.items():
        made[name] = task_registry.make(config, clip=clip)
        clip = made[name].model if name == "clip" else clip
    return made
