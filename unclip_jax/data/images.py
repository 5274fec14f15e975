"""Pictures at the edges: files, 8-bit arrays and contact sheets. Inside, all is f32 NHWC in [-1, 1]."""

import contextlib
import io
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from unclip_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20


class BadImage(UserError):
    """A picture file that cannot be used; the loader passes over it."""


def to_float(x):
    """u8[...] to f32[...] in [-1, 1]: x / 127.5 - 1. NumPy stays NumPy, JAX stays JAX."""
    return x.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x):
    """f32[...] in [-1, 1] to u8[...], rounded and clipped; the inverse of `to_float`. NaN becomes 0."""
    xp = np if isinstance(x, np.ndarray) else jnp
    x = xp.clip(xp.nan_to_num(x.astype(np.float32), nan=-1.0), -1, 1)
    return xp.round(x * 127.5 + 127.5).astype(np.uint8)


def resize(x: jax.Array, size: int, method: str = "bicubic") -> jax.Array:
    """Resamples f32[B, H, W, C] to f32[B, size, size, C], antialiased when it shrinks (jax.image)."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), method, antialias=True)


def gaussian_blur(x: jax.Array, sigma: float) -> jax.Array:
    """Blurs f32[B, H, W, C] by a separable Gaussian of 3 taps; edges reflected, edge pixel once.

    The first upsampler's low-resolution input is blurred so (Ramesh et al. 2022, section 2.1).

    Args:
      sigma: standard deviation in pixels, > 0.
    """
    weights = jnp.exp(-0.5 * (jnp.arange(-1, 2, dtype=jnp.float32) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(x.dtype)
    for axis in (1, 2):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded, n = jnp.pad(x, pad, mode="reflect"), x.shape[axis]
        x = sum(weights[k] * jax.lax.slice_in_dim(padded, k, k + n, axis=axis) for k in range(3))
    return x


def center_crop_resize(image: Image.Image, size: int, bicubic: bool = False) -> np.ndarray:
    """The largest centred square of an RGB picture as u8[size, size, 3].

    Where it shrinks, a pixel is the mean of the whole pixels around its place (Pillow's BOX), or by `bicubic`, as
    public CLIPs want pictures; where it grows, always the latter.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    method = Image.Resampling.BICUBIC if bicubic or side < size else Image.Resampling.BOX
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), method, box=box), np.uint8)


def random_crop(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A [size, size, C] window of [H, W, C], every place equally likely."""
    top = rng.integers(x.shape[0] - size + 1)
    left = rng.integers(x.shape[1] - size + 1)
    return x[top : top + size, left : left + size]


def open_image(path: str | os.PathLike) -> Image.Image:
    """Reads a picture file of unknown origin as RGB.

    Only FORMATS, at most MAX_BYTES and MAX_PIXELS (read from the header, before anything is decoded);
    turned as its EXIF says, transparency over white, 16 bits to 8, the first frame of an animation.

    Raises:
      BadImage: names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file() and not path.is_dir():
            raise BadImage(f"{path} cannot be read (it is no file)")  # a pipe would be waited for without end
        if size > MAX_BYTES:
            raise BadImage(f"{path} has {size} bytes, a picture at most {MAX_BYTES}")
        with open(path, "rb") as f:
            return decode_image(f.read(MAX_BYTES + 1), str(path))
    except OSError as e:
        raise BadImage(f"{path} cannot be read ({e.strerror or e})") from e


def decode_image(data: bytes, name: str) -> Image.Image:
    """`open_image` for the bytes of a file; `name` is for what is told of it."""
    if not data:
        raise BadImage(f"{name} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{name} has {width}x{height} pixels, more than {MAX_PIXELS}")
            image.load()
            return _to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as e:  # so many that Pillow does not open it
        raise BadImage(f"{name} has more than {MAX_PIXELS} pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadImage(f"{name} is not a picture this program reads ({', '.join(FORMATS)})") from e
    except Exception as e:  # decoders of damaged files raise nearly anything
        raise BadImage(f"{name} is damaged ({type(e).__name__}: {str(e)[:120]})") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow clips more than 8 bits instead of scaling them
        x = np.asarray(image, np.float64)
        if image.mode == "F":  # no range is agreed on: 0…1 or 0…255
            x = x * 255 if x.max(initial=0) <= 1 else x
        elif image.mode != "I" or x.max(initial=0) > 255:
            x = x / 257
        image = Image.fromarray(np.clip(np.nan_to_num(x), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def grid(
    images: np.ndarray,
    ncols: int,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int = 1,
    pad: int = 2,
) -> np.ndarray:
    """A contact sheet on white of u8[N, H, W, 3], row by row; the pictures' own pixels are not altered.

    Args:
      ncols: pictures a row.
      labels: a text under each, on at most two lines.
      title: a text above all.
      scale: each pixel is drawn as scale x scale.
      pad: white pixels around each picture.
    """
    images = np.asarray(images, np.uint8)
    if len(images) == 0:
        raise ValueError("a contact sheet needs at least one picture")
    images = images.repeat(scale, 1).repeat(scale, 2)
    n, height, width, _ = images.shape
    ncols = max(1, min(ncols, n))
    font_size = int(np.clip(width // 10, 9, 20))
    written = "".join([*(labels if labels is not None else ()), title or ""])
    font, line = _font(font_size, written), font_size + 3
    above = 0 if written.isascii() else 2  # for accents on capital letters
    texts = [_wrap(_plain(label), font, width) for label in labels] if labels is not None else []
    head = line + 2 * pad if title else 0
    cell_h = height + 2 * pad + line * max((len(t) for t in texts), default=0)
    cell_w, nrows = width + 2 * pad, -(-n // ncols)
    sheet = np.full((head + nrows * cell_h, ncols * cell_w, 3), 255, np.uint8)
    canvas = Image.fromarray(sheet)
    draw = ImageDraw.Draw(canvas)
    if title:
        line_1 = _wrap(_plain(title), font, ncols * cell_w - 2 * pad, lines=1)[0]
        draw.text((pad, pad), line_1, fill="black", font=font)
    for i, image in enumerate(images):
        x, y = (i % ncols) * cell_w + pad, head + (i // ncols) * cell_h + pad
        for j, text in enumerate(texts[i] if i < len(texts) else ()):
            draw.text((x, y + height + above + j * line), text, fill="black", font=font)
        canvas.paste(Image.fromarray(image), (x, y))
    return np.asarray(canvas)


def _font(size: int, text: str):
    """Pillow's own for ASCII; for other texts matplotlib's DejaVu Sans, which has Latin, Greek and Cyrillic letters."""
    if not text.isascii():
        with contextlib.suppress(ImportError, OSError):
            from matplotlib import get_data_path

            file = io.BytesIO(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf").read_bytes())
            # The layout that every build of Pillow has, so that sheets are the same everywhere.
            return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """One line without control characters, a letter and its accent as one sign."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _wrap(text: str, font, width: int, lines: int = 2) -> list[str]:
    """Cuts a text into at most `lines` lines of `width` pixels, between words if it can; "…" marks a loss."""
    out, words = [], text[: 2 * lines * width].split()  # longer ones never fit: no letter is half a pixel wide
    while words and len(out) < lines:
        take = 1
        while take < len(words) and font.getlength(" ".join(words[: take + 1])) <= width:
            take += 1
        row, words = " ".join(words[:take]), words[take:]
        if font.getlength(row) > width or (words and len(out) == lines - 1):
            while row and font.getlength(row + "…") > width:
                row = row[:-1]
            row += "…"
        out.append(row)
    return out or [""]


def png(image: np.ndarray, metadata: Mapping | None = None) -> bytes:
    """u8[H, W, 3] as PNG; the same picture and metadata give the same bytes.

    Args:
      metadata: text chunks in this order; values that are not text are written as JSON with sorted keys.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a PNG is made of u8[H, W, 3], not {image.dtype}{list(image.shape)}")
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        info.add_itxt(key, text.encode(errors="backslashreplace").decode())
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()
