"""A trained stage, of a run (its averaged weights) or of a stack, together with the data that it is measured on."""

from typing import Any, NamedTuple

from unclip_jax import checkpoint_read, data, tasks, weights
from unclip_jax.data import loader
from unclip_jax.errors import UserError
from unclip_jax.evaluation import pictures
from unclip_jax.tokenizer import Tokenizer

CONVERTED_BATCH = 64


class TrainedStage(NamedTuple):
    """A trained stage with what it is measured on."""

    task: Any
    params: Any
    frozen: dict
    config: Any
    step: int
    source: Any
    tokenizer: Tokenizer | None

    @property
    def batch_size(self) -> int:
        """That it was trained with; of a converted one it is not known."""
        return self.config.get("batch_size", CONVERTED_BATCH)

    def batches(self, seed: int):
        """Of the held-out split, in an order that the seed decides."""
        settings = {**self.config.get("loader", {}), "num_workers": 0}
        return loader.batches(self.source, self.tokenizer, self.batch_size, seed=seed, **settings)


def load(
    where: str, step: int | None = None, stage: str | None = None, source: str | None = None, path: str | None = None
) -> TrainedStage:
    """Reads a run's averaged weights, or a stage of a stack, and opens what it is measured on.

    Args:
      where: workdir of a training run; with `stage`, a stack or the name of a bundled one.
      step: of the run's checkpoint; None: the newest.
      stage: its name in the stack.
      source, path: "NAME" or "NAME:SPLIT" and its folder, in place of what the config holds out.
    """
    if path is not None and source is None:
        raise UserError(f"path={path!r} is of a source, and none is given", "give --data SOURCE as well")
    if stage is None:
        params, config, step, text = checkpoint_read.load_params(where, step=step)
        clip = config.clip
    else:
        stack = weights.load_stack(where, [stage], "float32")
        (params, config, step, _), text = stack.stages[stage], stack.tokenizer_json
        clip = str(stack.path) if tasks.needs_clip(config) else ""
    frozen = tasks.load_clip(clip) if clip else None
    if frozen and frozen.identity != config.clip_identity:
        raise UserError(
            f"{where} was trained with another CLIP than the one now in {clip}",
            "put the CLIP that it was trained with back in that place",
        )
    task = tasks.make(config, frozen.model if frozen else None)
    if source is not None:
        size = config.data.get("size") or (frozen and (frozen.model.vision or {}).get("image_size"))
        if not size:
            raise UserError(f"{stage or where} sees no pictures: its CLIP has no image tower", "measure a whole CLIP's")
        asked = config.task != "upsampler" or bool(config.model.get("text"))
        opened = pictures.source(source, size, config.data.get("seed", 0), path, asked)[0]
    elif "eval" in config:
        opened = data.make(**{**config.data, "split": config.eval.split})
    else:
        what = f"the stage {stage} was converted, and knows of no data to be measured on"
        raise UserError(what, "give --data SOURCE, and --path where it lies")
    tokenizer = Tokenizer.from_json(text) if text else None
    return TrainedStage(task, params, {"clip": frozen.params} if frozen else {}, config, step, opened, tokenizer)
