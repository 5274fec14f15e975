"""Trained weights that training begins with, from a run or from a stack: the frozen CLIP, and a stage to go on from."""

import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import weights
from unclip_jax.errors import UserError
from unclip_jax.fingerprint import fingerprint
from unclip_jax.models.clip import CLIP
from unclip_jax.storage import digest
from unclip_jax.tasks.clip import ClipTask


class FrozenCLIP(NamedTuple):
    """A trained CLIP: module, f32 parameters, its tokenizer's JSON text, and what identifies the weights."""

    model: CLIP
    params: Any
    tokenizer_json: str
    identity: str


class Trained(NamedTuple):
    """A stage as it was trained: parameters, config, step, its tokenizer's JSON text if any, other facts of a stack."""

    params: Any
    config: ConfigDict
    step: int
    tokenizer_json: str | None
    extra: dict


def load_stage(path: str | os.PathLike, task: str, size: int | None = None) -> Trained:
    """Reads the stage of `task` from a workdir of `unclip train` (averaged weights), or from a stack, bundled or not.

    Of several in a stack, such as upsamplers, that one whose pictures have `size` pixels a side.

    Raises:
      UserError: nothing usable at `path`, or no stage of this task, or several.
    """
    path, fix = weights.located(path), f"give the workdir of a run of '{task}', or a stack that holds one"
    if weights.is_stack(path):
        names = [name for name, own in weights.tasks_of(path).items() if own == task]
        pixels = ""
        if len(names) > 1 and size is not None:
            stages = weights.describe_stack(path, names).stages
            names = [name for name in names if stages[name].config.get("data", {}).get("size") == size]
            pixels = f" for {size} pixels (data.size)"
        if len(names) != 1:
            what = f"stack {path} has {len(names) or 'no'} stages of the task '{task}'{pixels}, and 1 is needed"
            raise UserError(what, fix)
        stack = weights.load_stack(path, names)
        params, config, step, extra = stack.stages[names[0]]
        return Trained(params, config, step, stack.tokenizer_json, extra)
    if not weights.is_run(path):
        state = "is neither a stack nor the workdir of a run" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}", fix)
    from unclip_jax import checkpoint_read  # and with it Orbax, which drawing does without

    own = checkpoint_read.peek(path)[0].get("task")
    if own != task:
        if {own, task} == {"prior_ar", "prior_diffusion"}:
            fix += ", or ask for the other kind of prior (--prior, --prior-ar)"
        raise UserError(f"{path} holds a run of the task {own!r}, not {task!r}", fix)
    return Trained(*checkpoint_read.load_params(path), {})


def load_clip(path: str | os.PathLike) -> FrozenCLIP:
    """Reads CLIP from a workdir or a stack, as `load_stage` does.

    The identity is taken of the trained weights; a stack carries it along, so weights rounded to bfloat16 keep it.
    """
    return freeze(load_stage(path, "clip"))


def freeze(clip: Trained) -> FrozenCLIP:
    """A trained CLIP as others learn against it."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), clip.params)
    identity = clip.extra.get("clip_identity") or clip_identity(params)
    return FrozenCLIP(ClipTask.from_config(clip.config).model, params, clip.tokenizer_json, identity)


def check_sees(clip: FrozenCLIP, path: str | os.PathLike, size: int) -> None:
    """UserError for a CLIP that is asked of pictures and sees none; a warning where `size` is less than it sees."""
    if clip.model.vision is None:
        raise UserError(f"the CLIP in {path} has no image tower, and is asked of pictures", "give one that has")
    seen = clip.model.vision["image_size"]
    if size < seen:
        what = f"pictures of {size} pixels are enlarged for the CLIP in {path}, which sees {seen}"
        warnings.warn(f"{what}: its embeddings are then of blurred pictures", stacklevel=2)


def clip_identity(params) -> str:
    """16 hexadecimal digits that tell one set of CLIP weights from another."""
    return digest(fingerprint(params))
