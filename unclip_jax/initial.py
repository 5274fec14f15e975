"""The weights that a stage is begun from (`config.init`): those of the same arrays, and what arrays do not show, told.

Not in the arrays are settings such as an activation or what a network predicts; and which CLIP a prior or a decoder was
trained against, for embeddings mean something to their own CLIP alone.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import config as configs
from unclip_jax import tasks
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.errors import UserError
from unclip_jax.fingerprint import by_path
from unclip_jax.models.clip import CLIP, VisionTransformer
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.prior import Prior
from unclip_jax.models.prior_ar import PriorAR
from unclip_jax.models.text import TextEncoder
from unclip_jax.models.unet import UNet
from unclip_jax.tasks.frozen import Trained
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import STATISTICS

NETWORKS = (CLIP, VisionTransformer, TextEncoder, Prior, PriorAR, UNet, Decoder)
OBJECTIVE = ("target", "empty_caption", "factor", "enlarge", "last_steps")  # of a network's use
FREE = ("remat", "dtype", "dropout")  # the function that is learned is the same with others


def starting_weights(
    config: ConfigDict, task: tasks.Task, shapes: Any, stage: Trained, tokenizer: Tokenizer | None
) -> dict[str, jax.Array]:
    """A trained stage's weights by name, in f32; UserError unless they are a network of just these arrays.

    With `config.init_partly` those arrays alone that both networks have; UserError unless there are any, each of the
    same shape. Statistics of another CLIP's embeddings are left out, to be measured anew. Warnings tell of that, of
    other settings, of another tokenizer, and of what is not taken.
    """
    if other := _other_settings(stage.config, config):
        warnings.warn(f"init={config.init!r} was trained with other settings: {'; '.join(other)}", stacklevel=2)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tasks.adopt(task, stage.params))
    found, wanted = (dict(by_path(tree)) for tree in (params, shapes))
    both = found.keys() & wanted.keys()
    for name in sorted(both if config.get("init_partly") and both else found.keys() | wanted.keys()):
        here, there = (str(side[name].shape) if name in side else "no array" for side in (wanted, found))
        if here != there:
            raise UserError(
                f"init={config.init!r} holds another network: {name} is {there}, and config.model asks for {here}",
                "take the config.model that those weights were trained with, or, where that network has more arrays or "
                "fewer but those of one name have one shape, --config.init_partly=True",
            )
    if len(both) < len(found.keys() | wanted.keys()):
        lacks, more = _named(wanted.keys() - both), _named(found.keys() - both)
        what = f"init={config.init!r} gives {len(both)} of the {len(wanted)} arrays"
        warnings.warn(f"{what}; random or measured: {lacks}; left there: {more}", stacklevel=2)
    known = stage.config.get("clip_identity") if tasks.needs_clip(config) else ""
    if known and known != config.clip_identity:
        what = f"init={config.init!r} was trained against the CLIP {known}, and config.clip is {config.clip_identity}"
        measured = both & STATISTICS
        what += f"; statistics measured anew: {_named(measured)}" if measured else ""
        warnings.warn(f"{what}; it has to learn anew what embeddings mean", stacklevel=2)
        both -= measured
    elif tokenizer and stage.tokenizer_json and _pieces(stage.tokenizer_json) != tokenizer.to_json():
        what = f"init={config.init!r} was trained with another tokenizer, and has to learn anew what its tokens mean"
        own = "train against its CLIP" if tasks.needs_clip(config) else "leave config.tokenizer.path out"
        warnings.warn(f"{what}; {own} to keep the one it knows", stacklevel=2)
    return {name: found[name] for name in both}


def _pieces(tokenizer_json: str) -> str:
    """A stored tokenizer's text as this version writes it."""
    return Tokenizer.from_json(tokenizer_json).to_json()


def _named(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _other_settings(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What two configs of one task say otherwise of what their network computes, "key: old -> new"."""
    old, new = _settings(old), _settings(new)
    defaults = _defaults()

    def said(settings, key):
        return settings.get(key, defaults.get(key.split(".")[-1]))

    both = ((key, said(old, key), said(new, key)) for key in sorted(old.keys() | new.keys()))
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in both if before != after]


def _settings(config: ConfigDict) -> dict[str, Any]:
    """The settings of a network and of its use that a config says, by key."""
    objective = {name: value for name, value in (config.get("objective") or {}).items() if name in OBJECTIVE}
    blocks = {"model": config.model, "diffusion": config.get("diffusion") or {}, "objective": objective}
    flat = configs.flatten({name: block for name, block in blocks.items() if block})
    return {key: value for key, value in flat.items() if key.split(".")[-1] not in FREE}


def _defaults() -> dict[str, Any]:
    """What goes without saying, by the last part of its key."""
    fields = [field for kind in (*tasks.TASKS.values(), *NETWORKS) for field in dataclasses.fields(kind)]
    own = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    schedule = inspect.signature(make_schedule).parameters.values()
    return {**own, **{p.name: p.default for p in schedule if p.default is not p.empty}}
