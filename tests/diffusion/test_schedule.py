"""Schedules against closed forms and Bayes' rule in float64."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import schedule as S
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.errors import UserError

TARGETS = ("x0", "eps", "v")


def f_cosine(u):
    return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2


def bayes(abar_prev, abar, x0, xt):
    """Mean and variance of x_{t-1} given xt and x0, from the product of two Gaussian densities in x_{t-1}."""
    alpha = abar / abar_prev
    prior_mean, prior_precision = np.sqrt(abar_prev) * x0, 1 / (1 - abar_prev)
    # xt = sqrt(alpha) x_{t-1} + noise of variance 1 - alpha, as a density of x_{t-1}
    seen_mean, seen_precision = xt / np.sqrt(alpha), alpha / (1 - alpha)
    precision = prior_precision + seen_precision
    return (prior_mean * prior_precision + seen_mean * seen_precision) / precision, 1 / precision


def triple(sched, t, seed=0, shape=(3, 2)):
    """x0, eps, v and xt in float64 numpy for steps t[B]."""
    rng = np.random.default_rng(seed)
    x0, eps = rng.uniform(-1, 1, (len(t), *shape)), rng.standard_normal((len(t), *shape))
    a = sched.alphas_cumprod[t].reshape(-1, *[1] * len(shape))
    parts = {"x0": x0, "eps": eps, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}
    return parts, np.sqrt(a) * x0 + np.sqrt(1 - a) * eps


def test_cosine_is_the_closed_form_up_to_its_capped_beta():
    sched = make_schedule("cosine")
    exact = f_cosine(np.arange(1, 1001) / 1000) / f_cosine(0)
    np.testing.assert_allclose(sched.alphas_cumprod[:-1], exact[:-1], rtol=1e-9)
    assert sched.betas[-1] == pytest.approx(0.999, rel=1e-12)
    assert sched.alphas_cumprod[-1] == pytest.approx(2.43e-9, rel=1e-3)
    np.testing.assert_array_equal(sched.timesteps, np.arange(1000))


@pytest.mark.parametrize("steps", [1000, 100, 21])
def test_linear_betas_are_even_and_scaled_to_the_number_of_steps(steps):
    betas = make_schedule("linear", steps).betas
    np.testing.assert_allclose(betas[[0, -1]], [0.1 / steps, 20 / steps], rtol=1e-9)
    np.testing.assert_allclose(np.diff(betas, 2), 0, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("shift", [0.25, 3.0])
def test_a_shift_multiplies_signal_over_noise_at_every_step(name, shift):
    plain, shifted = make_schedule(name, 500), make_schedule(name, 500, shift=shift)
    ratio = [np.sqrt(s.alphas_cumprod) / np.sqrt(1 - s.alphas_cumprod) for s in (shifted, plain)]
    np.testing.assert_allclose(ratio[0], shift * ratio[1], rtol=1e-9)
    assert make_schedule(name, 500, shift=1) == plain


@pytest.mark.parametrize("shift", [0, -1.0, np.inf, np.nan, "wide", None])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(UserError, match="shift"):
        make_schedule("cosine", 10, shift=shift)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_one_step_at_a_time_gives_the_marginal(name):
    sched = make_schedule(name, 200)
    scale, variance = 1.0, 0.0
    for beta, abar in zip(sched.betas, sched.alphas_cumprod, strict=True):
        scale, variance = np.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        np.testing.assert_allclose([scale, variance], [np.sqrt(abar), 1 - abar], rtol=1e-9)


def test_tables_stay_float64_and_exact_where_float32_would_not():
    sched = make_schedule("cosine")
    assert sched.betas[0] == 1 - sched.alphas_cumprod[0]
    assert sched.posterior_x0_coef[0] == 1 and sched.posterior_xt_coef[0] == 0
    assert sched.posterior_variance[0] == 0
    tables = (sched.betas, sched.snr, sched.posterior_variance, sched.posterior_log_variance,
              sched.posterior_x0_coef, sched.posterior_xt_coef)
    for table in tables:
        assert table.dtype == np.float64 and table.shape == (1000,) and np.all(np.isfinite(table))
    for table in tables:
        assert np.all(np.isfinite(table.astype(np.float32)))


def test_log_variances_at_the_first_step_are_those_of_the_second():
    sched = make_schedule("cosine", 50)
    assert sched.posterior_log_variance[0] == sched.posterior_log_variance[1]
    np.testing.assert_allclose(np.exp(sched.posterior_log_variance[1:]), sched.posterior_variance[1:])
    one = respace(sched, 1)
    assert one.posterior_log_variance == pytest.approx(np.log(one.betas))


def test_schedules_are_values():
    a, b = make_schedule("cosine", 30), make_schedule("cosine", 30)
    assert a == b and hash(a) == hash(b) and a is not b
    assert a != make_schedule("linear", 30) and a != respace(a, 29) and a != "cosine"
    assert a != Schedule(a.alphas_cumprod, a.timesteps + 1)
    copy = pickle.loads(pickle.dumps(a))
    assert copy == a and hash(copy) == hash(a)
    with pytest.raises(ValueError):
        a.alphas_cumprod[0] = 0.5
    with pytest.raises(AttributeError):
        a.timesteps = b.timesteps


def test_an_equal_schedule_does_not_compile_again():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def noised(sched, x0, t):
        traces.append(sched)
        return S.q_sample(sched, x0, t, x0)

    x0, t = jnp.ones((2, 3)), jnp.array([0, 9])
    for sched in (make_schedule("cosine", 10), make_schedule("cosine", 10), make_schedule("linear", 30)):
        noised(sched, x0, t)
    assert len(traces) == 2


def test_q_sample_has_the_mean_and_variance_of_the_marginal():
    sched, n = make_schedule("cosine", 100), 100_000
    t = jnp.array([0, 30, 60, 99])
    noise = jax.random.normal(jax.random.key(0), (4, n))
    xt = np.asarray(S.q_sample(sched, jnp.full((4, n), 0.7), t, noise), np.float64)
    a = sched.alphas_cumprod[np.array(t)]
    np.testing.assert_allclose(xt.mean(1), 0.7 * np.sqrt(a), atol=5 / np.sqrt(n))
    np.testing.assert_allclose(xt.var(1), 1 - a, rtol=5 * np.sqrt(2 / n))


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [None, 25, [10, 5, 3]])
def test_posterior_is_bayes_rule_also_when_respaced(name, steps):
    full = make_schedule(name)
    sched = full if steps is None else respace(full, steps)
    t = np.arange(1, sched.num_steps)
    abar = full.alphas_cumprod[sched.timesteps]  # straight from the full schedule, by the time that is kept
    parts, xt = triple(sched, t, shape=(2,))
    mean, var = bayes(abar[t - 1][:, None], abar[t][:, None], parts["x0"], xt)
    np.testing.assert_allclose(sched.posterior_variance[1:], var[:, 0], rtol=1e-9)
    got = S.q_posterior(sched, jnp.asarray(parts["x0"]), jnp.asarray(xt), jnp.asarray(t))
    np.testing.assert_allclose(got[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], var, rtol=1e-6)
    np.testing.assert_allclose(got[2], np.log(var), rtol=1e-6, atol=1e-6)


def test_posterior_of_the_first_step_is_x0_itself():
    x0, xt = jnp.array([[0.3, -1.0]]), jnp.array([[9.0, 9.0]])
    mean, var, _ = S.q_posterior(make_schedule("cosine"), x0, xt, jnp.array([0]))
    np.testing.assert_array_equal(mean, x0)
    assert float(var[0, 0]) == 0


@pytest.mark.parametrize("given", TARGETS)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_every_target_gives_back_x0_and_eps(name, given):
    sched = make_schedule(name)
    t = np.array([0, 1, 10, 500, 900, 990])
    parts, xt = triple(sched, t)
    for wanted, convert in (("x0", S.to_x0), ("eps", S.to_eps)):
        got = convert(sched, jnp.asarray(parts[given]), jnp.asarray(xt), jnp.asarray(t), target=given)
        assert got.dtype == jnp.float32
        # What f32 rounding of xt and the prediction is amplified by, at either end of the schedule.
        a = sched.alphas_cumprod[t].reshape(-1, 1, 1)
        amplified = {("x0", "eps"): np.sqrt((1 - a) / a), ("eps", "x0"): np.sqrt(a / (1 - a))}.get((wanted, given), 0)
        error = np.abs(np.asarray(got, np.float64) - parts[wanted])
        assert np.all(error <= 2e-6 * (1 + amplified)), (wanted, error.max((1, 2)))


def test_bfloat16_predictions_are_computed_in_float32():
    sched, t = make_schedule("cosine"), jnp.array([3, 800])
    pred = jax.random.normal(jax.random.key(0), (2, 5), jnp.bfloat16)
    xt = jax.random.normal(jax.random.key(1), (2, 5))
    for convert in (S.to_x0, S.to_eps):
        for target in TARGETS:
            np.testing.assert_array_equal(convert(sched, pred, xt, t, target=target),
                                          convert(sched, pred.astype(jnp.float32), xt, t, target=target))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 3)])
def test_samples_of_any_rank(shape):
    sched, t = make_schedule("cosine", 10), jnp.array([0, 4, 9])
    x0 = jnp.full((3, *shape), 0.5)
    xt = S.q_sample(sched, x0, t, jnp.zeros_like(x0))
    assert xt.shape == x0.shape
    expected = 0.5 * np.sqrt(sched.alphas_cumprod[np.array(t)])
    np.testing.assert_allclose(np.asarray(xt).reshape(3, -1).mean(1), expected, rtol=1e-6)


def test_variance_output_interpolates_the_logs():
    sched, t = respace(make_schedule("cosine"), 20), np.array([1, 7, 19])
    log_beta, log_post = np.log(sched.betas[t]), np.log(sched.posterior_variance[t])
    for v, expected in ((1.0, log_beta), (-1.0, log_post), (0.0, (log_beta + log_post) / 2),
                        (0.5, 0.75 * log_beta + 0.25 * log_post)):
        got = S.model_log_variance(sched, jnp.full((3, 2), v), jnp.asarray(t), 2)
        np.testing.assert_allclose(got, np.stack([expected] * 2, 1), rtol=1e-5)
    np.testing.assert_allclose(S.model_log_variance(sched, None, jnp.asarray(t), 2)[:, 0], log_post, rtol=1e-5)


def test_respace_by_count_gives_the_published_steps():
    full = make_schedule("cosine")
    assert respace(full, 7).timesteps.tolist() == [0, 166, 333, 500, 666, 832, 999]
    assert respace(full, 25).timesteps.tolist() == [
        0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832,
        874, 916, 957, 999]
    assert respace(full, 1).timesteps.tolist() == [999]
    assert respace(full, 2).timesteps.tolist() == [0, 999]
    assert respace(full, 1000) == full


def test_every_count_is_legal_and_keeps_the_noisiest_step():
    full = make_schedule("linear", 60)
    for n in range(1, 61):
        short = respace(full, n)
        assert short.num_steps == n and short.timesteps[-1] == 59
        np.testing.assert_array_equal(short.alphas_cumprod, full.alphas_cumprod[short.timesteps])
        assert np.ptp(np.diff(short.timesteps)) <= 1 if n > 1 else True  # equal strides but for rounding


def test_respace_by_sections():
    thirds = respace(make_schedule("linear", 300), [10, 15, 20]).timesteps
    for i, count in enumerate((10, 15, 20)):
        inside = thirds[thirds // 100 == i] - 100 * i
        assert len(inside) == count and inside[0] == 0 and inside[-1] == 99
    # 10 = 4 + 3 + 3: the first sections take the remainder
    assert respace(make_schedule("cosine", 10), [2, 2, 2]).timesteps.tolist() == [0, 3, 4, 6, 7, 9]
    assert respace(make_schedule("cosine", 10), (1, 0)).timesteps.tolist() == [0]


def test_fast27():
    steps = respace(make_schedule("linear"), "fast27").timesteps.tolist()
    assert len(steps) == 27
    assert steps[:10] == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    assert steps[10:20] == [200 + s for s in steps[:10]]
    assert steps[20:] == [400, 500, 599, 600, 799, 800, 997]  # GLIDE moves 999 to 997


def test_respacing_twice_keeps_the_original_times():
    full = make_schedule("cosine")
    twice = respace(respace(full, [100, 50]), 10)
    np.testing.assert_array_equal(twice.alphas_cumprod, full.alphas_cumprod[twice.timesteps])
    np.testing.assert_array_equal(S.model_time(twice, jnp.array([0, 9])), [0, 999])
    # A long step's beta is what the short ones add up to.
    first, last = twice.timesteps[3:5]
    product = np.prod(1 - full.betas[first + 1:last + 1])
    assert twice.betas[4] == pytest.approx(1 - product, rel=1e-9)


@pytest.mark.parametrize("act, words", [
    (lambda s: make_schedule("cosin"), "cosin.*did you mean 'cosine'"),
    (lambda s: make_schedule("cosine", 0), "num_steps=0"),
    (lambda s: make_schedule("linear", 20), "num_steps=20 must be above 20.*respace"),
    (lambda s: respace(s, 0), "steps=0 must be within 1 … 10"),
    (lambda s: respace(s, 11), "steps=11 must be within 1 … 10"),
    (lambda s: respace(s, "fast28"), "fast28.*fast27"),
    (lambda s: respace(s, [6, 1]), "6 must be within 0 … 5"),
    (lambda s: respace(s, []), "at least one step"),
    (lambda s: Schedule(np.array([0.5, 0.6]), np.array([0, 1])), "decrease strictly"),
    (lambda s: Schedule(np.array([1.0, 0.6]), np.array([0, 1])), "decrease strictly"),
    (lambda s: Schedule(np.array([0.9, 0.0]), np.array([0, 1])), "decrease strictly"),
    (lambda s: Schedule(np.array([0.9, 0.9]), np.array([0, 1])), "decrease strictly"),
    (lambda s: Schedule(np.array([0.9, np.nan]), np.array([0, 1])), "decrease strictly"),
    (lambda s: Schedule(np.array([0.9, 0.6]), np.array([-1, 1])), "strictly from 0 or more"),
    (lambda s: Schedule(np.array([0.9, 0.6]), np.array([1, 1])), "increase strictly"),
    (lambda s: Schedule(np.array([0.9, 0.6]), np.array([1])), "one length"),
    (lambda s: S.to_x0(s, jnp.ones(1), jnp.ones(1), jnp.array([0]), target="eps0"), "did you mean 'eps'"),
])
def test_mistakes_are_named_with_their_remedy(act, words):
    with pytest.raises(UserError, match=words):
        act(make_schedule("cosine", 10))
