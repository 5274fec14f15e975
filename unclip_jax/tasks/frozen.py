"""The frozen CLIP that the prior and the decoder learn against, from a training run or from a stack."""

import hashlib
import json
from pathlib import Path
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
    if (Path(path).expanduser() / "stack.json").is_file():
        stack = weights.load_stack(path, ["clip"])
        stage = stack.stages["clip"]
        params, config, tokenizer = stage.params, stage.config, stack.tokenizer_json
        known = stage.extra.get("clip_identity", "")
    else:
        params, config, _, tokenizer = checkpoint.load_params(path)
        known = ""
    if config.task != "clip":
        raise UserError(f"{path} holds the stage '{config.task}', not a CLIP", "set --config.clip to a CLIP run")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return FrozenCLIP(ClipTask.from_config(config).model, params, tokenizer, known or clip_identity(params))


def clip_identity(params) -> str:
    """16 hexadecimal digits that tell one set of CLIP weights from another."""
    prints = json.dumps(checkpoint.fingerprint(params), sort_keys=True)
    return hashlib.sha256(prints.encode()).hexdigest()[:16]
