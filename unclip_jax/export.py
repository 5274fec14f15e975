"""From trained stages, in workdirs or stacks, to one stack directory: what `UnCLIP.load` reads.

A prior and a decoder work with the CLIP they were trained on and no other, so what each recorded of its CLIP
is compared with the one exported. A decoder without CLIP (GLIDE's) needs neither it nor a prior. Paths of the machine
that trained do not go into the stack.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from unclip_jax import data, tasks, weights
from unclip_jax.data import loader
from unclip_jax.errors import UserError, suggest
from unclip_jax.settings import role_of, upsampler_names
from unclip_jax.stack import ROLES, chain
from unclip_jax.tokenizer import Tokenizer

DATA_PATHS = ("path", "index", "data_dir")  # arguments of sources that tell where things lie


def collect(
    out: str | os.PathLike,
    clip: str | os.PathLike | None,
    prior: str | os.PathLike | None,
    decoder: str | os.PathLike,
    upsamplers: Sequence[str | os.PathLike] = (),
    dtype: str = "bfloat16",
    overwrite: bool = False,
    analytic: Sequence[str] = (),
    prior_ar: str | os.PathLike | None = None,
) -> Path:
    """Writes the stack directory `out` from the newest averaged weights of each stage; returns its path.

    Args:
      clip, prior, decoder, upsamplers, prior_ar: workdirs of training runs, or stacks to take the stage from; of the
        diffusion prior and the autoregressive one, at least one. A decoder without CLIP takes no CLIP and no prior.
      dtype: of the stored weights, "bfloat16" or "float32".
      overwrite: replace a stack that is there.
      analytic: stages to measure the variances of that the sampler "analytic" needs, on the data they were trained on.

    Raises:
      UserError: no such stage at a path, or one trained with another CLIP or tokenizer, or without any; sizes that do
        not follow each other.
    """
    if Path(out).expanduser().exists() and not overwrite:
        raise UserError(f"out={str(out)!r} exists", "give another directory, or add --overwrite")
    if clip is not None and prior is None and prior_ar is None:
        raise UserError("a stack needs a prior to draw from prompts", "give --prior, --prior-ar, or both")
    runs = {"clip": clip, "prior": prior, "prior_ar": prior_ar, "decoder": decoder}
    runs = {name: path for name, path in runs.items() if path is not None}
    runs |= zip(upsampler_names(len(upsamplers)), upsamplers, strict=True)
    diffusing = [name for name in runs if name not in ("clip", "prior_ar")]
    for name in analytic:
        if name not in diffusing:
            raise UserError(f"analytic={name!r} is no stage with a sampler of diffusion", suggest(name, diffusing))
    stages, frozen, vocabulary = {}, None, None
    for name, path in runs.items():
        stage = tasks.load_stage(path, ROLES[role_of(name)])
        facts = stage.extra
        if name == "clip":
            frozen, vocabulary = tasks.freeze(stage), stage.tokenizer_json
            facts = {**facts, "clip_identity": frozen.identity}
        else:
            vocabulary = _vocabulary(name, path, stage, frozen, clip, vocabulary)
        if name in analytic and "loader" not in stage.config:
            what = f"the {name} in {path} was converted, and knows of no data to measure variances on"
            raise UserError(what, "leave it out of --analytic, or train it on")
        params = {**stage.params, "x0_variance": _variances(stage, frozen)} if name in analytic else stage.params
        stages[name] = (params, _without_paths(stage.config), stage.step, facts)
    chain(Path(out), {name: weights.Stage(*stage) for name, stage in stages.items()})
    return weights.save_stack(out, stages, vocabulary, dtype, overwrite)


def _vocabulary(name: str, path, stage, frozen, clip, known: str | None) -> str | None:
    """The stack's tokenizer, `known` where a stage before tells it; UserError for a stage that does not fit to those.

    Args:
      frozen: the CLIP in `clip`, None where there is none.
    """
    if tasks.needs_clip(stage.config):
        if frozen is None:
            what = f"the {name} in {path} was trained with a CLIP, and none is given"
            raise UserError(what, "give its own by --clip")
        if (stage.config.clip_identity, stage.tokenizer_json) != (frozen.identity, known):
            raise UserError(
                f"the {name} in {path} was trained with another CLIP than the one in {clip}",
                f"give its own by --clip, or train it with --config.clip={clip}",
            )
    elif name == "decoder" and frozen is not None:
        raise UserError(f"the decoder in {path} knows no CLIP, so it takes no CLIP and no prior", "leave them out")
    elif stage.config.model.get("text") and known not in (None, stage.tokenizer_json):
        raise UserError(f"the {name} in {path} was trained with another tokenizer than the decoder", "train both alike")
    return known or stage.tokenizer_json


def _variances(stage, frozen) -> jax.Array:
    """The table of `tasks.measure_x0_variance` of a trained stage beside its CLIP, on batches of its config's data."""
    config = stage.config
    task = tasks.make(config, frozen and frozen.model)
    tokenizer = Tokenizer.from_json(stage.tokenizer_json) if stage.tokenizer_json else None
    settings = {"seed": 0, **config.loader, "num_workers": 0}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), stage.params)
    stream = loader.batches(data.make(**config.data), tokenizer, config.batch_size, **settings)
    with contextlib.closing(stream):
        return tasks.measure_x0_variance(task, {"clip": frozen.params} if frozen else {}, params, stream)


def _without_paths(config):
    """The config without where things lay on the machine that trained it."""
    config = config.copy_and_resolve_references()
    blank = lambda block: {key: "" if key in DATA_PATHS else value for key, value in block.items()}  # noqa: E731
    words = config.get("tokenizer") or {}
    with config.unlocked():
        for block, key in ((config, "clip"), (config, "init"), (config, "track"), (words, "path")):
            if key in block:
                block[key] = ""
        config.data.update(blank(config.data))
        if "parts" in config.data:
            config.data.parts = tuple(map(blank, config.data.parts))
    return config
