"""What the tasks that draw pictures share: the network of a config, what it sees of a known picture, and its loss."""

import jax
import jax.numpy as jnp

from unclip_jax.data.masks import random_holes
from unclip_jax.diffusion.guide import Out
from unclip_jax.diffusion.loss import diffusion_loss
from unclip_jax.errors import UserError
from unclip_jax.models.clip import CLIP
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.unet import widen

KNOWN_CHANNELS = 4  # that a network for inpainting sees beside all others: a picture's, and where it is known


def make_network(config, clip: CLIP | None) -> Decoder:
    """The `Decoder` of a config's model; without a CLIP its captions are those of `config.tokenizer`."""
    model = {**config.model.to_dict(), "embed_dim": clip.embed_dim if clip else 0}
    if model["text"] is not None:
        captions = clip.text if clip else config.tokenizer
        model["text"] = {**model["text"], **{name: captions[name] for name in ("vocab_size", "max_len")}}
    elif clip is None:
        raise UserError("model.text=None takes a CLIP's text states, and there is no CLIP", "give model.text")
    model["unet"] = {**model["unet"], **channels(config.objective)}
    return Decoder(**model)


def channels(objective) -> dict[str, int]:
    """The keywords of a `UNet` that an objective sets."""
    extra = KNOWN_CHANNELS if objective.get("inpaint") else 0
    return {"out_channels": 6 if objective.vlb_weight else 3, "extra": extra}


def known_channels(batch, rows: int, size: int) -> jax.Array:
    """What a network for inpainting sees last, f32[rows, S, S, 4]: concat(picture * keep, keep), or that none is known.

    As GLIDE's do (Nichol et al. 2021, arXiv 2112.10741).
    """
    if "keep" not in batch:
        return jnp.zeros((rows, size, size, KNOWN_CHANNELS))
    return jnp.concatenate([batch["known"] * batch["keep"], batch["keep"]], axis=-1)


def with_holes(batch, rng) -> dict:
    """The batch of a network for inpainting, to train it: its images are known outside of random holes."""
    b, side = batch["image"].shape[:2]
    return {**batch, "known": batch["image"], "keep": 1.0 - random_holes(rng, b, side)[..., None]}


def adopt(net, patch: int, seen: int) -> dict:
    """A `UNet`'s parameters with the channels for inpainting where it lacks them, which are then of no effect.

    Args:
      patch: of the network.
      seen: the channels that it sees without those.
    """
    net = dict(net)
    for name, side in {"stem": patch, "outer_stem": 1}.items():
        if name in net and net[name]["kernel"].shape[-2] == seen * side**2:
            net[name] = {**net[name], "kernel": widen(net[name]["kernel"], side, KNOWN_CHANNELS)}
    return net


def split_variance(out: jax.Array) -> Out:
    """A network's 3 or 6 channels as prediction and, where there are 6, the variance's place in [-1, 1]."""
    return Out(*jnp.split(out, 2, axis=-1)) if out.shape[-1] == 6 else Out(out)


def image_loss(task, x0, denoise, t, t_rng, noise_rng) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(scalar, metrics) of a stage that draws pictures, as its objective says; `t` None: at times by chance."""
    t = jax.random.randint(t_rng, x0.shape[:1], 0, task.schedule.num_steps) if t is None else t
    noise, weights = jax.random.normal(noise_rng, x0.shape), (task.vlb_weight, task.weighting)
    loss, metrics = diffusion_loss(task.schedule, denoise, x0, t, noise, task.target, *weights)
    return loss.mean(), metrics


def mean_loss(task, params, batch, rng) -> dict[str, tuple[jax.Array, int]]:
    """The training loss at random times and its parts, without dropout, as {metric: (sum, count)}."""
    b = batch["image"].shape[0]
    t_rng, rng = jax.random.split(rng)
    t = jax.random.randint(t_rng, (b,), 0, task.schedule.num_steps)
    loss, metrics = task.loss(params, batch, rng, t)
    return {name: (value * b, b) for name, value in {"loss": loss, **metrics}.items()}
