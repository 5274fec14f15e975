"""What the frozen CLIP tells the stages that learn against it, and a caption that is dropped."""

import jax
import jax.numpy as jnp

from unclip_jax.data.images import resize
from unclip_jax.errors import UserError, suggest
from unclip_jax.models.clip import CLIP

CAPTIONS = ("tokens", "states")


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


def vocabulary(caption: str, clip: CLIP) -> int:
    """Of a prior's network: CLIP's where captions enter as "tokens", 0 where they do as its "states"."""
    if caption not in CAPTIONS:
        raise UserError(f"model.caption={caption!r} is unknown", suggest(caption, CAPTIONS))
    return clip.text["vocab_size"] if caption == "tokens" else 0


def caption_of(model, batch):
    """What a prior's network takes of captions: tokens where it has a vocabulary, else CLIP's states."""
    name = "tokens" if model.vocab_size else "states"
    if name not in batch:
        raise ValueError("these embeddings hold no caption states: make them with --states")
    return batch[name]
