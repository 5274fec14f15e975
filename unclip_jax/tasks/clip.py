"""CLIP's contrastive training (Radford et al. 2021, figure 3), or SigLIP's (Zhai et al. 2023)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from unclip_jax.data.images import resize
from unclip_jax.errors import UserError, is_whole, suggest
from unclip_jax.models.clip import CLIP
from unclip_jax.tasks import contrast

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
        told = {"accuracy": seen.image_hit.mean(), "temperature": 1 / scale}
        return loss, {**told, "bias": params["logit_bias"]} if self.loss_name == "sigmoid" else told

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


def ask(clip: CLIP, params, batch):
    """`batch` with what a frozen CLIP says of it: z_txt f32[B, D], states [B, L, W], of images z_img f32[B, D].

    Images of another size than CLIP's are resized for it, and stay as they are in the batch. A batch that was encoded
    before (`unclip data embed`) comes back as it is.
    """
    if "z_txt" in batch:
        return batch
    variables = {"params": params}
    z_txt, states = clip.apply(variables, batch["tokens"], batch["mask"], method="embed_text")
    batch = {**batch, "z_txt": z_txt, "states": states}
    if "image" in batch:
        image, side = batch["image"], clip.vision["image_size"]
        image = image if image.shape[1] == side else resize(image, side)
        batch["z_img"] = clip.apply(variables, image, method="embed_image")
    return batch


def ask_empty(clip: CLIP, params, batch):
    """`batch` with "empty": tokens, mask, z_txt and states of the empty caption, as often as the batch has rows.

    Its tokens, BOS and EOS alone, are those of any caption; what stands in the padding is masked.
    """
    tokens, mask = batch["tokens"][:1], batch["mask"][:1]
    places = jnp.arange(tokens.shape[1])[None]
    eos = jnp.take_along_axis(tokens, jnp.maximum(mask.sum(-1, keepdims=True) - 1, 0), axis=1)
    empty = ask(clip, params, {"tokens": jnp.where(places == 0, tokens[:, :1], eos), "mask": places < 2})
    repeat = lambda a: jnp.broadcast_to(a, (batch["tokens"].shape[0], *a.shape[1:]))  # noqa: E731
    return {**batch, "empty": jax.tree.map(repeat, empty)}


def drop_captions(batch, keep):
    """`batch` with the empty caption, and what CLIP says of it, in the rows where keep bool[B] is False."""
    rows = lambda a: keep.reshape((-1,) + (1,) * (a.ndim - 1))  # noqa: E731
    return {**batch, **{k: jnp.where(rows(a), batch[k], a) for k, a in batch["empty"].items() if k in batch}}


def caption_of(model, batch):
    """What a prior's network takes of captions: tokens where it has a vocabulary, else CLIP's states."""
    name = "tokens" if model.vocab_size else "states"
    if name not in batch:
        raise ValueError("these embeddings hold no caption states: make them with --states")
    return batch[name]


def unit(z: jax.Array) -> jax.Array:
    """z / |z| along the last axis."""
    return z * jax.lax.rsqrt(jnp.sum(jnp.square(z), -1, keepdims=True) + 1e-12)


def matrix_picture(matrix: jax.Array) -> jax.Array:
    """A matrix [N, M] as one grey picture f32[1, 4N, 4M, 3], each row's smallest value black and largest white."""
    low, high = matrix.min(-1, keepdims=True), matrix.max(-1, keepdims=True)
    grey = 2 * (matrix - low) / jnp.maximum(high - low, 1e-6) - 1
    grey = jnp.repeat(jnp.repeat(grey, 4, 0), 4, 1)
    return jnp.broadcast_to(grey[None, :, :, None], (1, *grey.shape, 3))
