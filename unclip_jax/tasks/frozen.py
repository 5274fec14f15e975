"""Trained weights that training begins with, from a run or from a stack: the frozen CLIP, and a stage to go on from."""

import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax import checkpoint, weights
from unclip_jax.errors import UserError
from unclip_jax.models.clip import CLIP
from unclip_jax.tasks.clip import ClipTask


class FrozenCLIP(NamedTuple):
    """A trained CLIP: module, f32 parameters, its tokenizer's JSON text, and what identifies the weights."""

    model: CLIP
    params: Any
    tokenizer_json: str
    identity: str


def load_clip(path: str) -> FrozenCLIP:
    """Reads CLIP from a workdir of `unclip train` (averaged weights) or from a stack directory.

    The identity is taken of the trained weights; a stack carries it along, so weights rounded to bfloat16 keep it.

    Raises:
      UserError: nothing usable at `path`, or a run of another stage.
    """
    params, config, tokenizer, extra = load_stage(path, "clip")
    known = extra.get("clip_identity", "")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return FrozenCLIP(ClipTask.from_config(config).model, params, tokenizer, known or clip_identity(params))


def load_stage(path: str, task: str) -> tuple[Any, Any, str | None, dict]:
    """A stage's weights from a workdir (averaged) or a stack: (params, config, tokenizer's JSON, other facts).

    Raises:
      UserError: nothing usable at `path`, or no stage of this task, or several.
    """
    fix = f"give the workdir of a run of '{task}', or a stack that holds one"
    if weights.is_stack(path):
        names = [name for name, own in weights.tasks_of(path).items() if own == task]
        if len(names) != 1:
            raise UserError(f"stack {path} has {len(names) or 'no'} stages of the task '{task}', and 1 is needed", fix)
        stack = weights.load_stack(path, names)
        params, config, _, extra = stack.stages[names[0]]
        return params, config, stack.tokenizer_json, extra
    params, config, _, tokenizer = checkpoint.load_params(path)
    if config.task != task:
        raise UserError(f"{path} holds a run of the task '{config.task}', not '{task}'", fix)
    return params, config, tokenizer, {}


def clip_identity(params) -> str:
    """16 hexadecimal digits that tell one set of CLIP weights from another."""
    prints = json.dumps(checkpoint.fingerprint(params), sort_keys=True)
    return hashlib.sha256(prints.encode()).hexdigest()[:16]
