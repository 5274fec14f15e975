"""DDIM run backwards, from a picture to the noise that DDIM draws it from: the unCLIP paper's x_T (section 3).

Song et al. 2020 (arXiv 2010.02502, section 4.3), Dhariwal & Nichol 2021 (arXiv 2105.05233, appendix F).
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guide import Denoise
from unclip_jax.diffusion.schedule import Schedule, at, bounded, model_time, to_eps, to_x0
from unclip_jax.errors import UserError


def ddim_invert(
    sched: Schedule,
    denoise: Denoise,
    x0: jax.Array,
    *,
    target: str,
    clip_x0: float | None = 1.0,
    iterations: int = 1,
) -> jax.Array:
    """The noise f32[B, …] that `ddim` with eta 0 takes to x0, up to the error of each step.

    DDIM's step, solved for where it came from: with r = sqrt(abar_t / abar_{t-1}),
    x_t = r x_{t-1} + (sqrt(1 - abar_t) - r sqrt(1 - abar_{t-1})) eps(x_t, t), and x_{-1} = x0. As x_t stands on both
    sides, eps is iterated, from the eps of the step before; each iteration is a call of the network. One leaves an
    error that falls with the steps; more tend to the exact inverse, by a factor of up to 1 - (SNR_t / SNR_{t-1})^1/2.

    What `ddim` gives back is a prediction of x0 at the least noise: a picture that the network cannot give there has
    no exact inverse, whatever the iterations. Then the noise takes up the rest, the more the less noise the
    schedule begins with, and is not standard normal.

    Args:
      sched: as `ddim` will use it, the same steps.
      x0: f32[B, …] in [-1, 1].
      target: what `denoise` predicts, "x0", "eps" or "v".
      clip_x0: as of `ddim`, and the same; where it clips, eps is that of the clipped x0, so the step is undone.
      iterations: calls of the network a step, at least 1.
    """
    if not iterations >= 1:
        raise UserError(f"iterations={iterations} of the inversion must be at least 1")
    a, prev = sched.alphas_cumprod, sched.alphas_cumprod_prev
    keep = np.sqrt(a / prev)
    add = np.sqrt(1 - a) - keep * np.sqrt(1 - prev)

    def step(carry, i):
        before, eps = carry
        t = jnp.full((before.shape[0],), i, jnp.int32)

        def onwards(eps):
            return at(keep, t, before.ndim) * before + at(add, t, before.ndim) * eps

        def look(_, eps):
            xt = onwards(eps)
            seen = to_x0(sched, denoise(xt, model_time(sched, t)).pred, xt, t, target=target)
            return to_eps(sched, bounded(seen, clip_x0), xt, t, target="x0")

        eps = jax.lax.fori_loop(0, iterations, look, eps)
        return (onwards(eps), eps), None

    x0 = jnp.asarray(x0, float)
    (noise, _), _ = jax.lax.scan(step, (x0, jnp.zeros_like(x0)), jnp.arange(sched.num_steps))
    return noise
