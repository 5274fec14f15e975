"""Samplers against float64 loops, and against the distributions that ideal denoisers must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import sample
from unclip_jax.diffusion import schedule as S
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Out, guide
from unclip_jax.diffusion.loss import x0_variance
from unclip_jax.diffusion.sample import SAMPLERS, ddim, ddpm, dpm, heun, initial_noise
from unclip_jax.errors import UserError

FULL = S.make_schedule("cosine")
WITH_TABLE = {**SAMPLERS, "analytic": functools.partial(ddpm, x0_variance=0.0)}


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def times(like, a):
    return a.reshape((-1,) + (1,) * (like.ndim - 1))


def toy(xp):
    """A smooth denoiser in numpy or jax that depends on xt and on the time it is told; with a variance."""
    def denoise(xt, model_time):
        phase = times(xt, xp.asarray(model_time) / 300)
        return Out(1.3 * xp.sin(1.7 * xt + phase) + 0.2, xp.cos(2 * xt + phase))

    return denoise


def fixed(denoise, var):
    """`denoise` with the variance "small", the posterior's, which no output means; "large", beta: an output of 1."""
    def run(xt, model_time):
        pred = denoise(xt, model_time).pred
        return Out(pred, jnp.ones_like(xt) if var == "large" else None)

    return run


def to_x0_np(target, pred, xt, a):
    return {"x0": pred, "eps": (xt - np.sqrt(1 - a) * pred) / np.sqrt(a),
            "v": np.sqrt(a) * xt - np.sqrt(1 - a) * pred}[target]


def clip_np(x, bound):
    return x if bound is None else np.clip(x, -bound, bound)


def walk(sched):
    """t, the told time, abar and abar of the step before, from the noisiest step down."""
    for t in range(sched.num_steps - 1, -1, -1):
        yield t, sched.timesteps[t], sched.alphas_cumprod[t], sched.alphas_cumprod[t - 1] if t else 1.0


# A nonlinear path is compared, so few steps: what differs by rounding grows along it.
@pytest.mark.parametrize("target, clip, eta", [
    ("x0", None, 0.0), ("eps", None, 0.0), ("eps", 0.8, 0.0), ("v", None, 0.7), ("v", 0.8, 0.0)])
def test_ddim_is_the_papers_loop(target, clip, eta):
    sched = S.Schedule(FULL.alphas_cumprod[50:900:100], FULL.timesteps[50:900:100])
    keys = keys_of(2)
    noise = initial_noise(keys, (2, 3))
    got = ddim(sched, toy(jnp), noise, keys, target=target, eta=eta, clip_x0=clip)

    xt = np.asarray(noise, np.float64)
    for t, told, a, prev in walk(sched):
        x0 = clip_np(to_x0_np(target, toy(np)(xt, np.full(2, told)).pred, xt, a), clip)
        eps = (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
        std = eta * np.sqrt((1 - prev) / (1 - a) * (1 - a / prev))
        z = np.stack([jax.random.normal(jax.random.fold_in(k, t), (2, 3)) for k in keys])
        xt = np.sqrt(prev) * x0 + np.sqrt(1 - prev - std**2) * eps + std * z
    np.testing.assert_allclose(got, xt, atol=5e-4)


@pytest.mark.parametrize("target, var", [
    ("x0", "learned"), ("eps", "learned"), ("v", "learned"), ("x0", "small"), ("x0", "large")])
def test_ddpm_is_the_papers_loop(target, var):
    sched = S.Schedule(FULL.alphas_cumprod[50:900:100], FULL.timesteps[50:900:100])
    keys = keys_of(2)
    noise = initial_noise(keys, (2, 3))
    denoise = toy(jnp) if var == "learned" else fixed(toy(jnp), var)
    got = ddpm(sched, denoise, noise, keys, target=target, clip_x0=0.9)

    xt = np.asarray(noise, np.float64)
    for t, told, a, prev in walk(sched):
        out = toy(np)(xt, np.full(2, told))
        x0 = np.clip(to_x0_np(target, out.pred, xt, a), -0.9, 0.9)
        alpha = a / prev
        mean = (np.sqrt(prev) * (1 - alpha) * x0 + np.sqrt(alpha) * (1 - prev) * xt) / (1 - a)
        small, large = (1 - alpha) * (1 - prev) / (1 - a), np.full_like(xt, 1 - alpha)
        if t == 0:
            xt = mean
            continue
        part = (out.var + 1) / 2
        std = {"small": np.sqrt(small), "large": np.sqrt(large),
               "learned": np.sqrt(large**part * small ** (1 - part))}[var]
        xt = mean + std * np.stack([jax.random.normal(jax.random.fold_in(k, t), (2, 3)) for k in keys])
    np.testing.assert_allclose(got, xt, atol=5e-4)


def gaussian_denoiser(mu, s, with_variance):
    """E[x0 | xt] for data N(mu, s^2), in x0; the variance output is that of the exact q(x_{t-1} | xt)."""
    def table(sched):
        a, coef = sched.alphas_cumprod, sched.posterior_x0_coef
        exact = sched.posterior_variance + coef**2 * s**2 * (1 - a) / (a * s**2 + 1 - a)
        low, high = sched.posterior_log_variance, np.log(sched.betas)
        frac = (np.log(exact) - low) / (high - low)
        frac[0] = 0
        return 2 * frac - 1

    def make(sched):
        def denoise(xt, model_time):
            t = jnp.searchsorted(jnp.asarray(sched.timesteps), model_time)
            a = S.at(sched.alphas_cumprod, t, xt.ndim)
            mean = mu + s**2 * jnp.sqrt(a) / (a * s**2 + 1 - a) * (xt - jnp.sqrt(a) * mu)
            return Out(mean, S.at(table(sched), t, xt.ndim) * jnp.ones_like(xt) if with_variance else None)

        return denoise

    return make


def test_ddpm_with_exact_mean_and_variance_is_exact_in_few_steps():
    """Gaussian data, ideal denoiser: the chain's marginals are the noised data's, to the last step."""
    mu, s, n = 0.4, 0.5, 2000
    sched = S.respace(S.make_schedule("cosine", 400), 8)
    keys = keys_of(n)
    noise = initial_noise(keys, (16,))
    # Start from the exact marginal of the noisiest step; it is N(0, 1) but for abar = 2e-6.
    got = ddpm(sched, gaussian_denoiser(mu, s, True)(sched), noise, keys, target="x0", clip_x0=None)
    a = sched.alphas_cumprod[0]
    variance = s**4 * a / (a * s**2 + 1 - a)  # the last step returns the mean of x0 given xt
    size = got.size
    assert float(got.mean()) == pytest.approx(mu, abs=5 * s / np.sqrt(size))
    assert float(got.var()) == pytest.approx(variance, rel=5 * np.sqrt(2 / size))


@pytest.mark.parametrize("var", ["small", "large"])
def test_ddpm_with_a_fixed_variance_follows_the_linear_recursion(var):
    mu, s, n = -0.3, 0.6, 2000
    sched = S.respace(S.make_schedule("cosine", 400), 12)
    keys = keys_of(n, 1)
    denoise = fixed(gaussian_denoiser(mu, s, False)(sched), var)
    got = ddpm(sched, denoise, initial_noise(keys, (16,)), keys, target="x0", clip_x0=None)
    mean, variance = 0.0, 1.0
    for t, _, a, prev in walk(sched):
        gain = s**2 * np.sqrt(a) / (a * s**2 + 1 - a)
        alpha = a / prev
        on_x0, on_xt = np.sqrt(prev) * (1 - alpha) / (1 - a), np.sqrt(alpha) * (1 - prev) / (1 - a)
        mean = on_x0 * (mu + gain * (mean - np.sqrt(a) * mu)) + on_xt * mean
        added = 0 if t == 0 else {"small": (1 - alpha) * (1 - prev) / (1 - a), "large": 1 - alpha}[var]
        variance = (on_x0 * gain + on_xt) ** 2 * variance + added
    assert float(got.mean()) == pytest.approx(mean, abs=5 * np.sqrt(variance / got.size))
    assert float(got.var()) == pytest.approx(variance, rel=5 * np.sqrt(2 / got.size))
    if var == "large":
        assert variance > 1.1 * s**2  # the two choices differ here, or the test would prove little


@pytest.mark.parametrize("target, clip", [("x0", None), ("eps", 0.8), ("v", None)])
def test_dpm_is_the_papers_loop(target, clip):
    """Algorithm 2 of arXiv 2211.01095, as written there: by alpha, sigma and lambda."""
    sched = S.Schedule(FULL.alphas_cumprod[50:900:100], FULL.timesteps[50:900:100])
    noise = initial_noise(keys_of(2), (2, 3))
    got = dpm(sched, toy(jnp), noise, target=target, clip_x0=clip)

    xt, before, h_before = np.asarray(noise, np.float64), None, None
    for t, told, a, prev in walk(sched):
        x0 = clip_np(to_x0_np(target, toy(np)(xt, np.full(2, told)).pred, xt, a), clip)
        if not t:
            break
        lam, lam_next = (np.log(np.sqrt(b) / np.sqrt(1 - b)) for b in (a, prev))
        h = lam_next - lam
        r = None if before is None else h_before / h
        d = x0 if r is None else (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        xt = np.sqrt(1 - prev) / np.sqrt(1 - a) * xt - np.sqrt(prev) * (np.exp(-h) - 1) * d
        before, h_before = x0, h
    np.testing.assert_allclose(got, x0, atol=5e-4)


@pytest.mark.parametrize("target, clip", [("x0", None), ("eps", 0.8), ("v", None)])
def test_heun_is_the_papers_loop(target, clip):
    """Algorithm 1 of arXiv 2206.00364 without churn, in its own variables: x / alpha and sigma / alpha.

    From a sigma above 80, here the first, where the paper's own steps begin, a step is Euler's.
    """
    rows = [50, 250, 450, 650, 850, 985, 999]
    sched = S.Schedule(FULL.alphas_cumprod[rows], FULL.timesteps[rows])
    with jax.enable_x64():
        noise = initial_noise(keys_of(2), (2, 3))
        got = heun(sched, toy(jnp), noise, target=target, clip_x0=clip)

    def slope(x, t):
        a = sched.alphas_cumprod[t]
        xt, sigma = x * np.sqrt(a), np.sqrt((1 - a) / a)
        pred = toy(np)(xt, np.full(2, sched.timesteps[t])).pred
        return (x - clip_np(to_x0_np(target, pred, xt, a), clip)) / sigma, sigma

    x, sigmas = np.asarray(noise, np.float64) / np.sqrt(sched.alphas_cumprod[-1]), []
    for t in range(sched.num_steps - 1, 0, -1):
        d, sigma = slope(x, t)
        sigmas.append(sigma)
        after = np.sqrt(1 / sched.alphas_cumprod[t - 1] - 1)
        euler = x + (after - sigma) * d
        x = euler if sigma > 80 else x + (after - sigma) * (d + slope(euler, t - 1)[0]) / 2
    assert sigmas[0] > 80 > sigmas[1] > 40
    d, sigma = slope(x, 0)
    np.testing.assert_allclose(got, x - sigma * d, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm", 2), ("heun", 2)])
def test_deterministic_samplers_converge_with_their_order(name, order):
    """To the exact flow from one Gaussian to another, x = alpha mu + sqrt(alpha^2 s^2 + sigma^2) z, in float64."""
    mu, s = 0.4, 0.3

    def end(steps):
        angle = np.linspace(0.15, 1.4, steps)
        sched = S.Schedule(np.cos(angle) ** 2, np.arange(steps))

        def ideal(xt, told):
            a = jnp.asarray(sched.alphas_cumprod)[told].reshape(-1, 1)
            return Out(mu + jnp.sqrt(a) * s**2 / (a * s**2 + 1 - a) * (xt - jnp.sqrt(a) * mu))

        a, low = sched.alphas_cumprod[-1], sched.alphas_cumprod[0]
        start = np.sqrt(a) * mu + np.sqrt(a * s**2 + 1 - a) * np.array([[1.3]])
        exact = np.sqrt(low) * mu + np.sqrt(low * s**2 + 1 - low) * 1.3
        # What the last step returns is the prediction there, which tells the point it was made at.
        x0 = SAMPLERS[name](sched, ideal, start, target="x0", clip_x0=None)
        weight = np.sqrt(low) * s**2 / (low * s**2 + 1 - low)
        return abs(float((x0[0, 0] - mu) / weight + np.sqrt(low) * mu) - exact)

    with jax.enable_x64():
        errors = [end(steps) for steps in (81, 161, 321)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (abs(slopes - order) < 0.3).all(), (errors, slopes)


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("steps, most", [(10, 0.08), (25, 0.02), (100, 0.004)])
def test_heun_draws_a_gaussian_from_pure_noise(steps, most, shift):
    """As wide as it is, though a cosine schedule ends where noise is 20,000 times the signal; DDIM is farther off."""
    mu, s = 0.2, 0.5
    full = S.make_schedule("cosine", 1000, shift=shift)
    noise = jnp.array([[-1.0], [1.0]])

    def ideal(xt, told):
        a = jnp.asarray(full.alphas_cumprod)[told].reshape(-1, 1)
        return Out(mu + jnp.sqrt(a) * s**2 / (a * s**2 + 1 - a) * (xt - jnp.sqrt(a) * mu))

    def error(sampler):  # all is linear: two points tell how wide the drawn one is
        low, high = sampler(S.respace(full, steps), ideal, noise, target="x0", clip_x0=None)[:, 0]
        return abs(float(high - low) / 2 / s - 1)

    with jax.enable_x64():
        assert error(heun) < min(most, error(ddim))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_the_ideal_denoiser_of_a_point_returns_the_point(eta):
    sched = S.respace(FULL, 27)
    keys = keys_of(4)
    point = jnp.linspace(-0.9, 0.9, 6).reshape(1, 6)

    def denoise(xt, model_time):
        a = S.at(FULL.alphas_cumprod, model_time, 2)
        return Out((xt - jnp.sqrt(a) * point) / jnp.sqrt(1 - a))

    got = ddim(sched, denoise, initial_noise(keys, (6,)), keys, target="eps", eta=eta)
    np.testing.assert_allclose(got, jnp.tile(point, (4, 1)), atol=1e-4)


def test_ddim_at_eta_one_is_ddpm_with_the_small_variance():
    sched = S.respace(FULL, 9)
    keys = keys_of(3)
    noise = initial_noise(keys, (4, 4, 3))
    a = ddim(sched, toy(jnp), noise, keys, target="x0", eta=1.0)
    b = ddpm(sched, fixed(toy(jnp), "small"), noise, keys, target="x0")
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_clipping_bounds_x0_and_eps_follows_it():
    """An eps that means a vast x0 at the noisiest step is cut to the bound, and stays there."""
    sched = S.respace(FULL, 5)
    noise = initial_noise(keys_of(2), (8,))

    def wild(xt, model_time):
        return Out(jnp.full_like(xt, 5.0))

    for name, bound in (("ddim", 1.0), ("ddim", 3.0), ("ddpm", 2.0)):
        got = SAMPLERS[name](sched, wild, noise, keys_of(2), target="eps", clip_x0=bound)
        assert float(jnp.abs(got).max()) <= bound
    assert float(jnp.abs(ddim(sched, wild, noise, target="eps", clip_x0=None)).max()) > 3


@pytest.mark.parametrize("sampler", [ddpm, functools.partial(ddim, eta=0.5)])
def test_a_sample_depends_on_its_own_key_and_noise_only(sampler):
    sched = S.respace(FULL, 6)
    keys = keys_of(6)
    run = jax.jit(lambda noise, keys: sampler(sched, toy(jnp), noise, keys, target="v"))  # compiled per size
    noise = initial_noise(keys, (4, 2))
    whole = run(noise, keys)
    order = jnp.array([4, 0, 5, 2, 1, 3])
    np.testing.assert_allclose(run(noise[order], keys[order]), whole[order], atol=1e-6)
    np.testing.assert_allclose(run(noise[2:4], keys[2:4]), whole[2:4], atol=1e-6)
    np.testing.assert_allclose(initial_noise(keys[2:4], (4, 2)), noise[2:4], atol=1e-6)
    other = run(noise, keys.at[0].set(keys_of(1, 99)[0]))
    assert float(jnp.abs(other[0] - whole[0]).max()) > 1e-3
    np.testing.assert_array_equal(other[1:], whole[1:])


def test_noise_is_standard_and_new_at_every_step_and_key():
    keys = keys_of(500)
    draws = jnp.stack([initial_noise(keys, (40,))] + [sample.step_noise(keys, i, (40,)) for i in range(3)])
    flat = np.asarray(draws, np.float64).reshape(4, -1)
    np.testing.assert_allclose(flat.mean(1), 0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(4), atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(flat.std(1), 1, atol=0.03)
    assert len(np.unique(draws)) > 0.98 * draws.size


def test_the_denoiser_is_traced_once_and_told_i32_times():
    traces = []

    def denoise(xt, model_time):
        traces.append((xt.shape, xt.dtype, model_time.shape, model_time.dtype))
        return Out(xt.astype(jnp.bfloat16), xt.astype(jnp.bfloat16))

    keys = keys_of(3)
    for name, sampler in WITH_TABLE.items():
        traces.clear()
        run = jax.jit(lambda n, k, sampler=sampler: sampler(S.respace(FULL, 20), denoise, n, k, target="x0"))
        out = run(initial_noise(keys, (2,)).astype(jnp.bfloat16), keys)
        assert out.dtype == jnp.float32, name
        assert set(traces) == {((3, 2), np.dtype("float32"), (3,), np.dtype("int32"))}
        # Whatever the steps; scan may look at its body twice, and Heun's looks twice in it and once after it.
        assert len(traces) <= (5 if name == "heun" else 2), name


def test_one_step_is_the_prediction():
    noise, keys = initial_noise(keys_of(2), (5,)), keys_of(2)
    for sampler in WITH_TABLE.values():
        got = sampler(S.respace(FULL, 1), toy(jnp), noise, keys, target="x0", clip_x0=None)
        np.testing.assert_allclose(got, toy(jnp)(noise, jnp.array([999, 999])).pred, rtol=1e-5)


def test_the_denoisers_variance_is_used():
    sched, keys = S.respace(FULL, 5), keys_of(2)
    noise = initial_noise(keys, (3,))
    small = ddpm(sched, fixed(toy(jnp), "small"), noise, keys, target="x0")
    assert float(jnp.abs(ddpm(sched, toy(jnp), noise, keys, target="x0") - small).max()) > 1e-3


def plain(sched, denoise, noise, **settings):
    """`draw` with nothing but a sampler's name, unless told."""
    settings = {"name": "ddim", "steps": sched.num_steps, **settings}
    return draw(sched, denoise, noise, keys_of(len(noise)), target="x0", **settings)


def halves(calls=None):
    """A denoiser of conditional rows, then unconditional ones; where it runs it notes its time and rows."""
    def denoise(xt, model_time):
        if calls is not None:
            jax.debug.callback(lambda time: calls.append((int(time), len(xt))), model_time[0])
        shift = jnp.where(jnp.arange(len(xt)) < 2, 0.3, -0.2)[:, None]
        return Out(jnp.sin(1.7 * xt + shift), 0.1 * xt)

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_neutral_settings_are_the_plain_sampler_to_the_bit(name):
    trained, keys, table = S.respace(FULL, 20), keys_of(2), np.linspace(0.1, 0.9, 20)
    sched, noise = S.respace(trained, 12), initial_noise(keys, (5,))
    rows = [trained.timesteps.tolist().index(time) for time in sched.timesteps]
    more = {"x0_variance": table[rows]} if name == "analytic" else {}
    by_hand = SAMPLERS[name](sched, guide(halves(), 3.0), noise, keys, target="x0", **more)
    neutral = {"guidance": 3.0, "rescale": 0.0, "interval": (0, 1), "threshold": None}
    for settings in ({"guidance": 3.0}, neutral):
        got = plain(trained, halves(), noise, name=name, steps=12, x0_variance=table, **settings)
        np.testing.assert_array_equal(got, by_hand)
    unguided = dict(guidance=1.0, rescale=0.7, interval=(0.2, 0.4))
    one = plain(trained, halves(), noise, name=name, steps=12, x0_variance=table, **unguided)
    np.testing.assert_array_equal(one, SAMPLERS[name](sched, halves(), noise, keys, target="x0", **more))


def test_outside_the_interval_no_unconditional_row_is_computed():
    """And there a sample takes the unguided step, inside the guided one: by hand, in numpy."""
    calls, sched = [], S.respace(FULL, 10)
    noise = initial_noise(keys_of(2), (5,))
    got = jax.jit(lambda n: plain(sched, halves(calls), n, guidance=3.0, interval=(0.3, 0.7)))(noise)
    jax.effects_barrier()
    assert sorted(calls) == [(t, 4 if 0.3 * 999 <= t <= 0.7 * 999 else 2) for t in sched.timesteps]
    assert 3 <= sum(rows == 4 for _, rows in calls) <= 5
    xt = np.asarray(noise, np.float64)
    for _, told, a, prev in walk(sched):
        c, u = np.sin(1.7 * xt + 0.3), np.sin(1.7 * xt - 0.2)
        x0 = np.clip(u + 3 * (c - u) if 0.3 * 999 <= told <= 0.7 * 999 else c, -1, 1)
        xt = np.sqrt(prev) * x0 + np.sqrt(1 - prev) * (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
    np.testing.assert_allclose(got, xt, atol=1e-3)


@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_dynamic_thresholding_is_imagens(bound):
    x0 = np.random.default_rng(0).normal(size=(4, 6, 6, 3)) * np.array([0.1, 1, 2, 8]).reshape(4, 1, 1, 1)
    got = np.asarray(sample.bounded(jnp.asarray(x0), bound, 0.9))
    for x, y in zip(x0, got, strict=True):
        s = max(bound, np.quantile(abs(x), 0.9))
        np.testing.assert_allclose(y, np.clip(x, -s, s) / s * bound, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[0], x0[0], rtol=1e-6)  # within the bound already: as it was
    np.testing.assert_array_equal(sample.bounded(jnp.asarray(x0), bound), np.clip(x0, -bound, bound).astype(np.float32))
    assert sample.bounded(x0, None) is x0
    with pytest.raises(UserError, match="threshold=0.9 scales into clip_x0, and there is none"):
        sample.bounded(x0, None, 0.9)


def test_a_threshold_changes_what_is_drawn():
    noise = initial_noise(keys_of(2), (40,))
    wild = lambda xt, told: Out(3 * xt)  # noqa: E731
    cut, scaled = (plain(S.respace(FULL, 8), wild, noise, threshold=q) for q in (None, 0.5))
    assert float(jnp.abs(scaled).max()) <= 1 and float(jnp.abs(cut - scaled).max()) > 0.05


def gaussian_facts(sched, s):
    """Of data N(mu, s^2), in f64 by conditioning Gaussians: Var(x0 | xt), E score^2, Var(x_{t-1} | xt)."""
    a, prev = sched.alphas_cumprod, sched.alphas_cumprod_prev
    total, before = a * s**2 + 1 - a, prev * s**2 + 1 - prev
    shared = np.sqrt(a / prev) * before  # Cov(x_{t-1}, x_t): x_t is sqrt(abar_t / abar_{t-1}) x_{t-1} and noise
    return s**2 - a * s**4 / total, 1 / total, before - shared**2 / total


def test_the_analytic_variance_is_the_reverse_steps_own_for_gaussian_data():
    sched, s = S.respace(FULL, 30), 0.4
    open_, score, reverse = gaussian_facts(sched, s)
    a = sched.alphas_cumprod
    np.testing.assert_allclose((1 - a) / a * (1 - (1 - a) * score), open_, rtol=1e-6)  # Bao et al.'s form of the table
    np.testing.assert_allclose(sched.posterior_variance + sched.posterior_x0_coef**2 * open_, reverse, rtol=1e-9)


def test_the_measured_table_is_the_closed_form():
    mu, s, n = 0.4, 0.5, 4000
    sched = S.respace(S.make_schedule("cosine", 400), 8)
    with jax.enable_x64():
        data = mu + s * jax.random.normal(jax.random.key(0), (n, 8), float)
        ideal = gaussian_denoiser(mu, s, False)(sched)
        got = x0_variance(sched, ideal, data, jax.random.key(1), target="x0", clip_x0=None)
    np.testing.assert_allclose(got, gaussian_facts(sched, s)[0], rtol=6 * np.sqrt(2 / data.size))


@pytest.mark.parametrize("bound", [None, 0.7])
def test_each_step_is_measured_with_noise_of_its_own_and_by_bounded_predictions(bound):
    """A network that sees no noise at all takes all of it for the picture's, here of black ones."""
    sched, key = S.respace(FULL, 4), jax.random.key(3)
    got = x0_variance(sched, lambda xt, told: Out(0 * xt), jnp.zeros((6, 5)), key, target="eps", clip_x0=bound)
    for i, a in enumerate(sched.alphas_cumprod):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, i), (6, 5)), np.float64)
        assert float(got[i]) == pytest.approx((clip_np(np.sqrt((1 - a) / a) * noise, bound) ** 2).mean(), rel=1e-5)


def test_analytic_sampling_is_exact_in_few_steps():
    """As with the exact learned variance; the small one, on the same mean, falls short of the data's spread."""
    mu, s, n = 0.4, 0.5, 2000
    sched = S.respace(S.make_schedule("cosine", 400), 8)
    keys, ideal = keys_of(n), gaussian_denoiser(mu, s, False)(sched)
    noise, table = initial_noise(keys, (16,)), gaussian_facts(sched, s)[0]
    got = ddpm(sched, ideal, noise, keys, target="x0", clip_x0=None, x0_variance=table)
    a = sched.alphas_cumprod[0]
    exact = s**4 * a / (a * s**2 + 1 - a)
    assert float(got.var()) == pytest.approx(exact, rel=5 * np.sqrt(2 / got.size))
    small = ddpm(sched, ideal, noise, keys, target="x0", clip_x0=None)
    assert float(small.var()) < 0.9 * exact


@pytest.mark.parametrize("call, words", [
    (lambda *a: ddim(*a, target="x0", eta=1.5), "eta=1.5 must be within 0 … 1"),
    (lambda *a: ddim(*a, target="x0", eta=0.5), "eta=0.5 needs random numbers. Fix: give keys"),
    (lambda *a: ddpm(*a, keys_of(2), target="noise"), "unknown prediction target 'noise'"),
    (lambda *a: plain(*a, name="analytic"), "needs a table.* Fix: .*export --analytic"),
    (lambda *a: plain(*a, name="ddmp"), "name='ddmp' is unknown. Fix: did you mean 'ddpm'"),
    (lambda *a: plain(*a, eta=1.5), "eta=1.5 must be within 0 … 1"),
    (lambda *a: plain(*a, threshold=1.5), "threshold=1.5 must be a quantile"),
    (lambda *a: plain(*a, rescale=-0.1), "rescale=-0.1 must be a number in 0"),
    (lambda *a: plain(*a, interval=(0.5, 0.5)), "interval=.0.5, 0.5. must be two noise levels"),
])
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call(S.respace(FULL, 2), toy(jnp), jnp.zeros((2, 3)))
