"""The autoregressive prior's task: what is measured, the loss, and drawing against a plain loop without any cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stack
from tests.tasks import stubs
from tests.tasks.test_prior_diffusion import batches, check_picture, encoded
from unclip_jax import tasks
from unclip_jax.errors import UserError
from unclip_jax.nn.drawing import layers_apart
from unclip_jax.tasks import prior_ar
from unclip_jax.tasks.prior_ar import PriorARTask, draw_code

D, K, BUCKETS, DOTS = 6, 4, 32, 4
SAMPLER = {"temperature": 1.0, "top_p": 1.0, "guidance": 1.0, "candidates": 1}


def with_net(**methods):
    attributes = {"vocab_size": 9, "dims": K, "buckets": BUCKETS, "dot_buckets": DOTS}
    return PriorARTask(stubs.Net(methods, attributes), stubs.clip(D), SAMPLER)


@pytest.fixture(scope="module")
def measured():
    """A task with no network, its parameters once prepared, and the embeddings and dot products they come from."""
    task = with_net()
    params = task.prepare({"clip": {}}, {"net": "kept"}, batches(0))
    stream = batches(0)
    told = [encoded(task, next(stream)) for _ in range(prior_ar.PREPARE_BATCHES)]
    z, z_txt = (np.concatenate([np.asarray(b[name], np.float64) for b in told]) for name in ("z_img", "z_txt"))
    return task, params, z, np.sum(z * z_txt, 1)


def test_components_and_dot_products_are_those_of_the_first_batches(measured):
    task, params, z, dot = measured
    _, values, vectors = np.linalg.svd(z - z.mean(0), full_matrices=False)
    assert params["net"] == "kept" and params["components"].shape == (D, K)
    np.testing.assert_allclose(params["mean"], z.mean(0), rtol=1e-4)
    np.testing.assert_allclose(params["std"], values[:K] / np.sqrt(len(z)), rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(params["components"] * vectors[:K].T, 0)), 1, atol=1e-3)
    counts = np.bincount(np.searchsorted(params["dots"], dot), minlength=DOTS)
    assert len(counts) == DOTS and np.ptp(counts) <= 2


def test_an_embedding_of_its_codes_is_the_embedding_within_the_buckets(measured):
    task, params, z, _ = measured
    codes = task.codes(params, z.astype(np.float32))
    back = np.asarray(task.embedding(params, codes))
    y, there = ((a - z.mean(0)) @ np.asarray(params["components"]) / np.asarray(params["std"]) for a in (z, back))
    assert np.abs(y - there)[np.abs(y) < 4].max() <= 4 / BUCKETS + 1e-3
    np.testing.assert_allclose(task.codes(params, back), codes)


def test_loss_is_the_cross_entropy_of_the_codes(measured):
    task, params, *_ = measured
    calls = stubs.Calls()

    def net(codes, dot, caption, mask, z_txt, keep):
        calls.note(codes=codes, dot=dot, keep=keep)
        return jnp.asarray(logits)

    task = dataclasses.replace(with_net(__call__=net), text_drop=0.3)
    batch = encoded(task, next(batches(5, 400)))
    logits = np.random.default_rng(0).standard_normal((400, K, BUCKETS)).astype(np.float32)
    loss, metrics = task.loss(params, batch, jax.random.key(0))
    (call,) = calls
    np.testing.assert_array_equal(call.codes, task.codes(params, batch["z_img"]))
    dot = np.sum(np.asarray(batch["z_img"], np.float64) * np.asarray(batch["z_txt"]), 1)
    assert (np.asarray(call.dot) == np.searchsorted(params["dots"], dot)).mean() > 0.99  # rounding at the edges
    assert abs(1 - np.asarray(call.keep).mean() - 0.3) < 4 * np.sqrt(0.21 / 400)
    p = np.exp(logits.astype(np.float64))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), np.asarray(call.codes)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -np.log(p).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits"], -np.log2(p).mean(), rtol=1e-5)
    right = logits.argmax(-1) == np.asarray(call.codes)
    np.testing.assert_allclose([metrics["accuracy"], metrics["accuracy_of_first"]], [right.mean(), right[:, 0].mean()])


# The real network, drawn from by its cache in one scan, against a plain loop over the whole sequence.

B, CANDIDATES = 4, 3


@pytest.fixture(scope="module")
def drawn():
    """The task, parameters, condition, keys; what `sample` draws; and the compiled function."""
    made = tiny_stack.configs()
    config = made["prior_ar"]
    config.sampler.update(temperature=0.7, top_p=0.9, guidance=1.5, candidates=CANDIDATES)
    task = tasks.make(config, tasks.make(made["clip"]).model)
    params = tiny_stack.weights(config, task.clip)
    params["net"]["out"]["kernel"] *= 3  # so that top_p has something to cut off
    tokens, mask = tiny_stack.tokenizer().encode(["a red circle", "two", "a blue star above a ring", ""], warn=False)
    cond = {
        "tokens": tokens,
        "mask": mask,
        "z_txt": np.random.default_rng(0).standard_normal((B, task.clip.embed_dim)).astype(np.float32),
        "states": np.zeros((B, task.clip.text["max_len"], 16), np.float32),
    }
    keys = jax.random.split(jax.random.key(5), B)
    sample = jax.jit(task.sample)
    return task, params, cond, keys, np.asarray(sample(params, cond, keys)), sample


def plain_loop(task, params, cond, keys):
    """All candidates f64[B, C, D]: each code from the whole sequence so far, its probabilities by numpy."""
    forward = jax.jit(lambda *args: task.model.apply({"params": params["net"]}, *args))
    tokens, mask, z_txt = (np.repeat(cond[k], CANDIDATES, 0) for k in ("tokens", "mask", "z_txt"))
    own = [jax.random.fold_in(key, i) for key in keys for i in range(CANDIDATES)]
    n, dots, k = len(own), task.model.dot_buckets, task.model.dims
    dot = np.array([jax.random.randint(jax.random.fold_in(key, 0), (), dots // 2, dots) for key in own])
    assert dots // 2 <= dot.min() and len(set(dot)) == dots - dots // 2  # the top half
    codes = np.zeros((n, k), np.int32)
    for place in range(k):
        args = codes, dot, tokens, mask, z_txt
        given, dropped = (np.asarray(forward(*args, np.full(n, keep)), np.float64)[:, place] for keep in (True, False))
        logits = (dropped + 1.5 * (given - dropped)) / 0.7
        for row, key in enumerate(own):
            p = np.exp(logits[row] - logits[row].max())
            p /= p.sum()
            order = np.argsort(-p)
            kept = order[: np.searchsorted(np.cumsum(p[order]), 0.9) + 1]
            assert len(kept) < len(p)
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, 1 + place), p.shape), np.float64)
            codes[row, place] = kept[np.argmax((np.log(p) + noise)[kept])]
    return np.asarray(task.embedding(params, codes), np.float64).reshape(B, CANDIDATES, -1)


def test_sample_is_a_plain_loop_over_the_whole_network_and_the_better_candidate(drawn):
    task, params, cond, keys, z, sample = drawn
    candidates = plain_loop(task, params, cond, keys)
    dots = np.einsum("bcd,bd->bc", candidates, cond["z_txt"])
    assert len(set(dots.argmax(1))) > 1  # not always the first
    np.testing.assert_allclose(z, candidates[np.arange(B), dots.argmax(1)], rtol=1e-4, atol=1e-4)
    other = np.asarray(sample(params, {**cond, "near": -cond["z_txt"]}, keys))
    np.testing.assert_allclose(other, candidates[np.arange(B), dots.argmin(1)], rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch_mates(drawn):
    task, params, cond, keys, z, sample = drawn
    order = np.array([3, 3, 2, 0])
    others = {name: value[order] for name, value in cond.items()}
    again = np.asarray(sample(params, others, keys[np.array([1, 0, 2, 3])]))
    np.testing.assert_allclose(again[2], z[2], rtol=1e-5, atol=1e-6)
    assert np.abs(again - z)[[0, 1, 3]].max(1).min() > 1e-2


def test_the_same_is_drawn_where_projections_are_one(drawn, monkeypatch):
    """As on a GPU."""
    task, params, cond, keys, z, _ = drawn
    monkeypatch.setattr(prior_ar, "for_loops", lambda p: layers_apart(p, join=True))
    found = jax.jit(lambda *args: task.sample(*args))(params, cond, keys)
    np.testing.assert_allclose(found, z, rtol=1e-5, atol=1e-6)


def test_codes_are_drawn_as_often_as_their_probabilities_say():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    n = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32))[None], (n, 4))
    keys = jax.random.split(jax.random.key(0), n)

    @functools.cache
    def shares(**settings):
        return np.bincount(np.asarray(jax.jit(lambda x, k: draw_code(x, k, **settings))(logits, keys)), minlength=4) / n

    def near(expected):
        return pytest.approx(np.asarray(expected), abs=4 * 0.5 / np.sqrt(n))

    assert shares() == near(p)
    assert shares(temperature=0.5) == near(p**2 / np.sum(p**2))
    assert shares(top_p=0.7) == near([2 / 3, 1 / 3, 0, 0]) and shares(top_p=0.7)[2:].sum() == 0
    assert shares(top_p=0.76)[2] > 0 and shares(top_p=0.76)[3] == 0
    assert shares(top_p=1e-3)[0] == 1 == shares(temperature=0)[0]
    even = jax.jit(lambda key: draw_code(jnp.zeros((200, 8)), jax.random.split(key, 200), top_p=0.5))
    assert len(np.unique(even(jax.random.key(1)))) == 4


def test_evaluate_compares_with_what_costs_nothing(measured):
    params = {**measured[1], "net": {}}

    def prefix(caption, mask, z_txt, keep, sizes):
        return sizes

    def step(token, place, prefixes, own):
        return 99 * jax.nn.one_hot(codes[:, place], BUCKETS), own

    net = lambda *_: 99 * jax.nn.one_hot(codes, BUCKETS)  # noqa: E731
    task = with_net(prefix=prefix, step=step, __call__=net)
    task.model.attributes.update(first=lambda dot, rows=0: dot, room=lambda rows: jnp.zeros(rows))
    batch = encoded(task, next(batches(2, 9)))
    codes = task.codes(params, batch["z_img"])
    told = jax.jit(lambda *args: (task.evaluate(*args, jax.random.key(0)), task.preview(*args, jax.random.key(0))))
    sums, picture = jax.device_get(told(params, batch))
    found = {name: float(total) / n for name, (total, n) in sums.items()}
    z, held = np.asarray(batch["z_img"], np.float64), np.asarray(task.embedding(params, codes), np.float64)
    cosine = (np.sum(z * held, 1) / np.linalg.norm(z, axis=1) / np.linalg.norm(held, axis=1)).mean()
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5) == found["cosine_of_codes"]
    assert found["accuracy"] == 1 and found["loss"] < 1e-6
    assert {"cosine_of_text_embedding", "cosine_of_mean", "cosine_of_others", "bits"} <= found.keys()
    mean, components, std = (np.asarray(params[name], np.float64) for name in ("mean", "components", "std"))
    check_picture(picture, *((a - mean) @ components / std for a in (held, z)))


def test_what_is_measured_gets_no_gradient_and_captions_may_enter_as_states():
    made = tiny_stack.configs()
    config, clip = made["prior_ar"], tasks.make(made["clip"]).model
    config.model.caption = "states"
    task = tasks.make(config, clip)
    params = tiny_stack.weights(config, clip)
    assert "states_in" in params["net"] and "word_embed" not in params["net"]
    rng = np.random.default_rng(0)
    length = clip.text["max_len"]
    shape = {"z_img": (2, 8), "z_txt": (2, 8), "states": (2, length, 16), "mask": (2, length)}
    batch = {name: rng.standard_normal(size).astype(np.float32) for name, size in shape.items()}
    batch["mask"] = batch["mask"] > 0
    slopes = jax.jit(jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0]))(params)
    assert all(np.asarray(slopes[name]).any() == (name == "net") for name in params if name != "net")
    assert np.asarray(slopes["net"]["out"]["kernel"]).any()
    config.model.text = {"width": 8, "layers": 1, "heads": 2}
    with pytest.raises(UserError, match="model.text encodes tokens"):
        tasks.make(config, clip)
