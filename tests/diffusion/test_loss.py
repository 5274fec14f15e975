"""Losses against float64 closed forms, numerical integration, and what a bound must obey."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.bound import bpd
from unclip_jax.diffusion import loss as L
from unclip_jax.diffusion import schedule as S
from unclip_jax.diffusion.guide import Out
from unclip_jax.errors import UserError

TARGETS = ("x0", "eps", "v")
LEVELS = np.arange(256) / 127.5 - 1


def pred_of(sched, target, x0, xt, t):
    """The prediction of `target` that means x0 at xt."""
    if target == "x0":
        return x0
    eps = S.to_eps(sched, x0, xt, t, target="x0")
    if target == "eps":
        return eps
    a = sched.alphas_cumprod[np.array(t)].reshape((-1,) + (1,) * (x0.ndim - 1))
    return np.sqrt(a) * eps - np.sqrt(1 - a) * x0


# Compiled once for each schedule and shape: a batch's shape is therefore the same in most tests.
jit_q_sample = jax.jit(S.q_sample, static_argnums=0)
jit_simple = jax.jit(L.simple, static_argnums=(0, 5, 6))
jit_vlb = jax.jit(L.vlb, static_argnums=(0, 5, 6))


def make_batch(sched, t, shape=(4, 4, 3), seed=0):
    k = jax.random.split(jax.random.key(seed), 2)
    t = jnp.asarray(t)
    x0 = jnp.asarray(LEVELS, jnp.float32)[jax.random.randint(k[0], (len(t), *shape), 0, 256)]
    noise = jax.random.normal(k[1], x0.shape)
    return x0, jit_q_sample(sched, x0, t, noise), t, noise


def per_sample(x):
    return np.asarray(x, np.float64).reshape(len(x), -1).mean(1)


def test_simple_is_the_mean_squared_error_to_its_target():
    sched = S.make_schedule("cosine")
    x0, xt, t, noise = make_batch(sched, [0, 10, 400, 999])
    a = sched.alphas_cumprod[np.array(t)].reshape(-1, 1, 1, 1)
    truth = {"x0": x0, "eps": noise, "v": np.sqrt(a) * noise - np.sqrt(1 - a) * x0}
    pred = jax.random.normal(jax.random.key(5), x0.shape)
    for target in TARGETS:
        got = jit_simple(sched, pred, x0, t, noise, target)
        assert got.shape == (4,) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, per_sample((np.asarray(pred) - truth[target]) ** 2), rtol=1e-5)


def test_weightings_are_the_same_x0_error_for_every_target():
    sched = S.make_schedule("cosine")
    t = np.array([1, 60, 200, 350, 500, 800])
    snr = sched.alphas_cumprod[t] / (1 - sched.alphas_cumprod[t])
    assert snr.min() < 0.2 and snr.max() > 5 * 20  # both sides of the bound
    x0, xt, t, noise = make_batch(sched, t)
    x0_pred = x0 + 0.3 * jax.random.normal(jax.random.key(9), x0.shape)
    error = per_sample((x0_pred - x0) ** 2)
    for target in TARGETS:
        pred = pred_of(sched, target, x0_pred, xt, t)
        for name, low in {"min_snr": 0, "clipped_snr": 1}.items():
            if (name, target) == ("clipped_snr", "eps"):  # whose weights would grow without bound
                with pytest.raises(UserError, match="would weigh the noisiest steps alone"):
                    L.snr_weights(sched, target, name)
                continue
            got = jit_simple(sched, pred, x0, t, noise, target, name)
            np.testing.assert_allclose(got, np.clip(snr, low, 5) * error, rtol=2e-3)


def test_kl_is_the_integral():
    x, kl = np.linspace(-40, 40, 400_001), jax.jit(L.gaussian_kl)
    for m1, s1, m2, s2 in ((0, 1, 0, 1), (0.3, 0.5, -1, 1.5), (2, 1.2, 1, 0.7), (0, 0.1, 0.05, 0.11)):
        log_p, log_q = stats.norm.logpdf(x, m1, s1), stats.norm.logpdf(x, m2, s2)
        integral = np.trapezoid(np.exp(log_p) * (log_p - log_q), x)
        got = kl(*jnp.array([m1, 2 * np.log(s1), m2, 2 * np.log(s2)], jnp.float32))
        assert float(got) == pytest.approx(integral, rel=1e-4, abs=1e-6)


discretised_nll = jax.jit(L.discretised_gaussian_nll)


@pytest.mark.parametrize("mean", [0.0, 0.013, -0.98, 1.0, 1.7, -3.0])
@pytest.mark.parametrize("scale", [1e-3, 0.006, 0.05, 1.0, 20.0])
def test_discretised_gaussian_is_a_distribution_over_256_levels(mean, scale):
    nll = discretised_nll(jnp.asarray(LEVELS, jnp.float32), jnp.float32(mean), jnp.float32(np.log(scale)))
    assert np.exp(-np.asarray(nll, np.float64)).sum() == pytest.approx(1, abs=2e-4)
    edges = np.append(LEVELS - 1 / 255, np.inf)
    edges[0] = -np.inf
    mass = np.diff(stats.norm.cdf(edges, mean, scale))
    clear = mass > 1e-7
    assert clear.any()
    np.testing.assert_allclose(np.asarray(nll)[clear], -np.log(mass[clear]), rtol=2e-3, atol=2e-3)
    assert np.all(np.isfinite(nll))


def test_far_tails_keep_value_and_gradient():
    """50 scales off, where the mass underflows in float64 too; log N's tail gives it."""
    nll = jax.jit(jax.value_and_grad(L.discretised_gaussian_nll, 2))
    got, slope = nll(jnp.float32(0.5), jnp.float32(0), jnp.log(0.01))
    nearest = (0.5 - 1 / 255) / 0.01
    assert float(got) == pytest.approx(-stats.norm.logsf(nearest), rel=1e-4)
    assert float(slope) == pytest.approx(-nearest**2, rel=1e-2)  # d/dlog s of z^2 / 2
    assert np.all(np.isfinite(nll(jnp.float32(0.5), jnp.float32(-1e6), jnp.log(1e-3))))


@pytest.mark.parametrize("target, bound", [("x0", None), ("eps", 1.0), ("v", 0.8)])
def test_vlb_terms_in_float64(target, bound):
    sched = S.make_schedule("cosine", 50)
    x0, xt, t, noise = make_batch(sched, [0, 1, 5, 25, 49])
    x0_pred = x0 + 0.1 * jax.random.normal(jax.random.key(2), x0.shape)
    hat = x0_pred if bound is None else np.clip(x0_pred, -bound, bound)
    v = jax.random.uniform(jax.random.key(3), x0.shape, minval=-1, maxval=1)
    out = Out(pred_of(sched, target, x0_pred, xt, t), v)
    got = jit_vlb(sched, out, x0, xt, t, target, bound)
    for b, step in enumerate(np.array(t)):
        n = {k: np.asarray(a[b], np.float64) for k, a in dict(x0=x0, xt=xt, hat=hat, v=v).items()}
        abar, prev = sched.alphas_cumprod[step], sched.alphas_cumprod[step - 1] if step else 1.0
        beta = 1 - abar / prev
        small = beta * (1 - prev) / (1 - abar)
        if step == 0:
            first, second = sched.alphas_cumprod[:2]
            log_small = np.log((1 - second / first) * (1 - first) / (1 - second))
        else:
            log_small = np.log(small)
        log_var = (n["v"] + 1) / 2 * np.log(beta) + (1 - n["v"]) / 2 * log_small
        if step == 0:
            lo = np.where(n["x0"] < -0.999, -np.inf, n["x0"] - 1 / 255)
            hi = np.where(n["x0"] > 0.999, np.inf, n["x0"] + 1 / 255)
            z = [(e - n["hat"]) * np.exp(-log_var / 2) for e in (lo, hi)]
            sign = np.where(z[0] > 0, -1, 1)  # the lower tail keeps its digits
            upper = stats.norm.logcdf(np.where(sign < 0, -z[0], z[1]))
            lower = stats.norm.logcdf(np.where(sign < 0, -z[1], z[0]))
            nats = -(upper + np.log1p(-np.exp(lower - upper)))
        else:
            shift = np.sqrt(prev) * beta / (1 - abar) * (n["x0"] - n["hat"])
            nats = 0.5 * (log_var - np.log(small) - 1 + (small + shift**2) / np.exp(log_var))
        assert float(got[b]) == pytest.approx(nats.mean() / np.log(2), rel=2e-3), step


def test_vlb_is_zero_for_the_true_posterior_and_positive_otherwise():
    sched = S.make_schedule("cosine", 100)
    x0, xt, t, noise = make_batch(sched, [1, 2, 50, 99])
    exact = jit_vlb(sched, Out(x0, -jnp.ones_like(x0)), x0, xt, t, "x0")
    np.testing.assert_allclose(exact, 0, atol=1e-6)
    np.testing.assert_allclose(jit_vlb(sched, Out(x0), x0, xt, t, "x0"), 0, atol=1e-6)  # "small" without var
    assert np.all(np.asarray(jit_vlb(sched, Out(x0, jnp.zeros_like(x0)), x0, xt, t, "x0"))[:2] > 1e-3)
    assert np.all(jit_vlb(sched, Out(0.9 * x0), x0, xt, t, "x0") > 0)


@pytest.mark.parametrize("target", TARGETS)
def test_vlb_gradient_reaches_the_variance_and_not_the_mean(target):
    sched = S.make_schedule("cosine", 100)
    x0, xt, t, noise = make_batch(sched, [0, 3, 40])
    pred = jax.random.normal(jax.random.key(4), x0.shape)

    def total(pred, v):
        return jnp.sum(L.vlb(sched, Out(pred, v), x0, xt, t, target))

    to_pred, to_var = jax.jit(jax.grad(total, (0, 1)))(pred, jnp.zeros_like(x0))
    np.testing.assert_array_equal(to_pred, 0)
    assert np.all(np.abs(np.asarray(to_var)).reshape(3, -1).max(1) > 0)


def test_hybrid_is_simple_plus_weight_times_the_estimated_sum():
    sched = S.make_schedule("cosine", 200)
    x0, xt, t, noise = make_batch(sched, [0, 20, 120, 199])
    sched = S.Schedule(sched.alphas_cumprod, sched.timesteps * 5 + 2)

    def denoise(x, model_time):
        return Out(0.5 * x + model_time.reshape(-1, 1, 1, 1) / 1000, jnp.tanh(x))

    hybrid = jax.jit(L.diffusion_loss, static_argnums=(0, 1, 5, 6, 7, 8))
    for weighting, clip_x0 in (("none", 1.0), ("min_snr", 0.5)):
        loss, metrics = hybrid(sched, denoise, x0, t, noise, "eps", 0.01, weighting, clip_x0)
        out = denoise(xt, 5 * t + 2)
        mse = jit_simple(sched, out.pred, x0, t, noise, "eps", weighting)
        bound = 200 * jit_vlb(sched, out, x0, xt, t, "eps", clip_x0)
        np.testing.assert_allclose(loss, mse + 0.01 * bound, rtol=1e-5)
        plain = jit_simple(sched, out.pred, x0, t, noise, "eps")
        np.testing.assert_allclose([metrics["mse"], metrics["vlb"]], [plain.mean(), bound.mean()], rtol=1e-5)


def test_hybrid_trains_the_mean_as_simple_does():
    sched = S.make_schedule("linear", 100)
    x0, _, t, noise = make_batch(sched, [0, 10, 90])

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def slope(w, weight):
        return jnp.sum(L.diffusion_loss(sched, lambda x, _: Out(w * x, 0 * x), x0, t, noise, "v", weight)[0])

    np.testing.assert_allclose(slope(0.3, 0.01), slope(0.3, 0.0), rtol=1e-5)
    _, metrics = L.diffusion_loss(sched, lambda x, _: Out(x), x0, t, noise, "v")
    assert set(metrics) == {"mse"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("clip_x0", [None, 1.0])
def test_finite_at_both_ends_with_wild_bfloat16_outputs(target, clip_x0):
    sched = S.make_schedule("cosine")
    x0, _, t, noise = make_batch(sched, [0, 0, 1, 998, 999, 999])

    @jax.jit
    def step(pred, v):
        def total(out):
            return jnp.mean(L.diffusion_loss(sched, lambda x, _: out, x0, t, noise, target, 0.001, "min_snr",
                                             clip_x0)[0])
        return jax.value_and_grad(total)(Out(pred, v))

    for size in (0.0, 1.0, 100.0):
        pred, v = (size * jax.random.normal(jax.random.key(i), x0.shape) for i in (6, 7))
        value, grads = step(pred.astype(jnp.bfloat16), jnp.clip(v, -10, 10).astype(jnp.bfloat16))
        assert np.isfinite(value)
        assert grads.pred.dtype == jnp.bfloat16
        assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in grads)


def test_learned_variance_descends_to_the_best_one():
    """With a mean off by d the KL is least at variance small + d^2; gradient steps on v must find it."""
    sched = S.respace(S.make_schedule("cosine", 100), 20)
    x0, xt, t, _ = make_batch(sched, [3], shape=(1,))
    beta, small = sched.betas[3], sched.posterior_variance[3]
    wanted = np.sqrt(beta * small)  # v = 0
    off = np.sqrt(wanted - small) / sched.posterior_x0_coef[3]
    grad = jax.grad(lambda v: jnp.sum(L.vlb(sched, Out(x0 + off, v), x0, xt, t, "x0", None)))
    v = jax.lax.fori_loop(0, 300, lambda _, v: v - 2.0 * grad(v), jnp.full((1, 1), 0.9))
    assert float(v[0, 0]) == pytest.approx(0, abs=0.02)


def test_prior_bpd_in_float64():
    x0 = jnp.linspace(-1, 1, 12).reshape(2, 6)
    for sched in (S.make_schedule("linear"), S.make_schedule("cosine"), S.make_schedule("cosine", 5)):
        a = sched.alphas_cumprod[-1]
        expected = 0.5 * (-a - np.log1p(-a) + a * np.asarray(x0, np.float64) ** 2).mean(1) / np.log(2)
        np.testing.assert_allclose(L.prior_bpd(sched, x0), expected, rtol=1e-5)
    assert float(L.prior_bpd(S.make_schedule("cosine"), x0).max()) < 1e-8


def test_bound_is_its_parts_and_only_the_last_step_for_a_known_image():
    sched = S.respace(S.make_schedule("cosine"), 10)
    x0 = jnp.asarray(LEVELS, jnp.float32)[jnp.array([[3, 100, 200], [0, 7, 255]])]
    got = jax.jit(lambda: bpd(sched, lambda xt, _: Out(x0), x0, jax.random.key(0), target="x0"))()
    assert got["vlb"].shape == (10, 2)
    np.testing.assert_allclose(got["vlb"][1:], 0, atol=1e-6)
    std = np.exp(sched.posterior_log_variance[0] / 2)
    ends = np.array([[0, 0, 0], [1, 0, 1]])  # levels 0 and 255 hold all beyond
    mass = np.where(ends, stats.norm.cdf(1 / 255 / std), 1 - 2 * stats.norm.sf(1 / 255 / std))
    np.testing.assert_allclose(got["vlb"][0], -np.log2(mass).mean(1), rtol=1e-4)
    np.testing.assert_allclose(got["total"], got["prior"] + got["vlb"].sum(0), rtol=1e-6)


def test_bound_is_above_the_entropy_and_near_it_for_the_ideal_denoiser():
    """Independent pixels, uniform over 256 levels: 8 bits each, which no model can beat."""
    sched = S.make_schedule("cosine", 60)
    levels = jnp.asarray(LEVELS, jnp.float32)

    def ideal(xt, t):
        """E[x0 | xt] and the variance of q(x_{t-1} | xt), from all 256 levels."""
        a = S.at(sched.alphas_cumprod, t, 3)
        logits = -((xt[..., None] - jnp.sqrt(a) * levels.reshape(1, 1, -1)) ** 2) / (2 * (1 - a))
        p = jax.nn.softmax(logits)
        mean = p @ levels
        spread = jnp.sum(p * (levels.reshape(1, 1, -1) - mean[..., None]) ** 2, -1)
        exact = S.at(sched.posterior_variance, t, 2) + S.at(sched.posterior_x0_coef, t, 2) ** 2 * spread
        low = S.at(sched.posterior_log_variance, t, 2)
        high = S.at(np.log(sched.betas), t, 2)
        return Out(mean, 2 * (jnp.log(exact + 1e-6) - low) / (high - low) - 1)

    x0 = jnp.tile(levels, (2, 4))
    best, fixed = (
        jax.jit(lambda d=denoise: bpd(sched, d, x0, jax.random.key(2), target="x0")["total"])()
        for denoise in (ideal, lambda xt, t: Out(ideal(xt, t).pred)))
    assert 7.95 <= float(best.mean()) <= 8.3
    assert np.all(fixed > best + 0.5)


def test_mistakes_are_named():
    sched = S.make_schedule("cosine", 10)
    x0, xt, t, noise = make_batch(sched, [1, 2])
    with pytest.raises(UserError, match="min_snr6.*did you mean 'min_snr'"):
        L.simple(sched, x0, x0, t, noise, "eps", "min_snr6")
    with pytest.raises(UserError, match="unknown prediction target 'xo'"):
        L.simple(sched, x0, x0, t, noise, "xo")
    with pytest.raises(UserError, match="vlb_weight=0.001 needs a model that learns its variance"):
        L.diffusion_loss(sched, lambda x, _: Out(x), x0, t, noise, "eps", 0.001)
