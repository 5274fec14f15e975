"""Our schedules and ancestral sampling against diffusers' UnCLIPScheduler, around networks made of arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from unclip_jax.diffusion.guide import Out, within  # noqa: E402
from unclip_jax.diffusion.sample import ddpm, initial_noise, step_noise  # noqa: E402
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace  # noqa: E402

FULL = make_schedule("cosine")
SHAPE = (5,)
TARGETS = {"prior": ("x0", 5.0), "decoder": ("eps", 1.0), "upsampler": ("eps", 1.0)}


def toy(xp, t, x):
    """A prediction and a variance output, that beyond [-1, 1] too, of x [B, 5] at time t (a number)."""
    return 2.0 * xp.sin(1.7 * x + t / 300) + 0.2 * x, 1.6 * xp.cos(2 * x + t / 300)


def draw(name, sched, variance=None, **settings):
    """Ours: x0 f64[3, 5]. `variance` of the toy's output; by default the decoder's as it is, and none of the others."""
    variance = variance or (lambda v: v if name == "decoder" else None)

    def denoise(x, time):
        pred, var = toy(jnp, time[:, None].astype(float), x)
        return Out(pred, variance(var))

    keys = jax.random.split(jax.random.key(0), 3)
    target, bound = TARGETS[name]
    return ddpm(sched, denoise, initial_noise(keys, SHAPE), keys, **{"target": target, "clip_x0": bound, **settings})


def theirs(name, steps, exact=True):
    """diffusers': f64[3, 5]. Its learned variance lies behind the prediction along axis 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    noises = [torch.from_numpy(np.array(step_noise(keys, i, SHAPE))) for i in range(steps)]

    def predict(x, t, last):
        pred, var = toy(torch, t.double(), x)
        return torch.cat([pred, var], 1) if name == "decoder" else pred

    start = torch.from_numpy(np.array(initial_noise(keys, SHAPE)))
    return ref.loop(ref.scheduler(name, steps, exact), predict, start, noises).numpy()


@pytest.mark.parametrize("steps", [2, 7, 25, 27, 50, 64, 250, 999, 1000])
def test_timesteps(steps):
    np.testing.assert_array_equal(respace(FULL, steps).timesteps[::-1], ref.scheduler("prior", steps).timesteps)


def test_rounding_is_to_even_halves_and_matters():
    ours = respace(FULL, 7).timesteps
    assert list(ours) == [0, 166, 333, 500, 666, 832, 999]
    assert list(np.floor(np.arange(7) * 999 / 6)) != list(ours)
    assert list(np.floor(np.arange(7) * 999 / 6 + 0.5)) != list(ours)


def test_tables():
    """alphas_cumprod of float32 beside ours: the sums of 1,000 roundings; 1 - alphas_cumprod[0] is off by 5e-4."""
    exact, plain = ref.scheduler("prior", 25), ref.scheduler("prior", 25, exact=False)
    np.testing.assert_allclose(FULL.alphas_cumprod, exact.alphas_cumprod.numpy(), rtol=1e-12)
    np.testing.assert_allclose(FULL.alphas_cumprod, plain.alphas_cumprod.numpy(), rtol=1e-4)
    factor = (plain.betas[0] / (1 - plain.alphas_cumprod[0])).item()
    assert 3e-4 < 1 - factor < 1e-3 and FULL.posterior_x0_coef[0] == 1


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("steps", [2, 25])
def test_loop(name, steps):
    with jax.enable_x64():
        got = draw(name, respace(FULL, steps))
        assert ref.error(got, theirs(name, steps)) < 1e-9
        # Its own f32 tables: the last step's 5e-4, and what earlier differences grow to on the way.
        assert ref.error(got, theirs(name, steps, exact=False)) < 2e-2


def test_what_would_differ():
    with jax.enable_x64():
        differs = lambda got, wanted: ref.error(got, wanted) > 1e-2  # noqa: E731
        sched, wanted = respace(FULL, 25), theirs("decoder", 25)
        assert differs(draw("decoder", sched, variance=lambda v: jnp.clip(v, -1, 1)), wanted), "variance clamped"
        assert differs(draw("decoder", sched, variance=lambda v: None), wanted), "variance not learned"
        assert differs(draw("decoder", sched, clip_x0=None), wanted), "x0 not clipped"
        trailing = Schedule(FULL.alphas_cumprod[39::40], FULL.timesteps[39::40])
        assert differs(draw("decoder", trailing), wanted), "other steps"
        assert differs(draw("prior", sched, clip_x0=1.0), theirs("prior", 25)), "the images' bound for the prior"
        assert differs(draw("prior", sched, variance=jnp.ones_like), theirs("prior", 25)), "the larger variance"


def test_hand_over_at_a_time():
    first, last = (lambda xt, time, k=k: Out(jnp.full_like(xt, k)) for k in (1.0, 2.0))
    denoise = jax.jit(lambda time: within(0, 166, last, first)(jnp.zeros((2, 3)), time).pred)
    for time, wanted in ((999, 1), (167, 1), (166, 2), (0, 2)):
        np.testing.assert_array_equal(denoise(jnp.full((2,), time)), wanted)
