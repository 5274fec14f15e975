"""Holes in pictures painted anew, and pictures painted over: inpainting, outpainting, image-to-image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from unclip_jax.data.masks import holes_at, known_at
from unclip_jax.diffusion.sample import picture_keys
from unclip_jax.diffusion.schedule import respace
from unclip_jax.errors import UserError, is_number
from unclip_jax.runner import Runner
from unclip_jax.settings import check_numbers, check_prompts, prior_of

CANDIDATES = 64  # of the prior, to find one that agrees with the picture in what the prompt leaves open
RESAMPLE = 4  # passes of RePaint over each stretch of steps, for decoders that never learned to inpaint


class Painting(Runner):
    """The method of `UnCLIP` that keeps a part of a picture."""

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
    ):
        """Paints the holes of pictures anew -> u8[len(images) * num, H, W, 3], image by image.

        Outside the hole the result is the given picture, brought to H x W, to the bit. A decoder that was trained with
        `objective.inpaint` sees the picture; any other is led by RePaint (`diffusion.inpaint`). Of the embeddings that
        the prior draws for a prompt the nearest to the picture's own is taken, if CLIP can see pictures: what the
        prompt leaves open, such as the background, is then the picture's.

        Args:
          images: u8[h, w, 3] each; the middle square counts.
          holes: bool[h, w] each, True where to paint; None paints all of it (image-to-image, for strength below 1).
          prompts: what the whole picture is to show, one for each image; None draws from the images' own embeddings.
          strength: above 0 and at most 1: how much of the steps is drawn, beginning from the noised picture.
          jump, resample: of `diffusion.inpaint.travel`; by default a sixth of the steps, and RESAMPLE or, for a decoder
            trained to inpaint, 1.
          seed, num, batch_size, return_stages, progress, **settings: as of `generate`; `candidates`: CANDIDATES.

        Raises:
          UserError: a bad argument, an empty hole, a stack that lacks what is needed, or a stage gave NaN.
        """
        more = {name: (n, 1) for name, n in {"jump": jump, "resample": resample}.items() if n is not None}
        check_numbers(seed, num, batch_size, **more)
        if not (is_number(strength, 0, 1) and strength > 0):
            raise UserError(f"strength={strength!r} must be above 0 and at most 1")
        squares = self.squares(images, self.size)
        images, holes = list(map(np.asarray, images)), None if holes is None else list(map(np.asarray, holes))
        if prompts is not None:
            check_prompts(prompts)
            if len(prompts) != len(images):
                raise UserError(f"{len(prompts)} prompts for {len(images)} images; one for each is needed")
        masks = None if holes is None else holes_at(images, holes, self.size)
        used = self.painting_settings(settings, prompts is not None)
        cond, task = self._given(images, holes, prompts, batch_size, progress), self.tasks["decoder"]
        steps = respace(task.schedule, used["decoder"]["steps"]).num_steps
        resample = (1 if task.inpaint else RESAMPLE) if resample is None else resample
        used["decoder"] |= {"strength": float(strength), "resample": resample, "jump": jump or max(1, steps // 6)}
        cond, squares = ({k: v.repeat(num, 0) for k, v in cond.items()}, squares.repeat(num, 0))
        masks = None if masks is None else masks.repeat(num, 0)
        keys = picture_keys(seed, len(images), num)
        drawn = self._draw(cond, keys, used, batch_size, True, progress, lambda size: known_at(squares, masks, size))
        pasted = drawn.images if masks is None else np.where(masks[..., None], drawn.images, squares)
        return drawn._replace(images=pasted) if return_stages else pasted

    def painting_settings(self, settings: Mapping, prompted: bool) -> dict[str, dict]:
        """The settings of each stage that `inpaint` draws with, but for strength, jump and resample."""
        used = self.settings(**settings) if prompted else self.embedded_settings(settings)
        prior = prior_of(used)
        if prompted and prior and self._vision is not None and settings.get("candidates") is None:
            used[prior]["candidates"] = CANDIDATES
        return used

    def _given(self, images, holes, prompts, batch_size: int, progress: bool) -> dict[str, np.ndarray]:
        """What CLIP is asked: the prompts, or the pictures where there are none; and what the prior is to come near."""
        if prompts is None:
            return {name: rows for name, rows in self._look(images).items() if name != "small"}
        if not self.prompted:
            raise UserError("this stack has no prior, so it cannot draw from prompts", "give no prompt")
        cond = self._captions(prompts)
        if self._vision is not None:
            cond["near"] = self.embed_images(_filled(images, holes), batch_size=batch_size, progress=progress)
        return cond


def _filled(images, holes):
    """The pictures with each pixel of their holes as the nearest one outside: what is cut out is not to be seen."""
    if holes is None:
        return images
    return [image if hole.all() else image[_nearest(hole)] for image, hole in zip(images, holes, strict=True)]


def _nearest(hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import distance_transform_edt  # a quarter of a second, which no other command needs

    return tuple(distance_transform_edt(hole, return_distances=False, return_indices=True))
