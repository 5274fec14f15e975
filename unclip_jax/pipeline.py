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
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from unclip_jax import sharding
from unclip_jax.data.images import center_crop_resize, to_float, to_uint8
from unclip_jax.diffusion.sample import SAMPLERS
from unclip_jax.errors import UserError, suggest
from unclip_jax.stack import OnDemand, open_stack
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import DTYPES


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a caller may change about sampling; None keeps what the stage's config says.

    Steps are 1 … the number the stage was trained with; a guidance of 1 is none, 0 ignores the prompt.

    Args:
      prior_steps, prior_guidance, candidates: of the prior; the best of `candidates` by dot product is kept.
      steps, guidance, sampler: of the decoder; the sampler by name ("ddpm", "ddim", "dpm", "heun").
      upsample_steps: of every upsampler.
    """

    prior_steps: int | None = None
    prior_guidance: float | None = None
    candidates: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    upsample_steps: int | None = None

    def __post_init__(self):
        for name in ("prior_steps", "candidates", "steps", "upsample_steps"):
            value = getattr(self, name)
            if value is not None and not _whole(value, 1):
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("prior_guidance", "guidance"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise UserError(f"{name}={value!r} must be a number of at least 0 (1 is no guidance)")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} is unknown", suggest(self.sampler, SAMPLERS))

    def of(self, role: str) -> dict[str, Any]:
        """The keyword arguments they mean for one role's `Task.sample`."""
        names = {
            "prior": {"steps": "prior_steps", "guidance": "prior_guidance", "candidates": "candidates"},
            "decoder": {"steps": "steps", "guidance": "guidance", "name": "sampler"},
            "upsampler": {"steps": "upsample_steps"},
        }[role]
        values = {key: getattr(self, name) for key, name in names.items()}
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
      mesh: the devices that share each batch; None: the first one does it all (see `spread`).
    """

    tokenizer: Tokenizer
    tasks: Mapping[str, Any]
    configs: Mapping[str, ConfigDict]
    params: Mapping[str, dict]
    mesh: Mesh | None = None
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

    def spread(self, devices: Sequence | None = None) -> UnCLIP:
        """The same stack with each batch split over `devices`, by default all of this host."""
        mesh = sharding.make_mesh(devices=jax.local_devices() if devices is None else devices)
        params = self.params
        if not isinstance(params, OnDemand):
            params = {name: jax.device_put(params[name], sharding.replicated(mesh)) for name in params}
        return dataclasses.replace(self, params=params, mesh=mesh, _programs={})

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
        return used

    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        num: int = 1,
        first: int = 0,
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
          first: the number p of the first prompt, so that a long list can be drawn in parts.
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
        keys = picture_keys(seed, len(prompts), num, first)
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
        vision = self.tasks["clip"].model.vision
        if vision is None:
            raise UserError("this stack's CLIP has no image tower, so it cannot look at pictures", "draw from prompts")
        squares = [_square(image, k, vision["image_size"]) for k, image in enumerate(images)]
        tokens, mask = self.tokenizer.encode([""] * len(images))
        cond = {"image": to_float(np.stack(squares)), "tokens": tokens, "mask": mask}
        cond = {name: value.repeat(num, 0) for name, value in cond.items()}
        used = self.settings(**settings)
        used["decoder"] = {**used["decoder"], "caption": False}
        keys = picture_keys(seed, len(images), num)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def _draw(self, cond: dict, keys, used: Mapping, batch_size: int, return_stages: bool, progress: bool):
        """Every stage after the other over all rows of `cond`; the prior only where there is no z_img yet."""
        total = len(keys)
        size = min(batch_size, 1 << (total - 1).bit_length())
        size = size if self.mesh is None else -(-size // self.mesh.size) * self.mesh.size
        bar = None if progress else True

        def run(number, stage, rows):
            return self._run(stage, (rows, _fold(keys, number)), used[stage], total, size, bar)

        cond = {**cond, **self._run("clip", (cond,), {}, total, size, bar)}
        cond.pop("image", None)
        if "z_img" not in cond:
            cond["z_img"] = run(1, "prior", cond)
        base = images = run(2, "decoder", cond)
        for number, stage in enumerate(self.upsamplers, start=3):
            images = run(number, stage, {"low": images})
        pictures = to_uint8(images)
        if not return_stages:
            return pictures
        return Drawn(pictures, to_uint8(base), cond["z_img"], cond["z_txt"])

    def _run(self, stage: str, rows, options: Mapping, total: int, size: int, bar: bool | None):
        """One stage over all rows, `size` at a time, the last chunk filled up with copies of the last row."""
        program = self._program(stage, options)
        params, parts = self.params[stage], []
        if self.mesh is not None:
            params = jax.device_put(params, sharding.replicated(self.mesh))  # nothing to do but with low memory
        for start in tqdm(range(0, total, size), desc=stage, unit="batch", leave=False, disable=bar):
            chunk = np.minimum(np.arange(start, start + size), total - 1)
            given = jax.tree.map(lambda x, at=chunk: x[at], rows)
            if self.mesh is not None:
                given = jax.device_put(given, sharding.batch_sharding(self.mesh))
            parts.append(jax.device_get(program(params, *given)))
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


def picture_keys(seed: int, prompts: int, num: int, first: int = 0) -> jax.Array:
    """key[prompts * num], one for each picture: fold_in(fold_in(key(seed), first + prompt's index), own index)."""
    p, i = np.divmod(np.arange(prompts * num, dtype=np.uint32), np.uint32(num))
    p += np.uint32(first)
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
