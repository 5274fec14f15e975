"""Contrastive losses in strips: values and gradients against float64 in numpy, on any mesh, in linear memory."""

import math
import re

import jax
import numpy as np
import pytest

from tests import tiny_stack
from tests.tasks import stubs
from tests.tasks.test_clip import log_softmax
from unclip_jax import sharding
from unclip_jax.errors import UserError
from unclip_jax.tasks import contrast
from unclip_jax.tasks.clip import ClipTask

N, D, SCALE, BIAS = 48, 5, 7.0, -2.0
LOSSES = ("softmax", "sigmoid")


def pairs(n=N):
    """Unit vectors of images and captions, float64 [n, D]; two captions are alike, so that there are ties."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((n, D))
    text = image + 0.8 * rng.standard_normal((n, D))
    text[7] = text[3]
    return tuple(a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))


def reference(name):
    """(loss, its gradients by image, text, scale and bias), from the whole matrix in float64."""
    image, text = pairs()
    cosine = image @ text.T
    logits, own = SCALE * cosine, np.eye(N)
    if name == "softmax":
        by_image, by_text = log_softmax(logits, 1), log_softmax(logits, 0)
        loss = -(np.diag(by_image).mean() + np.diag(by_text).mean()) / 2
        slope = (np.exp(by_image) + np.exp(by_text) - 2 * own) / (2 * N)
    else:
        signed = (2 * own - 1) * (logits + BIAS)
        loss = np.log1p(np.exp(-signed)).sum() / N
        slope = -(2 * own - 1) / (1 + np.exp(signed)) / N
    bias = 0.0 if name == "softmax" else slope.sum()
    return loss, (SCALE * slope @ text, SCALE * slope.T @ image, (slope * cosine).sum(), bias)


def ours(name, chunk):
    """(image, text, scale, bias) → loss and gradients."""

    def loss(image, text, scale, bias):
        if name == "sigmoid":
            return contrast.sigmoid_loss(image, text, scale, bias, chunk)
        return contrast.softmax_loss(image, text, scale, chunk)[0]

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


def check(got, wanted):
    np.testing.assert_allclose(got[0], wanted[0], rtol=2e-6)
    for one, other in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


ARGUMENTS = (*(a.astype(np.float32) for a in pairs()), np.float32(SCALE), np.float32(BIAS))


@pytest.mark.parametrize("chunk", [0, 8, 16])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_whole_matrix(name, chunk):
    check(jax.jit(ours(name, chunk))(*ARGUMENTS), reference(name))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_on_eight_devices(name, mesh):
    mesh = sharding.make_mesh(*mesh)
    rows, one = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    placed = jax.device_put(ARGUMENTS, (rows, rows, one, one))
    check(jax.jit(ours(name, 16), out_shardings=(one, (rows, rows, one, one)))(*placed), reference(name))


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_linear_in_a_devices_part_of_the_batch(name):
    """Four times the batch, the same chunk: four times the bytes, and no array of all pairs or of all captions."""
    mesh, chunk = sharding.make_mesh(), 64
    rows, one = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    used = []
    for n in (512, 2048):
        args = [jax.ShapeDtypeStruct(s, np.float32, sharding=p) for s, p in (((n, D), rows),) * 2 + (((), one),) * 2]
        step = jax.jit(ours(name, chunk), out_shardings=(one, (rows, rows, one, one))).lower(*args).compile()
        used.append(step.memory_analysis().temp_size_in_bytes)
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", step.as_text())]
        assert max(sizes) == n // 8 * chunk  # a strip on one device
        assert not re.search(rf"f32\[{n},{D}\]", step.as_text())
    assert used[1] < 4.1 * used[0]


@pytest.mark.parametrize("chunk", [0, 8])
def test_the_first_of_equal_captions_is_the_hit(chunk):
    image, text = pairs()
    logits = image @ text.T
    seen = jax.jit(lambda *of: contrast.see(*of, 1.0, chunk))(*ARGUMENTS[:2])
    np.testing.assert_array_equal(seen.image_hit, logits.argmax(1) == np.arange(N))
    np.testing.assert_array_equal(seen.text_hit, logits.argmax(0) == np.arange(N))
    assert not seen.image_hit[7]  # its caption is the fourth's as well
    np.testing.assert_allclose(seen.own, np.diag(logits), rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 8])
def test_a_caption_is_the_nearest_however_far_it_is(chunk):
    """All similarities are negative, as early in training they may be; most pairs are each other's nearest."""
    image, text = (np.c_[side * np.ones(N), a[:, 1:]] for side, a in zip((3, -3), pairs(), strict=True))
    image, text = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))
    logits = image @ text.T
    seen = jax.jit(lambda *of: contrast.see(*of, 1.0, chunk))(np.float32(image), np.float32(text))
    hits = logits.argmax(1) == np.arange(N)
    assert logits.max() < 0 and hits.sum() > 5
    np.testing.assert_array_equal(seen.image_hit, hits)
    np.testing.assert_array_equal(seen.text_hit, logits.argmax(0) == np.arange(N))
    np.testing.assert_allclose(seen.by_image, np.log(np.exp(logits).sum(1)), rtol=1e-5)


def test_a_chunk_that_does_not_divide_a_batch_gives_way():
    image, text = (a[:18] for a in ARGUMENTS[:2])
    both = jax.jit(lambda *of: [contrast.softmax_loss(*of, SCALE, chunk)[0] for chunk in (0, 12)])
    whole, parts = both(image, text)
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


def config(**objective):
    made = tiny_stack.configs()["clip"]
    made.objective = objective
    made.batch_size = 4
    return made


def test_the_bias_is_learned_for_the_sigmoid_loss_alone():
    """Starts as in the paper; with it, at the start nearly the loss of "no pair matches"."""
    made = config(loss="sigmoid", chunk=2)
    task = ClipTask.from_config(made)
    start = jax.jit(lambda key: [task.init(key)[name] for name in ("logit_scale", "logit_bias")])(jax.random.key(0))
    assert start == [pytest.approx(math.log(10)), -10]
    plain = jax.eval_shape(ClipTask.from_config(config()).init, jax.random.key(0))
    params = tiny_stack.weights(made) | {"logit_bias": start[1]}
    assert "logit_bias" not in plain and plain.keys() | {"logit_bias"} == params.keys()
    length = task.model.text["max_len"]
    tokens = np.arange(4 * length, dtype=np.int32).reshape(4, length) % 90
    image = np.random.default_rng(1).standard_normal((4, 16, 16, 3)).astype(np.float32)
    batch = {"image": image, "tokens": tokens, "mask": tokens >= 0}

    @jax.jit
    def all_of(params, batch):
        of_bias = lambda bias: task.loss({**params, "logit_bias": bias}, batch, None)  # noqa: E731
        loss = jax.value_and_grad(of_bias, has_aux=True)(params["logit_bias"])
        return loss, task.logits(params, batch), task.evaluate(params, batch, None)["loss"][0]

    ((loss, told), slope), logits, total = all_of(params, batch)
    signed = (2 * np.eye(4) - 1) * (np.asarray(logits, np.float64) - 10)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-signed)).sum() / 4, rtol=1e-4)
    assert told["bias"] == -10 and slope < 0 and 0 <= told["accuracy"] <= 1
    assert total == pytest.approx(4 * float(loss), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_task_s_chunk_is_that_of_its_loss_and_of_what_is_found(name, monkeypatch):
    """Captions at a time, when training and when evaluating."""
    seen, strips = [], contrast._strips
    monkeypatch.setattr(contrast, "_strips", lambda text, chunk: seen.append(chunk) or strips(text, chunk))
    net = stubs.Net({"__call__": lambda image, tokens, mask: (image, tokens, SCALE)})
    batch = dict(zip(("image", "tokens"), ARGUMENTS[:2], strict=True), mask=None)
    task, params = ClipTask(net, name, 16), {"logit_bias": BIAS}
    task.loss(params, batch, None)
    task.evaluate(params, batch, None)
    assert seen == [16] * 4


BAD = {
    "loss": ({"loss": "sigmoidal"}, "objective.loss='sigmoidal' is unknown.* did you mean 'sigmoid'"),
    "chunk": ({"chunk": 3}, "objective.chunk=3 must divide batch_size=4. Fix: use 1"),
    "negative": ({"chunk": -2}, "objective.chunk=-2 must be a whole number >= 0"),
    "kind": ({"chunk": 2.0}, "objective.chunk=2.0 must be a whole number"),
    "key": ({"chunks": 2}, "no key 'objective.chunks'.* did you mean 'chunk'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_of_the_objective(case):
    objective, words = BAD[case]
    with pytest.raises(UserError, match=words):
        ClipTask.from_config(config(**objective))
