"""The optimizer of every stage: AdamW (Loshchilov & Hutter 2019) or Muon, warm-up, clipping, gradient accumulation.

Weight decay is decoupled and reaches all but biases, scales and measured statistics (`decayed`). Two step counts exist
where gradients are accumulated: `num_steps` counts batches, as the training loop does; warm-up and decay count
optimizer updates, of which there are `num_steps // accumulate`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from unclip_jax.errors import UserError, suggest

SCHEDULES: dict[str, Callable] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1 - progress,
}
NAMES = ("adamw", "muon")
MUON_RMS = 0.2  # of an update per learning rate: AdamW's, so that both take the same rates (Liu et al. 2025)
# Kernels [width, heads, D] of `nn.DenseGeneral`, all others having one last axis for what comes out.
BY_HEADS = frozenset({"query", "key", "value", "context_key", "context_value"})
# Of more than one axis: layers stacked for a scan turn their biases and scales into matrices; components are measured.
UNDECAYED = frozenset({"bias", "scale", "components"})


def make(
    num_steps: int,
    *,
    name: str = "adamw",
    lr: float,
    warmup: int = 0,
    schedule: str = "cosine",
    final: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    sam_rho: float = 0.0,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW: p -= lr_t (m / (sqrt(v) + eps) + weight_decay p).

    Or Muon (Jordan et al. 2024): for each kernel as a matrix [in, out] (`matrices`)
    p -= lr_t (0.2 sqrt(max(in, out)) O + weight_decay p), where O is m (decay 0.95, Nesterov) made nearly orthogonal by
    five Newton-Schulz iterations; the scale is Liu et al.'s (2025, arXiv 2502.16982), who thus keep AdamW's learning
    rates. All else follows Adam with Nesterov's momentum. It learns more of each batch for more work in a step, which
    counts where a matrix lies over many devices: each step gathers it.

    Args:
      num_steps: batches the whole run takes, >= 1.
      name: "adamw" or "muon".
      lr: the highest learning rate, > 0.
      warmup: updates over which the rate rises linearly to `lr`; the first update already has lr / warmup.
      schedule: "cosine", "linear" or "constant" after the warm-up.
      final: what the rate falls towards, as a fraction of `lr`, in [0, 1]; it is that of the update after the last, so
        that with 0 the last still learns; "constant" has no use for it.
      weight_decay: >= 0; for arrays of rank >= 2 that are not biases, scales or statistics (`decayed`); with Muon for
        those it sees as matrices alone.
      b1, b2: decay of the first and second moment, in [0, 1).
      eps: > 0.
      clip_norm: the greatest global gradient norm, > 0, or None for no clipping.
      accumulate: batches whose mean gradient makes one update, in 1 … `num_steps`.
      sam_rho: >= 0; where it is not 0 the gradients come from `sharpness_aware`, of which the step takes care.

    Raises:
      UserError: a number outside its range, or an unknown name or schedule.
    """
    if name not in NAMES:
        raise UserError(f"optim.name={name!r} is unknown", suggest(name, NAMES))
    _number("optim.weight_decay", weight_decay, low=0)
    _number("optim.b1", b1, low=0, below=1)
    _number("optim.b2", b2, low=0, below=1)
    _number("optim.eps", eps, above=0)
    _number("optim.sam_rho", sam_rho, low=0)
    if clip_norm is not None:
        _number("optim.clip_norm", clip_norm, above=0)
    rate = _update_rate(num_steps, lr, warmup, schedule, final, accumulate)
    if name == "muon":
        descend = optax.contrib.muon(
            rate,
            eps=eps,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        descend = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    tx = optax.chain(optax.identity() if clip_norm is None else clip(clip_norm), descend)
    return (
        optax.MultiSteps(tx, every_k_schedule=accumulate).gradient_transformation() if accumulate > 1 else tx
    )


def clip(greatest: float) -> optax.GradientTransformation:
    """g min(1, greatest / |g|), |g| over all arrays: one factor for them, which XLA applies in the pass that follows.

    Whoever knows |g| may give it as `norm`; optax.MultiSteps hands none on, whose |g| is of a mean of gradients.
    """

    def update(grads, state, params=None, *, norm=None, **_):
        norm = optax.global_norm(grads) if norm is None else norm
        factor = jnp.minimum(1.0, greatest / norm)
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def learning_rate(
    num_steps: int,
    *,
    lr: float,
    warmup: int = 0,
    schedule: str = "cosine",
    final: float = 0.0,
    accumulate: int = 1,
    **_,
) -> optax.Schedule:
    """The rate `make` uses, by batch count (for logs): i32[] -> f32[]. Takes the same keywords."""
    rate = _update_rate(num_steps, lr, warmup, schedule, final, accumulate)
    return lambda step: rate(jnp.asarray(step) // accumulate)


def sharpness_aware(gradient: Callable, rho: float) -> Callable:
    """SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2 and 3): the gradient at p + rho g / |g|, where g is that at p.

    Args:
      gradient: parameters -> (value, gradient), as of jax.value_and_grad; it is asked twice.
      rho: how far is climbed, in the Euclidean norm over all parameters; 0: `gradient` as it is.

    Returns:
      parameters -> (value at p, gradient above). A gradient at p that is 0 is the one above.
    """

    def above(params):
        value, here = gradient(params)
        step = rho / jnp.maximum(optax.global_norm(here), jnp.finfo(jnp.float32).tiny)
        return value, gradient(jax.tree.map(lambda p, g: p + (step * g).astype(p.dtype), params, here))[1]

    return above if rho else gradient


def decayed(params) -> dict:
    """Which arrays weight decay reaches: a tree of bool like `params`."""

    def decays(path, array):
        return array.ndim >= 2 and jax.tree_util.keystr(path[-1:], simple=True) not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def matrices(params) -> dict:
    """As what matrix Muon sees each kernel: a tree of MuonDimensionNumbers like `params`, None where AdamW stays."""

    def see(path, array):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        axes = tuple(range("blocks" in names, array.ndim))  # the first of a scan's counts layers
        if names[-1] != "kernel" or len(axes) < 2:
            return None
        ins = 1 if names[-2] in BY_HEADS else len(axes) - 1
        return MuonDimensionNumbers(axes[:ins], axes[ins:])

    return jax.tree_util.tree_map_with_path(see, params)


def _update_rate(num_steps, lr, warmup, schedule, final, accumulate) -> optax.Schedule:
    """The learning rate of update `count` = 0, 1, …"""
    _number("num_steps", num_steps, low=1, whole=True)
    _number("optim.accumulate", accumulate, low=1, whole=True)
    _number("optim.lr", lr, above=0)
    _number("optim.warmup", warmup, low=0, whole=True)
    _number("optim.final", final, low=0, high=1)
    if schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={schedule!r} is unknown", suggest(schedule, SCHEDULES))
    if accumulate > num_steps:
        raise UserError(
            f"optim.accumulate={accumulate} must not exceed num_steps={num_steps}, or there is no update",
            f"set optim.accumulate to {num_steps} or less, or raise num_steps",
        )
    updates = num_steps // accumulate
    if warmup > updates:
        raise UserError(
            f"optim.warmup={warmup} must not exceed the {updates} updates of the run "
            f"(num_steps={num_steps}, accumulate={accumulate})",
            f"set optim.warmup to {updates} or less, or raise num_steps",
        )
    shape = SCHEDULES[schedule]

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (count + 1) / max(1, warmup))
        progress = jnp.clip((count - warmup) / max(1, updates - warmup), 0.0, 1.0)
        return lr * rise * (final + (1 - final) * shape(progress))

    return rate


def _number(name, value, *, low=-math.inf, above=-math.inf, high=math.inf, below=math.inf, whole=False):
    """Raises UserError unless `value` is finite, low <= value <= high and above < value < below."""
    kinds = int if whole else (int, float)
    ok = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if ok and low <= value <= high and above < value < below:
        return
    ends = [
        f"{sign} {end}"
        for sign, end in ((">=", low), (">", above), ("<=", high), ("<", below))
        if math.isfinite(end)
    ]
    kind = "an integer" if whole else "a finite number"
    raise UserError(f"{name}={value!r} must be {kind}" + "".join(f", {end}" for end in ends))
