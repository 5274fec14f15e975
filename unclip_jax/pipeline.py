"""The trained stack as one object: text -> z_txt -> prior -> z_img -> decoder -> upsamplers -> u8 pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import sharding
from unclip_jax.diffusion.sample import picture_keys
from unclip_jax.edits import Edits
from unclip_jax.errors import UserError, said_of, suggest
from unclip_jax.nn.drawing import placed
from unclip_jax.painting import Painting
from unclip_jax.reconstruction import Reconstruction
from unclip_jax.runner import Drawn
from unclip_jax.settings import check_numbers, check_prompts, is_listed
from unclip_jax.stack import OnDemand, open_stack
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import FLOATS

HELD = 2**26  # pixels that `stream` draws before the first is given: 64 pictures of 1024 px, 1,024 of 256 px


@dataclasses.dataclass(frozen=True)
class UnCLIP(Edits, Painting, Reconstruction):
    """A trained stack that draws pictures from prompts, and from pictures (`Edits`, `Painting`, `Reconstruction`).

    Made by `UnCLIP.load`.
    """

    @classmethod
    def load(cls, path: str | Path = "shapes", low_memory: bool = False, dtype: str | None = None) -> UnCLIP:
        """Reads a stack directory, or the bundled stack of that name.

        Args:
          path: "shapes", or a directory written by `unclip export` or `unclip convert`.
          low_memory: read each stage's weights when it runs and let go of them after it.
          dtype: "float32" or "bfloat16" of the weights; None is float32 on a CPU and as stored elsewhere.
        """
        if dtype is not None and dtype not in FLOATS:
            raise UserError(f"dtype={dtype!r} is unknown", suggest(dtype, FLOATS))
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        opened = open_stack(path, dtype)
        params = opened.params if low_memory else dict(opened.params)
        try:
            tokenizer = Tokenizer.from_json(opened.tokenizer_json)
        except UserError as error:
            raise UserError(f"stack {path}, tokenizer.json: {error}") from error
        return cls(tokenizer, opened.tasks, opened.configs, params)

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
        devices = jax.local_devices() if devices is None else devices
        if not is_listed(devices) or not len(devices):
            raise UserError(f"devices={devices!r} must be a list of them", "write spread(jax.devices()[:2]) for two")
        mesh = sharding.make_mesh(devices=devices)
        params = self.params
        if not isinstance(params, OnDemand):
            params = {name: placed(params[name], sharding.replicated(mesh)) for name in params}
        return dataclasses.replace(self, params=params, mesh=mesh, _programs={})

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
        cond, keys, used = self._asked(prompts, seed, num, first, batch_size, settings)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def stream(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        num: int = 1,
        batch_size: int = 8,
        progress: bool = True,
        **settings,
    ) -> Iterator[np.ndarray]:
        """The pictures of `generate` one by one, u8[H, W, 3], drawn some batches at a time: few are in memory."""
        cond, keys, used = self._asked(prompts, seed, num, 0, batch_size, settings)
        total, least = len(keys), min(batch_size, len(keys))
        block = max(1, HELD // (self.size**2 * batch_size)) * batch_size

        def drawn() -> Iterator[np.ndarray]:
            for start in range(0, total, block):
                count = min(block, total - start)
                # The last block is filled up to a batch: a smaller one would have programs of its own.
                at = np.minimum(start + np.arange(max(count, least)), total - 1)
                rows = {name: value[at] for name, value in cond.items()}
                yield from self._draw(rows, keys[at], used, batch_size, False, progress)[:count]

        return drawn()

    def _asked(self, prompts, seed, num, first, batch_size, settings) -> tuple[dict, jax.Array, dict]:
        """What `generate` asks `_draw` for: rows, a key for each, settings."""
        check_prompts(prompts)
        check_numbers(seed, num, batch_size, first=(first, 0))
        used = self.settings(**settings)
        if not self.prompted:
            raise UserError("this stack has no prior, so it cannot draw from prompts", "draw variations of pictures")
        cond = {name: value.repeat(num, 0) for name, value in self._captions(prompts).items()}
        return cond, picture_keys(seed, len(prompts), num, first), used

    def decode(
        self,
        z_img: np.ndarray,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        *,
        num: int = 1,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ):
        """Draws `num` pictures of each embedding -> u8[N * num, H, W, 3], embedding by embedding.

        The half of `generate` that follows the prior: of the z_img that it drew, with the prompts and the seed that it
        was given and num=1, the pictures are the same. No image tower is needed.

        Args:
          z_img: float[N, D] as `embed_images` or `generate(…, return_stages=True)` give them, their length included.
          prompts: N texts that the decoder is told as well; None drops the caption.
        """
        check_numbers(seed, num, batch_size)
        z_img = _embeddings(z_img, self._clip().embed_dim)
        if prompts is not None:
            check_prompts(prompts)
            if len(prompts) != len(z_img):
                raise UserError(f"{len(prompts)} prompts for {len(z_img)} embeddings; one for each is needed")
        used = self.embedded_settings(settings, caption=prompts is not None)
        cond = {**self._captions([""] * len(z_img) if prompts is None else prompts), "z_img": z_img}
        cond = {name: value.repeat(num, 0) for name, value in cond.items()}
        keys = picture_keys(seed, len(z_img), num)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)


def _embeddings(z_img, width: int) -> np.ndarray:
    """`z_img` as f32[N, width]; UserError for what is none."""
    fix = "take it from embed_images, or from generate(…, return_stages=True)"
    with said_of(f"z_img must be an array float[N, {width}]", fix):
        z = np.asarray(z_img)
    if not jnp.issubdtype(z.dtype, jnp.floating) or z.ndim != 2 or 0 in z.shape or z.shape[1] != width:
        raise UserError(f"z_img is {z.dtype}{list(z.shape)}; expected float[N, {width}], a row for each picture", fix)
    z = z.astype(np.float32)
    if not np.isfinite(z).all():
        raise UserError("z_img holds NaN or infinite values, and must be finite", fix)
    return z
