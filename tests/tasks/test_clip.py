"""CLIP's task: the loss against numpy on the whole batch, the bounded temperature, retrieval, what `ask` adds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stack
from tests.tasks import stubs
from unclip_jax.errors import UserError
from unclip_jax.models.clip import _capped
from unclip_jax.tasks.clip import ClipTask
from unclip_jax.tasks.embeddings import candidate_keys, matrix_picture, unit
from unclip_jax.tasks.teacher import ask, caption_of, vocabulary

B, D = 12, 7


def given(scale: float):
    """A CLIP whose embeddings are handed in as image and tokens."""
    return ClipTask(stubs.Net({"__call__": lambda image, tokens, mask: (image, tokens, scale)}))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((B, D)).astype(np.float32)
    text = (0.7 * image + rng.standard_normal((B, D))) * rng.uniform(0.1, 9, (B, 1))
    return {"image": image, "tokens": text.astype(np.float32), "mask": None}


def similarities(pairs, scale):
    image, text = (np.asarray(a, np.float64) for a in (pairs["image"], pairs["tokens"]))
    image, text = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))
    return scale * image @ text.T


def log_softmax(a, axis):
    a = a - a.max(axis, keepdims=True)
    return a - np.log(np.exp(a).sum(axis, keepdims=True))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_is_the_symmetric_cross_entropy_over_the_whole_batch(pairs, scale):
    logits = similarities(pairs, scale)
    rows, columns = np.diag(log_softmax(logits, 1)), np.diag(log_softmax(logits, 0))
    loss, metrics = given(scale).loss({"logit_scale": np.float32(np.log(scale))}, pairs, None)
    np.testing.assert_allclose(loss, -(rows.mean() + columns.mean()) / 2, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == np.arange(B)).mean())
    np.testing.assert_allclose(metrics["temperature"], 1 / scale, rtol=1e-5)


def test_evaluate_counts_what_is_found(pairs):
    logits = similarities(pairs, 10.0)
    found = given(10.0).evaluate({"logit_scale": np.float32(np.log(10))}, pairs, None)
    to_text, to_image = (logits.argmax(1) == np.arange(B)).sum(), (logits.argmax(0) == np.arange(B)).sum()
    assert 0 < to_text < B and to_text != to_image  # the case can tell the two apart
    assert [int(x) for x in found[f"image_to_text_recall@1_of_{B}"]] == [to_text, B]
    assert [int(x) for x in found[f"text_to_image_recall@1_of_{B}"]] == [to_image, B]
    loss, n = found["loss"]
    mean = -(np.diag(log_softmax(logits, 1)).mean() + np.diag(log_softmax(logits, 0)).mean()) / 2
    assert n == B and loss / n == pytest.approx(mean, rel=1e-4)


def test_temperature_is_bounded_and_embeddings_leave_with_their_norm():
    """exp(s) grows up to 100 and no further; s keeps its gradient, but above for what would raise it."""
    config = tiny_stack.configs()["clip"]
    task, params = ClipTask.from_config(config), tiny_stack.weights(config)
    rng = np.random.default_rng(1)
    length = config.tokenizer.max_len
    batch = {
        "image": rng.uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32),
        "tokens": rng.integers(3, 99, (4, length)).astype(np.int32),
        "mask": np.arange(length)[None] < rng.integers(2, length, (4, 1)),
    }

    @jax.jit
    def both(params, batch):
        loss, slope = jax.value_and_grad(lambda p: task.loss(p, batch, None)[0])(params)
        z_img, z_txt, scale = task.model.apply({"params": params}, batch["image"], batch["tokens"], batch["mask"])
        return task.logits(params, batch), z_img, z_txt, scale, slope["logit_scale"]

    scales = (np.log(1 / 0.07), np.log(99.0), np.log(100.0) + 0.1, 10.0)
    told = [jax.device_get(both({**params, "logit_scale": np.float32(s)}, batch)) for s in scales]
    for (logits, z_img, z_txt, scale, slope), s in zip(told, scales, strict=True):
        assert scale == pytest.approx(min(np.exp(s), 100), rel=1e-5)
        np.testing.assert_allclose(logits, similarities({"image": z_img, "tokens": z_txt}, scale), rtol=1e-3, atol=1e-3)
        assert slope != 0 if s < np.log(100) else slope >= 0
        for z in (z_img, z_txt):
            np.testing.assert_allclose(np.linalg.norm(z, axis=1), config.model.norm, rtol=1e-4)


@pytest.mark.parametrize("s, slopes", [(4.6, (2.0, -2.0)), (4.7, (2.0, 0.0))])
def test_a_temperature_at_its_bound_can_come_back(s, slopes):
    """Above ln 100 a gradient that lowers s passes, and one that raises it does not."""
    for slope, sign in zip(slopes, (2.0, -2.0), strict=True):
        assert float(jax.grad(lambda s, sign=sign: sign * _capped(s))(s)) == slope


def test_unit_and_matrix_picture():
    z = np.random.default_rng(0).standard_normal((3, D))
    np.testing.assert_allclose(unit(jnp.asarray(z)), z / np.linalg.norm(z, axis=1, keepdims=True), rtol=1e-5)
    assert not unit(jnp.zeros((1, D))).any()  # and not NaN
    picture = np.asarray(matrix_picture(jnp.asarray([[0.0, 1.0, 4.0], [7.0, 7.0, 7.0]])))
    assert picture.shape == (1, 8, 12, 3)
    np.testing.assert_allclose(picture[0, 0, ::4], np.repeat([[-1.0], [-0.5], [1.0]], 3, 1))
    np.testing.assert_array_equal(picture[0, :4, :4], np.full((4, 4, 3), -1))
    assert np.isfinite(picture).all()


def test_a_preview_has_a_row_for_each_image(pairs):
    picture = np.asarray(given(10.0).preview({}, pairs, None))[0, ::4, ::4, 0]
    wanted = similarities(pairs, 10.0)
    low, high = wanted.min(1, keepdims=True), wanted.max(1, keepdims=True)
    np.testing.assert_allclose(picture, 2 * (wanted - low) / (high - low) - 1, atol=1e-4)


def test_a_frozen_clip_is_asked_of_pictures_at_its_own_size():
    """A constant picture stays constant when resized, so its embedding does not depend on its size."""
    net = stubs.clip()
    grey = np.linspace(-1, 1, 3, dtype=np.float32)
    tokens = np.arange(3 * stubs.LENGTH, dtype=np.int32).reshape(3, -1)
    said = {}
    for side in (stubs.SIDE, 2 * stubs.SIDE, 24):
        image = np.broadcast_to(grey[:, None, None, None], (3, side, side, 3))
        said[side] = ask(net, {}, {"image": image, "tokens": tokens, "mask": tokens > 0, "other": 1})
        np.testing.assert_allclose(said[side]["z_img"], np.repeat(grey[:, None], 6, 1), atol=1e-5)
        assert said[side]["image"].shape == image.shape and said[side]["other"] == 1
    np.testing.assert_array_equal(said[24]["z_txt"][:, :5], tokens)
    assert "z_img" not in ask(net, {}, {"tokens": tokens, "mask": tokens > 0})
    assert ask(net, {}, said[24]) is said[24]  # encoded before


def test_captions_enter_as_tokens_or_as_states():
    net = stubs.clip()
    assert (vocabulary("tokens", net), vocabulary("states", net)) == (9, 0)
    with pytest.raises(UserError, match="model.caption='token' is unknown.* did you mean 'tokens'"):
        vocabulary("token", net)
    reads = [stubs.Net({}, {"vocab_size": size}) for size in (9, 0)]
    assert [caption_of(one, {"tokens": 1, "states": 2}) for one in reads] == [1, 2]
    with pytest.raises(ValueError, match="hold no caption states: make them with --states"):
        caption_of(reads[1], {"tokens": 1})


def test_a_candidate_s_key_is_of_its_caption_and_its_number():
    keys = jax.random.split(jax.random.key(0), 2)
    own = jax.random.key_data(candidate_keys(keys, 3))
    np.testing.assert_array_equal(own, [jax.random.key_data(jax.random.fold_in(k, i)) for k in keys for i in range(3)])


def test_config_gives_the_model_the_tokenizers_numbers():
    config = tiny_stack.configs()["clip"]
    task = ClipTask.from_config(config)
    assert task.model.text["vocab_size"] == config.tokenizer.vocab_size
    assert task.model.text["max_len"] == config.tokenizer.max_len
    config.model.vision.patch = 5
    with pytest.raises(UserError, match="image_size=16 must be a multiple of model.vision.patch=5"):
        ClipTask.from_config(config)


def test_tasks_are_plain_frozen_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        given(1.0).model = None
