"""The stages of unCLIP as Tasks: a network, a schedule, numbers of the objective. The loop knows only this protocol.

    stage             network   learns
    clip              CLIP      which caption belongs to which image
    prior_diffusion   Prior     caption, z_txt → z_img
    prior_ar          PriorAR   the same, as a sequence of codes
    decoder           Decoder   z_img, caption → image
    upsampler         UNet      small image → large image; a Decoder where captions enter (GLIDE)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from unclip_jax.diffusion.draw import check_setting
from unclip_jax.diffusion.loss import x0_variance
from unclip_jax.diffusion.schedule import respace
from unclip_jax.errors import UserError, said_of, suggest
from unclip_jax.fetch import fetched
from unclip_jax.models.clip import CLIP
from unclip_jax.tasks.clip import ClipTask
from unclip_jax.tasks.decoder import DecoderTask
from unclip_jax.tasks.frozen import FrozenCLIP, check_sees, clip_identity, freeze, load_clip, load_stage
from unclip_jax.tasks.prior_ar import PriorARTask
from unclip_jax.tasks.prior_diffusion import PriorTask
from unclip_jax.tasks.remat import policies, with_policy
from unclip_jax.tasks.upsampler import UpsamplerTask

__all__ = [
    "TASKS", "FrozenCLIP", "Task", "adopt", "check", "check_sees", "check_task", "clip_identity", "freeze", "load_clip",
    "load_stage", "make", "measure_x0_variance", "measurer", "needs_clip", "policies", "with_policy", "without_remat",
]  # fmt: skip

Batch = Mapping[str, jax.Array]


class Task(Protocol):
    """What the loop, the evaluation and the pipeline ask of a stage. All methods but `prepare` are pure, fit for jit.

    `frozen` is {"clip": parameters} for the stages that learn against a frozen CLIP, else {}.

    Stages of diffusion have besides: `schedule`, and `x0_and_denoise(params, batch)`, an encoded batch's x0 with the
    denoiser that is told all of it, for evaluation by noise level; where they are not "x0" and 1, `target` and
    `clip_x0`. `sampler`: the defaults of `sample`, to be checked. `adopt(params)`: what is put right in weights that
    another run or stack holds.
    """

    @classmethod
    def from_config(cls, config, clip: CLIP | None = None) -> "Task":
        """The stage that a config describes; `clip`, the frozen one's network, for those that need it alone."""

    def init(self, rng: jax.Array) -> Any:
        """Fresh parameters."""

    def prepare(self, frozen: Mapping, params: Any, batches: Iterator[Batch]) -> Any:
        """`params` with what is measured on data before the first step, such as the statistics of embeddings."""

    def encode(self, frozen: Mapping, batch: Batch) -> Batch:
        """`batch` with what the frozen CLIP says of it added."""

    def loss(self, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise over an encoded batch, and scalars to log."""

    def sample(self, params: Any, cond: Batch, keys: jax.Array, **over) -> jax.Array:
        """Draws an output for each row of `cond` by its own key in `keys` key[B]; `over` replaces sampler settings."""

    def evaluate(self, params: Any, batch: Batch, rng: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """{metric: (sum, count)} over an encoded batch, to be added up over batches and divided at the end."""

    def preview(self, params: Any, batch: Batch, rng: jax.Array) -> jax.Array:
        """Pictures of how training goes, f32[N, H, W, 3] in [-1, 1]."""


TASKS = {
    "clip": ClipTask,
    "prior_diffusion": PriorTask,
    "prior_ar": PriorARTask,
    "decoder": DecoderTask,
    "upsampler": UpsamplerTask,
}
_WITH_CLIP = ("prior_diffusion", "prior_ar", "decoder")  # learn against a frozen CLIP
SHARES = ("text_drop", "clip_drop", "blur_share")


def make(config, clip: CLIP | None = None) -> Task:
    """The Task that a config describes.

    Args:
      config: with `task`, `model`, and where the stage diffuses `diffusion`, `objective`, `sampler`.
      clip: the frozen CLIP's module, for the stages that need one.

    Raises:
      UserError: for an unknown task, a missing CLIP, keywords that the network does not take, or a number of
        the objective or the sampler outside its range.
    """
    check(config, clip is not None)
    with said_of(f"config of task {config.task} does not fit its network", "compare it with configs/"):
        task = TASKS[config.task].from_config(config, clip)
        check_task(task)
    return task


def needs_clip(config) -> bool:
    """Whether a stage learns against a frozen CLIP: the prior, and the decoder unless `model.embed_dim` = 0 (GLIDE)."""
    return config.task in _WITH_CLIP and config.model.get("embed_dim") != 0


def check(config, has_clip: bool) -> None:
    """Raises UserError for an unknown task, one that lacks the CLIP it learns against, and unknown remat policies."""
    if config.task not in TASKS:
        raise UserError(f"unknown task '{config.task}'", suggest(config.task, TASKS))
    if needs_clip(config) and not has_clip:
        fix = "set --config.clip=WORKDIR of a CLIP run or a stack"
        raise UserError(f"task {config.task} needs a trained CLIP", fix)
    policies(config)


def measurer(task: Task, seed: int = 0) -> Callable[..., dict[str, float]]:
    """`task.evaluate` averaged over the next `count` batches, compiled once for many calls.

    → (frozen, params, batches, count) → {metric: float}. The same seed, the same numbers.
    """

    @jax.jit
    def step(frozen, params, batch, index):
        rng = jax.random.fold_in(jax.random.key(seed), index)
        return task.evaluate(params, task.encode(frozen, batch), rng)

    def run(frozen, params, batches, count):
        totals: dict[str, list[float]] = {}
        for found in fetched(step(frozen, params, next(batches), index) for index in range(count)):
            for name, (value, number) in found.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += float(value)
                total[1] += float(number)
        return {name: value / number for name, (value, number) in totals.items()}

    return run


def without_remat(task: Task, config) -> Task:
    """The same task, none of whose networks recomputes anything; `task` itself where none does."""
    if set(policies(config)) <= {"none"}:
        return task
    return make(with_policy(config, "none"), getattr(task, "clip", None))


def adopt(task: Task, params: Any) -> Any:
    """A stored stage's parameters as `task` can go on from: without a measured table, with channels it lacks added."""
    params = {name: value for name, value in params.items() if name != "x0_variance"}
    return task.adopt(params) if hasattr(task, "adopt") else params


def measure_x0_variance(
    task: Task, frozen: Mapping, params: Any, batches: Iterator[Batch], count: int = 8, seed: int = 0
) -> jax.Array:
    """`loss.x0_variance` f32[S] of a trained stage, averaged over the next `count` batches.

    Beside the parameters as "x0_variance" it is what the sampler "analytic" needs (the paper's for the prior). The
    network is run at each of the schedule's S steps for every batch.
    """

    @jax.jit
    def of_batch(frozen, params, batch, index):
        x0, denoise = task.x0_and_denoise(params, task.encode(frozen, batch))
        view = dict(target=getattr(task, "target", "x0"), clip_x0=getattr(task, "clip_x0", 1.0))
        return x0_variance(task.schedule, denoise, x0, jax.random.fold_in(jax.random.key(seed), index), **view)

    return sum(of_batch(frozen, params, next(batches), index) for index in range(count)) / count


def check_task(task: Task) -> None:
    """Raises UserError for shares outside [0, 1], and for sampler settings that would fail at the first drawing."""
    for name in SHARES:
        if not 0 <= getattr(task, name, 0) <= 1:
            raise UserError(f"objective.{name}={getattr(task, name)} must be within 0 … 1")
    settings = getattr(task, "sampler", None) or {}
    for name, value in settings.items():
        check_setting(name, value, f"sampler.{name}")
    if settings and hasattr(task, "schedule"):
        check_setting("name", settings.get("name", ""), "sampler.name")
        respace(task.schedule, settings.get("steps", 0))
