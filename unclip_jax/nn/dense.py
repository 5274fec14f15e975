"""Dense layers: Flax's own, but for how a CPU computes the gradient of their weights.

There XLA's product of a transposed matrix, xᵀ g, runs at half the speed of one that lies as it is read, and a
transposed copy of x costs a tenth of it at most (docs/results.md).
"""

import functools

import flax.linen as nn
import jax

from unclip_jax.nn.rows import platform


def product(x: jax.Array, kernel: jax.Array, dimensions, **how) -> jax.Array:
    """`jax.lax.dot_general` as a layer asks for it: x's last axes with the kernel's first."""
    if platform() != "cpu" or any(wish is not None for wish in how.values()):
        return jax.lax.dot_general(x, kernel, dimensions, **how)
    return _product(len(dimensions[0][1]), x, kernel)


def _plain(inner: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Over `inner` axes."""
    return jax.lax.dot_general(x, kernel, ((range(x.ndim - inner, x.ndim), range(inner)), ((), ())))


def _forward(inner, x, kernel):
    return _plain(inner, x, kernel), (x, kernel)


def _backward(inner, kept, g):
    x, kernel = kept
    outer = x.ndim - inner
    to_x = ((range(outer, g.ndim), range(inner, kernel.ndim)), ((), ()))
    turned = jax.lax.optimization_barrier(x.transpose(*range(outer, x.ndim), *range(outer)))
    to_kernel = ((range(inner, x.ndim), range(outer)), ((), ()))
    return jax.lax.dot_general(g, kernel, to_x), jax.lax.dot_general(turned, g, to_kernel)


_product = jax.custom_vjp(_plain, nondiff_argnums=(0,))
_product.defvjp(_forward, _backward)

Dense = functools.partial(nn.Dense, dot_general=product)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=product)
