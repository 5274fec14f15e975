"""CLIP's contrastive training (Radford et al. 2021, figure 3), or SigLIP's (Zhai et al. 2023)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError, is_whole, suggest
from unclip_jax.models.clip import CLIP
from unclip_jax.tasks import contrast
from unclip_jax.tasks.embeddings import matrix_picture, unit

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class ClipTask:
    """Every image of the global batch with every caption (`tasks/contrast.py`).

    Attributes:
      loss_name: "softmax", CLIP's symmetric cross-entropy; or "sigmoid", SigLIP's, with a learned bias.
      chunk: captions that meet all images at a time, so that memory stays linear in a device's part of the batch: a
        divisor of the batch, best a multiple of the devices it is split over. 0: all at once. Results do not depend
        on it.
    """

    model: CLIP
    loss_name: str = "softmax"
    chunk: int = 0

    @classmethod
    def from_config(cls, config, clip=None):
        """Vocabulary and caption length come from `config.tokenizer`, loss and chunk from `config.objective`."""
        model = config.model.to_dict()
        side, patch = ((model["vision"] or {}).get(name) for name in ("image_size", "patch"))
        if side and patch and side % patch:
            raise UserError(f"model.vision.image_size={side} must be a multiple of model.vision.patch={patch}")
        loss, chunk = _objective(config)
        tokens = {"vocab_size": config.tokenizer.vocab_size, "max_len": config.tokenizer.max_len}
        clip = CLIP(**{**model, "text": {**model["text"], **tokens}}, bias=loss == "sigmoid")
        return cls(clip, loss, chunk)

    def init(self, rng):
        tokens = jnp.zeros((1, self.model.text["max_len"]), jnp.int32)
        if self.model.vision is None:
            return self.model.init(rng, tokens, tokens == 0, method="embed_text")["params"]
        size = self.model.vision["image_size"]
        return self.model.init(rng, jnp.zeros((1, size, size, 3)), tokens, tokens == 0)["params"]

    def prepare(self, frozen, params, batches):
        return params

    def encode(self, frozen, batch):
        return batch

    def embed(self, params, batch):
        """Unit vectors f32[B, D] of images and of captions, and the temperature's inverse.

        The losses are written over the global batch: under jit with a sharded batch, XLA moves captions between
        devices, so that every image meets every caption, whatever the devices.
        """
        image, text, scale = self.model.apply({"params": params}, batch["image"], batch["tokens"], batch["mask"])
        return unit(image), unit(text), scale

    def logits(self, params, batch):
        """f32[B, B]: row = image, column = caption, scaled by the temperature, without the bias."""
        image, text, scale = self.embed(params, batch)
        return scale * image @ text.T

    def loss(self, params, batch, rng):
        loss, seen, scale = self._compare(params, batch)
        metrics = {"accuracy": seen.image_hit.mean(), "temperature": 1 / scale}
        return loss, {**metrics, "bias": params["logit_bias"]} if self.loss_name == "sigmoid" else metrics

    def _compare(self, params, batch):
        image, text, scale = self.embed(params, batch)
        if self.loss_name == "softmax":
            return *contrast.softmax_loss(image, text, scale, self.chunk), scale
        seen = jax.lax.stop_gradient(contrast.see(image, text, scale, self.chunk))
        return contrast.sigmoid_loss(image, text, scale, params["logit_bias"], self.chunk), seen, scale

    def sample(self, params, cond, keys, **over):
        """CLIP draws nothing; its sample is the image embedding z_img f32[B, D]."""
        return self.model.apply({"params": params}, cond["image"], method="embed_image")

    def evaluate(self, params, batch, rng):
        loss, seen, _ = self._compare(params, batch)
        n = len(seen.own)
        return {
            f"image_to_text_recall@1_of_{n}": (seen.image_hit.sum(), n),
            f"text_to_image_recall@1_of_{n}": (seen.text_hit.sum(), n),
            "loss": (loss * n, n),
        }

    def preview(self, params, batch, rng):
        """The similarity matrix of the batch as one picture; a bright diagonal is what is wanted."""
        return matrix_picture(self.logits(params, batch))


def _objective(config) -> tuple[str, int]:
    """The loss's name and the chunk of a config's block `objective`, which older ones do not have."""
    given = dict(config.get("objective") or {})
    loss, chunk = given.pop("loss", "softmax"), given.pop("chunk", 0)
    if given:
        raise UserError(f"config has no key 'objective.{min(given)}'", suggest(min(given), ("loss", "chunk")))
    if loss not in LOSSES:
        raise UserError(f"objective.loss={loss!r} is unknown", suggest(str(loss), LOSSES))
    if not is_whole(chunk, 0):
        raise UserError(f"objective.chunk={chunk!r} must be a whole number >= 0 (0 is no chunks)")
    batch = config.get("batch_size", chunk)
    if chunk and batch % chunk:
        raise UserError(f"objective.chunk={chunk} must divide batch_size={batch}", f"use {math.gcd(chunk, batch)}")
    return loss, chunk
