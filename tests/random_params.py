"""Linen modules with random parameters: none is zero, so that layers which start at zero take part."""

import jax
import numpy as np


def draw(module, *args, seed: int = 0, dtype=np.float32, **kwargs):
    """Normal numbers in the shapes of `module.init(key, *args, **kwargs)`, kernels scaled to keep the size of signals.

    Nothing is compiled for it.
    """
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "kernel":
            return (noise / np.sqrt(max(1, leaf.size // leaf.shape[-1]))).astype(dtype)
        return (0.1 * noise + (name == "scale")).astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def run(module, params, *args, **settings):
    """`module.apply` of arrays (or None) as one compiled program, one for equal modules; `settings` are not traced."""
    key = (repr(module), repr(settings))
    if key not in _programs:
        _programs[key] = jax.jit(lambda params, *args: module.apply({"params": params}, *args, **settings))
    return _programs[key](params, *args)


_programs = {}


def with_initial(params, name, module, *args):
    """`params` with the layer `name` as `module.init` makes it; nothing else of `init` is compiled."""
    return {**params, name: jax.jit(lambda: module.init(jax.random.key(0), *args)["params"][name])()}
