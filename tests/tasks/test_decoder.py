"""The decoder's task: what is dropped and how often, which rows guidance runs, what a sample depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stack
from tests.tasks import stubs
from unclip_jax import tasks
from unclip_jax.data.images import resize
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Out
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.tasks.decoder import DecoderTask
from unclip_jax.tasks.pictures import mean_loss, split_variance

SAMPLER = {"name": "ddpm", "steps": 3, "guidance": 2.0}
SIDE = 4


def with_net(calls=None, answer=lambda xt, time: xt, **settings):
    """A task whose network notes how it is called and answers `answer(xt, time)`."""
    calls = stubs.Calls() if calls is None else calls

    def condition(z_img, keep_image, tokens, mask, keep_text, z_txt, states):
        calls.note(what="condition", keep_image=np.asarray(keep_image), keep_text=np.asarray(keep_text), z_img=z_img)
        return z_img

    def denoise(xt, time, cond, train=False):
        calls.note(what="denoise", rows=len(xt), cond=len(cond), train=train)
        return answer(xt, time)

    net = stubs.Net({"condition": condition, "denoise": denoise})
    settings = {"target": "x0", "vlb_weight": 0.0, **settings}
    return DecoderTask(net, make_schedule("cosine", 20), stubs.clip(), SIDE, SAMPLER, **settings)


def batch(task, n, side=2 * SIDE, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 9, (n, stubs.LENGTH)).astype(np.int32)
    image = rng.uniform(-1, 1, (n, side, side, 3)).astype(np.float32)
    return task.encode({"clip": {}}, {"image": image, "tokens": tokens, "mask": tokens >= 0})


@pytest.mark.parametrize(("image", "text"), [(0.1, 0.5), (0.0, 1.0), (0.4, 0.4)])
def test_embedding_and_caption_are_dropped_at_their_rates_independently(image, text):
    calls, n = stubs.Calls(), 4000
    task = with_net(calls, clip_drop=image, text_drop=text)
    task.loss({}, batch(task, n), jax.random.key(0))
    no_image, no_text = ~calls[0].keep_image, ~calls[0].keep_text
    for share, rate in ((no_image, image), (no_text, text), (no_image & no_text, image * text)):
        assert abs(share.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / n)
    assert calls[1].train


def test_others_are_dropped_in_the_next_step():
    calls = stubs.Calls()
    task = with_net(calls, clip_drop=0.5)
    for seed in (0, 0, 1):
        task.loss({}, batch(task, 64), jax.random.key(seed))
    first, same, other = (call.keep_image for call in calls if call.what == "condition")
    assert (first == same).all() and (first != other).any()


@pytest.mark.parametrize(("guidance", "halves"), [(1, 1), (1.0, 1), (0.0, 2), (3.0, 2)])
def test_guidance_one_calls_no_unconditional_half(guidance, halves):
    calls = stubs.Calls()
    task = with_net(calls)
    task.sample({}, batch(task, 5), jax.random.split(jax.random.key(0), 5), guidance=guidance)
    first, *steps = calls
    expected = [True] * 5 + [False] * 5 * (halves - 1)
    assert first.keep_image.tolist() == first.keep_text.tolist() == expected
    assert {(s.rows, s.cond, s.train) for s in steps} == {(5 * halves, 5 * halves, False)}
    assert len(calls) == 2  # the condition once, the network traced once, whatever the number of steps


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_network_that_knows_the_picture_draws_it(sampler, guidance):
    truth = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, SIDE, SIDE, 3)), jnp.float32)
    task = with_net(answer=lambda xt, time: jnp.concatenate([truth] * (len(xt) // 3)))
    cond, keys = batch(task, 3), jax.random.split(jax.random.key(1), 3)
    drawn = task.sample({}, cond, keys, guidance=guidance, name=sampler, steps=4)
    np.testing.assert_allclose(drawn, truth, atol=1e-5)
    rows = np.asarray(task.preview({}, {**cond, "image": truth}, jax.random.key(0)))
    np.testing.assert_allclose(rows, np.concatenate([truth, truth]), atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_noise_of_the_inversion_draws_its_picture(guidance):
    """With the same guidance and levels; a network that knows half of the picture, and is told the other half by xt."""
    task = with_net(answer=lambda xt, time: 0.3 + 0.5 * xt * (1 - (time / 25.0).reshape(-1, 1, 1, 1)))
    cond, over = batch(task, 2, SIDE), {"guidance": guidance, "steps": 12, "least": 0.2}
    noise = task.invert({}, {**cond, "image": 0.5 * cond["image"]}, iterations=30, **over)
    drawn = task.sample({}, {**cond, "noise": noise}, jax.random.split(jax.random.key(0), 2), name="ddim", **over)
    np.testing.assert_allclose(drawn, 0.5 * cond["image"], atol=0.01)


def test_levels_begin_at_the_least_noise_where_there_are_steps_enough():
    task = with_net()
    noise = lambda least, steps: np.sqrt(1 - task._levels(least, steps).alphas_cumprod)  # noqa: E731
    assert noise(0, 5)[0] < 0.2 and 0.2 <= noise(0.2, 5)[0] < 0.3
    assert len(noise(0.2, 20)) == 20 and len(noise(0.99, 5)) == 5


def test_variances_measured_at_all_levels_are_read_at_those_drawn_with():
    task, table = with_net(answer=lambda xt, time: jnp.sin(xt)), jnp.linspace(0.1, 0.9, 20)
    keys, how = jax.random.split(jax.random.key(0), 2), {"name": "analytic", "steps": 4, "guidance": 1.0}
    drawn = task.sample({"x0_variance": table}, batch(task, 2), keys, least=0.2, **how)
    levels, noise = task._levels(0.2, 4), initial_noise(keys, (SIDE, SIDE, 3))
    own = table[20 - levels.num_steps :]
    assert levels.num_steps < 20
    expected = draw(levels, lambda xt, _: Out(jnp.sin(xt)), noise, keys, target="x0", x0_variance=own, **how)
    np.testing.assert_allclose(drawn, jnp.clip(expected, -1, 1), atol=1e-5)


def test_pictures_are_seen_by_clip_first_and_then_brought_to_size():
    task = with_net()
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, stubs.SIDE, stubs.SIDE, 3)).astype(np.float32)
    image[0] = np.where(np.arange(stubs.SIDE) < SIDE + 1, -1, 1)[None, :, None]
    assert np.abs(resize(image, SIDE)).max() > 1.01  # beyond the range, at the edge
    tokens = np.zeros((2, stubs.LENGTH), np.int32)
    told = task.encode({"clip": {}}, {"image": image, "tokens": tokens, "mask": tokens == 0})
    np.testing.assert_array_equal(told["z_img"], image.reshape(2, -1)[:, :6])
    assert told["image"].shape == (2, SIDE, SIDE, 3) and np.abs(told["image"]).max() <= 1
    np.testing.assert_allclose(np.asarray(told["image"]).mean(), image.mean(), atol=0.05)
    same = {"image": image[:, :SIDE, :SIDE], "tokens": tokens, "mask": tokens == 0}
    assert task.encode({"clip": {}}, same)["image"] is same["image"]
    assert "image" not in task.encode({"clip": {}}, {"tokens": tokens, "mask": tokens == 0})


def test_three_channels_are_the_prediction_and_three_more_the_variance():
    out = jnp.arange(2 * 6.0).reshape(2, 1, 1, 6)
    pred, var = split_variance(out)
    assert pred.shape == var.shape == (2, 1, 1, 3) and float(var[0, 0, 0, 0]) == 3
    assert split_variance(out[..., :3]).var is None


def test_evaluation_is_the_training_loss_as_sum_and_count():
    calls = stubs.Calls()
    task = with_net(calls, answer=lambda xt, time: 0 * xt)
    given = batch(task, 6)
    found = mean_loss(task, {}, given, jax.random.key(0))
    assert not calls[-1].train  # no dropout
    # Predicting black costs the mean square of the pictures.
    total, n = found["loss"]
    assert n == 6 and total / n == pytest.approx(np.square(given["image"]).mean(), rel=1e-5)
    assert found.keys() == {"loss", "mse"} and task.evaluate({}, given, jax.random.key(0)).keys() == found.keys()


def test_the_bound_on_the_variance_is_weighed():
    def answer(xt, time):
        return jnp.concatenate([0 * xt, 0 * xt], axis=-1)

    plain = with_net(answer=answer)
    given, key = batch(plain, 6), jax.random.key(0)
    loss, metrics = dataclasses.replace(plain, vlb_weight=0.01).loss({}, given, key)
    assert metrics.keys() == {"mse", "vlb"}
    np.testing.assert_allclose(loss, metrics["mse"] + 0.01 * metrics["vlb"], rtol=1e-5)
    np.testing.assert_allclose(plain.loss({}, given, key)[0], metrics["mse"], rtol=1e-6)


def test_a_sample_of_the_real_network_does_not_depend_on_its_batch_mates():
    made = tiny_stack.configs()
    task = tasks.make(made["decoder"], tasks.make(made["clip"]).model)
    params = tiny_stack.weights(made["decoder"], task.clip)
    rng = np.random.default_rng(0)
    tokens, mask = tiny_stack.tokenizer().encode(["a red circle", "two", "a blue star above a ring"], warn=False)
    length, width = task.clip.text["max_len"], task.clip.text["width"]
    cond = {
        "tokens": tokens,
        "mask": mask,
        "z_img": rng.standard_normal((3, task.clip.embed_dim)).astype(np.float32),
        "z_txt": rng.standard_normal((3, task.clip.embed_dim)).astype(np.float32),
        "states": rng.standard_normal((3, length, width)).astype(np.float32),
    }
    keys = jax.random.split(jax.random.key(5), 3)
    sample = jax.jit(task.sample)
    drawn = np.asarray(sample(params, cond, keys))
    assert drawn.shape == (3, 16, 16, 3) and np.abs(drawn).max() <= 1 and drawn.std() > 0.01
    order = np.array([1, 0, 2])
    others = {name: value[order] for name, value in cond.items()}
    again = np.asarray(sample(params, others, keys))
    np.testing.assert_allclose(again[2], drawn[2], rtol=1e-5, atol=1e-5)
    assert np.abs(again - drawn)[:2].reshape(2, -1).max(1).min() > 1e-3
    moved = np.asarray(sample(params, others, keys[order]))  # with their keys, the samples move along
    np.testing.assert_allclose(moved, drawn[order], rtol=1e-5, atol=1e-5)
