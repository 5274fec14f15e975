"""Pictures in and out of a command: files read with all checks, and what was drawn laid out and written."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_jax.cli.arguments import MAX_PICTURES
from unclip_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """The picture of a file as u8[h, w, 3]; see `data.images.open_image` for what becomes of depth, alpha and colours.

    Of an animation the first frame, with a warning. Raises UserError for whatever cannot be used.
    """
    import numpy as np
    from PIL import Image

    from unclip_jax.data.images import FORMATS, open_image

    if not str(path) or "\0" in str(path):
        raise UserError(f"picture {str(path)!r} must be the path of a file")
    with warnings.catch_warnings():  # what is too large is an error of our own
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture, frames = open_image(Path(path).expanduser()), 1
        with contextlib.suppress(Exception), Image.open(Path(path).expanduser(), formats=FORMATS) as image:
            if image.format not in ("JPEG", "MPO"):
                frames = getattr(image, "n_frames", 1)  # the first may be sound, and another raise nearly anything
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames, and the first is taken", stacklevel=2)
    return np.asarray(picture)


def name_of(path: str) -> str:
    """A file's own name as text, for labels; the folders above it are nobody's business."""
    return Path(path).name.encode("utf-8", "replace").decode()


def at_most(pictures: int) -> None:
    """Raises UserError for more pictures than one call draws."""
    if pictures > MAX_PICTURES:
        raise UserError(f"{pictures} are more than {MAX_PICTURES} pictures", "draw them in several calls")


def beside(paths, squares, drawn, columns, inputs=None) -> list:
    """Rows for `gallery.write`: each given picture, and beside it what was drawn of it.

    Args:
      paths, squares: of the given pictures, and how they look as squares.
      drawn: pictures, so many for each given one as there are columns.
      columns: (label, facts) of each of those.
      inputs: (label, facts) of each given picture, its facts being those of its row too; by default its name.
    """
    from unclip_jax.gallery import Picture

    rows = []
    for p, (path, square) in enumerate(zip(paths, squares, strict=True)):
        name, own = name_of(path), drawn[p * len(columns) : (p + 1) * len(columns)]
        label, facts = inputs[p] if inputs else (name, {})
        facts = {"image": name, **facts}
        row = [Picture(square, label, {**facts, "role": "input"})]
        row += [Picture(image, title, {**facts, **more}) for image, (title, more) in zip(own, columns, strict=True)]
        rows.append((name, row))
    return rows


def finish(args, out: Path, rows, used, animated: bool = False, **more) -> None:
    """Writes the folder, and says so; seed, model, settings `used` and `more` hold for every picture."""
    from unclip_jax import gallery

    facts = {"seed": args.seed, "model": Path(args.model).name, "settings": used, **more}
    sizes = []

    def counted(row):
        for picture in row:
            sizes.append(picture.image.shape[:2])
            yield picture

    rows = ((words, counted(row)) for words, row in rows)
    out = gallery.write(out, rows, facts, page=args.html, animated=animated, overwrite=args.overwrite)[0].parent
    height, width = sizes[0]
    print(f"{len(sizes)} pictures of {height} x {width} pixels in {out}; all of them in {out / gallery.GRID}")
