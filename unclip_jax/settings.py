"""What a caller may change about sampling, by stage, and the checks of numbers that all calls share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from unclip_jax.diffusion.draw import check_setting
from unclip_jax.errors import UserError, is_whole, suggest

PRIORS = {"diffusion": "prior", "ar": "prior_ar"}  # by what a caller calls them; the first there is drawn with


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a caller may change about sampling; None keeps what the stage's config says.

    Names that begin with `prior_` are of the prior, with `upsample_` of every upsampler, and others of the decoder.

    Args:
      prior: "diffusion" or "ar", the autoregressive one; None is the first of these that the stack has.
      prior_temperature, prior_top_p: of the autoregressive prior; a temperature of 0 takes the likeliest code.
      steps: 1 … the number the stage was trained with.
      sampler: by name: "ddpm", "analytic", "ddim", "dpm", "heun".
      guidance, rescale, interval: guidance 1 is none, 0 ignores the prompt; see `diffusion.draw`.
      threshold: quantile of dynamic thresholding; see `diffusion.sample.viewer`.
      tile, overlap: side of the tiles that upsamplers work on, and what they share, in pixels; see `diffusion.tile`.
      candidates: the best of so many embeddings, by dot product with the caption's, is kept.
    """

    prior: str | None = None
    prior_steps: int | None = None
    prior_sampler: str | None = None
    prior_guidance: float | None = None
    prior_rescale: float | None = None
    prior_interval: tuple[float, float] | None = None
    prior_threshold: float | None = None
    prior_temperature: float | None = None
    prior_top_p: float | None = None
    candidates: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    rescale: float | None = None
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    upsample_steps: int | None = None
    upsample_sampler: str | None = None
    upsample_threshold: float | None = None
    tile: int | None = None
    overlap: int | None = None

    def __post_init__(self):
        if self.prior is not None and self.prior not in PRIORS:
            raise UserError(f"prior={self.prior!r} is unknown", suggest(self.prior, PRIORS))
        for kind, name in [setting for names in SETTINGS.values() for setting in names.items()]:
            if (value := getattr(self, name)) is None:
                continue
            if kind == "steps" and not is_whole(value, 1):
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
            check_setting(kind, value, name)
            if kind == "interval":
                object.__setattr__(self, name, tuple(map(float, value)))  # programs are told apart by it
            elif isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())

    def of(self, role: str) -> dict[str, Any]:
        """The keyword arguments they mean for one role's `Task.sample`."""
        values = {key: getattr(self, name) for key, name in SETTINGS[role].items()}
        return {key: value for key, value in values.items() if value is not None}


def _named(prefix: str, *kinds: str) -> dict[str, str]:
    return {"name" if kind == "sampler" else kind: prefix + kind for kind in kinds}


KINDS = ("steps", "sampler", "guidance", "rescale", "interval", "threshold")
# {role: {keyword of its Task.sample: name in Settings}}
SETTINGS = {
    "prior": {**_named("prior_", *KINDS), "candidates": "candidates"},
    "prior_ar": {**_named("prior_", "guidance", "temperature", "top_p"), "candidates": "candidates"},
    "decoder": _named("", *KINDS),
    "upsampler": {**_named("upsample_", "steps", "sampler", "threshold"), "tile": "tile", "overlap": "overlap"},
}


def upsampler_names(count: int) -> list[str]:
    """The stages of so many upsamplers, as they run: "upsampler", "upsampler_2", …"""
    return ["upsampler", *(f"upsampler_{k}" for k in range(2, count + 1))][:count]


def role_of(stage: str) -> str:
    """The key of SETTINGS for a stage: its name, for upsamplers "upsampler"."""
    return "upsampler" if stage.startswith("upsampler") else stage


def prior_of(used) -> str | None:
    """The stage of the prior among the settings of the stages that draw; None where there is none."""
    return next((name for name in PRIORS.values() if name in used), None)


def check_numbers(seed=0, num=1, batch_size=1, **more) -> None:
    """Raises UserError for what no call takes; `more` are name=(value, least)."""
    if not is_whole(seed, 0, 2**32 - 1):
        raise UserError(f"seed={seed!r} must be a whole number in 0 … 4294967295")
    for name, (value, least) in {"num": (num, 1), "batch_size": (batch_size, 1), **more}.items():
        if not is_whole(value, least):
            raise UserError(f"{name}={value!r} must be a whole number of at least {least}")


def is_listed(values) -> bool:
    """Whether it is a list, tuple or array; a set has no order, a generator is there but once, and a text is one."""
    return np.iterable(values) and hasattr(values, "__getitem__") and not isinstance(values, str)


def check_prompts(prompts) -> None:
    """Raises UserError unless `prompts` is a list of at least one text."""
    if not is_listed(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("prompts must be a list of texts", "write generate(['a red circle'])")
    if not len(prompts):
        raise UserError("prompts must hold at least one text")
