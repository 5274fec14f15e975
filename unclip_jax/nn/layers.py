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

from unclip_jax.nn.device import platform

WIDE = 64**2  # channels in times channels out from which on a convolution's gradient is worth so many products
FEW, NOT_MANY = 512, 2048  # pixels of a batch up to which a convolution, and its input's gradient, is one product


def product(x: jax.Array, kernel: jax.Array, dimensions, **how) -> jax.Array:
    """`jax.lax.dot_general` as a layer asks for it: x's last axes with the kernel's first."""
    if platform() != "cpu" or any(wish is not None for wish in how.values()):
        return jax.lax.dot_general(x, kernel, dimensions, **how)
    return _product(len(dimensions[0][1]), x, kernel)


def _matrices(inner: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [rows, joined] and kernel [joined, columns], where `inner` axes are joined: XLA would turn what has several."""
    joined = math.prod(kernel.shape[:inner])
    return x.reshape(-1, joined), kernel.reshape(joined, -1)


def _plain_product(inner: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Over `inner` axes."""
    return jnp.matmul(*_matrices(inner, x, kernel)).reshape(x.shape[: x.ndim - inner] + kernel.shape[inner:])


def _turned(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x.transpose(axes), of x as it lies in memory: XLA does not fuse what x comes from into branches, whose elements
    it would else compute one by one, out of their order.
    """
    turn = lambda x: x.transpose(axes)  # noqa: E731
    return jax.lax.cond(x.ravel()[0] < 0, turn, turn, x)


def _product_gradient(inner, kept, g):
    (x, kernel), shapes = _matrices(inner, *kept), [a.shape for a in kept]
    g = g.reshape(len(x), -1)
    of_x = jax.lax.dot_general(g, kernel, (((1,), (1,)), ((), ())))
    of_kernel = _turned(x, (1, 0)) @ g
    return of_x.reshape(shapes[0]), of_kernel.reshape(shapes[1])


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
        (height, width), around = x.shape[1:3], _surrounded(x, kernel)
        moved = [around[:, i : i + height, j : j + width] for i, j in np.ndindex(kernel.shape[:2])]
        moved = jnp.concatenate(moved, axis=-1)
        return moved @ kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolution_gradient(kept, g):
    """That of the kernel at a place (i, j) is (gᵀ x)ᵀ, with x moved by as much."""
    x, kernel = kept
    to_x = jax.linear_transpose(lambda x: _convolve(x, kernel, NOT_MANY), x)(g)[0]
    zero = 0 * g[0, 0, 0, 0]  # which ties to g what else would be made and held from the forward pass on
    around, turned, columns = _surrounded(x, kernel, zero), _turned(g, (3, 0, 1, 2)), kernel.shape[1]

    def fill(place, found):
        moved = jax.lax.dynamic_slice(around, (0, place // columns, place % columns, 0), x.shape)
        at = jax.lax.dot_general(turned, moved, (((1, 2, 3), (0, 1, 2)), ((), ())))
        return jax.lax.dynamic_update_index_in_dim(found, _turned(at, (1, 0)), place, 0)

    places = math.prod(kernel.shape[:2])
    empty = jnp.broadcast_to(zero, (places, *kernel.shape[2:]))
    return to_x, jax.lax.fori_loop(0, places, fill, empty).reshape(kernel.shape)


def _surrounded(x: jax.Array, kernel: jax.Array, by: jax.Array | float = 0.0) -> jax.Array:
    """x [B, H, W, C] with as many pixels around it as the kernel reaches over its edges."""
    reach = [(0, 0), *((side // 2, side // 2) for side in kernel.shape[:2]), (0, 0)]
    return jnp.pad(x, reach, constant_values=by)


_convolution = jax.custom_vjp(_plain_convolution)
_convolution.defvjp(lambda *args: (_plain_convolution(*args), args), _convolution_gradient)

Dense = functools.partial(nn.Dense, dot_general=product)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=product)
Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
