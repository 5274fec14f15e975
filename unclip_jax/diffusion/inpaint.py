"""Painting where a mask says, with a denoiser that was never trained for it; and starting from a picture.

RePaint: Lugmayr et al. 2022 (arXiv 2201.09865). `keep` is 1 where a picture is known, and 0 where it is to be painted.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guide import Denoise
from unclip_jax.diffusion.sample import step_noise, viewer
from unclip_jax.diffusion.schedule import Schedule, at, q_sample
from unclip_jax.errors import UserError


def partway(sched: Schedule, image: jax.Array, strength: float, noise: jax.Array) -> tuple[Schedule, jax.Array]:
    """The last `strength` of a schedule's steps, and q(xt | image) where they begin: SDEdit (arXiv 2108.01073).

    Args:
      image, noise: f32[B, …]; strength: above 0 and at most 1, rounded to at least one step.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} must be above 0 and at most 1")
    left = max(1, round(strength * sched.num_steps))
    short = Schedule(sched.alphas_cumprod[:left], sched.timesteps[:left])
    return short, q_sample(short, image, jnp.full((image.shape[0],), left - 1), noise)


def travel(num_steps: int, jump: int = 1, resample: int = 1) -> np.ndarray:
    """The noise levels that RePaint walks through, i32[N, 2]: a row (n, m) goes from level n to n - 1, then up to m.

    Level n is before n denoising steps, so 0 is the picture. At every `jump`-th level the walk goes `jump` levels back
    up, resample - 1 times, and down again (Lugmayr et al., figure 9). m = n - 1: not up.
    """
    left = {level: resample - 1 for level in range(0, num_steps - jump, jump)}
    rows, level = [], num_steps
    while level:
        after = level - 1
        if left.get(after, 0):
            left[after] -= 1
            after += jump
        rows.append((level, after))
        level = after
    return np.array(rows, np.int32)


def repaint(
    sched: Schedule,
    denoise: Denoise,
    noise: jax.Array,
    keys: jax.Array,
    *,
    known: jax.Array,
    keep: jax.Array,
    jump: int = 1,
    resample: int = 1,
    eta: float = 1.0,
    **view,
) -> jax.Array:
    """RePaint (Lugmayr et al., algorithm 1) -> x0 f32[B, …], equal to `known` to the bit where keep is 1.

    Each step takes x_{t-1} from q(x_{t-1} | known) where it is known, and from the sampler's step elsewhere; going back
    up by q(x_s | x_{t-1}) lets the two agree. The up-steps of one jump are one, being Gaussian.

    Args:
      noise: f32[B, …], where it begins; keys: key[B].
      known: f32[B, …], read where keep is 1; keep: f32 or bool, broadcast to it.
      jump, resample: of `travel`; resample 1 never goes back.
      eta: of `sample.ddim`'s step: 1 is DDPM's, as in the paper.
      view: of `sample.viewer`: target, clip_x0, threshold.
    """
    for name, value in (("jump", jump), ("resample", resample)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    look = viewer(sched, denoise, **view)
    rows = travel(sched.num_steps, jump, resample)
    abar = np.append(1.0, sched.alphas_cumprod)  # by level
    up = jnp.asarray(abar[rows[:, 1]] / abar[rows[:, 0] - 1], float)
    prev, std = sched.alphas_cumprod_prev, eta * np.sqrt(sched.posterior_variance)
    direction = np.sqrt(np.maximum(1 - prev - std**2, 0))

    def step(xt, row):
        number, i, ratio = row
        t, x0, eps, _ = look(xt, i)
        z_own, z_known, z_up = (step_noise(keys, 3 * number + k, xt.shape[1:]) for k in range(3))
        signal, *own = (at(table, t, xt.ndim) for table in (np.sqrt(prev), direction, std))
        painted = signal * x0 + own[0] * eps + own[1] * z_own
        given = signal * known + at(np.sqrt(1 - prev), t, xt.ndim) * z_known
        x = jnp.where(keep > 0, given, painted)
        return jnp.sqrt(ratio) * x + jnp.sqrt(1 - ratio) * z_up, None

    x0, _ = jax.lax.scan(step, jnp.asarray(noise, float), (jnp.arange(len(rows)), rows[:, 0] - 1, up))
    return x0
