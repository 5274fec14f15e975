"""A stage that is nothing but the protocol: it learns the mean colour of the pictures, and compiles at once."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tests import tiny_runs

WIDE = 2**16  # elements of the array that the mesh splits


@dataclasses.dataclass(frozen=True)
class Toy:
    """Loss: mean squared distance of `colour`, jittered by rng, from each picture's mean colour."""

    traces: list  # of names, one for each time a method is traced

    def init(self, rng):
        return {"colour": jax.random.normal(rng, (3,)), "wide": jnp.ones((WIDE,)) * 1e-3}

    def prepare(self, frozen, params, batches):
        return params

    def encode(self, frozen, batch):
        return {**batch, "mean": batch["image"].mean((1, 2))}

    def loss(self, params, batch, rng):
        jitter = 0.1 * jax.random.normal(rng, (3,))
        error = batch["mean"] - (params["colour"] + jitter)[None]
        return jnp.square(error).sum(-1).mean() + jnp.square(params["wide"]).mean(), {"jitter": jitter[0]}

    def sample(self, params, cond, keys, **over):
        return jnp.broadcast_to(params["colour"], cond["image"].shape)

    def evaluate(self, params, batch, rng):
        self.traces.append("evaluate")
        error = jnp.abs(batch["mean"] - params["colour"][None]).sum()
        return {"error": (error, batch["mean"].size)}

    def preview(self, params, batch, rng):
        self.traces.append("preview")
        return jnp.concatenate([batch["image"], jnp.broadcast_to(params["colour"], batch["image"].shape)])


def add(monkeypatch) -> Toy:
    """Makes "toy" a stage; returns the task that every run will use."""
    from unclip_jax import tasks

    task = Toy([])
    monkeypatch.setitem(tasks.TASKS, "toy", type("Maker", (), {"from_config": staticmethod(lambda *_: task)}))
    return task


def config(ema_decay=0.9, **changes) -> ConfigDict:
    """A config of it: that of the tiny upsampler under another name."""
    made = tiny_runs.config("upsampler", optim__lr=0.05, optim__schedule="constant", ema_decay=ema_decay, **changes)
    with made.unlocked():
        made.task = "toy"
    return made
