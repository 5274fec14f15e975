"""From a config's `sampler` block to a sample: respacing, guidance, a picture to begin from or to keep, the sampler."""

import jax
import numpy as np

from unclip_jax.diffusion.guide import Denoise, guide, is_one, within
from unclip_jax.diffusion.inpaint import partway, repaint
from unclip_jax.diffusion.sample import SAMPLERS
from unclip_jax.diffusion.schedule import Schedule, respace
from unclip_jax.errors import UserError, is_number, is_whole, suggest

RANGES = {"temperature": (0, 100), "top_p": (1e-6, 1)}


def draw(
    sched: Schedule,
    denoise: Denoise,
    noise: jax.Array,
    keys: jax.Array,
    *,
    target: str,
    clip_x0: float | None = 1.0,
    x0_variance: jax.Array | None = None,
    name: str,
    steps: int | str,
    guidance: float | jax.Array = 1.0,
    threshold: float | None = None,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    eta: float | None = None,
    image: jax.Array | None = None,
    keep: jax.Array | None = None,
    strength: float = 1.0,
    jump: int = 1,
    resample: int = 1,
) -> jax.Array:
    """Samples as a config's `sampler` block says -> x0 f32[B, …].

    Args:
      sched: as trained.
      denoise: takes B rows, and with a guidance other than 1 also 2 B, the conditional ones first.
      noise, keys, target, clip_x0, threshold: as of the samplers.
      x0_variance: f32[S] at the steps of `sched`, for the sampler "analytic"; None where it was not measured.
      name: of SAMPLERS.
      steps: of `respace`.
      guidance, rescale: of `guide`.
      interval: (low, high) within 0 (least noise) … 1 (most): guided there only, and outside it the unconditional half
        is not computed (Kynkäänniemi et al. 2024, arXiv 2404.07724); None is everywhere.
      eta: of DDIM, 0 … 1; None is the sampler's own.
      image, strength: f32[B, …] to begin from, with so much of the steps left to go; see `inpaint.partway`.
      keep, jump, resample: f32[B, …], 1 where `image` is to stay; drawn by `inpaint.repaint` then, by DDPM's steps or
        DDIM's where the sampler named is a deterministic one.
    """
    for setting, value in dict(name=name, threshold=threshold, rescale=rescale, interval=interval).items():
        check_setting(setting, value)
    if not is_one(guidance):
        guided = guide(denoise, guidance, rescale)
        if interval is not None and tuple(interval) != (0, 1):
            guided = within(*(level * int(sched.timesteps[-1]) for level in interval), guided, denoise)
        denoise = guided
    short, more = respace(sched, steps), {}
    view = dict(target=target, clip_x0=clip_x0, threshold=threshold)
    if image is not None and strength != 1:
        short, noise = partway(short, image, strength, noise)
    if keep is not None:
        walk = dict(jump=jump, resample=resample, eta=1.0 if name in ("ddpm", "analytic") else 0.0)
        return repaint(short, denoise, noise, keys, known=image, keep=keep, **walk, **view)
    if eta is not None:
        more["eta"] = eta
    if name == "analytic":
        if x0_variance is None:
            raise UserError("the sampler analytic needs a table of variances", "measure it: unclip export --analytic")
        more["x0_variance"] = x0_variance[np.searchsorted(sched.timesteps, short.timesteps)]
    return SAMPLERS[name](short, denoise, noise, keys, **view, **more)


def check_setting(name: str, value, called: str = "") -> None:
    """Raises UserError for a value that a sampler's setting does not take; None and other settings are not looked at.

    Args:
      name: of the setting, as `draw` calls it, or an autoregressive prior.
      called: what the error calls it; by default its name.
    """
    if value is None:
        return
    given = f"{called or name}={value!r}"
    if name == "name" and value not in SAMPLERS:
        raise UserError(f"{given} is unknown", suggest(value, SAMPLERS))
    if name == "guidance" and not is_number(value, 0):
        raise UserError(f"{given} must be a number of at least 0 (1 is no guidance)")
    if name == "threshold" and not (is_number(value, 0, 1) and value > 0):
        raise UserError(f"{given} must be a quantile above 0, and 1 at most, such as 0.995")
    if name == "rescale" and not is_number(value, 0, 1):
        raise UserError(f"{given} must be a number in 0 (none) … 1")
    if name == "interval":
        pair = tuple(value) if isinstance(value, (tuple, list, np.ndarray)) else ()
        if not (len(pair) == 2 and all(is_number(level, 0, 1) for level in pair) and pair[0] < pair[1]):
            raise UserError(f"{given} must be two noise levels, 0 <= low < high <= 1")
    if name == "candidates" and not is_whole(value, 1):
        raise UserError(f"{given} must be a whole number of at least 1")
    if name in RANGES and not is_number(value, *RANGES[name]):
        raise UserError(f"{given} must be a number in {RANGES[name][0]:g} … {RANGES[name][1]}")
