"""Training losses of diffusion: squared error, weighted by SNR or not, and the hybrid with a learned variance.

Ho et al. 2020 (arXiv 2006.11239): L_simple. Nichol & Dhariwal 2021 (arXiv 2102.09672): L_hybrid = L_simple +
0.001 L_vlb. Hang et al. 2023 (arXiv 2303.09556): min-SNR-5. All in f32, one number per sample, a mean over
the sample's dimensions.

Scale of the hybrid: L_vlb is the sum over the S steps; with t drawn uniformly its estimate is S L_t, so the
loss is simple + vlb_weight * S * L_t with L_t in bits per dimension. The paper's weight is 0.001: at S = 1000
the factor of L_t is then 1, the same as in guided-diffusion, which writes it as L_t S / 1000.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guide import Denoise, Out
from unclip_jax.diffusion.schedule import (
    Schedule,
    at,
    bounded,
    check_target,
    model_log_variance,
    model_time,
    q_posterior,
    q_sample,
    to_x0,
)
from unclip_jax.errors import UserError, suggest

# Between what the weight of the x0 error follows SNR; None: every step weighs 1.
WEIGHTINGS = {"none": None, "min_snr": (0.0, 5.0), "clipped_snr": (1.0, 5.0)}


def simple(
    sched: Schedule,
    pred: jax.Array,
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    target: str,
    weighting: str = "none",
) -> jax.Array:
    """w_t mean((pred - target)^2) -> f32[B].

    Args:
      pred: f32[B, …], the network's output for `target`: "x0", "eps" or "v"; x0, noise alike, t i32[B].
      weighting: "none" (w = 1), "min_snr": min(SNR, 5) times the x0 error for any target; or
        "clipped_snr": max(1, min(SNR, 5)) times it, which leaves layouts, seen at low SNR, their share (with the lower
        bound of Salimans & Ho 2022, arXiv 2202.00512).
    """
    weights = snr_weights(sched, target, weighting)
    error = _f32(pred) - _truth(sched, x0, t, noise, target)
    return _mean(jnp.square(error)) * at(weights, t, 1)


def snr_weights(sched: Schedule, target: str, weighting: str) -> np.ndarray:
    """w_t, f64[S]: m = SNR within bounds for x0, m / SNR for eps, m / (SNR+1) for v (arXiv 2303.09556); or ones.

    Raises:
      UserError: an unknown weighting, or one with a lower bound for eps: 1 / SNR would leave the last steps alone.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"unknown loss weighting '{weighting}'", suggest(weighting, WEIGHTINGS))
    check_target(target)
    bounds, snr = WEIGHTINGS[weighting], sched.snr
    if bounds is None:
        return np.ones_like(snr)
    if target == "eps" and bounds[0] > 0:
        what = f"weighting={weighting!r} of a network that predicts eps would weigh the noisiest steps alone"
        raise UserError(what, "take 'min_snr', or the target x0 or v")
    return np.clip(snr, *bounds) / {"x0": 1.0, "eps": snr, "v": snr + 1}[target]


def vlb(
    sched: Schedule,
    out: Out,
    x0: jax.Array,
    xt: jax.Array,
    t: jax.Array,
    target: str,
    clip_x0: float | None = 1.0,
) -> jax.Array:
    """One term L_t of the variational bound -> f32[B] bits/dim; its gradient reaches `out.var` only.

    t > 0: KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt)); t = 0: -log p(x0 | xt) for x0 in 256 levels of [-1, 1].
    The mean is held constant (arXiv 2102.09672, 3.1). Without `out.var` the variance is the posterior's.

    Args:
      clip_x0: bound of the x0 that the prediction means, or None. Clipped as in the sampler, so the variance
        is learned for the mean sampled from, and eps errors, times 2e4 at the noisiest step, stay bounded.
    """
    x0, xt = _f32(x0), _f32(xt)
    x0_pred = to_x0(sched, jax.lax.stop_gradient(out.pred), xt, t, target=target)
    x0_pred = bounded(x0_pred, clip_x0)
    mean, _, true_log_var = q_posterior(sched, x0_pred, xt, t)
    log_var = model_log_variance(sched, out.var, t, x0.ndim)
    # The means differ in their x0 part only; subtracting it, not them, keeps the digits.
    shift = at(sched.posterior_x0_coef, t, x0.ndim) * (x0 - x0_pred)
    kl = gaussian_kl(shift, true_log_var, jnp.zeros_like(shift), log_var)
    nll = discretised_gaussian_nll(x0, mean, 0.5 * log_var)
    first = t.reshape((-1,) + (1,) * (x0.ndim - 1)) == 0
    return _mean(jnp.where(first, nll, kl)) / np.log(2)


def diffusion_loss(
    sched: Schedule,
    denoise: Denoise,
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    target: str,
    vlb_weight: float = 0.0,
    weighting: str = "none",
    clip_x0: float | None = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """simple + vlb_weight * S * vlb -> f32[B], and metrics.

    The metrics are scalars, batch means: "mse" (unweighted) and, with vlb_weight, "vlb" (S L_t, bits/dim).

    Args:
      x0: f32[B, …]; t: i32[B] drawn uniformly from 0 … S-1; noise: f32[B, …] standard normal.
      vlb_weight: 0 (no learned variance) or the paper's 0.001; needs a denoiser that gives `var`.
      clip_x0: as for vlb, and used there only.
    """
    xt = q_sample(sched, x0, t, noise)
    out = denoise(xt, model_time(sched, t))
    if vlb_weight and out.var is None:
        raise UserError(f"vlb_weight={vlb_weight} needs a model that learns its variance",
                        "set vlb_weight=0, or let the model put out a variance")
    weights = snr_weights(sched, target, weighting)
    mse = simple(sched, out.pred, x0, t, noise, target)
    loss = mse * at(weights, t, 1)
    metrics = {"mse": jnp.mean(mse)}
    if vlb_weight:
        bound = sched.num_steps * vlb(sched, out, x0, xt, t, target, clip_x0)
        loss = loss + vlb_weight * bound
        metrics["vlb"] = jnp.mean(bound)
    return loss, metrics


def x0_variance(
    sched: Schedule,
    denoise: Denoise,
    x0: jax.Array,
    rng: jax.Array,
    *,
    target: str,
    clip_x0: float | None = 1.0,
) -> jax.Array:
    """E Var(x0 | xt) at every step, estimated by the mean of (x0 - its prediction)^2 over the batch -> f32[S].

    What the sampler "analytic" adds to the posterior's variance. Bao et al. 2022 (arXiv 2201.06503, theorem 1) write it
    as (1 - abar) / abar (1 - (1 - abar) Gamma_t), with Gamma_t = E |score|^2 / D; for an ideal denoiser the two are
    equal. For another one the squared error makes the variance optimal (arXiv 2206.07309, by the same authors), and it
    is no small difference of two estimates where abar is near 0.
    """

    def term(step):
        t = jnp.full((x0.shape[0],), step, jnp.int32)
        xt = q_sample(sched, x0, t, jax.random.normal(jax.random.fold_in(rng, step), x0.shape))
        pred = to_x0(sched, denoise(xt, model_time(sched, t)).pred, xt, t, target=target)
        return jnp.mean(jnp.square(x0 - bounded(pred, clip_x0)))

    return jax.lax.map(term, jnp.arange(sched.num_steps))


def prior_bpd(sched: Schedule, x0: jax.Array) -> jax.Array:
    """KL(q(x_{S-1} | x0) || N(0, I)) -> f32[B] bits/dim: what the end of the schedule still knows of x0."""
    a = sched.alphas_cumprod[-1]
    spread = -a - np.log1p(-a)  # variance - 1 - log variance, in f64: in f32 it would be 0
    return _mean(0.5 * (spread + a * jnp.square(_f32(x0)))) / np.log(2)


def gaussian_kl(mean1: jax.Array, log_var1: jax.Array, mean2: jax.Array, log_var2: jax.Array) -> jax.Array:
    """KL(N(mean1, exp(log_var1)) || N(mean2, exp(log_var2))) in nats, elementwise."""
    ratio = log_var1 - log_var2
    # expm1(r) - r >= 0 is the variances' part; written so it stays near 0 when they agree.
    return 0.5 * (jnp.expm1(ratio) - ratio + jnp.square(mean1 - mean2) * jnp.exp(-log_var2))


def discretised_gaussian_nll(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """-log of N(mean, exp(log_scale)^2)'s mass in x's bin, in nats (Ho et al., eq. 13), elementwise.

    x is u8 / 127.5 - 1, in the middle of one of 256 bins of half width 1/255. The end bins reach to infinity,
    so that the 256 masses sum to 1.
    """
    log_cdf, half = jax.scipy.special.log_ndtr, jnp.exp(-log_scale) / 255
    # Bounded: farther out log_cdf's f32 derivative overflows, and turns even masked-out terms into NaN.
    z = jnp.clip((x - mean) * jnp.exp(-log_scale), -2000, 2000)
    below, above = log_cdf(z + half), log_cdf(half - z)  # up to the bin's end; from its start on
    # By symmetry taken in the lower tail, where log_cdf does not round to 0: log(e^upper - e^lower).
    upper, lower = jnp.minimum(below, above), log_cdf(-half - jnp.abs(z))
    inner = upper + jnp.log(jnp.maximum(-jnp.expm1(lower - upper), 1e-12))
    return -jnp.where(x < -0.999, below, jnp.where(x > 0.999, above, inner))


def _truth(sched: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array, target: str) -> jax.Array:
    check_target(target)
    x0, noise = _f32(x0), _f32(noise)
    if target == "v":
        abar = sched.alphas_cumprod
        return at(np.sqrt(abar), t, x0.ndim) * noise - at(np.sqrt(1 - abar), t, x0.ndim) * x0
    return x0 if target == "x0" else noise


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
