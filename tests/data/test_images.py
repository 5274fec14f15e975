"""Pictures: value ranges, resampling and blur against answers computed another way, and hostile files."""

import io
import os
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from unclip_jax import gallery
from unclip_jax.data import images
from unclip_jax.data.images import BadImage
from unclip_jax.errors import UserError


@pytest.mark.parametrize("xp", [np, jnp])
def test_every_byte_survives_the_round_trip(xp):
    x = xp.arange(256, dtype=xp.uint8).reshape(1, 16, 16, 1)
    y = images.to_float(x)
    assert y.dtype == np.float32 and float(y.min()) == -1 and float(y.max()) == 1
    assert isinstance(images.to_uint8(y), type(x))
    np.testing.assert_array_equal(images.to_uint8(y), x)


@pytest.mark.parametrize("xp", [np, jnp])
def test_to_uint8_rounds_and_clips(xp):
    x = xp.asarray([-9.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 7.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    assert images.to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255, 255, 0, 0]


def test_shrinking_keeps_constants_and_ramps():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    np.testing.assert_allclose(images.resize(jnp.full((1, 32, 32, 3), 0.3), 8), 0.3, atol=1e-6)
    assert images.resize(x, 8).shape == (2, 8, 8, 3)
    # Away from the edges a ramp becomes the ramp of area means, whatever the symmetric kernel.
    ramp = jnp.broadcast_to(jnp.arange(32.0)[None, None, :, None], (1, 32, 32, 1))
    got = images.resize(ramp, 8)[0, 4, 2:-2, 0]
    np.testing.assert_allclose(got, np.arange(32.0).reshape(8, 4).mean(1)[2:-2], atol=1e-4)


def test_resize_suppresses_what_the_small_grid_cannot_hold():
    checker = jnp.asarray((np.indices((32, 32)).sum(0) % 2) * 2.0 - 1)[None, :, :, None]
    assert float(jnp.abs(images.resize(checker, 8)).max()) < 0.05


@pytest.mark.parametrize("sigma", [0.6, 1.3])
def test_blur_agrees_with_scipy(sigma):
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3)).astype(np.float32)
    want = scipy.ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="mirror", radius=(0, 1, 1, 0))
    np.testing.assert_allclose(images.gaussian_blur(jnp.asarray(x), sigma), want, atol=1e-5)


def test_center_crop_takes_the_middle_square_and_averages_areas():
    x = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    got = images.center_crop_resize(Image.fromarray(x), 4)
    want = x[:, 4:20].reshape(4, 4, 4, 4, 3).mean((1, 3))
    assert got.shape == (4, 4, 3) and np.abs(got - want).max() <= 1
    large = Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC, box=(4, 0, 20, 16))
    np.testing.assert_array_equal(images.center_crop_resize(Image.fromarray(x), 64), large)  # no blocks
    assert images.center_crop_resize(Image.new("RGB", (1, 500)), 8).shape == (8, 8, 3)


@pytest.mark.parametrize("side", [16, 23, 31])
def test_bicubic_is_what_public_clips_are_shown(side):
    """Pillow's, antialiased, as transformers' processor has it (resample 3)."""
    x = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    want = Image.fromarray(x).resize((11, 11), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.center_crop_resize(Image.fromarray(x), 11, bicubic=True), want)
    assert (images.center_crop_resize(Image.fromarray(x), 11) != np.asarray(want)).any()


def test_random_crops_are_windows_and_reach_every_place():
    x = np.arange(30).reshape(5, 6, 1)
    seen = set()
    for i in range(200):
        crop = images.random_crop(x, 3, np.random.default_rng([0, i]))
        top, left = divmod(int(crop[0, 0, 0]), 6)
        np.testing.assert_array_equal(crop, x[top : top + 3, left : left + 3])
        seen.add((top, left))
    assert seen == {(i, j) for i in range(3) for j in range(4)}
    np.testing.assert_array_equal(images.random_crop(x[:, :5], 5, np.random.default_rng(0)), x[:, :5])


# Files


def _colour(path) -> tuple:
    image = images.open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_modes_become_rgb(tmp_path):
    def saved(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return _colour(tmp_path / name)

    assert saved(Image.new("RGB", (4, 4), (200, 30, 40)), "rgb.png") == (200, 30, 40)
    assert saved(Image.new("RGB", (4, 4), (200, 30, 40)), "rgb.webp", lossless=True) == (200, 30, 40)
    assert saved(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "clear.png") == (255, 255, 255)
    assert saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "half.png") == (127, 127, 127)
    assert saved(Image.new("LA", (4, 4), (0, 0)), "la.png") == (255, 255, 255)
    assert saved(Image.new("L", (4, 4), 77), "l.png") == (77, 77, 77)
    assert saved(Image.new("1", (4, 4), 1), "bit.png") == (255, 255, 255)
    assert saved(Image.fromarray(np.full((4, 4), 257 * 250, np.uint16)), "16.png") == (250, 250, 250)
    assert saved(Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)), "16.tif") == (99, 99, 99)
    assert saved(Image.fromarray(np.full((4, 4), 0.2, np.float32)), "f.tif") == (51, 51, 51)
    assert saved(Image.fromarray(np.full((4, 4), 1.0, np.float32)), "one.tif") == (255, 255, 255)
    assert saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "cmyk.tif") == (255, 0, 0)
    assert saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "cmyk.jpg", quality=100) == (255, 0, 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert saved(palette, "p.png") == saved(palette, "p.gif") == (10, 20, 30)
    assert saved(palette, "p_clear.png", transparency=1) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert saved(frames[0], "a.gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)
    assert saved(frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=True) == (255, 0, 0)


@pytest.mark.parametrize("name", ["turned.png", "turned.jpg"])
def test_exif_turns_the_picture(name, tmp_path):
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise: left becomes top
    image.save(tmp_path / name, exif=exif)
    turned = images.open_image(tmp_path / name)
    assert turned.size == (16, 32)
    np.testing.assert_allclose(turned.getpixel((8, 0)), (255, 0, 0), atol=3)
    np.testing.assert_allclose(turned.getpixel((8, 31)), (0, 0, 255), atol=3)


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in (header, *chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def _hostile(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    text_bomb = (b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20), 9))
    return {
        "bomb.png": _png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(1000)))),
        "just_over.png": _png(8_000, 8_001, (b"IDAT", zlib.compress(bytes(1000)))),
        "text_bomb.png": _png(4, 4, text_bomb, (b"IDAT", zlib.compress(bytes(52)))),
        "zero.png": _png(0, 4, (b"IDAT", zlib.compress(b""))),
        "truncated.png": data[: len(data) // 2],
        "empty.png": b"",
        "text.png": b"hello",
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


def test_hostile_files_are_errors_that_name_the_file(tmp_path):
    for name, data in _hostile(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(BadImage) as error:
            images.open_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), name
        assert ("more than 64000000" in str(error.value)) == (name in ("bomb.png", "just_over.png")), name
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "missing.png", tmp_path, tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError, match="cannot be read"):
            images.open_image(path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadImage, match="empty.png is empty$"):
        images.open_image(tmp_path / "empty.png")


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    path = tmp_path / "sparse.png"
    with open(path, "wb") as f:
        f.truncate(images.MAX_BYTES + 1)
    with pytest.raises(BadImage, match="a picture at most"):
        images.open_image(path)


# Sheets and PNG


def test_grid_leaves_the_pictures_as_they_are():
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    long = "a very long caption that cannot fit under one small picture on two lines"
    np.testing.assert_array_equal(images.grid(x, 9), images.grid(x, 5))  # no room for pictures that are not there
    for kw in ({}, {"labels": ["short", long, "", "a\nb\x1b[31m", "unbreakable" * 9], "title": "t"}):
        sheet = images.grid(x, 3, scale=4, pad=2, **kw)
        assert sheet.dtype == np.uint8 and sheet.shape[1] == 3 * (48 + 4)
        for picture in x:
            big = np.kron(picture, np.ones((4, 4, 1), np.uint8))
            found = [
                (top, left)
                for top in range(sheet.shape[0] - 31)
                for left in (2, 54, 106)
                if (sheet[top : top + 32, left : left + 48] == big).all()
            ]
            assert len(found) == 1, found


def test_grid_draws_labels_below_and_never_beyond_two_lines():
    x = np.zeros((2, 40, 40, 3), np.uint8)
    bare, one, two = (images.grid(x, 2, labels=labels) for labels in (None, ["a", "b"], ["a", "word " * 50]))
    line = one.shape[0] - bare.shape[0]
    assert two.shape[0] - bare.shape[0] == 2 * line and line > 8
    text = two[44:, 44:]
    assert (text < 100).any() and (one[44:, 44:] < 100).any()
    assert (two[:, 42:44] == 255).all()  # nothing runs into the neighbour


def test_grid_draws_letters_beyond_ascii(monkeypatch):
    """Each another sign, not a box for every one; where it must be, one font for the whole sheet."""
    x = np.zeros((1, 40, 40, 3), np.uint8)

    def sheet(label):
        return images.grid(x, 1, labels=[label])

    letters = [sheet(letter) for letter in "éüßčžαβЖя"]
    assert len({letter.tobytes() for letter in letters}) == len(letters)
    assert {letter.shape for letter in letters} == {sheet("e").shape}
    np.testing.assert_array_equal(sheet("u\u0308"), sheet("ü"))
    np.testing.assert_array_equal(sheet("é"), letters[0])
    for capital in "ŻÜÉ":  # whose accents are as high as letters get
        assert (sheet(capital)[42:43] == 255).all() and (sheet(capital)[43:] < 100).any()
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.get_data_path", lambda: pytest.fail("not for ASCII"))
        ascii_only = sheet("e")
    monkeypatch.setattr("matplotlib.get_data_path", lambda: "/nowhere")
    np.testing.assert_array_equal(sheet("é"), sheet("ü"))  # boxes, where the font is missing
    np.testing.assert_array_equal(sheet("e"), ascii_only)


def test_a_label_costs_no_more_for_being_long(monkeypatch):
    """However long, few letters of it are measured: no more than could fit."""
    font, asked = images.ImageFont.load_default(10), []

    class Counted:
        def getlength(self, text):
            asked.append(len(text))
            return font.getlength(text)

    for text in ("word " * 50_000, "letters" * 50_000):
        del asked[:]
        rows = images._wrap(text, Counted(), 100)
        assert 1 <= len(rows) <= 2 and rows[-1].endswith("…") and all(font.getlength(row) <= 100 for row in rows)
        assert len(asked) < 500 and max(asked) <= 401


def test_png_metadata_is_read_back_and_bytes_are_reproducible():
    x = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    metadata = {"prompt": 'ein "rotes" Quadrat 红', "settings": {"steps": 25, "a": [1, None]}, "seed": 7}
    made = images.png(x, metadata)
    assert made == images.png(x, metadata)
    with Image.open(io.BytesIO(made)) as image:
        np.testing.assert_array_equal(np.asarray(image), x)
        settings = '{"a": [1, null], "steps": 25}'
        assert image.text == {"prompt": metadata["prompt"], "settings": settings, "seed": "7"}


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="u8"):
        gallery.write_image(tmp_path / "x.png", np.zeros((4, 4, 3), np.float32))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png cannot be written"):
        gallery.write_image(tmp_path / "folder.png", np.zeros((4, 4, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
