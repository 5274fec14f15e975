"""DDIM inversion against its closed form for Gaussian data in float64, and as the mirror of `ddim`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import schedule as S
from unclip_jax.diffusion.guide import Out
from unclip_jax.diffusion.invert import ddim_invert
from unclip_jax.diffusion.sample import ddim
from unclip_jax.errors import UserError

FULL = S.make_schedule("cosine")
MU, STD = 0.3, 0.6


@pytest.fixture(autouse=True)
def in_f64():
    with jax.enable_x64(True):
        yield


def gaussian(sched, target="x0"):
    """The ideal denoiser of data N(MU, STD^2)."""
    def denoise(xt, time):
        t = jnp.searchsorted(jnp.asarray(sched.timesteps), time)
        a = S.at(sched.alphas_cumprod, t, xt.ndim)
        x0 = MU + STD**2 * jnp.sqrt(a) / (a * STD**2 + 1 - a) * (xt - jnp.sqrt(a) * MU)
        return Out({"x0": x0, "eps": S.to_eps(sched, x0, xt, t, target="x0")}[target])

    return denoise


def pictures():
    return MU + STD * np.random.default_rng(0).standard_normal((3, 4, 5))


def test_iterations_solve_each_step_of_a_linear_denoiser():
    """Step by step in numpy: DDIM's step is x_{t-1} = g x_t + c, and its inverse (x_{t-1} - c) / g."""
    sched = S.Schedule(FULL.alphas_cumprod[50:900:100], FULL.timesteps[50:900:100])
    xt = pictures()
    for a, prev in zip(sched.alphas_cumprod, sched.alphas_cumprod_prev, strict=True):
        gain = STD**2 * np.sqrt(a) / (a * STD**2 + 1 - a)
        slope, offset = gain, MU * (1 - gain * np.sqrt(a))  # of x0 by xt
        on_eps = np.sqrt((1 - prev) / (1 - a))
        g = (np.sqrt(prev) - np.sqrt(a) * on_eps) * slope + on_eps
        c = (np.sqrt(prev) - np.sqrt(a) * on_eps) * offset
        xt = (xt - c) / g
    got = ddim_invert(sched, gaussian(sched), pictures(), target="x0", clip_x0=None, iterations=60)
    np.testing.assert_allclose(got, xt, rtol=1e-9)
    back = ddim(sched, gaussian(sched), got, target="x0", clip_x0=None)
    np.testing.assert_allclose(back, pictures(), atol=1e-9)


def test_it_tends_to_the_exact_flow():
    """For Gaussian data the flow keeps the standard score: x_t = sqrt(a) MU + sd_t (x0 - MU) / STD."""
    x0, errors = pictures(), []
    for steps in (50, 200):
        sched = S.respace(S.make_schedule("cosine", 4000), steps)
        a = sched.alphas_cumprod[-1]
        exact = np.sqrt(a) * MU + np.sqrt(a * STD**2 + 1 - a) * (x0 - MU) / STD
        got = ddim_invert(sched, gaussian(sched), x0, target="x0", clip_x0=None)
        errors.append(float(np.abs(got - exact).max()))
    assert errors[1] < errors[0] / 2.5 and errors[1] < 0.05


def test_there_and_back_the_error_falls_with_the_steps_and_with_iterations():
    def error(steps, iterations=1):
        sched = S.respace(FULL, steps)
        denoise = gaussian(sched, "eps")
        noise = ddim_invert(sched, denoise, pictures(), target="eps", clip_x0=None, iterations=iterations)
        return float(np.abs(ddim(sched, denoise, noise, target="eps", clip_x0=None) - pictures()).mean())

    errors = [error(steps) for steps in (10, 40, 160)]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4
    assert error(10, 4) < errors[0] / 3


def test_clipping_is_undone_too():
    """Beyond the bound, eps of `ddim` is that of the clipped prediction; so it is here."""
    sched = S.Schedule(FULL.alphas_cumprod[50:900:100], FULL.timesteps[50:900:100])
    x0 = np.clip(pictures(), -0.5, 0.5)  # many at the bound
    assert (np.abs(x0) == 0.5).mean() > 0.3

    def denoise(xt, time):  # overshoots, then is clipped
        return Out(1.5 * gaussian(sched)(xt, time).pred)

    noise = ddim_invert(sched, denoise, x0, target="x0", clip_x0=0.5, iterations=60)
    np.testing.assert_allclose(ddim(sched, denoise, noise, target="x0", clip_x0=0.5), x0, atol=1e-6)


@pytest.mark.parametrize("bound", [1.0, 0.5])
def test_every_step_that_clips_is_undone_by_itself(bound):
    """In numpy DDIM's step takes each level to the one before; all steps together forgive more, as clipping forgets.

    1 is what both take unless told.
    """
    a, time = FULL.alphas_cumprod[150:900:250], FULL.timesteps[150:900:250]
    x0 = np.clip(2 * pictures(), -bound, bound)
    told = {} if bound == 1 else {"clip_x0": bound}
    invert = lambda k: ddim_invert(  # noqa: E731
        S.Schedule(a[:k], time[:k]), lambda xt, _: Out(1.8 * xt), x0, target="x0", iterations=60, **told
    )
    levels = [x0, *(np.asarray(invert(k)) for k in range(1, len(a) + 1))]
    clipped = 0
    for k in range(len(a)):
        prev, xt = np.append(1.0, a)[k], levels[k + 1]
        seen = np.clip(1.8 * xt, -bound, bound)
        clipped += (np.abs(seen) == bound).mean()
        eps = (xt - np.sqrt(a[k]) * seen) / np.sqrt(1 - a[k])
        np.testing.assert_allclose(np.sqrt(prev) * seen + np.sqrt(1 - prev) * eps, levels[k], atol=1e-6)
    assert 0.2 < clipped / len(a) < 0.9


def test_no_iteration_is_an_error():
    sched = S.make_schedule("cosine", 4)
    with pytest.raises(UserError, match="iterations=0"):
        ddim_invert(sched, gaussian(sched), pictures(), target="x0", iterations=0)
