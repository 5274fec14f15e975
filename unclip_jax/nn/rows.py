"""Where a batch lies while it is computed on: split by its rows, whatever the shardings of weights suggest to XLA.

Weights that are split over the same devices as the batch ("fsdp") may pull activations along: XLA then splits features
instead of rows, and sums them over devices in every layer, several times the traffic of gathering the weights. Models
name no mesh axis; only `nn.attention` does, which splits a fused kernel over heads and rows, and `rows`, which does
nothing unless the function is traced by `sharding.split_rows`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from unclip_jax.nn.device import alone

BATCH = ("data", "fsdp")


def rows(x: jax.Array) -> jax.Array:
    """x [B, …] as it is, its first axis split over data x fsdp; other axes as XLA likes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))


def in_parts(run: Callable, sizes: Sequence[int], *given: Any) -> list:
    """`given`, trees of arrays with rows first, cut into groups of `sizes` consecutive rows → [run(group) for each].

    On one device it is one pass over all rows, cut afterwards. On several each group is a pass of its own: rows that
    are split over devices would be moved by what is put beside them.
    """
    cut = lambda tree, at: jax.tree.map(lambda a: a[at], tree)  # noqa: E731
    places = [slice(*pair) for pair in itertools.pairwise(np.cumsum([0, *sizes]))]
    if alone():
        made = run(*given)
        return [cut(made, at) for at in places]
    return [run(*cut(given, at)) for at in places]


def repeated(parts: Sequence[jax.Array], rows: int) -> jax.Array:
    """Each part's rows repeated, one run after the other, until all parts, equally long, have `rows` rows together."""
    each = rows // len(parts)
    return jnp.concatenate([jnp.repeat(part, each // part.shape[0], axis=0) for part in parts])
