"""The trained stack as one object: text -> z_txt -> prior -> z_img -> decoder -> upsamplers -> u8 pictures.

Ramesh et al. 2022, figure 2, lower half. Each stage is one compiled program, its whole sampling loop inside.
Stages run one after the other over all pictures; with `low_memory` the device holds one stage's weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from unclip_jax.data.images import center_crop_resize, to_float, to_uint8
from unclip_jax.data.masks import holes_at, known_at
from unclip_jax.diffusion.draw import check_settings
from unclip_jax.diffusion.sample import SAMPLERS
from unclip_jax.diffusion.schedule import respace
from unclip_jax.errors import UserError, suggest
from unclip_jax.stack import OnDemand, open_stack
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import DTYPES

RESAMPLE = 4  # passes of RePaint over each stretch of steps, for decoders that never learned to inpaint


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a caller may change about sampling; None keeps what the stage's config says.

    Names that begin with `prior_` are of the prior, with `upsample_` of every upsampler, and others of the decoder.

    Args:
      steps: 1 … the number the stage was trained with.
      sampler: by name: "ddpm", "analytic", "ddim", "dpm", "heun".
      guidance, rescale, interval: guidance 1 is none, 0 ignores the prompt; see `diffusion.draw`.
      threshold: quantile of dynamic thresholding; see `diffusion.sample.viewer`.
      tile, overlap: side of the tiles that upsamplers work on, and what they share, in pixels; see `diffusion.tile`.
      candidates: the best of so many embeddings, by dot product with the caption's, is kept.
    """

    prior_steps: int | None = None
    prior_sampler: str | None = None
    prior_guidance: float | None = None
    prior_rescale: float | None = None
    prior_interval: tuple[float, float] | None = None
    prior_threshold: float | None = None
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
        for name, value in dataclasses.asdict(self).items():
            if value is None:
                continue
            kind = name.split("_")[-1]
            if kind in ("steps", "candidates") and not _whole(value, 1):
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
            if kind == "guidance" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise UserError(f"{name}={value!r} must be a number of at least 0 (1 is no guidance)")
            if kind == "sampler" and value not in SAMPLERS:
                raise UserError(f"{name}={value!r} is unknown", suggest(value, SAMPLERS))
            if kind in ("threshold", "rescale", "interval"):
                check_settings(name.removesuffix(kind), **{kind: value})

    def of(self, role: str) -> dict[str, Any]:
        """The keyword arguments they mean for one role's `Task.sample`."""
        prefix = {"prior": "prior_", "decoder": "", "upsampler": "upsample_"}[role]
        kinds = {"name": "sampler"} | {k: k for k in ("steps", "guidance", "rescale", "interval", "threshold")}
        values = {key: getattr(self, prefix + kind, None) for key, kind in kinds.items()}
        values["candidates"] = self.candidates if role == "prior" else None
        if role == "upsampler":
            values |= {"tile": self.tile, "overlap": self.overlap}
        return {key: value for key, value in values.items() if value is not None}


class Drawn(NamedTuple):
    """What every stage made for N pictures: u8[N, H, W, 3], the decoder's u8[N, h, w, 3], f32[N, D] twice."""

    images: np.ndarray
    base: np.ndarray
    z_img: np.ndarray
    z_txt: np.ndarray


@dataclasses.dataclass(frozen=True)
class UnCLIP:
    """A trained stack that draws pictures from prompts. Made by `UnCLIP.load`.

    Args:
      tokenizer: the one that every stage was trained with.
      tasks, configs, params: by stage: "clip", "prior", "decoder" and any upsamplers, in the order they run.
    """

    tokenizer: Tokenizer
    tasks: Mapping[str, Any]
    configs: Mapping[str, ConfigDict]
    params: Mapping[str, dict]
    _programs: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path = "shapes", low_memory: bool = False, dtype: str | None = None) -> UnCLIP:
        """Reads a stack directory, or the bundled stack of that name.

        Args:
          path: "shapes", or a directory written by `unclip export`.
          low_memory: read each stage's weights when it runs and let go of them after it.
          dtype: "float32" or "bfloat16" of the weights; None is float32 on a CPU and as stored elsewhere.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown", suggest(dtype, DTYPES))
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        opened = open_stack(path, dtype)
        params = opened.params if low_memory else {name: opened.params[name] for name in opened.params}
        return cls(Tokenizer.from_json(opened.tokenizer_json), opened.tasks, opened.configs, params)

    @property
    def upsamplers(self) -> list[str]:
        """The stages that enlarge, in the order they run."""
        return [name for name in self.tasks if name.startswith("upsampler")]

    @property
    def size(self) -> int:
        """Side of the final pictures, in pixels."""
        return self.tasks[(self.upsamplers or ["decoder"])[-1]].image_size

    def without_upsamplers(self) -> UnCLIP:
        """The same stack ending with the decoder's own pictures."""
        keep = [name for name in self.tasks if name not in self.upsamplers]
        return dataclasses.replace(
            self,
            tasks={name: self.tasks[name] for name in keep},
            configs={name: self.configs[name] for name in keep},
            params=self.params if isinstance(self.params, OnDemand) else {name: self.params[name] for name in keep},
        )

    def settings(self, **changed) -> dict[str, dict]:
        """What sampling will use, by stage: the configs' numbers with `changed` (see `Settings`) put in.

        Raises:
          UserError: a setting is unknown, out of its range, or asks for more steps than were trained.
        """
        names = [field.name for field in dataclasses.fields(Settings)]
        for name in changed:
            if name not in names:
                raise UserError(f"{name} is no setting of sampling", suggest(name, names))
        changes = Settings(**changed)
        used = {}
        for name in [n for n in self.tasks if n != "clip"]:
            config, own = self.configs[name], changes.of(_role(name))
            trained = config.diffusion.num_steps
            if own.get("steps", 1) > trained:
                raise UserError(
                    f"{name}: {own['steps']} steps are more than the {trained} it was trained with"
                )
            used[name] = {**config.sampler.to_dict(), **own}
            if used[name].get("tile") is not None:
                self.tasks[name].tiles(used[name]["tile"], used[name].get("overlap"))
            elif used[name].get("overlap") is not None:
                raise UserError(f"overlap={used[name]['overlap']} is of tiles, and none are asked for", "give a tile")
            if used[name]["name"] == "analytic" and "x0_variance" not in self.params[name]:
                what = f"{name}: the sampler analytic needs a table of variances, and this stack has none"
                raise UserError(what, f"measure it: unclip export … --analytic {name}")
        return used

    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        num: int = 1,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ) -> np.ndarray | Drawn:
        """Draws `num` pictures of each prompt -> u8[len(prompts) * num, H, W, 3], prompt by prompt.

        Picture i of prompt p is decided by (seed, p, i), the prompt and the settings: neither `num` nor other
        prompts nor `batch_size` changes it by more than rounding.

        Args:
          prompts: texts; "" is the null caption.
          seed: 0 … 2**32 - 1.
          batch_size: pictures drawn at once.
          return_stages: give a `Drawn` with what the stages before the last made.
          progress: show a bar on a terminal.
          **settings: see `Settings`.

        Raises:
          UserError: a bad argument, or a stage gave NaN.
        """
        _check_call(prompts, seed, num, batch_size)
        if "prior" not in self.tasks:
            raise UserError("this stack has no prior, so it cannot draw from prompts", "draw variations of pictures")
        tokens, mask = self.tokenizer.encode(list(prompts))
        cond = {"tokens": tokens.repeat(num, 0), "mask": mask.repeat(num, 0)}
        keys = picture_keys(seed, len(prompts), num)
        return self._draw(cond, keys, self.settings(**settings), batch_size, return_stages, progress)

    def variations(
        self,
        images: Sequence[np.ndarray],
        seed: int = 0,
        *,
        num: int = 1,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ) -> np.ndarray | Drawn:
        """Draws `num` pictures of what each image shows -> u8[len(images) * num, H, W, 3], image by image.

        From the CLIP embedding of the image alone, no prior and no caption, with other noise for each picture (Ramesh
        et al. 2022, section 3.1, here from white noise).

        Args:
          images: u8[h, w, 3] each; the middle square is looked at.
          seed, num, batch_size, return_stages, progress, **settings: as of `generate`.

        Raises:
          UserError: a bad argument, a CLIP without image tower, or a stage gave NaN.
        """
        _check_call([""] * len(images), seed, num, batch_size)
        cond = {name: value.repeat(num, 0) for name, value in self._asked(images, None).items()}
        used = self.settings(**settings)
        used["decoder"] = {**used["decoder"], "caption": False}
        keys = picture_keys(seed, len(images), num)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def inpaint(
        self,
        images: Sequence[np.ndarray],
        holes: Sequence[np.ndarray] | None,
        prompts: Sequence[str] | None,
        seed: int = 0,
        *,
        num: int = 1,
        strength: float = 1.0,
        jump: int | None = None,
        resample: int | None = None,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ) -> np.ndarray | Drawn:
        """Paints the holes of pictures anew -> u8[len(images) * num, H, W, 3], image by image.

        Outside the hole the result is the given picture, brought to H x W, to the bit. A decoder that was trained with
        `objective.inpaint` sees the picture; any other is led by RePaint (`diffusion.inpaint`).

        Args:
          images: u8[h, w, 3] each; the middle square counts.
          holes: bool[h, w] each, True where to paint; None paints all of it (image-to-image, for strength below 1).
          prompts: what the whole picture is to show, one for each image; None draws from the images' own embeddings.
          strength: above 0 and at most 1: how much of the steps is drawn, beginning from the noised picture.
          jump, resample: of `diffusion.inpaint.travel`; by default a sixth of the steps, and RESAMPLE or, for a decoder
            trained to inpaint, 1.
          seed, num, batch_size, return_stages, progress, **settings: as of `generate`.

        Raises:
          UserError: a bad argument, an empty hole, a stack that lacks what is needed, or a stage gave NaN.
        """
        _check_call([""] * len(images) if prompts is None else prompts, seed, num, batch_size)
        for name, value in (("jump", jump), ("resample", resample)):
            if value is not None and not _whole(value, 1):
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
        if not (isinstance(strength, (int, float)) and 0 < strength <= 1):
            raise UserError(f"strength={strength!r} must be above 0 and at most 1")
        if prompts is not None and len(prompts) != len(images):
            raise UserError(f"{len(prompts)} prompts for {len(images)} images; one for each is needed")
        squares = np.stack([_square(image, k, self.size) for k, image in enumerate(images)])
        masks = None if holes is None else holes_at(images, holes, self.size)
        cond, used = self._asked(images, prompts), self.settings(**settings)
        task = self.tasks["decoder"]
        steps = respace(task.schedule, used["decoder"]["steps"]).num_steps
        resample = (1 if task.inpaint else RESAMPLE) if resample is None else resample
        used["decoder"] |= {"strength": float(strength), "resample": resample, "jump": jump or max(1, steps // 6)}
        if prompts is None:
            used["decoder"]["caption"] = False
        cond, squares = ({k: v.repeat(num, 0) for k, v in cond.items()}, squares.repeat(num, 0))
        masks = None if masks is None else masks.repeat(num, 0)
        keys = picture_keys(seed, len(images), num)
        drawn = self._draw(cond, keys, used, batch_size, True, progress, lambda size: known_at(squares, masks, size))
        pasted = drawn.images if masks is None else np.where(masks[..., None], drawn.images, squares)
        return drawn._replace(images=pasted) if return_stages else pasted

    def _asked(self, images: Sequence[np.ndarray], prompts: Sequence[str] | None) -> dict[str, np.ndarray]:
        """What CLIP is asked: the prompts, or the pictures where there are none."""
        tokens, mask = self.tokenizer.encode([""] * len(images) if prompts is None else list(prompts))
        if prompts is not None:
            if "prior" not in self.tasks:
                raise UserError("this stack has no prior, so it cannot draw from prompts", "give no prompt")
            return {"tokens": tokens, "mask": mask}
        vision = self.tasks["clip"].model.vision
        if vision is None:
            raise UserError("this stack's CLIP has no image tower, so it cannot look at pictures", "draw from prompts")
        squares = [_square(image, k, vision["image_size"]) for k, image in enumerate(images)]
        return {"image": to_float(np.stack(squares)), "tokens": tokens, "mask": mask}

    def _draw(
        self, cond: dict, keys, used: Mapping, batch_size: int, return_stages: bool, progress: bool, known=None
    ):
        """Every stage after the other over all rows of `cond`; the prior only where there is no z_img yet.

        known: side -> what a stage that draws pictures of that side is told of a given one; None: nothing.
        """
        total = len(keys)
        size = min(batch_size, 1 << (total - 1).bit_length())
        bar = None if progress else True

        def run(number, stage, rows):
            return self._run(stage, (rows, _fold(keys, number)), used[stage], total, size, bar)

        cond = {**cond, **self._run("clip", (cond,), {}, total, size, bar)}
        cond.pop("image", None)
        if "z_img" not in cond:
            cond["z_img"] = run(1, "prior", cond)
        told = lambda stage: known(self.tasks[stage].image_size) if known else {}  # noqa: E731
        base = images = run(2, "decoder", {**cond, **told("decoder")})
        for number, stage in enumerate(self.upsamplers, start=3):
            images = run(number, stage, {"low": images, **told(stage)})
        pictures = to_uint8(images)
        if not return_stages:
            return pictures
        return Drawn(pictures, to_uint8(base), cond["z_img"], cond["z_txt"])

    def _run(self, stage: str, rows, options: Mapping, total: int, size: int, bar: bool | None):
        """One stage over all rows, `size` at a time, the last chunk filled up with copies of the last row."""
        program = self._program(stage, options)
        params, parts = self.params[stage], []
        for start in tqdm(range(0, total, size), desc=stage, unit="batch", leave=False, disable=bar):
            chunk = np.minimum(np.arange(start, start + size), total - 1)
            parts.append(jax.device_get(program(params, *jax.tree.map(lambda x, at=chunk: x[at], rows))))
        out = jax.tree.map(lambda *x: np.concatenate(x)[:total], *parts)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(out)):
            raise UserError(
                f"stage '{stage}' gave NaN or infinite values, so no picture was made",
                "lower the guidance, take more steps, or use dtype float32",
            )
        return out

    def _ask(self, params, rows):
        asked = [self.tasks[name].encode({"clip": params}, rows) for name in ("prior", "decoder") if name in self.tasks]
        return {name: value for each in asked for name, value in each.items() if name not in rows}

    def _program(self, stage: str, options: Mapping):
        """The compiled program of one stage, (params, rows[, keys]) -> output; one for each `options`."""
        key = (stage, tuple(sorted(options.items())))
        if key not in self._programs:
            task = self.tasks[stage]
            if stage == "clip":  # what the encodings of prior and decoder add to tokens, mask and image
                self._programs[key] = jax.jit(self._ask)
            else:
                self._programs[key] = jax.jit(
                    lambda params, rows, keys: task.sample(params, rows, keys, **options)
                )
        return self._programs[key]


def picture_keys(seed: int, prompts: int, num: int) -> jax.Array:
    """key[prompts * num], one for each picture: fold_in(fold_in(key(seed), prompt's index), own index)."""
    p, i = np.divmod(np.arange(prompts * num, dtype=np.uint32), np.uint32(num))
    root = jax.random.key(np.uint32(seed))
    return jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(root, a), b))(p, i)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _square(image, number: int, side: int) -> np.ndarray:
    """The middle square of a picture, u8[side, side, 3]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"image {number} is {image.dtype}{list(image.shape)}; expected uint8[height, width, 3]")
    return center_crop_resize(Image.fromarray(image), side)


def _role(stage: str) -> str:
    return "upsampler" if stage.startswith("upsampler") else stage


def _whole(value, least: int, most: float = math.inf) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most


def _check_call(prompts, seed, num, batch_size) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("prompts must be a list of texts", "write generate(['a red circle'])")
    if not len(prompts):
        raise UserError("prompts must hold at least one text")
    if not _whole(seed, 0, 2**32 - 1):
        raise UserError(f"seed={seed!r} must be a whole number in 0 … 4294967295")
    for name, value in (("num", num), ("batch_size", batch_size)):
        if not _whole(value, 1):
            raise UserError(f"{name}={value!r} must be a whole number of at least 1")
