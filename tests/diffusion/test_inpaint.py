"""RePaint against the paper's own schedule and a float64 loop, and against the exact conditional of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import schedule as S
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Out
from unclip_jax.diffusion.inpaint import partway, repaint, travel
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.errors import UserError

FULL = S.make_schedule("cosine")


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def papers_levels(steps, jump, resample):
    """Every level in turn, one step at a time, as Lugmayr et al.'s appendix lists them."""
    jumps = {level: resample - 1 for level in range(0, steps - jump, jump)}
    levels, level = [steps], steps
    while level >= 1:
        level -= 1
        levels.append(level)
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            for _ in range(jump):
                level += 1
                levels.append(level)
    return levels


@pytest.mark.parametrize("steps, jump, resample", [(6, 1, 1), (9, 3, 2), (25, 10, 10), (7, 1, 3), (3, 5, 4)])
def test_the_walk_is_the_papers(steps, jump, resample):
    levels = [steps]
    for n, after in travel(steps, jump, resample):
        assert n == levels[-1]
        levels += [n - 1, *range(n, after + 1)]
    assert levels == papers_levels(steps, jump, resample)


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_it_is_the_papers_loop(eta):
    """In float64 with the same noise, by DDPM's steps and DDIM's; the up-steps of a jump are drawn as one."""
    sched = S.Schedule(FULL.alphas_cumprod[50:900:170], FULL.timesteps[50:900:170])
    keys, rng = keys_of(2), np.random.default_rng(0)
    noise, known = initial_noise(keys, (3,)), rng.uniform(-1, 1, (2, 3))
    keep = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def toy(xp):
        return lambda xt, time: Out(xp.sin(1.3 * xt) * 0.7 + xp.asarray(time)[:, None] / 3000)

    walk = dict(jump=2, resample=3) | ({} if eta == 1 else {"eta": eta})  # 1, the paper's, unless told
    got = repaint(sched, toy(jnp), noise, keys, known=known, keep=keep, target="x0", **walk)

    def z(number):
        return np.stack([jax.random.normal(jax.random.fold_in(k, number), (3,)) for k in keys])

    abar = np.append(1.0, sched.alphas_cumprod)
    xt = np.asarray(noise, np.float64)
    for number, (n, after) in enumerate(travel(sched.num_steps, 2, 3)):
        a, prev = abar[n], abar[n - 1]
        x0 = np.clip(toy(np)(xt, np.full(2, sched.timesteps[n - 1])).pred, -1, 1)
        alpha = a / prev
        mean = (np.sqrt(prev) * (1 - alpha) * x0 + np.sqrt(alpha) * (1 - prev) * xt) / (1 - a)
        own = mean + np.sqrt((1 - alpha) * (1 - prev) / (1 - a)) * z(3 * number)
        if eta == 0:
            own = np.sqrt(prev) * x0 + np.sqrt(1 - prev) * (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
        given = np.sqrt(prev) * known + np.sqrt(1 - prev) * z(3 * number + 1)
        x = np.where(keep > 0, given, own)
        up = abar[after] / prev
        xt = np.sqrt(up) * x + np.sqrt(1 - up) * z(3 * number + 2)
    np.testing.assert_allclose(got, xt, atol=2e-3)


def test_what_is_known_comes_back_to_the_bit_and_samples_are_independent():
    sched, keys = S.respace(FULL, 8), keys_of(4)
    known = np.random.default_rng(0).uniform(-1, 1, (4, 5, 5, 3)).astype(np.float32)
    keep = np.random.default_rng(1).integers(0, 2, (4, 5, 5, 1)).astype(np.float32)
    net = lambda xt, time: Out(0.9 * jnp.sin(xt))  # noqa: E731

    @jax.jit
    def run(keys, known, keep):
        noise = initial_noise(keys, (5, 5, 3))
        return repaint(sched, net, noise, keys, known=known, keep=keep, jump=3, resample=2, target="x0")

    got = np.asarray(run(keys, np.where(keep, known, np.nan), keep > 0))  # read where it is known alone
    there = np.broadcast_to(keep > 0, got.shape)
    np.testing.assert_array_equal(got[there], known[there])
    assert (got[~there] != known[~there]).all() and np.isfinite(got).all()
    np.testing.assert_allclose(run(keys[2:], known[2:], keep[2:]), got[2:], atol=1e-5)  # f32 or bool


@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("analytic", 1.0), ("ddim", 0.0), ("dpm", 0.0)])
def test_steps_are_random_where_the_named_sampler_s_are(name, eta):
    sched, keys, walk = S.respace(FULL, 4), keys_of(2), dict(jump=2, resample=2)
    net, noise = lambda xt, time: Out(0.9 * jnp.sin(xt)), initial_noise(keys, (3,))
    known, keep = jnp.full((2, 3), 0.4), jnp.array([[1.0, 0.0, 0.0]])
    got = draw(sched, net, noise, keys, target="x0", name=name, steps=4, image=known, keep=keep, **walk)
    by_hand = repaint(sched, net, noise, keys, known=known, keep=keep, eta=eta, target="x0", **walk)
    np.testing.assert_array_equal(got, by_hand)


def test_resampling_makes_the_painted_part_agree_with_the_known():
    """Two correlated Gaussians, one known: the mean of the other is then rho times it; without going back, less."""
    rho, n, value = 0.9, 3000, 1.5
    cov, sched = np.array([[1, rho], [rho, 1]]), S.respace(FULL, 20)
    precise = np.stack([a * cov + (1 - a) * np.eye(2) for a in sched.alphas_cumprod])
    gains = np.stack([np.sqrt(a) * cov @ np.linalg.inv(p) for a, p in zip(sched.alphas_cumprod, precise, strict=True)])

    def ideal(xt, time):
        t = jnp.searchsorted(jnp.asarray(sched.timesteps), time)
        return Out(jnp.einsum("bij,bj->bi", jnp.asarray(gains, jnp.float32)[t], xt))

    keys, means = keys_of(n), {}
    for resample in (1, 10):
        got = repaint(
            sched, ideal, initial_noise(keys, (2,)), keys, known=jnp.full((n, 2), value), keep=jnp.array([[1.0, 0.0]]),
            jump=2, resample=resample, target="x0", clip_x0=None,
        )  # fmt: skip
        means[resample] = float(got[:, 1].mean())
    assert means[1] < 0.8 * rho * value
    assert means[10] == pytest.approx(rho * value, rel=0.1)


@pytest.mark.parametrize("strength, left", [(1.0, 10), (0.5, 5), (0.31, 3), (0.29, 3), (0.001, 1)])
def test_partway_begins_at_the_noised_picture(strength, left):
    sched = S.respace(FULL, 10)
    image, noise = (np.random.default_rng(k).normal(size=(2, 4)) for k in (0, 1))
    short, xt = partway(sched, image, strength, noise)
    assert short.num_steps == left and (short.timesteps == sched.timesteps[:left]).all()
    a = sched.alphas_cumprod[left - 1]
    np.testing.assert_allclose(xt, np.sqrt(a) * image + np.sqrt(1 - a) * noise, rtol=1e-5, atol=1e-6)


def test_a_weak_strength_stays_near_the_picture():
    """Of independent Gaussian pixels, with the ideal denoiser: the nearer, the weaker."""
    keys = keys_of(50)
    image = 0.5 * np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)

    def ideal(xt, time):
        a = S.at(FULL.alphas_cumprod, time, 2)
        return Out(0.25 * jnp.sqrt(a) / (0.25 * a + 1 - a) * xt)

    def apart(strength):
        settings = dict(name="ddpm", steps=50, image=image, strength=strength)
        got = draw(FULL, ideal, initial_noise(keys, (40,)), keys, target="x0", clip_x0=None, **settings)
        return float(np.corrcoef(np.ravel(got), image.ravel())[0, 1])

    weak, middle, strong = (apart(s) for s in (0.1, 0.5, 1.0))
    assert weak > 0.9 > middle > 0.1 > abs(strong) + 0.02


@pytest.mark.parametrize("change, words", [
    ({"jump": 0}, "jump=0 must be at least 1"), ({"resample": 0}, "resample=0 must be at least 1"),
    ({"strength": 0}, "strength=0 must be above 0"), ({"strength": 1.5}, "strength=1.5 must be above 0 and at most 1"),
])  # fmt: skip
def test_mistakes_are_named(change, words):
    settings = dict(name="ddpm", steps=3, image=jnp.zeros((2, 3)), keep=jnp.ones((2, 3)), **change)
    with pytest.raises(UserError, match=words):
        draw(FULL, lambda xt, time: Out(xt), jnp.zeros((2, 3)), keys_of(2), target="x0", **settings)
