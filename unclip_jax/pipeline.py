"""The trained stack as one object: text -> z_txt -> prior -> z_img -> decoder -> upsamplers -> u8 pictures.

Ramesh et al. 2022, figure 2, lower half. Each stage is one compiled program, its whole sampling loop inside.
Stages run one after the other over all pictures; with `low_memory` the device holds one stage's weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax import sharding
from unclip_jax.compiling import compiled
from unclip_jax.data.images import to_uint8
from unclip_jax.diffusion.guide import is_one
from unclip_jax.diffusion.sample import picture_keys
from unclip_jax.edits import Edits, fold
from unclip_jax.errors import UserError, suggest
from unclip_jax.fetch import fetched
from unclip_jax.nn.drawing import placed
from unclip_jax.painting import Painting
from unclip_jax.reconstruction import Reconstruction
from unclip_jax.settings import PRIORS, SETTINGS, Settings, check_numbers, check_prompts, prior_of
from unclip_jax.stack import OnDemand, open_stack
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import DTYPES

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
class UnCLIP(Edits, Painting, Reconstruction):
    """A trained stack that draws pictures from prompts, and from pictures (`Edits`, `Painting`,
    `Reconstruction`). Made by `UnCLIP.load`.

    Args:
      tokenizer: the one that every stage was trained with.
      tasks, configs, params: by stage: "clip", "prior" and "prior_ar" if any, "decoder", upsamplers; as they run. GLIDE
        has neither CLIP nor prior, Karlo's stack for variations has no prior.
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
        params = opened.params if low_memory else dict(opened.params)
        try:
            tokenizer = Tokenizer.from_json(opened.tokenizer_json)
        except UserError as error:
            raise UserError(f"stack {path}, tokenizer.json: {error}") from error
        return cls(tokenizer, opened.tasks, opened.configs, params)

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
            params = {name: placed(params[name], sharding.replicated(mesh)) for name in params}
        return dataclasses.replace(self, params=params, mesh=mesh, _programs={})

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
            config, own = self.configs[name], changes.of(_role(name))
            if "steps" in own and own["steps"] > config.diffusion.num_steps:
                trained = config.diffusion.num_steps
                raise UserError(
                    f"{name}: {own['steps']} steps are more than the {trained} it was trained with"
                )
            used[name] = {**config.sampler.to_dict(), **own}
            if used[name].get("tile") is not None:
                self.tasks[name].tiles(used[name]["tile"], used[name].get("overlap"))
            elif used[name].get("overlap") is not None:
                raise UserError(f"overlap={used[name]['overlap']} is of tiles, and none are asked for", "give a tile")
            if used[name].get("name") == "analytic" and "x0_variance" not in self._shapes(name):
                what = f"{name}: the sampler analytic needs a table of variances, and this stack has none"
                raise UserError(what, f"measure it: unclip export … --analytic {name}")
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
        check_prompts(prompts)
        check_numbers(seed, num, batch_size, first=(first, 0))
        used = self.settings(**settings)
        if "clip" in self.tasks and not prior_of(used):
            raise UserError("this stack has no prior, so it cannot draw from prompts", "draw variations of pictures")
        cond = {name: value.repeat(num, 0) for name, value in self._captions(prompts).items()}
        keys = picture_keys(seed, len(prompts), num, first)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def _draw(
        self, cond: dict, keys, used: Mapping, batch_size: int, return_stages: bool, progress: bool, known=None
    ):
        """Every stage after the other over all rows of `cond`; the prior only where there is no z_img yet.

        known: side -> what a stage that draws pictures of that side is told of a given one; None: nothing.
        """

        def run(number, stage, rows):
            return self._run(stage, (rows, fold(keys, number)), used[stage], batch_size, progress)

        caption = {name: cond[name] for name in ("tokens", "mask")}
        if "clip" in self.tasks:
            cond = {**cond, **self._run("clip", (cond,), {}, batch_size, progress)}
        cond.pop("image", None)
        if prior_of(used) and "z_img" not in cond:
            cond["z_img"] = run(1, prior_of(used), cond)
        told = lambda stage: known(self.tasks[stage].image_size) if known else {}  # noqa: E731
        base = images = run(2, "decoder", {**cond, **told("decoder")})
        for number, stage in enumerate(self.upsamplers, start=3):
            images = run(number, stage, {"low": images, **caption, **told(stage)})
        pictures = to_uint8(images)
        if not return_stages:
            return pictures
        return Drawn(pictures, to_uint8(base), cond.get("z_img"), cond.get("z_txt"))

    def _run(self, stage: str, rows, options: Mapping, batch_size: int, progress: bool, method: str = "sample"):
        """One stage over all rows, some at a time, the last chunk filled up with copies of the last row."""
        total = len(jax.tree.leaves(rows)[0])
        size = min(batch_size, 1 << (total - 1).bit_length())
        size = size if self.mesh is None else -(-size // self.mesh.size) * self.mesh.size
        where = None if self.mesh is None else sharding.batch_sharding(self.mesh)
        bar = None if progress else True

        def chunk(start):
            at = np.minimum(np.arange(start, start + size), total - 1)
            given = jax.tree.map(lambda x: x[at], rows)
            return given if where is None else jax.device_put(given, where)

        # A scale of guidance is handed over, so that one program is for all but 1, which runs half as much.
        scales = {} if is_one(options.get("guidance", 1)) else {"guidance": np.float32(options["guidance"])}
        options = {name: value for name, value in options.items() if name not in scales}
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=where), rows)
        program = self._program(stage, options, method, (*given, scales))
        params, starts = self._params(stage), range(0, total, size)
        drawn = fetched(program(params, *chunk(start), scales) for start in starts)
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
        told = rows
        for name in ENCODERS:
            told = self.tasks[name].encode({"clip": params}, told) if name in self.tasks else told
        return {name: value for name, value in told.items() if name not in rows}

    def _program(self, stage: str, options: Mapping, method: str, given):
        """The compiled program of one stage, (params, *given) -> output; one for all of such options and shapes.

        Copies of a stack share its programs, and tell those of their own tasks by identity.
        """
        args = (self._shapes(stage), *given)
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
            return lambda params, rows, _: self._ask(params, rows)
        run = getattr(self.tasks[stage], method)
        return lambda params, *given: run(params, *given[:-1], **options, **given[-1])


def _role(stage: str) -> str:
    return "upsampler" if stage.startswith("upsampler") else stage
