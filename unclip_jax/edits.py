"""Pictures made from pictures, by the bipartite latents (z_i, x_T) of Ramesh et al. 2022, section 3.

z_i is the CLIP embedding of a picture: what CLIP knows of it. x_T is the noise that DDIM inversion finds for it through
the decoder, given z_i and no caption: all that is left. The decoder gives the picture back from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from unclip_jax.diffusion.sample import initial_noise, picture_keys
from unclip_jax.diffusion.slerp import slerp
from unclip_jax.errors import UserError, is_number, suggest
from unclip_jax.runner import Runner, fold
from unclip_jax.settings import check_numbers, check_prompts, is_listed, prior_of

STEPS = 100  # of the decoder, where it was trained with as many: fewer undo less exactly
LEAST = 0.1  # noise below which x_T would hold the decoder's errors more than the picture
TEXT_GUIDANCE = 2.0  # of text diffs: without, the decoder follows the turned embedding half as often
THETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NOISES = ("slerp", "fixed")


class Latents(NamedTuple):
    """(z_i, x_T) of N pictures: f32[N, D] and f32[N, S, S, 3], S the decoder's size."""

    z_img: np.ndarray
    noise: np.ndarray


class Edits(Runner):
    """The methods of `UnCLIP` that start from pictures, or from what CLIP knows of them.

    Pictures are u8[h, w, 3] each, of which the middle square is looked at. `seed`, `batch_size`, `return_stages`,
    `progress` and `**settings` are those of `UnCLIP.generate`. Where x_T is used, the settings' defaults are
    sampler="ddim", 100 steps and guidance=1 (2 for text diffs), the same for the inversion and for what is drawn: only
    with the noise's own guidance the picture comes back. No method uses a caption other than for its embedding. All
    raise UserError: a bad argument, no CLIP or one without image tower, a stage that gave NaN.
    """

    def latents(
        self, images: Sequence[np.ndarray], *, batch_size: int = 8, progress: bool = True, **settings
    ) -> Latents:
        """The bipartite latents of pictures, by DDIM inversion."""
        check_numbers(batch_size=batch_size)
        return self._latents(self._look(images), self.exact_settings(settings), batch_size, progress)

    def variations(
        self,
        images: Sequence[np.ndarray],
        seed: int = 0,
        *,
        num: int = 1,
        eta: float | None = None,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ):
        """Draws `num` pictures of what each image shows -> u8[len(images) * num, H, W, 3], image by image.

        Section 3.1: from (z_i, x_T) by DDIM with chance in each step.

        Args:
          eta: how much chance, 0 (the picture itself) … 1; None draws from white noise instead of x_T, which keeps
            what CLIP sees and nothing else.
        """
        check_numbers(seed, num, batch_size)
        if eta is not None and not is_number(eta, 0, 1):
            raise UserError(f"eta={eta!r} must be a number in 0 … 1, or None to draw from white noise")
        if eta is not None and settings.get("sampler") not in (None, "ddim"):
            raise UserError(f"sampler={settings['sampler']!r} has no eta", "leave out the sampler, or eta")
        cond = self._look(images)
        if eta is None:
            used = self.embedded_settings(settings)
            cond.pop("small")
        else:
            used = self.exact_settings(settings)
            latents = self._latents(cond, used, batch_size, progress)
            cond = {**self._captions([""] * len(images)), **latents._asdict()}
            used["decoder"] = {**used["decoder"], "eta": float(eta)}
        cond = {name: value.repeat(num, 0) for name, value in cond.items()}
        keys = picture_keys(seed, len(images), num)
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def interpolate(
        self,
        inputs: Sequence[np.ndarray | str],
        frames: int = 9,
        seed: int = 0,
        *,
        noise: str | None = None,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ):
        """The way from one picture to the next -> u8[(len(inputs) - 1) * (frames - 1) + 1, H, W, 3].

        Section 3.2: slerp of the z_i. A prompt's z_i is the prior's.

        Args:
          inputs: two or more pictures or prompts, in the order they are passed.
          frames: pictures from one input to the next, both counted; at least 2.
          noise: "slerp" of the inputs' x_T, which ends at the pictures themselves (a prompt has noise by chance);
            "fixed" for one noise by chance in all frames. None is "slerp" where there is a picture.
        """
        check_numbers(seed, 1, batch_size, frames=(frames, 2))
        if not is_listed(inputs) or len(inputs) < 2:
            raise UserError("interpolation needs at least two pictures or prompts")
        noise = noise_between(inputs, noise)
        used = self.exact_settings(settings, prompted=any(isinstance(given, str) for given in inputs))
        ends = self._ends(inputs, seed, noise, used, batch_size, progress)
        path = Latents(*(_path(points, frames) for points in ends))
        return self._draw_latents(path, seed, used, batch_size, return_stages, progress)

    def text_diff(
        self,
        images: Sequence[np.ndarray],
        source: str,
        target: str,
        thetas: Sequence[float] = THETAS,
        seed: int = 0,
        *,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ):
        """Turns pictures from what `source` says to what `target` says -> u8[len(images) * len(thetas), H, W, 3].

        Section 3.3: slerp(z_i, z_d, theta), z_d = norm(z_t - z_t0) at the length of z_i, x_T held.

        Args:
          source, target: texts, such as "red" and "green".
          thetas: how far to turn, each 0 (the picture itself) … 1; the paper goes to 0.25 – 0.50.
        """
        check_numbers(seed, 1, batch_size)
        check_prompts([source, target])
        if not np.iterable(thetas) or not len(thetas) or not all(is_number(theta, 0, 1) for theta in thetas):
            raise UserError(f"thetas={thetas!r} must be numbers in 0 … 1, at least one")
        cond, used = self._look(images), self.exact_settings(settings, TEXT_GUIDANCE)
        to, start = self.embed_texts([target, source], batch_size=batch_size, progress=progress)
        if np.linalg.norm(to - start) < 1e-6 * np.linalg.norm(to):
            raise UserError(f"{source!r} and {target!r} mean the same to CLIP", "give two texts that differ")
        z, x = self._latents(cond, used, batch_size, progress)
        z_d = np.broadcast_to(to - start, z.shape)
        z_d = z_d * np.linalg.norm(z, axis=1, keepdims=True) / np.linalg.norm(z_d, axis=1, keepdims=True)
        turned = np.stack([slerp(z, z_d, theta) for theta in thetas], 1).reshape(-1, z.shape[1])
        path = Latents(turned.astype(np.float32), x.repeat(len(thetas), 0))
        return self._draw_latents(path, seed, used, batch_size, return_stages, progress)

    def probe(
        self,
        images: Sequence[np.ndarray],
        labels: Sequence[str],
        template: str = "a picture of {}",
        *,
        batch_size: int = 8,
        progress: bool = True,
    ) -> np.ndarray:
        """What CLIP takes pictures for: softmax of its scaled cosines over labels -> f64[len(images), len(labels)].

        Section 4, figure 6, shows these beside variations: the decoder may draw what CLIP's label does not say.

        Args:
          template: holds one {} for the label.
        """
        check_numbers(batch_size=batch_size)
        texts = label_texts(labels, template)
        z_img = self.embed_images(images, batch_size=batch_size, progress=progress)
        z_txt = self.embed_texts(texts, batch_size=batch_size, progress=progress)
        z_img, z_txt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_img, z_txt))
        scale = math.exp(min(float(self.params["clip"]["logit_scale"]), math.log(100)))
        logits = scale * np.asarray(z_img, np.float64) @ z_txt.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def exact_settings(self, settings: Mapping, guidance: float = 1.0, prompted: bool = False) -> dict[str, dict]:
        """The settings of each stage with which x_T gives its picture back, unless others were given.

        prompted: whether the prior draws embeddings as well.
        """
        steps = min(STEPS, self.configs["decoder"].diffusion.num_steps)
        given = {name: value for name, value in settings.items() if value is not None}
        given = {"sampler": "ddim", "guidance": guidance, "steps": steps, **given}
        used = self.settings(**given) if prompted else self.embedded_settings(given)
        used["decoder"] = {**used["decoder"], "caption": False, "least": LEAST}
        return used

    def _latents(self, cond: Mapping, used: Mapping, batch_size: int, progress: bool) -> Latents:
        for name in ("rescale", "interval", "threshold"):
            if used["decoder"].get(name):
                raise UserError(f"{name}={used['decoder'][name]} is not undone by DDIM inversion", "leave it out")
        encoded = self._encode(cond, batch_size, progress)
        options = {name: used["decoder"][name] for name in ("steps", "guidance", "caption", "least")}
        rows = {**encoded, "image": cond["small"]}
        return Latents(encoded["z_img"], self.run("decoder", (rows,), options, batch_size, progress, "invert"))

    def _ends(self, inputs, seed: int, noise: str, used: Mapping, batch_size: int, progress: bool) -> Latents:
        """The latents of `interpolate`'s pictures and prompts, in their order."""
        words = np.array([isinstance(given, str) for given in inputs])
        keys, side = picture_keys(seed, len(inputs), 1), self.tasks["decoder"].image_size
        x = np.array(jax.jit(initial_noise, static_argnums=1)(fold(keys, 2), (side, side, 3)))
        x = x[:1].repeat(len(x), 0) if noise == "fixed" else x
        z = np.zeros((len(inputs), self._clip().embed_dim), np.float32)
        if words.any():
            prompts = [given for given in inputs if isinstance(given, str)]
            z[words] = self._imagine(prompts, keys[words], used, batch_size, progress)
        if not words.all():
            images = [given for given in inputs if not isinstance(given, str)]
            if noise == "slerp":
                z[~words], x[~words] = self._latents(self._look(images), used, batch_size, progress)
            else:
                z[~words] = self.embed_images(images, batch_size=batch_size, progress=progress)
        return Latents(z, x)

    def _imagine(self, prompts, keys, used: Mapping, batch_size: int, progress: bool) -> np.ndarray:
        """The prior's z_img of prompts."""
        if not (prior := prior_of(used)):
            raise UserError("this stack has no prior, so it cannot draw from prompts", "give pictures")
        rows = self._captions(prompts)
        rows |= self.run("clip", (rows,), {}, batch_size, progress)
        return self.run(prior, (rows, fold(keys, 1)), used[prior], batch_size, progress)

    def _draw_latents(self, latents: Latents, seed: int, used, batch_size: int, return_stages: bool, progress: bool):
        """One picture of each; whatever else is by chance is the same in all."""
        count = len(latents.z_img)
        keys = picture_keys(seed, 1, 1)[np.zeros(count, int)]
        cond = {**self._captions([""] * count), **latents._asdict()}
        return self._draw(cond, keys, used, batch_size, return_stages, progress)


def label_texts(labels: Sequence[str], template: str) -> list[str]:
    """What `probe` asks CLIP; UserError for fewer than two labels, or a template that does not take one."""
    if not is_listed(labels) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        what = f"labels={labels!r} must be texts, and two are needed to choose from, at least"
        raise UserError(what, "separate them by commas")
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise UserError(f"template {template!r} must hold one {{}} for the label", "write 'a picture of {}'")
    return [template.replace("{}", label) for label in labels]


def noise_between(inputs: Sequence, noise: str | None = None) -> str:
    """Which noise `interpolate` draws from; UserError for one of another name than NOISES."""
    noise = noise or ("fixed" if all(isinstance(given, str) for given in inputs) else "slerp")
    if noise not in NOISES:
        raise UserError(f"noise={noise!r} is unknown", suggest(noise, NOISES))
    return noise


def _path(points: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """Great circles through the points, `frames` from each to the next, both counted."""
    legs = zip(points[:-1], points[1:], strict=True)
    shares = np.linspace(0, 1, frames)[1:]
    steps = [slerp(a[None], b[None], share)[0] for a, b in legs for share in shares]
    return np.stack([points[0], *steps]).astype(np.float32)
