"""The upsampler's task: small images against numpy, how many are blurred, what the network is shown, other sizes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stack
from tests.interop import glide_files
from tests.tasks import stubs
from unclip_jax import tasks
from unclip_jax.data.images import gaussian_blur, resize
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Out
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.errors import UserError
from unclip_jax.tasks.pictures import mean_loss
from unclip_jax.tasks.upsampler import UpsamplerTask

SAMPLER = {"name": "ddim", "steps": 3}
SIDE, FACTOR = 12, 2


def with_net(answer=lambda x, time: x[..., :3], **settings):
    """A task whose network answers `answer(x, time)`, x being [noised, enlarged]."""
    net = stubs.Net({"__call__": lambda x, time, train=False: answer(x, time)})
    settings = {"factor": FACTOR, "target": "x0", **settings}
    return UpsamplerTask(net, make_schedule("cosine", 20), SIDE, SAMPLER, **settings)


def pictures(n, side=SIDE, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, side, side, 3)).astype(np.float32)


def shrinking(side: int, factor: int) -> np.ndarray:
    """f64[side / factor, side]: Keys' cubic (a = -1/2) stretched by the factor, each row of sum 1."""
    small, large = np.arange(side // factor), np.arange(side)
    x = np.abs((large[None] + 0.5) - (small[:, None] + 0.5) * factor) / factor
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("factor", [2, 4])
def test_small_images_are_antialiased_cubic_reductions(factor):
    image = pictures(2)
    encoded = with_net(factor=factor).encode({}, {"image": image, "other": 1})
    weights = shrinking(SIDE, factor)
    expected = np.einsum("ah,bw,nhwc->nabc", weights, weights, image.astype(np.float64))
    np.testing.assert_allclose(encoded["low"], expected, atol=1e-5)
    assert encoded["image"] is image and encoded["other"] == 1


def test_a_size_that_the_factor_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="images of 15 pixels must be divisible by factor=2"):
        with_net().encode({}, {"image": pictures(1, 15)})


def test_small_images_that_the_loader_made_are_taken_as_they_are():
    image, low = pictures(2), pictures(2, SIDE // FACTOR)
    encoded = with_net().encode({}, {"image": image, "low": low})
    assert encoded["low"] is low and encoded["image"] is image
    with pytest.raises(ValueError, match="loader.factor made 3 pixels of 12, and objective.factor is 2"):
        with_net().encode({}, {"image": image, "low": low[:, :3, :3]})


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_given_share_of_small_images_is_blurred(share):
    seen, n = [], 200

    def answer(x, time):
        seen.append(np.asarray(x[..., 3:]))
        return x[..., :3]

    task = with_net(answer, blur_share=share, blur=0.8)
    batch = task.encode({}, {"image": pictures(n)})
    task.loss({}, batch, jax.random.key(0))

    def enlarged(low):
        return np.asarray(jax.image.resize(low, (n, SIDE, SIDE, 3), "bicubic"))

    sharp = np.isclose(seen[0], enlarged(batch["low"]), atol=1e-5).all((1, 2, 3))
    blurred = np.isclose(seen[0], enlarged(gaussian_blur(batch["low"], 0.8)), atol=1e-5).all((1, 2, 3))
    assert (sharp ^ blurred).all()
    assert abs(blurred.mean() - share) <= 4 * np.sqrt(share * (1 - share) / n)


def test_the_network_is_shown_the_noised_picture_and_the_small_one_and_predicts_the_large_one():
    seen = []

    def answer(x, time):
        seen.append((np.asarray(x), np.asarray(time)))
        return truth

    task = with_net(answer)
    truth = jnp.asarray(pictures(1000))
    loss, metrics = task.loss({}, task.encode({}, {"image": truth}), jax.random.key(1))
    assert float(loss) < 1e-10 and metrics.keys() == {"mse"}
    ((x, time),) = seen
    assert x.shape == (1000, SIDE, SIDE, 6) and set(time) == set(range(20))
    for t in (0, 10, 19):
        alike = np.corrcoef(x[time == t][..., :3].ravel(), np.asarray(truth)[time == t].ravel())[0, 1]
        signal = task.schedule.alphas_cumprod[t] / 3  # 1/3: the pictures' variance
        noise = 1 - task.schedule.alphas_cumprod[t]
        assert alike == pytest.approx(np.sqrt(signal / (signal + noise)), abs=0.05)


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_any_size_is_drawn(side, sampler):
    """A network that answers with the enlarged small picture draws just that."""
    low = pictures(2, side // FACTOR)
    task = with_net(lambda x, time: x[..., 3:])
    drawn = task.sample({}, {"low": low}, jax.random.split(jax.random.key(0), 2), name=sampler, steps=4)
    expected = np.clip(jax.image.resize(low, (2, side, side, 3), "bicubic"), -1, 1)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_tiles_draw_the_same_where_the_network_looks_at_each_pixel_alone():
    task = with_net(lambda x, time: 0.9 * x[..., :3] + 0.1 * x[..., 3:])
    task = dataclasses.replace(task, model=stubs.Net(task.model.methods, {"patch": 2, "multipliers": (1, 2)}))
    low, keys = pictures(2, 12), jax.random.split(jax.random.key(0), 2)
    whole = task.sample({}, {"low": low}, keys, name="ddpm")
    for more in ({"tile": 24}, {"tile": 16}, {"tile": 12, "overlap": 5}):
        np.testing.assert_allclose(task.sample({}, {"low": low}, keys, name="ddpm", **more), whole, atol=1e-5)
    for more, words in (({"tile": 10}, "tile=10 must be a multiple of the network's 4"),
                        ({"tile": 8, "overlap": 5}, "overlap=5 must be at most 4")):
        with pytest.raises(UserError, match=words):
            task.sample({}, {"low": low}, keys, **more)
    assert task.tiles(24) == (24, 6, 4) and task.tiles(24, 0) == (24, 0, 4)
    sides, net = set(), stubs.Net({"__call__": lambda x, time: (sides.add(x.shape[1]), x[..., :3])[1]})
    two = dataclasses.replace(task, model=stubs.Net(net.methods, task.model.attributes), last_steps=1)
    two.sample({"net": {}, "last": {}}, {"low": low}, keys, tile=16)
    assert sides == {16}  # of both networks


def test_the_second_network_draws_the_steps_of_least_noise_of_those_that_are_taken():
    """As many as `last_steps` says, of the steps of this call and not of the config."""

    class Two(stubs.Net):
        def apply(self, variables, x, time):
            jax.debug.callback(lambda t: told.append((variables["params"], int(t))), time[0], ordered=True)
            return x[..., :3]

    told, task = [], dataclasses.replace(with_net(), model=Two({}), last_steps=2)
    for steps, over in ((3, {}), (6, {"steps": 6})):
        times = respace(task.schedule, steps).timesteps[::-1].tolist()
        params = {"net": "first", "last": "last"}
        task.sample(params, {"low": pictures(2, 2)}, jax.random.split(jax.random.key(0), 2), **over)
        jax.effects_barrier()
        assert told == list(zip(["first"] * (steps - 2) + ["last"] * 2, times, strict=True)) and times[-2] > 1
        told.clear()


def test_a_network_that_reads_captions_is_tiled_at_its_unet_s_factor():
    task = tasks.make(glide_files.config("upsampler", 30))
    assert task.captioned and task.tiles(16) == (16, 4, 4)
    with pytest.raises(UserError, match="tile=18 must be a multiple of the network's 4"):
        task.tiles(18)


def test_a_sample_does_not_depend_on_its_batch_mates():
    task = with_net(lambda x, time: 0.9 * x[..., :3] + 0.1 * x[..., 3:])
    low, keys = pictures(3, SIDE // FACTOR), jax.random.split(jax.random.key(0), 3)
    whole = np.asarray(task.sample({}, {"low": low}, keys, name="ddpm"))
    alone = np.asarray(task.sample({}, {"low": low[1:2]}, keys[1:2], name="ddpm"))
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5, atol=1e-6)


def test_settings_go_before_the_config_s_and_temperature_is_a_factor_on_the_noise():
    """The network is linear, so what is drawn is as large as the noise was."""
    task = with_net(lambda x, time: 0.02 * x[..., :3])
    low, keys = pictures(2, SIDE // FACTOR), jax.random.split(jax.random.key(0), 2)
    whole, more, half = (
        np.asarray(task.sample({}, {"low": low}, keys, **over)) for over in ({}, {"steps": 5}, {"temperature": 0.5})
    )
    assert 0.001 < np.abs(whole).max() < 1 and not np.allclose(whole, more, rtol=0.01, atol=0)
    np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-4, atol=1e-7)
    same = dataclasses.replace(task, sampler={"name": "ddim", "steps": 5, "temperature": 0.5})
    np.testing.assert_allclose(same.sample({}, {"low": low}, keys), 0.5 * more, rtol=1e-4, atol=1e-7)


def test_variances_that_were_measured_are_drawn_with():
    task, table = with_net(lambda x, time: jnp.sin(x[..., :3])), jnp.linspace(0.1, 0.9, 20)
    low, keys = pictures(2, SIDE // FACTOR), jax.random.split(jax.random.key(0), 2)
    drawn = task.sample({"x0_variance": table}, {"low": low}, keys, name="analytic")
    how = {"name": "analytic", "steps": 3, "target": "x0", "x0_variance": table}
    noise = initial_noise(keys, (SIDE, SIDE, 3))
    expected = draw(task.schedule, lambda xt, _: Out(jnp.sin(xt)), noise, keys, **how)
    np.testing.assert_allclose(drawn, jnp.clip(expected, -1, 1), atol=1e-5)


def test_times_noise_and_blur_are_drawn_anew_and_apart():
    """Whatever is drawn from one key correlates no more than by chance, four deviations at most."""
    seen, n = [], 400
    task = with_net(lambda x, time: (seen.append((np.asarray(x), np.asarray(time))), x[..., :3])[1])
    batch = {"image": np.zeros((n, SIDE, SIDE, 3), np.float32), "low": pictures(n, SIDE // FACTOR)}
    for key in range(2):
        task.loss({}, batch, jax.random.key(key))
    (x, time), (other, later) = seen
    sharp = np.asarray(resize(batch["low"], SIDE))
    blurred = [(a[..., 3:] != sharp).any((1, 2, 3)) for a in (x, other)]
    noise = x[..., :3].mean((1, 2, 3)) / np.sqrt(1 - task.schedule.alphas_cumprod[time])
    assert (np.abs(np.corrcoef([time, blurred[0], noise]) - np.eye(3)) < 4 / np.sqrt(n)).all()
    assert (time != later).any() and (blurred[0] != blurred[1]).any() and (x[..., :3] != other[..., :3]).any()


def test_an_upsampler_is_not_guided():
    config = tiny_stack.configs()["upsampler"]
    config.sampler.guidance = 2.0
    with pytest.raises(UserError, match="sampler.guidance=2.0: an upsampler is not guided. Fix: leave it out"):
        tasks.make(config)
    config.sampler.guidance = 1.0  # none
    assert tasks.make(config).sampler["guidance"] == 1


def test_small_images_are_within_the_range_of_drawn_ones():
    edge = jnp.where(jnp.arange(SIDE)[None, None, :, None] < SIDE // 2 + 1, -1.0, 1.0) * jnp.ones((2, SIDE, 1, 3))
    assert float(jnp.abs(resize(edge, SIDE // FACTOR)).max()) > 1.01  # as resizing alone gives them
    low = with_net(None).encode({}, {"image": edge})["low"]
    assert float(low.min()) == -1 and float(low.max()) == 1


def test_held_out_losses_are_told_when_no_picture_is_trained_on():
    """At times of the whole schedule, which tells the loss to switch dropout off."""
    asked = []

    def loss(params, batch, rng, t):
        asked.append(t)
        return 2.0, {"mse": 3.0}

    task = SimpleNamespace(schedule=SimpleNamespace(num_steps=50), loss=loss)
    found = mean_loss(task, {}, {"image": np.zeros((400, 2, 2, 3))}, jax.random.key(1))
    assert found == {"loss": (800.0, 400), "mse": (1200.0, 400)}
    (t,) = asked
    assert t.shape == (400,) and int(t.min()) == 0 and int(t.max()) == 49 and abs(float(t.mean()) - 24.5) < 3


def test_preview_and_evaluation():
    task = with_net(lambda x, time: 0 * x[..., :3])
    batch = task.encode({}, {"image": pictures(4)})
    rows = np.asarray(task.preview({}, batch, jax.random.key(0))).reshape(3, 4, SIDE, SIDE, 3)
    np.testing.assert_array_equal(rows[0], np.repeat(np.repeat(batch["low"], FACTOR, 1), FACTOR, 2))
    np.testing.assert_allclose(rows[1], 0, atol=1e-6)
    np.testing.assert_array_equal(rows[2], batch["image"])
    training = []
    net = stubs.Net({"__call__": lambda x, time, train=False: (training.append(train), 0 * x[..., :3])[1]})
    task = dataclasses.replace(task, model=net)
    task.loss({}, batch, jax.random.key(0))
    total, n = task.evaluate({}, batch, jax.random.key(0))["loss"]
    assert training == [True, False]  # whether there is dropout
    assert n == 4 and total / 4 == pytest.approx(np.square(batch["image"]).mean(), rel=1e-5)


def test_the_network_has_six_channels_where_the_variance_is_learned():
    config = tiny_stack.configs()["upsampler"]
    assert tasks.make(config).model.out_channels == 3
    config.objective.vlb_weight = 0.001
    assert tasks.make(config).model.out_channels == 6
    assert dataclasses.replace(tasks.make(config), factor=4).factor == 4


def test_a_network_for_inpainting_is_trained_with_holes_and_shown_what_is_known():
    seen, n = [], 200
    task = with_net(lambda x, time: (seen.append(x), x[..., :3])[1], inpaint=True)
    truth = pictures(n)

    @jax.jit
    def shown_in_training(truth):
        task.loss({}, task.encode({}, {"image": truth}), jax.random.key(0))
        return seen.pop()

    known, keep = np.split(np.asarray(shown_in_training(truth))[..., 6:], [3], -1)
    np.testing.assert_array_equal(known, truth * keep)
    assert set(np.unique(keep)) == {0, 1} and 0.2 < keep.mean() < 0.8 and (keep == keep[:1]).mean() < 0.9

    low, keys = pictures(2, SIDE // FACTOR), jax.random.split(jax.random.key(1), 2)
    given = {"known": pictures(2, seed=1), "keep": np.ones((2, SIDE, SIDE, 1)) * (np.arange(SIDE) < 5)[:, None]}
    seen.clear()
    drawn = task.sample({}, {"low": low, **given}, keys)
    kept = given["keep"][..., 0] == 1
    np.testing.assert_array_equal(np.asarray(drawn)[kept], given["known"][kept])
    with jax.disable_jit():
        task.sample({}, {"low": low, **given}, keys)
        task.sample({}, {"low": low}, keys)
    shown = [np.asarray(x)[..., 6:] for x in seen[-2 * SAMPLER["steps"] :]]
    for x in shown[: SAMPLER["steps"]]:
        np.testing.assert_allclose(x, np.concatenate([given["known"] * given["keep"], given["keep"]], -1), atol=1e-6)
    assert all((x == 0).all() for x in shown[SAMPLER["steps"] :])


@pytest.mark.parametrize("captioned", [False, True])
def test_one_that_begins_from_a_plain_one_begins_with_its_predictions(captioned):
    config = tiny_stack.configs()["upsampler"]
    if captioned:
        config = glide_files.config("upsampler", 30)
    plain = tasks.make(config)
    config.objective.inpaint = True
    task, key = tasks.make(config), jax.random.key(0)
    normal = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda a: np.float32(normal(a.shape) / 8), jax.eval_shape(plain.init, key))
    shapes = jax.tree.map(jnp.shape, task.adopt(params))
    assert shapes == jax.tree.map(jnp.shape, jax.eval_shape(task.init, key)) and task.adopt(task.adopt(params))
    assert plain.adopt(params) is params
    side, factor = plain.image_size, plain.factor
    batch = {"image": pictures(2, side), "low": pictures(2, side // factor), "known": pictures(2, side, 1)}
    batch |= {"keep": np.ones((2, side, side, 1), np.float32), "tokens": np.ones((2, glide_files.LENGTH), int)}
    batch["mask"] = batch["tokens"] > 0

    def predicted(task, params):
        return jax.jit(lambda p: task.x0_and_denoise(p, batch)[1](batch["image"], np.array([3, 700])))(params)

    got, wanted = predicted(task, task.adopt(params)), predicted(plain, params)
    assert np.abs(wanted[0]).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)
