"""The stages of unCLIP as Tasks: a network, a schedule, and the numbers of its objective. The loop knows only this protocol.

    stage             network   learns
    clip              CLIP      which caption belongs to which image
    prior_diffusion   Prior     caption, z_txt → z_img
    decoder           Decoder   z_img, caption → image
    upsampler         UNet      small image → large image
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax

from unclip_jax.errors import UserError, suggest
from unclip_jax.models.clip import CLIP
from unclip_jax.tasks.clip import ClipTask
from unclip_jax.tasks.decoder import DecoderTask
from unclip_jax.tasks.frozen import FrozenCLIP, clip_identity, load_clip
from unclip_jax.tasks.prior_diffusion import PriorTask
from unclip_jax.tasks.upsampler import UpsamplerTask

__all__ = ["TASKS", "FrozenCLIP", "Task", "clip_identity", "load_clip", "make", "measure"]

Batch = Mapping[str, jax.Array]


class Task(Protocol):
    """What the loop, the evaluation and the pipeline ask of a stage. All methods but `prepare` are pure and can be jitted.

    `frozen` is {"clip": parameters} for the stages that learn against a frozen CLIP, else {}.
    """

    def init(self, rng: jax.Array) -> Any:
        """Fresh parameters."""

    def prepare(self, frozen: Mapping, params: Any, batches: Iterator[Batch]) -> Any:
        """`params` with what is measured on data before the first step, such as the statistics of embeddings."""

    def encode(self, frozen: Mapping, batch: Batch) -> Batch:
        """`batch` with what the frozen CLIP says of it added."""

    def loss(self, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise over an encoded batch, and scalars to log."""

    def sample(self, params: Any, cond: Batch, keys: jax.Array, **over) -> jax.Array:
        """Draws one output per row of `cond`, each from its own key in `keys` key[B]; `over` replaces sampler settings."""

    def evaluate(self, params: Any, batch: Batch, rng: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """{metric: (sum, count)} over an encoded batch, to be added up over batches and divided at the end."""

    def preview(self, params: Any, batch: Batch, rng: jax.Array) -> jax.Array:
        """Pictures of how training goes, f32[N, H, W, 3] in [-1, 1]."""


TASKS = {
    "clip": ClipTask,
    "prior_diffusion": PriorTask,
    "decoder": DecoderTask,
    "upsampler": UpsamplerTask,
}


def make(config, clip: CLIP | None = None) -> Task:
    """The Task that a config describes.

    Args:
      config: with `task`, `model`, and where the stage diffuses `diffusion`, `objective`, `sampler`.
      clip: the frozen CLIP's module, for the prior and the decoder.

    Raises:
      UserError: for an unknown task, a missing CLIP, or keywords that the network does not take.
    """
    if config.task not in TASKS:
        raise UserError(f"unknown task '{config.task}'", suggest(config.task, TASKS))
    if config.task in ("prior_diffusion", "decoder") and clip is None:
        raise UserError(f"task {config.task} needs a trained CLIP", "set --config.clip=WORKDIR of a CLIP run or a stack")
    try:
        return TASKS[config.task].from_config(config, clip)
    except TypeError as e:
        raise UserError(f"config of task {config.task} does not fit its network: {e}", "compare it with configs/") from e


def measure(task: Task, frozen: Mapping, params: Any, batches: Iterator[Batch], count: int, seed: int = 0) -> dict:
    """`task.evaluate` averaged over the next `count` batches: {metric: float}. The same seed, the same numbers."""

    @jax.jit
    def step(frozen, params, batch, index):
        rng = jax.random.fold_in(jax.random.key(seed), index)
        return task.evaluate(params, task.encode(frozen, batch), rng)

    totals: dict[str, list[float]] = {}
    for index in range(count):
        for name, (value, number) in jax.device_get(step(frozen, params, next(batches), index)).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float(value)
            total[1] += float(number)
    return {name: value / number for name, (value, number) in totals.items()}
