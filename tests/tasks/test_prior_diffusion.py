"""The prior's task: statistics, whitening, dropped captions; sampling against a plain loop over the whole network."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_runs, tiny_stack
from tests.tasks import stubs
from unclip_jax import tasks
from unclip_jax.diffusion.sample import initial_noise, step_noise
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.models.prior import Prefix
from unclip_jax.nn.drawing import layers_apart
from unclip_jax.tasks import prior_diffusion
from unclip_jax.tasks.prior_diffusion import PriorTask
from unclip_jax.tasks.teacher import caption_of

SAMPLER = {"name": "ddpm", "steps": 3, "guidance": 1.0, "candidates": 1}
D = 6


def batches(n, size=16):
    """Random pictures, whose first pixels a stub CLIP takes as z_img, each component of its own mean and spread."""
    rng = np.random.default_rng(n)
    spread = np.linspace(0.2, 3, stubs.SIDE**2 * 3).reshape(stubs.SIDE, stubs.SIDE, 3)
    while True:
        image = spread * rng.standard_normal((size, stubs.SIDE, stubs.SIDE, 3)) - 2 * spread
        tokens = rng.integers(0, 9, (size, stubs.LENGTH)).astype(np.int32)
        yield {"image": image.astype(np.float32), "tokens": tokens, "mask": tokens >= 0}


def with_net(**methods):
    net = stubs.Net(methods, {"vocab_size": 9})
    return PriorTask(net, make_schedule("cosine", 20), stubs.clip(D), SAMPLER)


def test_statistics_are_those_of_the_first_batches():
    params = with_net().prepare({"clip": {}}, {"net": "kept"}, batches(0))
    stream = batches(0)
    z = np.concatenate([next(stream)["image"].reshape(16, -1)[:, :D] for _ in range(prior_diffusion.PREPARE_BATCHES)])
    assert params["net"] == "kept"
    np.testing.assert_allclose(params["mean"], z.mean(0), rtol=1e-4)
    np.testing.assert_allclose(params["std"], z.std(0), rtol=1e-4)


def test_a_mean_far_from_zero_takes_no_digits_from_the_deviation():
    far = ({**batch, "image": batch["image"] + 1000} for batch in batches(0))
    params, near = (with_net().prepare({"clip": {}}, {}, stream) for stream in (far, batches(0)))
    np.testing.assert_allclose(params["std"], near["std"], rtol=1e-3)


def test_a_component_that_never_varies_does_not_divide_by_zero():
    def still():
        while True:
            batch = next(batches(0))
            yield {**batch, "image": np.full_like(batch["image"], 0.5)}

    params = with_net().prepare({"clip": {}}, {}, still())
    np.testing.assert_allclose(params["mean"], 0.5, rtol=1e-5)
    assert (np.asarray(params["std"]) >= 1e-3 - 1e-6).all()


def encoded(task, batch):
    return task.encode({"clip": {}}, batch)


def test_the_whitened_embedding_is_what_is_predicted_and_noised():
    """A network that answers with the truth has no loss; it is shown abar x0 + … of unit variance and the true time."""
    calls = stubs.Calls()

    def answer(xt, time, caption, mask, z_txt, keep):
        calls.note(xt=xt, time=time, caption=caption, z_txt=z_txt)
        return truth

    task = with_net(__call__=answer)
    batch = encoded(task, next(batches(1, 4000)))
    z = np.asarray(batch["z_img"], np.float64)
    params = {"net": {}, "mean": z.mean(0).astype(np.float32), "std": z.std(0).astype(np.float32)}
    truth = jnp.asarray((z - z.mean(0)) / z.std(0), jnp.float32)
    loss, metrics = task.loss(params, batch, jax.random.key(0))
    assert float(loss) < 1e-8 and set(metrics) == {"mse"}
    (call,) = calls
    assert set(np.asarray(call.time)) == set(range(20))
    np.testing.assert_allclose(np.asarray(call.xt).std(), 1, atol=0.03)
    noisiest = np.asarray(call.time) == 19
    assert abs(np.corrcoef(np.asarray(call.xt)[noisiest].ravel(), np.asarray(truth)[noisiest].ravel())[0, 1]) < 0.15
    assert call.caption is batch["tokens"] and call.z_txt is batch["z_txt"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_captions_are_dropped_at_the_given_rate(rate):
    calls = stubs.Calls()

    def net(xt, time, caption, mask, z_txt, keep):
        calls.note(keep=np.asarray(keep), others=np.stack([np.asarray(time, float), np.ravel(xt)[:n]]))
        return xt

    task = dataclasses.replace(with_net(__call__=net), text_drop=rate)
    n = 4000
    batch = encoded(task, next(batches(1, n)))
    params = {"net": {}, "mean": jnp.zeros(D), "std": jnp.ones(D)}
    task.loss(params, batch, jax.random.key(3))
    task.loss(params, batch, jax.random.key(4))
    first, second = (~call.keep for call in calls)
    assert abs(first.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / n)
    if rate in (0, 1):
        return
    assert (first != second).any()
    for call in calls:  # by chance of its own, which no time and no noise share
        assert np.abs(np.corrcoef(call.keep, call.others)[0, 1:]).max() < 5 / np.sqrt(n)


def test_statistics_get_no_gradient():
    task = with_net(__call__=lambda xt, *_: xt)
    batch = encoded(task, next(batches(1)))
    params = {"net": {}, "mean": jnp.zeros(D), "std": jnp.ones(D)}
    slopes = jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0])(params)
    assert not np.asarray(slopes["mean"]).any() and not np.asarray(slopes["std"]).any()


# The real network, drawn from with its prefix run once, against a plain loop over the whole sequence.


B, GUIDANCE, CANDIDATES, BOUND = 4, 1.5, 3, 4.0


@pytest.fixture(scope="module")
def drawn():
    """The task, parameters, condition, keys; what `sample` draws; and the compiled function."""
    made = tiny_stack.configs()
    config = made["prior"]
    with config.unlocked():
        config.diffusion.num_steps = 100
        config.sampler.update(steps=5, guidance=GUIDANCE, candidates=CANDIDATES)
        config.objective.clip_x0 = BOUND
    task = tasks.make(config, tasks.make(made["clip"]).model)
    params = tiny_stack.weights(config, task.clip)
    rng = np.random.default_rng(0)
    tokens, mask = tiny_stack.tokenizer().encode(["a red circle", "two", "a blue star above a ring", ""], warn=False)
    cond = {
        "tokens": tokens,
        "mask": mask,
        "z_txt": rng.standard_normal((B, task.clip.embed_dim)).astype(np.float32),
        "states": np.zeros((B, task.clip.text["max_len"], 16), np.float32),
    }
    keys = jax.random.split(jax.random.key(5), B)
    sample = jax.jit(task.sample)
    return task, params, cond, keys, np.asarray(sample(params, cond, keys)), sample


def plain_loop(task, params, cond, keys, interval=(0, 1)):
    """All candidates f64[B, C, D], by Ho et al.'s algorithm 2 in numpy, the network run on the whole sequence."""
    forward = jax.jit(lambda *args: task.model.apply({"params": params["net"]}, *args))
    sched = respace(task.schedule, 5)
    abar = sched.alphas_cumprod
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    tokens, mask, z_txt = (np.repeat(cond[k], CANDIDATES, 0) for k in ("tokens", "mask", "z_txt"))
    n, d = z_txt.shape
    own = jnp.stack([jax.random.fold_in(key, i) for key in keys for i in range(CANDIDATES)])
    xt = np.asarray(initial_noise(own, (d,)), np.float64)
    for i in reversed(range(5)):
        time = np.full((n,), sched.timesteps[i], np.int32)
        args = np.float32(xt), time, tokens, mask, z_txt
        cond_x0, null_x0 = (np.asarray(forward(*args, np.full((n,), keep)), np.float64) for keep in (True, False))
        guided = interval[0] <= time[0] / sched.timesteps[-1] <= interval[1]
        x0 = np.clip(null_x0 + (GUIDANCE if guided else 1) * (cond_x0 - null_x0), -BOUND, BOUND)
        mean = np.sqrt(before[i]) * beta[i] / (1 - abar[i]) * x0
        mean += np.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - abar[i]) * xt
        variance = beta[i] * (1 - before[i]) / (1 - abar[i])
        xt = mean + (np.sqrt(variance) * np.asarray(step_noise(own, i, (d,)), np.float64) if i else 0)
    z = xt * np.asarray(params["std"]) + np.asarray(params["mean"])
    return z.reshape(B, CANDIDATES, d)


def test_sample_is_a_plain_loop_over_the_whole_network_and_the_better_candidate(drawn):
    task, params, cond, keys, z, sample = drawn
    candidates = plain_loop(task, params, cond, keys)
    dots = np.einsum("bcd,bd->bc", candidates, cond["z_txt"])
    best = dots.argmax(1)
    assert len(set(best)) > 1  # not always the first
    np.testing.assert_allclose(z, candidates[np.arange(B), best], rtol=1e-4, atol=1e-4)
    assert np.abs(candidates - z[:, None]).max(-1).max(1).min() > 1e-3  # the others are others
    near = -cond["z_txt"]
    other = np.asarray(sample(params, {**cond, "near": near}, keys))
    np.testing.assert_allclose(other, candidates[np.arange(B), dots.argmin(1)], rtol=1e-4, atol=1e-4)


def test_guided_within_an_interval_alone(drawn):
    """Outside of it the captions' prefixes are read without the dropped one's."""
    task, params, cond, keys, z, _ = drawn
    draw = jax.jit(functools.partial(task.sample, interval=(0.2, 0.6)))
    candidates = plain_loop(task, params, cond, keys, (0.2, 0.6))
    best = np.einsum("bcd,bd->bc", candidates, cond["z_txt"]).argmax(1)
    found = np.asarray(draw(params, cond, keys))
    np.testing.assert_allclose(found, candidates[np.arange(B), best], rtol=1e-4, atol=1e-4)
    assert np.abs(found - z).max(1).min() > 1e-3


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
    monkeypatch.setattr(prior_diffusion, "for_loops", lambda p: layers_apart(p, join=True))
    found = jax.jit(lambda *args: task.sample(*args))(params, cond, keys)
    np.testing.assert_allclose(found, z, rtol=1e-5, atol=1e-5)


def prefixes(caption, mask, z_txt, keep, times, sizes):
    """Of captions and times that stand for their own keys and values."""
    ends = np.cumsum([0, *sizes])
    assert ends[-1] == len(caption) == len(mask) == len(z_txt)
    return tuple(Prefix(caption[a:b], times, mask[a:b]) for a, b in itertools.pairwise(ends))


def test_each_step_is_given_the_token_of_its_own_time():
    seen = []

    def step(xt, prefixes, place):
        jax.debug.callback(lambda *times: seen.append([int(t) for t in times]), *(p.times[place] for p in prefixes))
        return xt

    task = with_net(prefix=prefixes, step=step)
    params = {"net": {}, "mean": jnp.zeros(D), "std": jnp.ones(D)}
    keys = jax.random.split(jax.random.key(0), 2)
    task.sample(params, encoded(task, next(batches(0, 2))), keys, guidance=2.0, candidates=1, steps=3)
    jax.effects_barrier()
    assert seen == [[t, t] for t in respace(task.schedule, 3).timesteps[::-1].tolist()]


@pytest.mark.parametrize("empty_caption", [False, True])
def test_guidance_runs_one_dropped_caption_more_and_guidance_one_none(empty_caption):
    """The captions are the first half's, the dropped one all of the second's."""
    calls = stubs.Calls()

    def prefix(caption, mask, z_txt, keep, times, sizes):
        calls.note(caption=np.asarray(caption), mask=np.asarray(mask), z_txt=np.asarray(z_txt), keep=keep)
        return prefixes(caption, mask, z_txt, keep, times, sizes)

    def step(xt, prefixes, place):
        calls.note(rows=len(xt), captions=[len(p.before) for p in prefixes], masks=[len(p.mask) for p in prefixes])
        return xt

    task = dataclasses.replace(with_net(prefix=prefix, step=step), empty_caption=empty_caption)
    batch = encoded(task, next(batches(0, 5)))
    params = {"net": {}, "mean": jnp.zeros(D), "std": jnp.ones(D)}
    keys = jax.random.split(jax.random.key(0), 5)
    for guidance, sizes in ((1, [5]), (1.0, [5]), (2.0, [5, 1])):
        calls.clear()
        z = task.sample(params, batch, keys, guidance=guidance, candidates=3)
        assert z.shape == (5, D)
        first, *steps = calls
        for name in ("tokens", "mask", "z_txt"):
            rows = getattr(first, "caption" if name == "tokens" else name)
            np.testing.assert_array_equal(rows[:5], batch[name])
            if empty_caption:
                np.testing.assert_array_equal(rows[5:], batch["empty"][name][: len(rows) - 5])
        kept = None if first.keep is None else np.asarray(first.keep).tolist()
        assert kept == (None if empty_caption else [True] * 5 + [False] * (len(sizes) - 1))
        of_step = (15 * len(sizes), sizes, sizes)
        assert all((s.rows, s.captions, s.masks) == of_step for s in steps) and len(first.mask) == sum(sizes) and steps


def test_evaluate_compares_with_what_costs_nothing():
    """With the truth drawn the cosine is 1; text, mean and other pictures give theirs by numpy."""
    task = with_net(
        prefix=prefixes,
        step=lambda xt, *_: truth,
        __call__=lambda xt, *_: truth,
    )
    batch = encoded(task, next(batches(2, 9)))
    mean, std = jnp.linspace(-1, 1, D), jnp.linspace(1, 2, D)
    truth = (batch["z_img"] - mean[None]) / std[None]
    task = dataclasses.replace(task, clip_x0=None)
    found = jax.jit(task.evaluate)({"net": {}, "mean": mean, "std": std}, batch, jax.random.key(0))
    z, text = np.asarray(batch["z_img"], np.float64), np.asarray(batch["z_txt"], np.float64)

    def cosine(a, b):
        return (np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).sum()

    others = np.concatenate([z[-1:], z[:-1]])
    expected = {
        "cosine": 9.0,
        "cosine_of_text_embedding": cosine(z, text),
        "cosine_of_mean": cosine(z, np.tile(np.linspace(-1, 1, D), (9, 1))),
        "cosine_of_others": cosine(z, others),
        "loss": 0.0,
    }
    assert found.keys() == expected.keys()
    for name, (total, n) in found.items():
        assert n == 9
        np.testing.assert_allclose(total, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
    picture = np.asarray(task.preview({"net": {}, "mean": mean, "std": std}, batch, jax.random.key(0)))
    white = (z - np.linspace(-1, 1, D)) / np.linspace(1, 2, D)
    check_picture(picture, white, white)


def check_picture(picture, drawn, true):
    """A preview of whitened embeddings f64[N, D] each: cosines, in each row from black to white."""
    drawn, true = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (drawn, true))
    cosine = drawn @ true.T
    low, high = cosine.min(1, keepdims=True), cosine.max(1, keepdims=True)
    grey = 2 * (cosine - low) / (high - low) - 1
    assert picture.shape == (1, 4 * len(drawn), 4 * len(true), 3)
    np.testing.assert_allclose(picture[0, ::4, ::4], np.stack([grey] * 3, -1), atol=1e-3)


def test_captions_may_enter_as_clips_states():
    config = tiny_runs.config("prior_diffusion")
    clip = tasks.make(tiny_stack.configs()["clip"]).model
    with config.unlocked():
        config.model.caption = "states"
    task = tasks.make(config, clip)
    assert task.model.vocab_size == 0 and caption_of(task.model, {"tokens": 1, "states": 2}) == 2
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    assert "states_in" in shapes["net"] and "token_embed" not in shapes["net"]
