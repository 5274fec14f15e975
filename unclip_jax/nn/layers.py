"""Dense and convolutional layers: Flax's own, but for how a CPU computes the gradient of their weights and convolutions
of few pixels.

There XLA's product of a transposed matrix, xᵀ g, runs at half the speed of one that lies as it is read, and a
transposed copy costs a tenth of it at most; the gradient of a wide convolution's kernel runs at a sixth to two thirds
of the speed of as many such products as the kernel has places. A convolution of few pixels is one product of a matrix
that has each pixel's neighbours side by side, up to twice as fast, as is the gradient of its input (docs/results.md).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.nn.rows import platform

WIDE = 64**2  # channels in times channels out from which on a convolution's gradient is worth so many products
FEW, NOT_MANY = 512, 2048  # pixels of a batch up to which a convolution, and its input's gradient, is one product


def product(x: jax.Array, kernel: jax.Array, dimensions, **how) -> jax.Array:
    """`jax.lax.dot_general` as a layer asks for it: x's last axes with the kernel's first."""
    if platform() != "cpu" or any(wish is not None for wish in how.values()):
        return jax.lax.dot_general(x, kernel, dimensions, **how)
    return _product(len(dimensions[0][1]), x, kernel)


def _plain_product(inner: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Over `inner` axes."""
    return jax.lax.dot_general(x, kernel, ((range(x.ndim - inner, x.ndim), range(inner)), ((), ())))


def _product_gradient(inner, kept, g):
    x, kernel = kept
    outer = x.ndim - inner
    to_x = ((range(outer, g.ndim), range(inner, kernel.ndim)), ((), ()))
    turned = jax.lax.optimization_barrier(x.transpose(*range(outer, x.ndim), *range(outer)))
    to_kernel = ((range(inner, x.ndim), range(outer)), ((), ()))
    return jax.lax.dot_general(g, kernel, to_x), jax.lax.dot_general(turned, g, to_kernel)


_product = jax.custom_vjp(_plain_product, nondiff_argnums=(0,))
_product.defvjp(lambda inner, *args: (_plain_product(inner, *args), args), _product_gradient)


def convolution(x: jax.Array, kernel: jax.Array, strides, padding, **how) -> jax.Array:
    """`jax.lax.conv_general_dilated` as a layer asks for it: x [B, H, W, C], kernel [h, w, C, O]."""
    wished = how.get("precision") is not None or how.get("preferred_element_type") is not None
    undilated = {*how["lhs_dilation"], *how["rhs_dilation"], how["feature_group_count"], *strides} == {1}
    same = padding == "SAME" and all(side % 2 for side in kernel.shape[:2])
    wide = kernel.shape[-2] * kernel.shape[-1] >= WIDE
    if platform() != "cpu" or x.ndim != 4 or wished or not (undilated and same and wide):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)
    return _convolution(x, kernel)


def _plain_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel, FEW)


def _convolve(x: jax.Array, kernel: jax.Array, few: int) -> jax.Array:
    """Of up to `few` pixels as one product."""
    if math.prod(x.shape[:3]) <= few:
        moved = jnp.concatenate(_moved(x, kernel), axis=-1)
        return _plain_product(1, moved, kernel.reshape(-1, kernel.shape[-1]))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolution_gradient(kept, g):
    """That of the kernel at a place (i, j) is gᵀ x, with x moved by as much."""
    x, kernel = kept
    to_x = jax.linear_transpose(lambda x: _convolve(x, kernel, NOT_MANY), x)(g)[0]
    turned = jax.lax.optimization_barrier(g.transpose(3, 0, 1, 2))
    over = (((1, 2, 3), (0, 1, 2)), ((), ()))
    places = jnp.stack([jax.lax.dot_general(turned, at, over) for at in _moved(x, kernel)])
    return to_x, places.swapaxes(1, 2).reshape(kernel.shape)


def _moved(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """x [B, H, W, C], with zeros around it, as each place of the kernel sees it."""
    (height, width), (rows, columns) = x.shape[1:3], kernel.shape[:2]
    x = jnp.pad(x, [(0, 0)] + [(side // 2, side // 2) for side in (rows, columns)] + [(0, 0)])
    return [x[:, i : i + height, j : j + width] for i, j in np.ndindex(rows, columns)]


_convolution = jax.custom_vjp(_plain_convolution)
_convolution.defvjp(lambda *args: (_plain_convolution(*args), args), _convolution_gradient)

Dense = functools.partial(nn.Dense, dot_general=product)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=product)
Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
