"""CLIP: the length of its embeddings, where the text embedding is read, what it does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.models.clip import CLIP

BLOCKS = dict(width=8, layers=1, heads=2)
SIZES = dict(embed_dim=6, vision=dict(image_size=8, patch=4, **BLOCKS), text=dict(vocab_size=11, max_len=6, **BLOCKS))
TOKENS = np.array([[1, 5, 6, 7, 2, 0], [1, 8, 2, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return draw(CLIP(**SIZES), IMAGES, TOKENS, MASK)


@pytest.mark.parametrize("norm", [1.0, 17.2])
def test_embeddings_leave_with_the_norm_asked_for(params, norm):
    z_img, z_txt, _ = run(CLIP(**SIZES, norm=norm), params, IMAGES, TOKENS, MASK)
    for z in (z_img, z_txt):
        np.testing.assert_allclose(np.linalg.norm(z, axis=-1), norm, rtol=1e-5)


def test_without_a_norm_they_leave_as_projected(params):
    plain, scaled = (run(CLIP(**SIZES, norm=n), params, IMAGES, method="embed_image") for n in (None, 2.0))
    np.testing.assert_allclose(2 * plain / np.linalg.norm(plain, axis=-1, keepdims=True), scaled, rtol=0, atol=1e-5)


def test_text_embedding_is_the_projected_state_at_eos(params):
    z, states = run(CLIP(**SIZES, norm=None), params, TOKENS, MASK, method="embed_text")
    at_eos = np.stack([states[0, 4], states[1, 2]])
    np.testing.assert_allclose(z, at_eos @ params["text_projection"]["kernel"], rtol=0, atol=1e-5)


def test_padding_has_no_influence_on_the_text_embedding(params):
    clip = CLIP(**SIZES)
    a, b = (run(clip, params, t, MASK, method="embed_text")[0] for t in (TOKENS, np.where(MASK, TOKENS, 9)))
    np.testing.assert_array_equal(a, b)


def test_the_null_caption_has_an_embedding(params):
    """An empty mask, too, reads some position instead of wrapping to the end."""
    tokens, mask = np.array([[1, 2, 0, 0, 0, 0]]), np.zeros((1, 6), bool)
    z, states = run(CLIP(**SIZES, norm=None), params, tokens, mask, method="embed_text")
    np.testing.assert_allclose(z[0], states[0, 0] @ params["text_projection"]["kernel"], rtol=0, atol=1e-5)


def test_samples_of_a_batch_are_independent(params):
    clip = CLIP(**SIZES)
    both = run(clip, params, IMAGES, method="embed_image")
    one = run(clip, params, IMAGES[1:], method="embed_image")
    np.testing.assert_allclose(both[1:], one, rtol=0, atol=1e-4)


def test_the_temperature_is_bounded(params):
    """exp(s), but never above 100."""
    for s, want in ((1.0, np.e), (9.0, 100.0)):
        scale = run(CLIP(**SIZES), {**params, "logit_scale": np.float32(s)}, IMAGES, TOKENS, MASK)[2]
        np.testing.assert_allclose(scale, want, rtol=1e-5)


def test_starts_at_temperature_007():
    s = jax.jit(lambda: CLIP(**SIZES).init(jax.random.key(0), IMAGES, TOKENS, MASK)["params"]["logit_scale"])()
    np.testing.assert_allclose(np.exp(-s), 0.07, rtol=1e-5)


def test_patches_are_read_in_place(params):
    """Two patches exchanged, their position vectors too, give the same class token."""
    moved = IMAGES.copy()
    moved[:, :4, :4], moved[:, 4:, :4] = IMAGES[:, 4:, :4], IMAGES[:, :4, :4]
    position = params["visual"]["position"][np.array([0, 3, 2, 1, 4])]
    exchanged = {**params, "visual": {**params["visual"], "position": position}}
    clip = CLIP(**SIZES)
    want = run(clip, params, IMAGES, method="embed_image")
    np.testing.assert_allclose(run(clip, exchanged, moved, method="embed_image"), want, rtol=0, atol=1e-4)
    assert not np.allclose(run(clip, params, moved, method="embed_image"), want, atol=1e-2)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="CLIP takes 8x8 images, got 16x16"):
        jax.eval_shape(lambda: CLIP(**SIZES).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), TOKENS, MASK))
