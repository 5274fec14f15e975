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

from unclip_jax import pca as components
from unclip_jax.data import loader
from unclip_jax.data.images import center_crop_resize, to_float, to_uint8
from unclip_jax.data.source import Source
from unclip_jax.diffusion.sample import SAMPLERS
from unclip_jax.errors import UserError, suggest
from unclip_jax.pca import PCA
from unclip_jax.stack import PRIORS, OnDemand, open_stack
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import DTYPES


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a caller may change about sampling; None keeps what the stage's config says.

    Steps are 1 … the number the stage was trained with; a guidance of 1 is none, 0 ignores the prompt.

    Args:
      prior: "diffusion" or "ar", the autoregressive one; None is the first of these that the stack has.
      prior_guidance, candidates: of either prior; the best of `candidates` by dot product is kept.
      prior_steps: of the diffusion prior.
      prior_temperature, prior_top_p: of the autoregressive prior; a temperature of 0 takes the likeliest code.
      steps, guidance, sampler: of the decoder; the sampler by name ("ddpm", "ddim", "dpm", "heun").
      upsample_steps: of every upsampler.
    """

    prior: str | None = None
    prior_steps: int | None = None
    prior_guidance: float | None = None
    prior_temperature: float | None = None
    prior_top_p: float | None = None
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
        for name, least, most in (("prior_temperature", 0, 100), ("prior_top_p", 1e-6, 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and least <= value <= most):
                raise UserError(f"{name}={value!r} must be a number in {least:g} … {most}")
        if self.prior is not None and self.prior not in PRIORS:
            raise UserError(f"prior={self.prior!r} is unknown", suggest(self.prior, PRIORS))
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} is unknown", suggest(self.sampler, SAMPLERS))

    def of(self, role: str) -> dict[str, Any]:
        """The keyword arguments they mean for one role's `Task.sample`."""
        values = {key: getattr(self, name) for key, name in SETTINGS[role].items()}
        return {key: value for key, value in values.items() if value is not None}


# {role: {keyword of its Task.sample: name in Settings}}
SETTINGS = {
    "prior": {"steps": "prior_steps", "guidance": "prior_guidance", "candidates": "candidates"},
    "prior_ar": {
        "temperature": "prior_temperature",
        "top_p": "prior_top_p",
        "guidance": "prior_guidance",
        "candidates": "candidates",
    },
    "decoder": {"steps": "steps", "guidance": "guidance", "name": "sampler"},
    "upsampler": {"steps": "upsample_steps"},
}


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
      tasks, configs, params: by stage: "clip", "prior" and "prior_ar" if any, "decoder", upsamplers; as they run.
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
        """What sampling will use, by stage: the configs' numbers with `changed` (see `Settings`) put in; of one prior.

        Raises:
          UserError: a setting is unknown, out of its range, asks for more steps than were trained, or is of a prior
            that the stack does not have or draw with.
        """
        names = [field.name for field in dataclasses.fields(Settings)]
        for name in changed:
            if name not in names:
                raise UserError(f"{name} is no setting of sampling", suggest(name, names))
        changes = Settings(**changed)
        used = {}
        prior = self._prior(changes)
        for name in [n for n in self.tasks if n != "clip" and (n == prior or n not in PRIORS.values())]:
            config, own = self.configs[name], changes.of(_role(name))
            if "steps" in own and own["steps"] > config.diffusion.num_steps:
                trained = config.diffusion.num_steps
                raise UserError(
                    f"{name}: {own['steps']} steps are more than the {trained} it was trained with"
                )
            used[name] = {**config.sampler.to_dict(), **own}
        return used

    def _prior(self, changes: Settings) -> str | None:
        """The stage of the prior to draw with; None where the stack has none and none is asked for."""
        there = [kind for kind, stage in PRIORS.items() if stage in self.tasks]
        kind = changes.prior or (there[0] if there else None)
        if kind is None:
            return None
        if kind not in there:
            has = f"only prior='{there[0]}'" if there else "no prior at all"
            raise UserError(f"this stack has no prior={kind!r}, {has}", "export one into it: unclip export --help")
        own = SETTINGS[PRIORS[kind]].values()
        for name in {n for stage in PRIORS.values() for n in SETTINGS[stage].values()}.difference(own):
            if getattr(changes, name) is not None:
                raise UserError(f"{name} is no setting of prior={kind!r}", "leave it out, or choose the other prior")
        return PRIORS[kind]

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
        used = self.settings(**settings)
        if not set(PRIORS.values()) & used.keys():
            raise UserError("this stack has no prior, so it cannot draw from prompts", "draw variations of pictures")
        tokens, mask = self.tokenizer.encode(list(prompts))
        cond = {"tokens": tokens.repeat(num, 0), "mask": mask.repeat(num, 0)}
        keys = picture_keys(seed, len(prompts), num)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

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
        cond = {name: value.repeat(num, 0) for name, value in self._shown(images).items()}
        keys = picture_keys(seed, len(images), num)
        return self._draw(cond, keys, self._without_caption(settings), batch_size, return_stages, progress)

    def reconstruct(
        self,
        images: Sequence[np.ndarray],
        dims: Sequence[int],
        seed: int = 0,
        *,
        pca: PCA | None = None,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ) -> np.ndarray | Drawn:
        """Draws each image from the first k principal components of its CLIP embedding, for each k of `dims`.

        Ramesh et al. 2022, figure 7: what the components hold, by decreasing variance. All pictures of an image are
        drawn with the same noise, and without a caption -> u8[len(images) * len(dims), H, W, 3], image by image.

        Args:
          images: as of `variations`.
          dims: each of them within the components that there are.
          pca: the components; None: those kept with the stack's autoregressive prior. See `components_of`.
          seed, batch_size, return_stages, progress, **settings: as of `generate`.
        """
        _check_call([""] * len(images), seed, 1, batch_size)
        pca = self.kept_components() if pca is None else pca
        if not len(dims) or not all(_whole(k, 1, pca.std.shape[0]) for k in dims):
            what = f"dims={list(dims)!r} must be whole numbers in 1 … {pca.std.shape[0]}, the components that there are"
            raise UserError(what, "name fewer, or measure all components on data")
        used = self._without_caption(settings)
        cond = self._shown(images)
        size = min(batch_size, len(images))
        z = self._run("clip", (cond,), {}, len(images), size, None if progress else True)["z_img"]
        parts = [pca.keep(int(k)) for k in dims]
        z = np.stack([np.asarray(part.back(part.project(z)), np.float32) for part in parts], axis=1)
        cond = {name: cond[name].repeat(len(dims), 0) for name in ("tokens", "mask")}
        keys = picture_keys(seed, len(images), 1)[np.arange(len(images)).repeat(len(dims))]
        cond["z_img"] = z.reshape(-1, z.shape[-1])
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def kept_components(self) -> PCA:
        """The principal components of z_img that the stack's autoregressive prior works with."""
        if "prior_ar" not in self.tasks:
            what = "this stack has no autoregressive prior, whose principal components could be used"
            raise UserError(what, "measure them on data: --data shapes, or UnCLIP.components_of")
        return self.tasks["prior_ar"].pca(self.params["prior_ar"])

    def components_of(self, source: Source, num: int = 4096, batch_size: int = 64) -> PCA:
        """All principal components of z_img, measured on `num` pictures of a data source (`data.make`)."""
        task, side = self.tasks["clip"], self._side()
        measure = jax.jit(lambda params, x: components.batch_moments(task.sample(params, {"image": x}, None)))
        params, seen, size = self.params["clip"], None, min(num, batch_size)
        stream = loader.batches(source, None, size)
        for _ in range(-(-num // size)):
            image = next(stream)["image"]
            if image.shape[1] != side:
                raise UserError(f"the source's pictures have {image.shape[1]} pixels, and this CLIP takes {side}")
            seen = components.merge(seen, size, *jax.device_get(measure(params, image)))
        return components.fit(seen)

    def _side(self) -> int:
        """Pixels of the pictures that CLIP sees."""
        vision = self.tasks["clip"].model.vision
        if vision is None:
            raise UserError("this stack's CLIP has no image tower, so it cannot look at pictures", "draw from prompts")
        return vision["image_size"]

    def _shown(self, images: Sequence[np.ndarray]) -> dict:
        """What CLIP is given of pictures: their middle squares, and the empty caption."""
        squares = [_square(image, k, self._side()) for k, image in enumerate(images)]
        tokens, mask = self.tokenizer.encode([""] * len(images))
        return {"image": to_float(np.stack(squares)), "tokens": tokens, "mask": mask}

    def _without_caption(self, settings: Mapping) -> dict[str, dict]:
        """`settings`, the decoder seeing z_img alone."""
        used = self.settings(**settings)
        return {**used, "decoder": {**used["decoder"], "caption": False}}

    def _draw(self, cond: dict, keys, used: Mapping, batch_size: int, return_stages: bool, progress: bool):
        """Every stage after the other over all rows of `cond`; the prior only where there is no z_img yet."""
        total = len(keys)
        size = min(batch_size, 1 << (total - 1).bit_length())
        bar = None if progress else True

        def run(number, stage, rows):
            return self._run(stage, (rows, _fold(keys, number)), used[stage], total, size, bar)

        cond = {**cond, **self._run("clip", (cond,), {}, total, size, bar)}
        cond.pop("image", None)
        if "z_img" not in cond:
            cond["z_img"] = run(1, next(name for name in PRIORS.values() if name in used), cond)
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
        stages = [name for name in (*PRIORS.values(), "decoder") if name in self.tasks]
        asked = [self.tasks[name].encode({"clip": params}, rows) for name in stages]
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
