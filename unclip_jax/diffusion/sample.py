"""Samplers: from noise to x0, each one `lax.scan` over a schedule's steps (respace it for fewer).

DDPM: Ho et al. 2020 (arXiv 2006.11239, algorithm 2). DDIM: Song et al. 2020 (arXiv 2010.02502, eq. 12, 16).
Analytic-DPM: Bao et al. 2022 (arXiv 2201.06503). DPM-Solver++: Lu et al. 2022 (arXiv 2211.01095). Heun: Karras et
al. 2022 (arXiv 2206.00364). Each asks the denoiser through a `viewer`, where x0 is bounded.

Randomness comes from one key per sample, so a sample depends on its own key and noise only, not on its batch
(with JAX's default threefry keys; "rbg" ones draw for a whole batch from its first key).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guide import Denoise
from unclip_jax.diffusion.schedule import (
    Schedule,
    at,
    bounded,
    model_log_variance,
    model_time,
    q_posterior,
    to_eps,
    to_x0,
)
from unclip_jax.errors import UserError

# Folded into a sample's key for its initial noise; the steps fold in their index, which is always lower.
INITIAL = 2**31 - 1
KARRAS_MAX = 80.0  # of sigma / signal: where Karras et al. begin (table 1)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise to start from: key[B] and the shape of ONE sample -> f32[B, *shape]."""
    return step_noise(keys, INITIAL, shape)


def step_noise(keys: jax.Array, step: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """normal(fold_in(key, step), shape) for each sample's key: key[B] -> f32[B, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys)


def picture_keys(seed: int, prompts: int, num: int, first: int = 0) -> jax.Array:
    """key[prompts * num], one for each picture: fold_in(fold_in(key(seed), first + prompt's index), own index)."""
    p, i = np.divmod(np.arange(prompts * num, dtype=np.uint32), np.uint32(num))
    return _picture_keys(np.uint32(seed), p + np.uint32(first), i)


@jax.jit
def _picture_keys(seed, p, i):
    root = jax.random.key(seed)
    return jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(root, a), b))(p, i)


def viewer(
    sched: Schedule, denoise: Denoise, *, target: str, clip_x0: float | None = 1.0, threshold: float | None = None
) -> Callable[[jax.Array, jax.Array], tuple]:
    """What a step sees: (xt f32[B, …], step i) -> t i32[B], x0 and eps f32[B, …], the denoiser's variance or None.

    eps is taken anew from the bounded x0, so that both say the same of xt.

    Args:
      target: what `denoise` predicts, "x0", "eps" or "v".
      clip_x0: bound of the predicted x0; None for none.
      threshold: 0 … 1, dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): the bound of a sample
        is this quantile of its |x0|, clip_x0 at least, and x0 is then scaled back into clip_x0; None is plain clipping.

    Raises:
      UserError: a threshold without clip_x0.
    """

    def view(xt, i):
        t = jnp.full((xt.shape[0],), i, jnp.int32)
        out = denoise(xt, model_time(sched, t))
        x0 = bounded(to_x0(sched, out.pred, xt, t, target=target), clip_x0, threshold)
        return t, x0, to_eps(sched, x0, xt, t, target="x0"), out.var

    return view


def ddpm(
    sched: Schedule,
    denoise: Denoise,
    noise: jax.Array,
    keys: jax.Array,
    *,
    x0_variance: jax.Array | None = None,
    **view,
) -> jax.Array:
    """Ancestral sampling, x_{t-1} ~ N(posterior mean of x0's prediction, variance) -> x0 f32[B, …].

    Args:
      noise: f32[B, …], standard normal; keys: key[B].
      x0_variance: f32[S], Var(x0 | xt) at each step of `sched`, for Analytic-DPM: the variance is then the posterior's
        and what the mean's x0 leaves open, posterior_x0_coef^2 x0_variance; see `loss.x0_variance`. None: it is that of
        `schedule.model_log_variance`.
      view: of `viewer`: target, clip_x0, threshold. The last step returns its mean.
    """
    look = viewer(sched, denoise, **view)
    if x0_variance is not None:
        analytic = sched.posterior_variance + sched.posterior_x0_coef**2 * x0_variance

    def step(xt, i):
        t, x0, _, v = look(xt, i)
        mean, _, _ = q_posterior(sched, x0, xt, t)
        if x0_variance is None:
            std = jnp.exp(0.5 * model_log_variance(sched, v, t, xt.ndim))
        else:
            std = jnp.sqrt(at(analytic, t, xt.ndim))
        return mean + jnp.where(i > 0, std, 0.0) * step_noise(keys, i, xt.shape[1:]), None

    return _scan(step, sched, noise)


def ddim(
    sched: Schedule,
    denoise: Denoise,
    noise: jax.Array,
    keys: jax.Array | None = None,
    *,
    eta: float = 0.0,
    **view,
) -> jax.Array:
    """x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - s^2) eps + s z -> x0 f32[B, …].

    s = eta sqrt(posterior variance), z standard normal (Song et al., eq. 12 and 16).

    Args:
      noise: f32[B, …], standard normal; keys: key[B], needed where eta > 0.
      eta: 0 (deterministic) … 1 (as random as DDPM with the posterior's variance).
      view: of `viewer`: target, clip_x0, threshold.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must be within 0 … 1")
    if eta and keys is None:
        raise UserError(f"eta={eta} needs random numbers", "give keys, one for each sample, or eta=0")
    look = viewer(sched, denoise, **view)
    prev, std = sched.alphas_cumprod_prev, eta * np.sqrt(sched.posterior_variance)
    direction = np.sqrt(np.maximum(1 - prev - std**2, 0))

    def step(xt, i):
        t, x0, eps, _ = look(xt, i)
        xt_prev = at(np.sqrt(prev), t, xt.ndim) * x0 + at(direction, t, xt.ndim) * eps
        return xt_prev + at(std, t, xt.ndim) * step_noise(keys, i, xt.shape[1:]) if eta else xt_prev, None

    return _scan(step, sched, noise)


def dpm(
    sched: Schedule, denoise: Denoise, noise: jax.Array, keys: jax.Array | None = None, **view
) -> jax.Array:
    """DPM-Solver++(2M), of second order at one call a step (Lu et al. 2022, algorithm 2) -> x0 f32[B, …].

    x_{t-1} = (sigma_{t-1} / sigma_t) x_t - sqrt(abar_{t-1}) (e^-h - 1) D, with h the step of log(signal / sigma) and
    D = x0 + h / (2 h_before) (x0 - x0_before), the line through the last two predictions of x0. The first step and the
    last, which ends without noise, take D = x0 and are DDIM's.

    Args:
      noise, view: as of `ddim`; `keys` are not used.
    """
    look = viewer(sched, denoise, **view)
    prev, half_log_snr = sched.alphas_cumprod_prev, 0.5 * np.log(sched.snr)
    h = np.append(np.inf, half_log_snr[:-1] - half_log_snr[1:])
    mix = np.zeros_like(h)
    mix[1:-1] = h[1:-1] / (2 * h[2:])
    shrink, gain = np.sqrt((1 - prev) / (1 - sched.alphas_cumprod)), -np.sqrt(prev) * np.expm1(-h)

    def step(carry, i):
        xt, before = carry
        t, x0, _, _ = look(xt, i)
        line = x0 + at(mix, t, xt.ndim) * (x0 - before)
        return (at(shrink, t, xt.ndim) * xt + at(gain, t, xt.ndim) * line, x0), None

    noise = jnp.asarray(noise, float)
    (x0, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), jnp.arange(sched.num_steps), reverse=True)
    return x0


def heun(
    sched: Schedule, denoise: Denoise, noise: jax.Array, keys: jax.Array | None = None, **view
) -> jax.Array:
    """Heun's second order on dx/ds = eps, x = xt / signal, s = sigma / signal (Karras et al. 2022, algorithm 1) -> x0.

    DDIM's step is Euler's; a second call at its end gives the slope there, and the mean of both slopes is taken. Two
    calls a step but for the last: 2 S - 1 in all. A step from s > 80, where the paper begins and a cosine schedule has
    20,000, stays Euler's: over so long a one the slope is no line, and the mean would leave noise that never goes.

    Args:
      noise, view: as of `ddim`; `keys` are not used.
    """
    look = viewer(sched, denoise, **view)
    prev = sched.alphas_cumprod_prev
    ratio = np.sqrt((1 - sched.alphas_cumprod) / sched.alphas_cumprod)
    stride = np.sqrt(prev) * np.append(-ratio[:1], ratio[:-1] - ratio[1:])
    correction = np.where(ratio > KARRAS_MAX, 0.0, stride / 2)

    def step(xt, i):
        t, x0, eps, _ = look(xt, i)
        euler = at(np.sqrt(prev), t, xt.ndim) * x0 + at(np.sqrt(1 - prev), t, xt.ndim) * eps
        _, _, slope, _ = look(euler, i - 1)
        return euler + at(correction, t, xt.ndim) * (slope - eps), None

    xt, _ = jax.lax.scan(step, jnp.asarray(noise, float), jnp.arange(1, sched.num_steps), reverse=True)
    return look(xt, 0)[1]


# "analytic" is ddpm with a table, which `draw` gives it.
SAMPLERS = {"ddpm": ddpm, "analytic": ddpm, "ddim": ddim, "dpm": dpm, "heun": heun}


def _scan(step, sched: Schedule, noise: jax.Array) -> jax.Array:
    x0, _ = jax.lax.scan(step, jnp.asarray(noise, float), jnp.arange(sched.num_steps), reverse=True)
    return x0
