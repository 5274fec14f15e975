"""Noise schedules as data: q(xt | x0) = N(sqrt(abar_t) x0, (1 - abar_t) I), for t = 0 (least noise) … S - 1.

Realises Ho et al. 2020 (arXiv 2006.11239, eq. 4 to 7), the cosine schedule and the respacing of Nichol &
Dhariwal 2021 (arXiv 2102.09672), and v of Salimans & Ho 2022 (arXiv 2202.00512). A `Schedule` holds float64
numpy tables; every function on arrays computes in f32 (in f64 under JAX's x64 mode), gathers the tables by t:
i32[B] (an index into the schedule, 0 … S - 1) and returns f32.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError, suggest

TARGETS = ("x0", "eps", "v")
# Named lists of rows: sections, and how far below the noisiest step the last one lies. GLIDE's 27 steps for
# upsamplers, dense where the noise is low, end at step 997 of 1000, to spare DDIM artifacts of the noisiest.
NAMED_STEPS = {"fast27": ((10, 10, 3, 2, 2), 2)}
MAX_BETA = 0.999


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusion's noise levels. Equal and hashed by content, so it may be static in a jitted function.

    Args:
      alphas_cumprod: f64[S], abar_t = prod(1 - beta), strictly decreasing within (0, 1). The source of truth.
      timesteps: i32[S], the time that the network is told at each step; strictly increasing.
    Derived tables are f64[S] numpy arrays too. Raises UserError for tables that break these rules.
    """

    alphas_cumprod: np.ndarray
    timesteps: np.ndarray

    def __post_init__(self):
        abar = np.array(self.alphas_cumprod, np.float64)
        times = np.array(self.timesteps, np.int32)
        if abar.ndim != 1 or not abar.size or abar.shape != times.shape:
            raise UserError(f"alphas_cumprod of shape {abar.shape} and timesteps of shape {times.shape} must "
                            "be two lists of one length, at least 1")
        if not (np.all(np.diff(abar) < 0) and 0 < abar[-1] and abar[0] < 1):
            raise UserError(f"alphas_cumprod={abar[0]:g} … {abar[-1]:g} must decrease strictly within (0, 1)")
        if times[0] < 0 or not np.all(np.diff(times) > 0):
            raise UserError(f"timesteps={times[0]} … {times[-1]} must increase strictly from 0 or more")
        abar.flags.writeable = times.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", abar)
        object.__setattr__(self, "timesteps", times)

    def __eq__(self, other):
        if not isinstance(other, Schedule):
            return NotImplemented
        return (np.array_equal(self.alphas_cumprod, other.alphas_cumprod)
                and np.array_equal(self.timesteps, other.timesteps))

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.alphas_cumprod.tobytes(), self.timesteps.tobytes()))

    @property
    def num_steps(self) -> int:
        """S, the number of steps."""
        return len(self.alphas_cumprod)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """abar_{t-1}, with abar_{-1} = 1."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """beta_t = 1 - abar_t / abar_{t-1}, from the difference so that beta_0 = 1 - abar_0 exactly."""
        return (self.alphas_cumprod_prev - self.alphas_cumprod) / self.alphas_cumprod_prev

    @functools.cached_property
    def snr(self) -> np.ndarray:
        """Signal to noise, abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Var q(x_{t-1} | xt, x0) = beta_t (1 - abar_{t-1}) / (1 - abar_t) (Ho et al., eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its log; at t = 0, where it is -inf, that of t = 1 instead (log beta_0 if there is no t = 1)."""
        floor = self.posterior_variance[1:2] if self.num_steps > 1 else self.betas
        return np.log(np.append(floor, self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_x0_coef(self) -> np.ndarray:
        """Weight of x0 in the posterior's mean (Ho et al., eq. 7); exactly 1 at t = 0."""
        return np.sqrt(self.alphas_cumprod_prev) * self.betas / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_xt_coef(self) -> np.ndarray:
        """Weight of xt in the posterior's mean (Ho et al., eq. 7); 0 at t = 0."""
        return np.sqrt(1 - self.betas) * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)


def make_schedule(name: str, num_steps: int = 1000, shift: float = 1.0) -> Schedule:
    """The named schedule with timesteps 0 … num_steps - 1.

    "cosine": abar_t = f((t+1)/S) / f(0), f(u) = cos^2((u + 0.008) / 1.008 * pi/2), with betas of at most
      0.999 (arXiv 2102.09672, eq. 17).
    "linear": betas even from 1e-4 to 2e-2, times 1000 / num_steps (arXiv 2006.11239); needs num_steps > 20.

    shift: factor on signal / noise, so SNR shift^2 (Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1). Below 1
      more of the steps are noisy: for images whose content outlasts more noise, being large or flat.
    """
    if name not in ("cosine", "linear"):
        raise UserError(f"unknown noise schedule '{name}'", suggest(name, ("cosine", "linear")))
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps} must be at least 1")
    if name == "cosine":
        f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], MAX_BETA)
    else:
        betas = np.linspace(1e-4, 2e-2, num_steps) * (1000 / num_steps)
        if betas[-1] >= 1:
            raise UserError(f"num_steps={num_steps} must be above 20 with the linear schedule",
                            "make it with 1000 steps and respace it")
    if not (isinstance(shift, (int, float)) and 0 < shift < np.inf):
        raise UserError(f"shift={shift!r} of the noise schedule must be a number above 0 (1 is none)")
    abar = np.cumprod(1 - betas)
    if shift != 1:
        abar = 1 / (1 + (1 - abar) / (abar * shift**2))
    return Schedule(abar, np.arange(num_steps))


def respace(sched: Schedule, steps: int | str | Sequence[int]) -> Schedule:
    """A shorter schedule of the same noise levels: rows of `sched`, its abar and timesteps kept as they are.

    Args:
      steps: a count n of steps, 1 … S: round(i (S-1) / (n-1)), halves to even, i = 0 … n-1, both ends included,
        as Karlo does (one step: the noisiest); or a list of counts, one for each equal section of the steps from
        least to most noise, strided within a section with both its ends, a count of 1 taking its first (arXiv
        2102.09672 and GLIDE); or "fast27", GLIDE's (10, 10, 3, 2, 2) with the last step moved down by 2.
    """
    if isinstance(steps, str):
        if steps not in NAMED_STEPS:
            raise UserError(f"unknown sampling steps '{steps}'",
                            f"give a count, or {suggest(steps, NAMED_STEPS)}")
        sections, below = NAMED_STEPS[steps]
        rows = _section_rows(sched.num_steps, list(sections))
        rows[-1] -= below
    elif isinstance(steps, Sequence):
        rows = _section_rows(sched.num_steps, list(steps))
    else:
        rows = _count_rows(sched.num_steps, int(steps))
    return Schedule(sched.alphas_cumprod[rows], sched.timesteps[rows])


def _count_rows(total: int, count: int) -> np.ndarray:
    if not 1 <= count <= total:
        raise UserError(f"sampling steps={count} must be within 1 … {total}, the steps of the diffusion")
    if count == 1:
        return np.array([total - 1])
    # The product with the ratio, not (i (S-1)) / (n-1): float rounding then falls as in diffusers.
    return np.round(np.arange(count) * ((total - 1) / (count - 1))).astype(int)


def _section_rows(total: int, counts: list[int]) -> np.ndarray:
    sections = np.array_split(np.arange(total), max(len(counts), 1))  # the first ones take the remainder
    rows = []
    for section, count in zip(sections, counts, strict=False):
        if not 0 <= count <= len(section):
            raise UserError(f"sections={counts}: {count} must be within 0 … {len(section)}, its section")
        stride = (len(section) - 1) / (count - 1) if count > 1 else 1
        rows.extend(section[0] + round(i * stride) for i in range(count))
    if not rows:
        raise UserError(f"sections={counts} must hold at least one step")
    return np.array(rows)


def model_time(sched: Schedule, t: jax.Array) -> jax.Array:
    """timesteps[t], what the network is told: i32[B] -> i32[B]."""
    return jnp.asarray(sched.timesteps)[t]


def q_sample(sched: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al., eq. 4) -> f32[B, …].

    x0, noise: f32[B, …]; t: i32[B].
    """
    signal, sigma = _signal_sigma(sched, t, x0.ndim)
    return signal * _float(x0) + sigma * _float(noise)


def q_posterior(
    sched: Schedule, x0: jax.Array, xt: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q(x_{t-1} | xt, x0) (Ho et al., eq. 6 and 7) -> mean f32[B, …], variance and log variance f32[B, 1, …].

    At t = 0 the mean is x0, the variance 0 and the log variance that of t = 1, to stay finite.
    """
    mean = (at(sched.posterior_x0_coef, t, x0.ndim) * _float(x0)
            + at(sched.posterior_xt_coef, t, x0.ndim) * _float(xt))
    return (mean, at(sched.posterior_variance, t, x0.ndim), at(sched.posterior_log_variance, t, x0.ndim))


def to_x0(sched: Schedule, pred: jax.Array, xt: jax.Array, t: jax.Array, *, target: str) -> jax.Array:
    """The x0 that a prediction of `target` means -> f32[B, …].

    eps: (xt - sqrt(1 - abar) eps) / sqrt(abar); v: sqrt(abar) xt - sqrt(1 - abar) v.
    """
    check_target(target)
    pred, xt, a = _float(pred), _float(xt), sched.alphas_cumprod
    if target == "eps":
        return at(1 / np.sqrt(a), t, xt.ndim) * xt - at(np.sqrt((1 - a) / a), t, xt.ndim) * pred
    if target == "v":
        signal, sigma = _signal_sigma(sched, t, xt.ndim)
        return signal * xt - sigma * pred
    return pred


def to_eps(sched: Schedule, pred: jax.Array, xt: jax.Array, t: jax.Array, *, target: str) -> jax.Array:
    """The noise that a prediction of `target` means -> f32[B, …].

    x0: (xt - sqrt(abar) x0) / sqrt(1 - abar); v: sqrt(1 - abar) xt + sqrt(abar) v.
    """
    check_target(target)
    pred, xt = _float(pred), _float(xt)
    signal, sigma = _signal_sigma(sched, t, xt.ndim)
    if target == "x0":
        return (xt - signal * pred) / sigma
    if target == "v":
        return sigma * xt + signal * pred
    return pred


def model_log_variance(sched: Schedule, v: jax.Array | None, t: jax.Array, ndim: int) -> jax.Array:
    """log variance of p(x_{t-1} | xt) -> f32[B, …], or f32[B, 1, …] where it is fixed.

    Args:
      v: f32[B, …], the network's variance output: 1 means log beta_t and -1 the log posterior variance, and between
        them frac log beta_t + (1 - frac) log posterior, frac = (v + 1) / 2, not clamped (arXiv 2102.09672, eq. 15).
        None: the posterior's.
    """
    small = at(sched.posterior_log_variance, t, ndim)
    if v is None:
        return small
    frac = (_float(v) + 1) / 2
    return frac * at(np.log(sched.betas), t, ndim) + (1 - frac) * small


def bounded(x0: jax.Array, clip_x0: float | None, threshold: float | None = None) -> jax.Array:
    """x0 f32[B, …] within -clip_x0 … clip_x0, cut there or, by a `threshold`, scaled into it; see `sample.viewer`."""
    if clip_x0 is None:
        if threshold is not None:
            raise UserError(f"threshold={threshold} scales into clip_x0, and there is none", "leave the threshold out")
        return x0
    if threshold is None:
        return jnp.clip(x0, -clip_x0, clip_x0)
    size = jnp.quantile(jnp.abs(x0), threshold, axis=tuple(range(1, x0.ndim)), keepdims=True)
    size = jnp.maximum(size, clip_x0)
    return jnp.clip(x0, -size, size) * (clip_x0 / size)


def at(table: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """table[t] in f32 (f64 in x64 mode), shaped [B, 1, …] with `ndim` dimensions to multiply a batch."""
    return jnp.asarray(table, float)[t].reshape((-1,) + (1,) * (ndim - 1))


def check_target(target: str) -> None:
    """Raises UserError unless the prediction target is "x0", "eps" or "v"."""
    if target not in TARGETS:
        raise UserError(f"unknown prediction target '{target}'", suggest(target, TARGETS))


def _signal_sigma(sched: Schedule, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    return at(np.sqrt(sched.alphas_cumprod), t, ndim), at(np.sqrt(1 - sched.alphas_cumprod), t, ndim)


def _float(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, float)
