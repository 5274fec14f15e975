"""A captioned contact sheet of a data source, to see what a model will learn from."""

import os
from pathlib import Path

import numpy as np

from unclip_jax.data.images import BadImage, grid
from unclip_jax.errors import UserError
from unclip_jax.gallery import write_image

MOST_PIXELS = 200_000_000  # of all pictures on a sheet; a hundred of 1,024 are half of it
LEAST_WIDTH = 200  # pixels of a cell; narrower ones leave no room for a caption


def contact_sheet(source, n: int, ncols: int, path: str | os.PathLike) -> None:
    """Writes n pictures of a source, always the same ones, with their captions, as PNG.

    Args:
      source: see data/source.py.
      n: how many; at most as many as there are.
      ncols: pictures a row.
      path: the file to write.
    """
    if n < 1 or ncols < 1:
        raise UserError(f"n={n} and ncols={ncols} must be at least 1")
    if source.clip_identity:
        raise UserError(f"'{source.name}' holds embeddings, and pictures are shown", "give a source of pictures")
    n, size = min(n, len(source)), max(source.size, LEAST_WIDTH)
    if n * size**2 > MOST_PIXELS:
        what = f"{n} pictures of {source.size} pixels are too many for one sheet"
        raise UserError(what, "give a smaller --num or --size")
    records = []
    chosen = np.random.default_rng(0).choice(len(source), n, replace=False)
    for i in sorted(chosen.tolist()):
        try:
            records.append(source[i])
        except BadImage:
            continue
    if not records:
        raise UserError(f"no picture of '{source.name}' can be read")
    images = np.stack([r["image"] for r in records])
    captions = [r["caption"] for r in records]
    scale = max(1, -(-LEAST_WIDTH // images.shape[2]))
    title = f"{source.name}, {len(source)} records"
    sheet = grid(images, ncols, labels=captions, title=title, scale=scale, pad=4)
    write_image(Path(path), sheet, {"source": source.name, "licence": source.licence, "captions": captions})
