"""The stages of a trained stack as compiled programs, run over any number of rows: what `UnCLIP` is built on.

Ramesh et al. 2022, figure 2, lower half. Each stage is one program, its whole sampling loop inside. Stages run one
after the other over all rows; with weights on demand (`low_memory`) the device holds one stage's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from unclip_jax import sharding
from unclip_jax.compiling import compiled
from unclip_jax.data.images import center_crop_resize, to_float, to_uint8
from unclip_jax.diffusion.guide import is_one
from unclip_jax.errors import UserError, suggest
from unclip_jax.fetch import fetched
from unclip_jax.settings import PRIORS, SETTINGS, Settings, check_numbers, check_prompts, is_listed, prior_of, role_of
from unclip_jax.stack import OnDemand
from unclip_jax.tokenizer import Tokenizer

ENCODERS = (*PRIORS.values(), "decoder")  # whose `encode` says what CLIP is asked


class Drawn(NamedTuple):
    """What every stage made for N pictures: u8[N, H, W, 3], the decoder's u8[N, h, w, 3], f32[N, D] twice.

    The two embeddings are None where the stack has no CLIP.
    """

    images: np.ndarray
    base: np.ndarray
    z_img: np.ndarray | None
    z_txt: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Runner:
    """The stages of a stack, and what runs them.

    Args:
      tokenizer: the one that every stage was trained with.
      tasks, configs, params: by stage: "clip", "prior" and "prior_ar" if any, "decoder", upsamplers; as they run. GLIDE
        has neither CLIP nor prior, Karlo's stack for variations has no prior.
      mesh: the devices that share each batch; None: the first one does it all (see `UnCLIP.spread`).
    """

    tokenizer: Tokenizer
    tasks: Mapping[str, Any]
    configs: Mapping[str, ConfigDict]
    params: Mapping[str, dict]
    mesh: Mesh | None = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def upsamplers(self) -> list[str]:
        """The stages that enlarge, in the order they run."""
        return [name for name in self.tasks if role_of(name) == "upsampler"]

    @property
    def size(self) -> int:
        """Side of the final pictures, in pixels."""
        return self.tasks[(self.upsamplers or ["decoder"])[-1]].image_size

    @property
    def prompted(self) -> bool:
        """Whether it draws from prompts: by a prior, or by a decoder that knows no CLIP."""
        return "clip" not in self.tasks or not set(PRIORS.values()).isdisjoint(self.tasks)

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
        if not self.upsamplers and (given := changes.of("upsampler")):
            name = SETTINGS["upsampler"][next(iter(given))]
            raise UserError(f"{name} is of an upsampler, and this stack draws without one", "leave it out")
        used = {}
        prior = self._prior(changes)
        for name in [n for n in self.tasks if n != "clip" and (n == prior or n not in PRIORS.values())]:
            config, own = self.configs[name], changes.of(role_of(name))
            if "steps" in own and own["steps"] > config.diffusion.num_steps:
                trained = config.diffusion.num_steps
                raise UserError(f"{name}: {own['steps']} steps are more than the {trained} it was trained with")
            used[name] = {**config.sampler.to_dict(), **own}
            if used[name].get("tile") is not None:
                self.tasks[name].tiles(used[name]["tile"], used[name].get("overlap"))
            elif used[name].get("overlap") is not None:
                raise UserError(f"overlap={used[name]['overlap']} is of tiles, and none are asked for", "give a tile")
            if used[name].get("name") == "analytic" and "x0_variance" not in self._shapes(name):
                what = f"{name}: the sampler analytic needs a table of variances, and this stack has none"
                raise UserError(what, f"measure it: unclip export … --analytic {name}")
        return used

    def embedded_settings(self, changed: Mapping, caption: bool = False) -> dict[str, dict]:
        """The `settings` of what is drawn from embeddings that are there, told captions or not.

        Raises:
          UserError: as `settings`, or a setting of the prior, which is not asked.
        """
        of_prior = {"prior", *SETTINGS["prior"].values(), *SETTINGS["prior_ar"].values()}
        if given := [name for name, value in changed.items() if name in of_prior and value is not None]:
            raise UserError(f"{given[0]} is of the prior, and without prompts none draws", "leave it out")
        used = {stage: own for stage, own in self.settings(**changed).items() if stage not in PRIORS.values()}
        return used if caption else {**used, "decoder": {**used["decoder"], "caption": False}}

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

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 8, progress: bool = False) -> np.ndarray:
        """CLIP's embeddings of texts, z_txt f32[len(texts), D]: what a prior is told of a caption."""
        check_numbers(batch_size=batch_size)
        check_prompts(texts)
        self._clip()
        return self.run("clip", (self._captions(texts),), {}, batch_size, progress)["z_txt"]

    def embed_images(self, images: Sequence[np.ndarray], *, batch_size: int = 8, progress: bool = False) -> np.ndarray:
        """CLIP's embeddings of pictures, z_img f32[len(images), D]: what `decode` draws from."""
        check_numbers(batch_size=batch_size)
        return self._encode(self._look(images), batch_size, progress)["z_img"]

    def squares(self, images: Sequence[np.ndarray], side: int, bicubic: bool = False) -> np.ndarray:
        """The middle squares of pictures, u8[N, side, side, 3]; see `center_crop_resize`."""
        if not is_listed(images) or not len(images):
            raise UserError("images must be a list of at least one picture", "write [picture] for one")
        return np.stack([_square(image, k, side, bicubic) for k, image in enumerate(images)])

    @property
    def _vision(self) -> Mapping | None:
        """The settings of CLIP's image tower; None where the stack has none."""
        return self.tasks["clip"].model.vision if "clip" in self.tasks else None

    def _clip(self):
        """CLIP's network."""
        if "clip" not in self.tasks:
            raise UserError("this stack's decoder knows no CLIP, so there are no embeddings", "draw from prompts")
        return self.tasks["clip"].model

    def _captions(self, texts: Sequence[str]) -> dict:
        """Rows of texts, "tokens" and "mask"."""
        return dict(zip(("tokens", "mask"), self.tokenizer.encode(list(texts)), strict=True))

    def _look(self, images) -> dict:
        """Rows of pictures at CLIP's size, "image", and the decoder's, "small", with the empty caption.

        A CLIP that wants pixels normalised by other numbers than ours is a public one, and wants bicubic resizing too.
        """
        vision = self._vision
        if vision is None:
            what = "CLIP has no image tower" if "clip" in self.tasks else "decoder knows no CLIP"
            raise UserError(f"this stack's {what}, so it cannot look at pictures", "draw from prompts")
        seen = self.squares(images, vision["image_size"], bicubic="mean" in vision)
        small = self.squares(images, self.tasks["decoder"].image_size)
        return {"image": to_float(seen), "small": to_float(small), **self._captions([""] * len(images))}

    def _encode(self, cond: Mapping, batch_size: int, progress: bool) -> dict:
        """What CLIP says of the rows of `_look`, and their tokens."""
        rows = {name: cond[name] for name in ("image", "tokens", "mask")}
        encoded = self.run("clip", (rows,), {}, batch_size, progress)
        return {**encoded, "tokens": cond["tokens"], "mask": cond["mask"]}

    def _draw(
        self, cond: dict, keys, used: Mapping, batch_size: int, return_stages: bool, progress: bool, known=None
    ):
        """Every stage after the other over all rows of `cond`; the prior only where there is no z_img yet.

        known: side -> what a stage that draws pictures of that side is told of a given one; None: nothing.
        """

        def run(number, stage, rows):
            return self.run(stage, (rows, fold(keys, number)), used[stage], batch_size, progress)

        def known_to(stage):
            return known(self.tasks[stage].image_size) if known else {}

        caption = {name: cond[name] for name in ("tokens", "mask")}
        if "clip" in self.tasks:
            cond = {**cond, **self.run("clip", (cond,), {}, batch_size, progress)}
        cond.pop("image", None)
        if prior_of(used) and "z_img" not in cond:
            cond["z_img"] = run(1, prior_of(used), cond)
        base = images = run(2, "decoder", {**cond, **known_to("decoder")})
        for number, stage in enumerate(self.upsamplers, start=3):
            images = run(number, stage, {"low": images, **caption, **known_to(stage)})
        pictures = to_uint8(images)
        if not return_stages:
            return pictures
        return Drawn(pictures, to_uint8(base), cond.get("z_img"), cond.get("z_txt"))

    def run(
        self, stage: str, given: tuple, options: Mapping, batch_size: int, progress: bool, method: str = "sample"
    ):
        """What one stage makes of N rows, `batch_size` at a time, the last of them filled up with copies of a row.

        Args:
          stage: of `tasks`; "clip" gives all that the priors and the decoder ask of it.
          given: what the stage's `method` takes after the parameters, trees of arrays [N, …]: (cond, keys) of `sample`,
            (cond,) of `invert` and of "clip".
          options: its keywords, as `settings` has them.

        Raises:
          UserError: the result holds NaN or infinite values.
        """
        total = len(jax.tree.leaves(given)[0])
        size = min(batch_size, 1 << (total - 1).bit_length())
        size = size if self.mesh is None else -(-size // self.mesh.size) * self.mesh.size
        where = None if self.mesh is None else sharding.batch_sharding(self.mesh)
        bar = None if progress else True

        def chunk(start):
            at = np.minimum(np.arange(start, start + size), total - 1)
            rows = jax.tree.map(lambda x: x[at], given)
            return rows if where is None else jax.device_put(rows, where)

        # A scale of guidance is an argument, so that one program is for all but 1, which runs half as much.
        scales = {} if is_one(options.get("guidance", 1)) else {"guidance": np.float32(options["guidance"])}
        options = {name: value for name, value in options.items() if name not in scales}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=where), given)
        program = self._program(stage, options, method, shapes, scales)
        params, starts = self._params(stage), range(0, total, size)
        drawn = fetched(program(params, chunk(start), scales) for start in starts)
        parts = list(tqdm(drawn, stage, len(starts), unit="batch", leave=False, disable=bar))
        out = jax.tree.map(lambda *x: np.concatenate(x)[:total], *parts)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(out)):
            raise UserError(
                f"stage '{stage}' gave NaN or infinite values, so no picture was made",
                "lower the guidance, take more steps, or use dtype float32",
            )
        return out

    def _params(self, stage: str):
        """A stage's weights, where they run."""
        return self.params.read(stage, self._where) if isinstance(self.params, OnDemand) else self.params[stage]

    def _shapes(self, stage: str):
        """What its programs are compiled for: the weights, or their shapes where they are read on demand."""
        return self.params.shapes(stage, self._where) if isinstance(self.params, OnDemand) else self.params[stage]

    @property
    def _where(self):
        return jax.local_devices()[0] if self.mesh is None else sharding.replicated(self.mesh)

    def _ask(self, params, rows):
        """What the stages' encodings add to rows of tokens, mask, and pictures if any."""
        encoded = rows
        for name in ENCODERS:
            encoded = self.tasks[name].encode({"clip": params}, encoded) if name in self.tasks else encoded
        return {name: value for name, value in encoded.items() if name not in rows}

    def _program(self, stage: str, options: Mapping, method: str, given: tuple, scales: Mapping):
        """The compiled program of one stage, (params, given, scales) -> output; one for all such options and shapes.

        Copies of a stack share its programs, and tell those of their own tasks by identity.
        """
        args = (self._shapes(stage), given, scales)
        leaves, form = jax.tree.flatten(args)
        told_by = ENCODERS if stage == "clip" else (stage,)
        tasks = [self.tasks[name] for name in told_by if name in self.tasks]
        key = (stage, method, tuple(sorted(options.items())), form, tuple((a.shape, a.dtype) for a in leaves))
        key = (*key, *map(id, tasks))
        if key not in self._programs:
            program = compiled(jax.jit(self._function(stage, options, method)).lower(*args))
            self._programs[key] = program, tasks  # which, kept, leave their identity to no other
        return self._programs[key][0]

    def _function(self, stage: str, options: Mapping, method: str):
        if stage == "clip":  # what the encodings of prior and decoder add to tokens, mask and image
            return lambda params, given, _: self._ask(params, *given)
        run = getattr(self.tasks[stage], method)
        return lambda params, given, scales: run(params, *given, **options, **scales)


def fold(keys: jax.Array, number: int) -> jax.Array:
    """Each picture's key for stage `number`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _square(image, number: int, side: int, bicubic: bool) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        what = f"image {number} is {image.dtype}{list(image.shape)}; expected uint8[height, width, 3]"
        raise UserError(what, "give a list of them, of 0 … 1 as (255 * x).round().astype('uint8'), or Pillow's in RGB")
    return center_crop_resize(Image.fromarray(image), side, bicubic)
