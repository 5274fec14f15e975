"""A decoder with channels for a picture and its mask: without effect at first, and what they show in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_runs, tiny_stack
from tests.tasks import stubs
from tests.tasks.test_decoder import SIDE, batch, with_net
from unclip_jax import tasks, train
from unclip_jax.models.unet import UNet, fold, widen
from unclip_jax.run import make_run


@pytest.mark.parametrize("patch", [1, 2])
def test_a_widened_kernel_reads_the_first_channels_alone(patch):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, patch**2 * 3, 5))
    x, more = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(2, 8, 8, 4))
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        fold(jnp.asarray(x), patch), jnp.asarray(k), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    wide = widen(jnp.asarray(kernel), patch, 4)
    np.testing.assert_allclose(conv(np.concatenate([x, more], -1), wide), conv(x, kernel), atol=1e-5)


def test_a_new_networks_extra_channels_are_without_effect():
    net = UNet(channels=8, multipliers=(1,), blocks=1, groups=4, patch=2, outer=8, extra=4)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 7))
    params = jax.jit(net.init)(jax.random.key(1), x, jnp.zeros(1, jnp.int32))["params"]
    params["out"]["kernel"] = jnp.ones_like(params["out"]["kernel"])
    run = jax.jit(lambda x: net.apply({"params": params}, x, jnp.zeros(1, jnp.int32)))
    np.testing.assert_array_equal(run(x), run(x.at[..., 3:].set(5.0)))
    assert (run(x) != run(x.at[..., :3].add(1.0))).any()


@pytest.mark.slow
@pytest.mark.parametrize("patch", [1, 2])
def test_a_run_that_begins_from_a_plain_decoder_begins_with_its_outputs(patch, tmp_path):
    made, tuned = (tiny_runs.config("decoder", model__unet__patch=patch) for _ in range(2))
    for each in (made, tuned):
        with each.unlocked():
            each.model.unet.outer = 8 * (patch - 1)
    base = tasks.make(made, tasks.load_clip(made.clip).model)
    params = tiny_stack.weights(made, base.clip)
    tiny_runs.save(tmp_path / "base", made, {**params, "x0_variance": np.ones(3, np.float32)}, None)
    with tuned.unlocked():
        tuned.objective.inpaint, tuned.init = True, str(tmp_path / "base")
    run = make_run(tuned, tmp_path / "run")
    rng = np.random.default_rng(0)
    cond = {
        "image": rng.uniform(-1, 1, (2, 16, 16, 3)),
        "z_img": rng.normal(size=(2, 8)),
        "z_txt": rng.normal(size=(2, 8)),
        "states": rng.normal(size=(2, 32, 16)),
        "tokens": rng.integers(0, 9, (2, 32)),
        "mask": np.ones((2, 32), bool),
        "known": rng.uniform(-1, 1, (2, 16, 16, 3)),
        "keep": np.ones((2, 16, 16, 1)),
    }
    xt, time = rng.normal(size=(2, 16, 16, 3)), np.array([3, 700])

    def outputs(task, params):
        return jax.jit(lambda params: task.x0_and_denoise(params, cond)[1](jnp.asarray(xt), time))(params)

    got, wanted = outputs(run.task, train._fresh(run, None).params), outputs(base, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def shown_in_training(task, n=400):
    """(x0, keep, known) that the network is given in one loss."""
    seen = []
    net = stubs.Net({
        "condition": lambda *a: a[0], "denoise": lambda x, time, cond, train=False: (seen.append(x), x[..., :3])[1],
    }, {"unet": {}})  # fmt: skip
    given = batch(task, n)

    @jax.jit
    def shown(given):
        dataclasses.replace(task, model=net, inpaint=True).loss({}, given, jax.random.key(0))
        return seen.pop()

    x = np.asarray(shown(given))
    return np.asarray(given["image"]), x[..., 6:], x[..., 3:6]


def test_in_training_the_network_is_shown_the_picture_but_for_random_holes():
    image, keep, known = shown_in_training(with_net())
    assert set(np.unique(keep)) == {0, 1} and keep.shape == (400, SIDE, SIDE, 1)
    np.testing.assert_array_equal(known, image * keep)
    share = keep.mean((1, 2, 3))
    assert 0.1 < (share == 0).mean() < 0.4 and (share == 1).any() and ((0 < share) & (share < 1)).mean() > 0.4


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_known_stays_and_the_network_sees_it_in_both_halves(inpaint, guidance):
    seen = []

    def answer(x, time):
        seen.append(x)
        return 0.5 * x[..., :3]

    task = dataclasses.replace(with_net(answer=answer), inpaint=inpaint)
    rng = np.random.default_rng(0)
    known = rng.uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    keep = rng.integers(0, 2, (2, SIDE, SIDE, 1)).astype(np.float32)
    cond, keys = {**batch(task, 2), "known": known, "keep": keep}, jax.random.split(jax.random.key(1), 2)
    with jax.disable_jit():
        drawn = np.asarray(task.sample({}, cond, keys, guidance=guidance, resample=2))
    there = np.broadcast_to(keep > 0, known.shape)
    np.testing.assert_array_equal(drawn[there], known[there])
    assert (drawn[~there] != known[~there]).all()
    rows = 2 if guidance == 1 else 4
    assert {x.shape for x in seen} == {(rows, SIDE, SIDE, 7 if inpaint else 3)}
    if inpaint:
        expected = np.concatenate([known * keep, keep], -1)
        np.testing.assert_array_equal(seen[0][..., 3:], np.concatenate([expected] * (rows // 2)))
        with jax.disable_jit():  # without a picture it draws freely, shown nothing
            task.sample({}, batch(task, 2), keys)
        assert seen[-1].shape[-1] == 7 and not np.asarray(seen[-1][..., 3:]).any()
