"""What a network sees in pictures, computed in batches that are split over the devices of this host."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax import sharding
from unclip_jax.errors import UserError
from unclip_jax.fetch import fetched
from unclip_jax.metrics.inception import FEATURES, Inception
from unclip_jax.metrics.resample import NAME, resize
from unclip_jax.models.clip import CLIP

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that looks at pictures.

    Attributes:
      name: "inception" or "clip".
      identity: tells weights and resizing from others.
      dim: of its features.
      see: (params, u8[B, S, S, 3]) → {"features": f32[B, dim], …}, pure.
      params: its parameters.
    """

    name: str
    identity: str
    dim: int
    see: Callable[..., dict[str, jax.Array]]
    params: Any


def inception(params: Any, identity: str, width: float = 1.0) -> Network:
    """The FID Inception: "features", its pool3, and "logits"."""
    module = Inception(width)

    def see(params, images):
        return dict(zip(("features", "logits"), module.apply({"params": params}, images), strict=True))

    return Network("inception", f"inception {identity}, {NAME}", int(FEATURES * width), see, params)


def clip(model: CLIP, params: Any, identity: str) -> Network:
    """A CLIP's image embeddings."""
    if model.vision is None:
        raise UserError("this CLIP has no image tower, so it cannot look at pictures", "give another by --clip")
    side = model.vision["image_size"]

    def see(params, images):
        images = resize(images, side) / 127.5 - 1
        return {"features": model.apply({"params": params}, images, method="embed_image")}

    return Network("clip", f"clip {identity}, {side} px, {NAME}", model.embed_dim, see, params)


def extractor(network: Network, devices: Sequence | None = None, batch: int = BATCH) -> Callable[..., dict]:
    """A function of N pictures u8[S, S, 3] → {"features": f32[N, dim], …}, compiled once for every size of picture.

    Args:
      devices: that share each batch; None: all of this host.
      batch: pictures at once, rounded up to a multiple of the devices.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices() if devices is None else devices)
    params = jax.device_put(network.params, sharding.replicated(mesh))
    see = jax.jit(network.see)
    batch = -(-batch // mesh.size) * mesh.size

    def extract(images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        stacks = (np.stack([images[i] for i in chunk]) for chunk in chunks(len(images), batch))
        given = (jax.device_put(stack, sharding.batch_sharding(mesh)) for stack in stacks)
        parts = list(fetched(see(params, some) for some in given))
        return {name: np.concatenate([p[name] for p in parts])[: len(images)].astype(np.float32) for name in parts[0]}

    return extract


def embed_texts(model: CLIP, params: Any, tokenizer, texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """CLIP's caption embeddings f32[N, D]; captions longer than CLIP takes lose their end."""
    tokens, mask = tokenizer.encode(list(texts), warn=False)
    batch = min(batch, 1 << (len(tokens) - 1).bit_length())
    embed = jax.jit(lambda p, t, m: model.apply({"params": p}, t, m, method="embed_text")[0])
    parts = fetched(embed(params, tokens[c], mask[c]) for c in chunks(len(tokens), batch))
    return np.concatenate(list(parts))[: len(tokens)].astype(np.float32)


def chunks(total: int, size: int) -> Iterator[np.ndarray]:
    """Rows of each chunk of `size`; the last is filled up with copies of the last row, so that shapes stay."""
    for start in range(0, total, size):
        yield np.minimum(np.arange(start, start + size), total - 1)
