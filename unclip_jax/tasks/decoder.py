"""The decoder's training and sampling (unCLIP, section 2.1): diffusion over images given z_img and the caption.

Without a CLIP (`model.embed_dim` = 0) it is GLIDE's base network: the caption alone, read by a Transformer of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.data.images import resize
from unclip_jax.diffusion.guide import Out, guide_batched
from unclip_jax.diffusion.loss import diffusion_loss
from unclip_jax.diffusion.sample import SAMPLERS, initial_noise
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.errors import UserError
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.tasks.clip import ask, ask_empty, drop_captions


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
      sampler: defaults of `sample`: name, steps, guidance.
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
        image = jnp.zeros((1, size, size, 3))
        time = jnp.zeros((1,), jnp.int32)
        return self.model.init(rng, image, time, z, one, tokens, tokens == 0, one, z, states)["params"]

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

    def loss(self, params, batch, rng):
        t_rng, noise_rng, image_rng, text_rng, dropout = jax.random.split(rng, 5)
        x0 = batch["image"]
        b = x0.shape[0]
        t = jax.random.randint(t_rng, (b,), 0, self.schedule.num_steps)
        keep_image = jax.random.uniform(image_rng, (b,)) >= self.clip_drop
        keep_text = jax.random.uniform(text_rng, (b,)) >= self.text_drop
        cond = self.condition(params, batch, keep_image, keep_text)

        def denoise(xt, time):
            out = self.model.apply(
                {"params": params}, xt, time, cond, train=True, method="denoise", rngs={"dropout": dropout}
            )
            return split_variance(out)

        loss, metrics = diffusion_loss(
            self.schedule,
            denoise,
            x0,
            t,
            jax.random.normal(noise_rng, x0.shape),
            self.target,
            self.vlb_weight,
            self.weighting,
        )
        return loss.mean(), metrics

    def sample(self, params, cond, keys, **over):
        """cond {tokens, mask, z_img, z_txt, states} of B samples, the last three not without CLIP → f32[B, S, S, 3].

        Caption Transformer and projections are run once, not in every step. `caption=False` in `over` draws from z_img
        alone, with every caption dropped (variations).
        """
        settings = {**self.sampler, **over}
        b, guidance = len(cond["tokens"]), settings["guidance"]
        halves = 1 if guidance == 1 else 2
        seen = ("tokens", "mask", "z_img", "z_txt", "states", *["empty"] * self.empty_caption)
        cond = {k: jax.tree.map(lambda a: jnp.concatenate([a] * halves), cond[k]) for k in seen if k in cond}
        keep = jnp.arange(b * halves) < b
        shared = self.condition(params, cond, keep, keep & settings.get("caption", True))

        def denoise(xt, time):
            return split_variance(self.model.apply({"params": params}, xt, time, shared, method="denoise"))

        image = SAMPLERS[settings["name"]](
            respace(self.schedule, settings["steps"]),
            denoise if halves == 1 else guide_batched(denoise, guidance),
            initial_noise(keys, (self.image_size, self.image_size, 3)),
            keys,
            target=self.target,
        )
        return jnp.clip(image, -1, 1)

    def evaluate(self, params, batch, rng):
        return mean_loss(self, params, batch, rng)

    def preview(self, params, batch, rng):
        """True images, and below them what the decoder draws from their captions and embeddings."""
        image = batch["image"]
        drawn = self.sample(params, batch, jax.random.split(rng, image.shape[0]))
        return jnp.concatenate([image, drawn])


def make_network(config, clip: CLIP | None) -> Decoder:
    """The `Decoder` of a config's model; without a CLIP its captions are those of `config.tokenizer`."""
    model = {**config.model.to_dict(), "embed_dim": clip.embed_dim if clip else 0}
    if model["text"] is not None:
        captions = clip.text if clip else config.tokenizer
        model["text"] = {**model["text"], **{name: captions[name] for name in ("vocab_size", "max_len")}}
    elif clip is None:
        raise UserError("model.text=None takes a CLIP's text states, and there is no CLIP", "give model.text")
    model["unet"] = {**model["unet"], "out_channels": 6 if config.objective.vlb_weight else 3}
    return Decoder(**model)


def split_variance(out: jax.Array) -> Out:
    """A network's 3 or 6 channels as prediction and, where there are 6, the variance's place in [-1, 1]."""
    return Out(*jnp.split(out, 2, axis=-1)) if out.shape[-1] == 6 else Out(out)


def mean_loss(task, params, batch, rng) -> dict[str, tuple[jax.Array, int]]:
    """The training loss and its parts as {metric: (sum, count)}."""
    loss, metrics = task.loss(params, batch, rng)
    b = batch["image"].shape[0]
    return {name: (value * b, b) for name, value in {"loss": loss, **metrics}.items()}
