"""Where a batch lies while it is computed on: split by its rows, whatever the shardings of weights suggest to XLA.

Weights that are split over the same devices as the batch ("fsdp") may pull activations along: XLA then splits features
instead of rows, and sums them over devices in every layer, several times the traffic of gathering the weights. Models
name no axis but by `rows`, which does nothing unless the function is traced by `sharding.split_rows`.
"""

import math

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")


def rows(x: jax.Array) -> jax.Array:
    """x [B, …] as it is, its first axis split over data x fsdp; other axes as XLA likes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))
