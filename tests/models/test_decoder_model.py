"""The decoder's conditioning: what dropped parts hide, and where the image embedding enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.models.decoder import Decoder
from unclip_jax.nn.unet_blocks import CONTEXT

B, D, L, W, STATES = 2, 5, 4, 8, 6
UNET = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8, groups=4)
OWN_TEXT = dict(vocab_size=11, max_len=L, layers=1, heads=2)
KINDS = {  # GLIDE's way of reading the caption (the paper), and Karlo's
    "own": Decoder(D, UNET, OWN_TEXT, context_width=W, image_tokens=3),
    "states": Decoder(D, {**UNET, "positions": True}, None, context_width=W, image_tokens=3, add_text_embedding=True),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, TIME = normal(B, 8, 8, 3), np.array([3, 800])
YES, NO = np.ones(B, bool), np.zeros(B, bool)
IMAGE = dict(z_img=normal(B, D, seed=1))
TEXT = dict(
    tokens=np.array([[1, 6, 2, 0], [1, 2, 0, 0]]),
    mask=np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool),
    z_txt=normal(B, D, seed=2),
    states=normal(B, L, STATES, seed=3),
)
OTHER_IMAGE = dict(z_img=-IMAGE["z_img"])
OTHER_TEXT = dict(tokens=TEXT["tokens"][::-1], mask=TEXT["mask"][::-1], z_txt=-TEXT["z_txt"], states=-TEXT["states"])


def arguments(image, text, keep_image, keep_text):
    return image["z_img"], keep_image, text["tokens"], text["mask"], keep_text, text["z_txt"], text["states"]


@pytest.fixture(scope="module", params=KINDS)
def decoder(request):
    """(draw a picture, condition), each a compiled function of (image, text, keep_image, keep_text)."""
    module = KINDS[request.param]
    p = draw(module, X, TIME, *arguments(IMAGE, TEXT, YES, YES))
    whole = jax.jit(lambda *a: module.apply({"params": p}, X, TIME, *a))
    return module, p, lambda *a: np.asarray(whole(*arguments(*a)))


def test_dropped_embedding_is_not_seen(decoder):
    _, _, output = decoder
    np.testing.assert_array_equal(output(IMAGE, TEXT, NO, YES), output(OTHER_IMAGE, TEXT, NO, YES))
    assert (output(IMAGE, TEXT, YES, YES) != output(OTHER_IMAGE, TEXT, YES, YES)).mean() > 0.99


def test_dropped_caption_is_not_seen(decoder):
    _, _, output = decoder
    np.testing.assert_array_equal(output(IMAGE, TEXT, YES, NO), output(IMAGE, OTHER_TEXT, YES, NO))
    assert (output(IMAGE, TEXT, YES, YES) != output(IMAGE, OTHER_TEXT, YES, YES)).mean() > 0.99


def test_the_two_are_dropped_sample_by_sample(decoder):
    """Row 0 without embedding, row 1 without caption: as if each were drawn so alone."""
    _, _, output = decoder
    mixed = output(IMAGE, TEXT, np.array([False, True]), np.array([True, False]))
    np.testing.assert_allclose(mixed[0], output(IMAGE, TEXT, NO, YES)[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(mixed[1], output(IMAGE, TEXT, YES, NO)[1], rtol=0, atol=1e-4)


def test_what_is_padded_is_not_seen(decoder):
    _, _, output = decoder
    mask = TEXT["mask"]
    other = {
        **TEXT,
        "tokens": np.where(mask, TEXT["tokens"], 9),
        "states": np.where(mask[..., None], TEXT["states"], np.float32(9)),
    }
    np.testing.assert_array_equal(output(IMAGE, TEXT, YES, YES), output(IMAGE, other, YES, YES))


def test_the_embedding_enters_as_tokens_and_beside_the_time(decoder):
    """Token t has the features c*T + t of the projection (Karlo's order); the vector beside the time has its own."""
    module, p, _ = decoder
    cond = run(module, p, *arguments(IMAGE, TEXT, YES, YES), method="condition")
    assert cond.context.shape == (B, 3 + L, W)
    flat = IMAGE["z_img"] @ p["image_to_tokens"]["kernel"] + p["image_to_tokens"]["bias"]
    for t in range(3):
        np.testing.assert_allclose(cond.context[:, t], flat[:, t::3], rtol=0, atol=1e-5)
    other = run(module, p, *arguments(OTHER_IMAGE, TEXT, YES, YES), method="condition")
    change = (OTHER_IMAGE["z_img"] - IMAGE["z_img"]) @ p["image_to_time"]["kernel"]
    np.testing.assert_allclose(other.emb - cond.emb, change, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cond.context[:, 3:], other.context[:, 3:])


def test_condition_then_denoise_is_the_whole(decoder):
    module, p, output = decoder
    cond = run(module, p, *arguments(IMAGE, TEXT, YES, YES), method="condition")
    drawn = run(module, p, X, TIME, cond, method="denoise")
    np.testing.assert_allclose(drawn, output(IMAGE, TEXT, YES, YES), rtol=0, atol=1e-4)
    assert drawn.shape == (B, 8, 8, 6)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_the_context_projected_once_is_the_context_projected_by_each_layer(decoder, dtype, bound):
    """And a step then reads no projection any more: their weights may be anything."""
    module, p, _ = decoder
    with jax.enable_x64(dtype == np.float64):
        module = module.clone(dtype=jnp.dtype(dtype))
        cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype) if a.dtype == np.float32 else a, tree)  # noqa: E731
        p, text = cast(p), cast(TEXT)
        cond = run(module, p, *arguments(cast(IMAGE), text, YES, YES), method="condition")
        assert set(cond.kv) == {"down1_attn0", "mid_attn", "up1_attn0", "up1_attn1"}
        nowhere = {
            name: {part: jax.tree.map(lambda a: a * np.nan, w) if part in CONTEXT else w for part, w in own.items()}
            for name, own in p["net"].items()
            if isinstance(own, dict)
        }
        x = X.astype(dtype)
        once = run(module, {**p, "net": {**p["net"], **nowhere}}, x, TIME, cond, method="denoise")
        each = run(module, p, x, TIME, cond._replace(kv=None), method="denoise")
        assert once.dtype == each.dtype == dtype
        np.testing.assert_allclose(once, each, rtol=0, atol=bound)
