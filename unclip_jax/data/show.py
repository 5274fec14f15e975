"""A captioned contact sheet of a data source, to see what a model will learn from."""

import os

import numpy as np

from unclip_jax.data.images import BadImage, grid, save_png
from unclip_jax.errors import UserError

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
    records = []
    chosen = np.random.default_rng(0).choice(len(source), min(n, len(source)), replace=False)
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
    save_png(path, sheet, {"source": source.name, "licence": source.licence, "captions": captions})
