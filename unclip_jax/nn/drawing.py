"""How a network's weights lie on the device that draws with them: the same numbers, in other arrays or another order.

Steps run in a loop, which should read each weight from where it lies, as a scanned Transformer does not: at every step
it copies each layer's weights out of the stack. On a GPU, moreover, three projections of the same tokens would become
one product whose weights are put together while it runs, at half the speed; and a convolution's kernel that does not
lie as cuDNN reads it would be turned, and the turned copy held for as long as the program runs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from unclip_jax.nn.device import platform
from unclip_jax.nn.transformer import APART, JOINED, PROJECTIONS


def placed(params: Mapping[str, Any], where: jax.Device | Sharding) -> Mapping[str, Any]:
    """A network's parameters on devices to draw with: `for_loops`, and kernels [h, w, C, O] on a GPU as [O, h, w, C].

    numpy's arrays are cut and joined by the host; a CPU takes them where they lie, if they cannot be written to.
    """
    lies = _layout(where)
    return jax.tree.map(lambda a: jax.device_put(a, lies(a)), for_loops(params))


def foreseen(params: Mapping[str, Any], where: jax.Device | Sharding) -> Mapping[str, Any]:
    """ShapeDtypeStructs of `placed`, from such of the parameters: what a program can be compiled for before them."""
    lies = _layout(where)
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=lies(a))  # noqa: E731
    return jax.tree.map(shape, jax.eval_shape(functools.partial(layers_apart, join=platform() == "gpu"), params))


def _layout(where: jax.Device | Sharding) -> Callable[[Any], Sharding | Format]:
    """How an array lies."""
    sharding = where if isinstance(where, Sharding) else SingleDeviceSharding(where)
    kernel = Format(Layout((3, 0, 1, 2)), sharding) if platform() == "gpu" else sharding
    return lambda a: kernel if a.ndim == 4 else sharding


def for_loops(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """A network's parameters for steps that are run in a loop: `layers_apart`, on a GPU joined."""
    return layers_apart(params, join=platform() == "gpu")


def layers_apart(params: Mapping[str, Any], join: bool = False) -> dict[str, Any]:
    """A network's parameters with each Transformer's layers cut apart; with `join` query, key and value are one.

    Not for training.
    """
    out = {}
    for name, own in params.items():
        if name == "blocks":
            for i in range(jax.tree.leaves(own)[0].shape[0]):
                layer = jax.tree.map(lambda a, i=i: a[i], own)
                out[APART.format(i)] = _joined(layer) if join else layer
        else:
            out[name] = layers_apart(own, join) if isinstance(own, Mapping) else own
    return out


def _joined(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block's kernels [W, H, D] of query, key and value as one [W, 3 H, D], their biases [H, D] as [3 H, D]."""
    rest = {name: own for name, own in block.items() if name not in PROJECTIONS}

    def joined(*arrays):
        return (np if isinstance(arrays[0], np.ndarray) else jnp).concatenate(arrays, axis=-2)

    return {**rest, JOINED: jax.tree.map(joined, *(block[name] for name in PROJECTIONS))}
