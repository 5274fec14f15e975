"""From the workdirs of trained stages to one stack directory: what `UnCLIP.load` reads.

A prior and a decoder work with the CLIP they were trained on and no other, so what each recorded of its CLIP
is compared with the one exported. Paths of the machine that trained do not go into the stack.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from unclip_jax import checkpoint, tasks, weights
from unclip_jax.errors import UserError

TASKS = {"clip": "clip", "prior": "prior_diffusion", "decoder": "decoder", "upsampler": "upsampler"}


def collect(
    out: str | os.PathLike,
    clip: str | os.PathLike,
    prior: str | os.PathLike,
    decoder: str | os.PathLike,
    upsamplers: Sequence[str | os.PathLike] = (),
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Path:
    """Writes the stack directory `out` from the newest averaged weights of each workdir; returns its path.

    Args:
      clip: workdir of its training run, or a stack whose CLIP the others were trained with.
      prior, decoder, upsamplers: workdirs of training runs.
      dtype: of the stored weights, "bfloat16" or "float32".
      overwrite: replace a stack that is there.

    Raises:
      UserError: no checkpoint in a workdir, a stage of another task, or one trained with another CLIP or
        tokenizer.
    """
    if Path(out).expanduser().exists() and not overwrite:
        raise UserError(f"out={str(out)!r} exists", "give another directory, or add --overwrite")
    runs = {"clip": clip, "prior": prior, "decoder": decoder}
    runs |= {f"upsampler_{k + 1}" if k else "upsampler": path for k, path in enumerate(upsamplers)}
    for name, path in runs.items():
        _check_task(name, path)
    stages, (params, config, step, vocabulary, identity) = {}, _clip(clip)
    stages["clip"] = (params, config, step, {"clip_identity": identity})
    for name in list(runs)[1:]:
        params, config, step, tokenizer = checkpoint.load_params(runs[name])
        if config.clip and (config.clip_identity, tokenizer) != (identity, vocabulary):
            raise UserError(
                f"the {name} in {runs[name]} was trained with another CLIP than the one in {clip}",
                f"give its own, --clip {config.clip}, or train it with --config.clip={clip}",
            )
        stages[name] = (params, _without_paths(config), step, {})
    return weights.save_stack(out, stages, vocabulary, dtype, overwrite)


def _check_task(name: str, path) -> None:
    flag = name.split("_")[0]
    if flag == "clip" and weights.is_stack(path):
        return
    task = checkpoint.peek(path)[0].get("task")
    if task != TASKS[flag]:
        raise UserError(f"{path} holds a run of the task {task!r}", f"give --{flag} a run of '{TASKS[flag]}'")


def _clip(path) -> tuple:
    """(params, config, step, tokenizer's JSON, identity) of a CLIP run, or of a stack's CLIP."""
    frozen = tasks.load_clip(path)
    if weights.is_stack(path):
        _, config, step, _ = weights.load_stack(path, ["clip"]).stages["clip"]
    else:
        config, step = checkpoint.peek(path)
    return frozen.params, _without_paths(config), step, frozen.tokenizer_json, frozen.identity


def _without_paths(config):
    """The config without where things lay on the machine that trained it."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for block, key in ((config, "clip"), (config, "init"), (config.data, "path"), (config.tokenizer or {}, "path")):
            if key in block:
                block[key] = ""
    return config
