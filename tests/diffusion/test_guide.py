"""Guidance: linear in the two predictions, and of the prediction only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guide import Out, guide, within


@pytest.fixture
def batch():
    xt = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    return xt, jnp.array([0, 500, 999])


def denoiser(shift):
    """An Out that depends on xt, on the time, and on a condition: f32[B] `shift`."""
    def denoise(xt, model_time):
        row = (jnp.asarray(shift) + model_time / 1000).reshape(-1, 1, 1, 1)
        return Out(jnp.sin(xt) + row, jnp.cos(xt) * row)

    return denoise


COND, UNCOND = jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0, 0.5, 0.0])
BOTH = jnp.concatenate([COND, UNCOND])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25, 4.0, -1.0])
def test_guided_prediction_is_on_the_line_through_both(batch, scale):
    c, u = denoiser(COND)(*batch), denoiser(UNCOND)(*batch)
    out = guide(denoiser(BOTH), scale)(*batch)
    expected = scale * np.asarray(c.pred, np.float64) + (1 - scale) * np.asarray(u.pred, np.float64)
    np.testing.assert_allclose(out.pred, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.var, c.var)


def test_scale_may_be_traced_and_one_per_sample(batch):
    @jax.jit
    def guided(scale):
        return guide(denoiser(BOTH), scale)(*batch).pred

    scales = [1.0, 2.5, 7.0]
    each = [guide(denoiser(BOTH), s)(*batch).pred for s in scales]
    for s, expected in zip(scales, each, strict=True):
        np.testing.assert_allclose(guided(jnp.float32(s)), expected, rtol=1e-5, atol=1e-6)
    mixed = guided(jnp.array(scales))
    for i in range(3):
        np.testing.assert_allclose(mixed[i], each[i][i], rtol=1e-5, atol=1e-6)


def test_the_network_is_called_once_with_both_halves(batch):
    calls = []

    def denoise2(xt, model_time):
        calls.append((xt.shape[0], model_time.shape[0], model_time.dtype))
        return denoiser(BOTH)(xt, model_time)

    guide(denoise2, 3.0)(*batch)
    assert calls == [(6, 6, jnp.int32)]


def test_without_variance_there_is_none(batch):
    def plain(xt, model_time):
        return Out(xt)

    assert guide(plain, 2.0)(*batch).var is None


def test_bfloat16_outputs_are_mixed_in_float32(batch):
    def half(shift):
        return lambda xt, model_time: Out(denoiser(shift)(xt, model_time).pred.astype(jnp.bfloat16))

    c, u = (np.asarray(half(s)(*batch).pred, np.float64) for s in (COND, UNCOND))
    out = guide(half(BOTH), 8.0)(*batch).pred
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, u + 8 * (c - u), rtol=1e-6, atol=1e-5)


def test_guided_score_is_that_of_the_tilted_density():
    """-sigma times the gradient of log p_u (p_c / p_u)^s, for two Gaussians of one variance."""
    sigma, mean_c, mean_u, s = 0.5, 1.0, -0.25, 3.0

    def eps(xt, model_time):
        return Out((xt - jnp.repeat(jnp.array([mean_c, mean_u]), len(xt) // 2)[:, None]) / sigma)

    xt = jnp.linspace(-2, 2, 9)[:, None]
    log_density = lambda m, x: -((x - m) ** 2) / (2 * sigma**2)  # noqa: E731
    tilted = jax.vmap(jax.grad(lambda x: (1 - s) * log_density(mean_u, x) + s * log_density(mean_c, x)))
    out = guide(eps, s)(xt, jnp.zeros(9, jnp.int32)).pred
    np.testing.assert_allclose(-sigma * tilted(xt[:, 0]), out[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_brings_the_spread_of_each_sample_back(batch, phi):
    """Lin et al. 2023, eq. 15 and 16, in float64."""
    c = np.asarray(denoiser(COND)(*batch).pred, np.float64)
    uneven = jnp.linspace(1, 3, 32).reshape(1, 4, 4, 2)  # so that the spread is another in each row and channel
    u = np.asarray(uneven * denoiser(UNCOND)(*batch).pred, np.float64)
    factor = jnp.concatenate([jnp.ones((3, 4, 4, 2)), uneven.repeat(3, 0)])
    both = lambda xt, model_time: Out(factor * denoiser(BOTH)(xt, model_time).pred)  # noqa: E731
    got = np.asarray(guide(both, 4.0, phi)(*batch).pred)
    for i in range(3):
        guided = u[i] + 4 * (c[i] - u[i])
        np.testing.assert_allclose(got[i], phi * guided * c[i].std() / guided.std() + (1 - phi) * guided, rtol=1e-4)
        assert phi < 1 or got[i].std() == pytest.approx(c[i].std(), rel=1e-4)


def test_a_prediction_without_spread_is_rescaled_to_itself(batch):
    """What a new network says, whose last layer is zero."""
    nothing = lambda xt, model_time: Out(0 * xt)  # noqa: E731
    assert not np.asarray(guide(nothing, 3.0, 0.7)(*batch).pred).any()


def test_no_rescaling_is_plain_guidance_to_the_bit(batch):
    both = denoiser(BOTH)
    plain = guide(both, 3.0)(*batch).pred
    np.testing.assert_array_equal(guide(both, 3.0, rescale=0.0)(*batch).pred, plain)
    np.testing.assert_allclose(guide(both, 3.0, rescale=jnp.float32(0))(*batch).pred, plain, rtol=1e-6)


def test_within_an_interval_one_denoiser_and_outside_it_the_other_and_only_that_one():
    calls = []

    def named(name, value, dtype):
        def denoise(xt, model_time):
            jax.debug.callback(lambda: calls.append(name))
            return Out(jnp.full_like(xt, value, dtype), jnp.full_like(xt, value / 4))

        return denoise

    both = jax.jit(within(200, 300, named("in", 1, jnp.float32), named("out", 2, jnp.bfloat16)))
    for time, name, value in ((199, "out", 2), (200, "in", 1), (300, "in", 1), (301, "out", 2)):
        calls.clear()
        out = both(jnp.zeros((2, 3)), jnp.full((2,), time))
        jax.effects_barrier()
        assert calls == [name] and out.pred.dtype == jnp.float32
        np.testing.assert_array_equal(out.pred, value)
        np.testing.assert_array_equal(out.var, value / 4)
