"""The decoder's training and sampling (unCLIP, section 2.1): diffusion over images given z_img and the caption.

Without a CLIP (`model.embed_dim` = 0) it is GLIDE's base network: the caption alone, read by a Transformer of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.images import resize
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import guide, is_one
from unclip_jax.diffusion.invert import ddim_invert
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.tasks import pictures
from unclip_jax.tasks.pictures import image_loss, make_network, mean_loss, split_variance
from unclip_jax.tasks.teacher import ask, ask_empty, drop_captions


@dataclasses.dataclass(frozen=True)
class DecoderTask:
    """Decoder, drawn with classifier-free guidance on z_img and caption together.

    Attributes:
      image_size: side of the drawn images in pixels; `config.data.size` unless the objective names another, so that
        CLIP can see larger images than are drawn (the paper: 256 and 64).
      target: what the network predicts, "eps" (the paper), "v" or "x0".
      clip_drop: share of examples whose z_img is dropped (the paper: 0.1).
      text_drop: share of examples whose caption is dropped, independently (the paper: 0.5).
      empty_caption: a dropped caption is the empty one, as CLIP encodes it (Karlo).
      vlb_weight: of the variational bound that trains the variance (Nichol & Dhariwal: 0.001); 0: variance not learned.
      inpaint: the network also sees a known picture and where it is known (`pictures.known_channels`); it is trained
        with random holes, and draws without a picture alike.
      sampler: defaults of `sample`: what `diffusion.draw` takes (name, steps, guidance, …).
    """

    model: Decoder
    schedule: Schedule
    clip: CLIP | None
    image_size: int
    sampler: dict[str, Any]
    target: str = "eps"
    weighting: str = "none"
    clip_drop: float = 0.1
    text_drop: float = 0.5
    vlb_weight: float = 0.001
    empty_caption: bool = False
    inpaint: bool = False

    @classmethod
    def from_config(cls, config, clip: CLIP | None):
        """Embedding width and what captions are come from the CLIP, the output's width from the objective."""
        clip = None if config.model.get("embed_dim") == 0 else clip
        net, sampler = make_network(config, clip), config.sampler.to_dict()
        schedule = make_schedule(**config.diffusion)
        return cls(net, schedule, clip, sampler=sampler, **{"image_size": config.data.size, **config.objective})

    def init(self, rng):
        text = self.clip.text if self.clip else {**self.model.text, "width": 0}
        one, size = jnp.ones((1,), bool), self.image_size
        z, tokens = jnp.zeros((1, self.model.embed_dim)), jnp.zeros((1, text["max_len"]), jnp.int32)
        states = jnp.zeros((1, text["max_len"], text["width"]))
        image = jnp.zeros((1, size, size, 3 + pictures.KNOWN_CHANNELS * self.inpaint))
        time = jnp.zeros((1,), jnp.int32)
        return self.model.init(rng, image, time, z, one, tokens, tokens == 0, one, z, states)["params"]

    def adopt(self, params):
        """The parameters of a decoder that may lack the channels for inpainting, which are then of no effect."""
        if not self.inpaint:
            return params
        return {**params, "net": pictures.adopt(params["net"], self.model.unet.get("patch", 1), 3)}

    def prepare(self, frozen, params, batches):
        return params

    def encode(self, frozen, batch):
        """Adds what CLIP says of the images as they come, then brings them to `image_size`."""
        batch = ask(self.clip, frozen["clip"], batch) if self.clip else dict(batch)
        batch = ask_empty(self.clip, frozen["clip"], batch) if self.empty_caption else batch
        if "image" in batch and batch["image"].shape[1] != self.image_size:
            batch["image"] = jnp.clip(resize(batch["image"], self.image_size), -1, 1)
        return batch

    def condition(self, params, batch, keep_image, keep_text):
        """The network's `Condition` for an encoded batch; keep_image, keep_text bool[B]."""
        if self.empty_caption:
            batch, keep_text = drop_captions(batch, keep_text), None
        z_img, z_txt, states = (batch.get(name) for name in ("z_img", "z_txt", "states"))
        args = (z_img, keep_image, batch["tokens"], batch["mask"], keep_text, z_txt, states)
        return self.model.apply({"params": params}, *args, method="condition")

    def x0_and_denoise(self, params, batch, keep_image=None, keep_text=None, **train):
        """An encoded batch's images, and the network that knows z_img and caption where kept; None: everywhere."""
        everywhere = jnp.ones(batch["image"].shape[:1], bool)
        keep_image, keep_text = (everywhere if keep is None else keep for keep in (keep_image, keep_text))
        cond = self.condition(params, batch, keep_image, keep_text)
        return batch["image"], self._denoise(params, cond, self._shown(batch), **train)

    def _shown(self, batch):
        """What an inpainting network sees beside xt, for all rows of a batch."""
        return pictures.known_channels(batch, batch["tokens"].shape[0], self.image_size) if self.inpaint else None

    def _denoise(self, params, cond, shown, **train):
        """The denoiser for all rows of `cond`, or for its first ones."""

        def denoise(xt, time):
            n = xt.shape[0]
            x = xt if shown is None else jnp.concatenate([xt, shown[:n]], axis=-1)
            own = jax.tree.map(lambda a: a[:n], cond)
            return split_variance(self.model.apply({"params": params}, x, time, own, method="denoise", **train))

        return denoise

    def loss(self, params, batch, rng, t=None):
        """`t` i32[B] asks for the error at these times, without dropout; None draws them, to train."""
        t_rng, noise_rng, image_rng, text_rng, dropout, hole_rng = jax.random.split(rng, 6)
        b = batch["image"].shape[0]
        keep_image = jax.random.uniform(image_rng, (b,)) >= self.clip_drop
        keep_text = jax.random.uniform(text_rng, (b,)) >= self.text_drop
        train = dict(train=t is None, rngs={"dropout": dropout})
        if self.inpaint:
            batch = pictures.with_holes(batch, hole_rng)
        x0, denoise = self.x0_and_denoise(params, batch, keep_image, keep_text, **train)
        return image_loss(self, x0, denoise, t, t_rng, noise_rng)

    def sample(self, params, cond, keys, **over):
        """cond {tokens, mask, z_img, z_txt, states} of B samples, the last three not without CLIP → f32[B, S, S, 3].

        Caption Transformer and projections are run once, not in every step. In `cond` may be "noise" f32[B, S, S, 3],
        drawn from instead of the keys' own; and known f32[B, S, S, 3], keep f32[B, S, S, 1]: the known picture stays
        where keep is 1. In `over`, beside what `draw` takes: `caption=False` draws from z_img alone, with every caption
        dropped (variations); `least` leaves out what has less noise (a standard deviation), for drawing from the noise
        of `invert`; with `known`, `strength` begins from it.
        """
        settings = {**self.sampler, **over}
        denoise, sched = self._ready(params, cond, settings)
        variance = params.get("x0_variance")
        image = draw(
            sched,
            denoise,
            cond["noise"] if "noise" in cond else initial_noise(keys, (self.image_size, self.image_size, 3)),
            keys,
            target=self.target,
            x0_variance=None if variance is None else variance[-sched.num_steps :],
            image=cond.get("known"),
            keep=cond.get("keep"),
            **settings,
        )
        return jnp.clip(image, -1, 1)

    def invert(self, params, cond, *, iterations: int = 1, **over):
        """cond of `sample` with "image" f32[B, S, S, 3] → the noise f32[B, S, S, 3] that DDIM draws these from (x_T).

        Draw with the same `over` to get the image back. Where the network's error is larger than the noise, the noise
        of the inversion becomes mostly that error, and too large; so begin at `least`. `iterations`: see `ddim_invert`.
        """
        settings = {**self.sampler, **over}
        denoise, sched = self._ready(params, cond, settings)
        if not is_one(settings["guidance"]):
            denoise = guide(denoise, settings["guidance"])
        levels = respace(sched, settings["steps"])
        return ddim_invert(levels, denoise, cond["image"], target=self.target, iterations=iterations)

    def _ready(self, params, cond, settings):
        """The denoiser, conditional rows first, then as many without where guided; and the noise levels to draw with.

        Takes "caption" and "least" out of `settings`.
        """
        b, halves = len(cond["tokens"]), 1 if is_one(settings["guidance"]) else 2
        seen = ("tokens", "mask", "z_img", "z_txt", "states", "known", "keep", *["empty"] * self.empty_caption)
        cond = {k: jax.tree.map(lambda a: jnp.concatenate([a] * halves), cond[k]) for k in seen if k in cond}
        keep = jnp.arange(b * halves) < b
        shared = self.condition(params, cond, keep, keep & settings.pop("caption", True))
        sched = self._levels(settings.pop("least", 0), settings["steps"])
        return self._denoise(params, shared, self._shown(cond)), sched

    def _levels(self, least: float, steps: int) -> Schedule:
        """The noise levels of a standard deviation of `least` and more, or so many that `steps` of them are left."""
        sched = self.schedule
        if not least:
            return sched
        noise = np.sqrt(1 - sched.alphas_cumprod)
        first = min(np.searchsorted(noise, least), sched.num_steps - steps)
        return Schedule(sched.alphas_cumprod[first:], sched.timesteps[first:])

    def evaluate(self, params, batch, rng):
        return mean_loss(self, params, batch, rng)

    def preview(self, params, batch, rng):
        """True images, and below them what the decoder draws from their captions and embeddings."""
        image = batch["image"]
        drawn = self.sample(params, batch, jax.random.split(rng, image.shape[0]))
        return jnp.concatenate([image, drawn])
