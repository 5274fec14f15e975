"""How a network's weights lie on the device that draws with them: the same numbers, in other arrays or another order.

Steps run in a loop, which on a GPU should read each weight from where it lies. There a scanned Transformer would copy
each layer's weights out of the stack at every step; three projections of the same tokens would become one product whose
weights are put together while it runs, at half the speed; and a convolution's kernel that does not lie as cuDNN reads
it would be turned, and the turned copy held for as long as the program runs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from unclip_jax.nn.rows import platform
from unclip_jax.nn.transformer import APART, JOINED, PROJECTIONS


def placed(params: Mapping[str, Any], where: jax.Device | Sharding) -> Mapping[str, Any]:
    """A network's parameters on devices to draw with.

    On a GPU they are `for_loops`, and convolutions' kernels [h, w, C, O] lie in memory as [O, h, w, C]. Arrays of
    numpy's are cut and joined by the host, in its memory.
    """
    if platform() != "gpu":
        return jax.device_put(params, where)
    sharding = where if isinstance(where, Sharding) else SingleDeviceSharding(where)
    kernel = Format(Layout((3, 0, 1, 2)), sharding)
    return jax.tree.map(lambda a: jax.device_put(a, kernel if a.ndim == 4 else where), for_loops(params))


def for_loops(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """A network's parameters for steps that are run in a loop: `layers_apart` on a GPU."""
    return layers_apart(params) if platform() == "gpu" else params


def layers_apart(params: Mapping[str, Any]) -> dict[str, Any]:
    """A network's parameters with each Transformer's layers cut apart, and the projections of each joined to one.

    Not for training. With them keys and values are a tuple of the layers' own, without the axis [layers].
    """
    out = {}
    for name, own in params.items():
        if name == "blocks":
            layers = jax.tree.leaves(own)[0].shape[0]
            out |= {APART.format(i): _joined(jax.tree.map(lambda a, i=i: a[i], own)) for i in range(layers)}
        else:
            out[name] = layers_apart(own) if isinstance(own, Mapping) else own
    return out


def _joined(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block's kernels [W, H, D] of query, key and value as one [W, 3 H, D], their biases [H, D] as [3 H, D]."""
    rest = {name: own for name, own in block.items() if name not in PROJECTIONS}

    def joined(*arrays):
        return (np if isinstance(arrays[0], np.ndarray) else jnp).concatenate(arrays, axis=-2)

    return {**rest, JOINED: jax.tree.map(joined, *(block[name] for name in PROJECTIONS))}
