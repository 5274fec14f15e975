"""What a denoiser is to the diffusion code, classifier-free guidance over it (arXiv 2207.12598), and one that is two.

Guidance here: u + s (c - u), so s = 1 is the conditional model, s = 0 the unconditional, s > 1 guided. It
touches the prediction only; the variance is the conditional one's, as in GLIDE and Karlo. `rescale` phi brings the
guided prediction's spread back to the conditional one's: phi g std(c) / std(g) + (1 - phi) g, with the standard
deviation over each sample (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16); 0 is none.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Out(NamedTuple):
    """A denoiser's output, float of any width.

    pred: f32[B, …], x0, eps or v; var: f32[B, …] in [-1, 1], read by `schedule.model_log_variance`, or None.
    """

    pred: jax.Array
    var: jax.Array | None = None


# (xt f32[B, …], model_time i32[B]) -> Out; parameters and conditioning are closed over.
Denoise = Callable[[jax.Array, jax.Array], Out]


def guide(denoise2: Denoise, scale: float | jax.Array, rescale: float = 0.0) -> Denoise:
    """u + scale (c - u), c and u from one call on a doubled batch: one program, larger matrices.

    Args:
      denoise2: a denoiser whose conditioning has 2B rows, the conditional half first; it gets xt and
        model_time doubled.
      scale, rescale: of `mix`. At a scale of 1 still 2B rows are computed (use the conditional denoiser itself).
    """

    def denoise(xt, model_time):
        out = denoise2(jnp.concatenate([xt, xt]), jnp.concatenate([model_time, model_time]))
        c, u = jnp.split(out.pred, 2)
        var = None if out.var is None else jnp.split(out.var, 2)[0]
        return Out(mix(c, u, scale, rescale), var)

    return denoise


def within(low: float, high: float, inside: Denoise, outside: Denoise) -> Denoise:
    """`inside` at model times low … high, ends included, and `outside` at others; only one of them is computed.

    All rows of a call are at one time. Predictions come in f32.
    """

    def wide(denoise):
        def cast(xt, model_time):
            out = denoise(xt, model_time)
            return Out(jnp.asarray(out.pred, float), out.var)

        return cast

    def denoise(xt, model_time):
        is_inside = (low <= model_time[0]) & (model_time[0] <= high)
        return jax.lax.cond(is_inside, wide(inside), wide(outside), xt, model_time)

    return denoise


def is_one(scale) -> bool:
    """Whether a scale is known to be 1, which is no guidance: a traced one is not."""
    return isinstance(scale, (int, float)) and scale == 1


def mix(c: jax.Array, u: jax.Array, scale: float | jax.Array, rescale: float = 0.0) -> jax.Array:
    """u + scale (c - u) of predictions f[B, …] -> f32[B, …].

    Args:
      scale: a float, a traced scalar or f32[B]; 1 = unguided.
      rescale: 0 … 1.
    """
    # In f32 (f64 in x64 mode): the difference of two near bf16 numbers, times s, would be mostly rounding.
    c, u, scale = (jnp.asarray(a, float) for a in (c, u, scale))
    if scale.ndim:
        scale = scale.reshape((-1,) + (1,) * (c.ndim - 1))
    mixed = u + scale * (c - u)
    if isinstance(rescale, (int, float)) and rescale == 0:
        return mixed
    spread = lambda x: jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)  # noqa: E731
    least = jnp.finfo(mixed.dtype).tiny  # a new network's prediction is zero everywhere
    return mixed * (1 - rescale + rescale * spread(c) / jnp.maximum(spread(mixed), least))
