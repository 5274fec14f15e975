"""The whole variational bound of a diffusion, an oracle for what estimates a part of it."""

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.loss import prior_bpd, vlb
from unclip_jax.diffusion.schedule import model_time, q_sample


def bpd(sched, denoise, x0, rng, *, target, clip_x0=1.0):
    """-log p(x0)'s bound, one pass over all S steps: {"total": f32[B], "prior": f32[B], "vlb": f32[S, B]}, bits/dim.

    total = prior + sum of vlb over S.
    """

    def term(_, step):
        t = jnp.full((x0.shape[0],), step, jnp.int32)
        xt = q_sample(sched, x0, t, jax.random.normal(jax.random.fold_in(rng, step), x0.shape))
        return None, vlb(sched, denoise(xt, model_time(sched, t)), x0, xt, t, target, clip_x0)

    _, terms = jax.lax.scan(term, None, jnp.arange(sched.num_steps))
    prior = prior_bpd(sched, x0)
    return {"total": prior + jnp.sum(terms, 0), "prior": prior, "vlb": terms}
