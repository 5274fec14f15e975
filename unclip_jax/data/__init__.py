"""Sources of captioned pictures by name, the images themselves, and the loader that makes batches of them."""

import importlib
import inspect

from unclip_jax.errors import UserError, is_whole, suggest

# Imported when asked for: icons needs an extra.
SOURCES = {
    "shapes": "unclip_jax.data.shapes:Shapes",
    "icons": "unclip_jax.data.icons:Icons",
    "folder": "unclip_jax.data.folder:Folder",
    "webdataset": "unclip_jax.data.webdataset:WebDataset",
    "tfds": "unclip_jax.data.tfds:Tfds",
    "mixture": "unclip_jax.data.mixture:Mixture",
    "embeddings": "unclip_jax.data.embeddings:Embeddings",
}


def make(source: str, split: str = "train", *, size: int, seed: int = 0, **kw):
    """Opens a source by name.

    Args:
      source: a name in SOURCES.
      split: "train", "heldout", …; each source names its own.
      size: side of its square pictures, in pixels.
      seed: for sources that draw pictures or captions by chance.
      **kw: the source's own arguments, such as `path` of "folder".
    """
    if source not in SOURCES:
        raise UserError(f"data.source='{source}' is not a known source", suggest(source, SOURCES))
    if not is_whole(size, 1):
        raise UserError(f"data.size={size} must be a positive number of pixels")
    module, name = SOURCES[source].split(":")
    cls = getattr(importlib.import_module(module), name)
    known = [k for k in inspect.signature(cls).parameters if k not in ("split", "size", "seed")]
    for key in kw:
        if key not in known:
            fix = suggest(key, known) if known else "leave it out"
            raise UserError(f"data.{key} is not an argument of the source '{source}'", fix)
    return cls(split=split, size=size, seed=seed, **kw)
