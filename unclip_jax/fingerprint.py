"""A number for every array of a tree that tells it from all that differ in an element, wherever and however it lies."""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.tensors import by_rows


def fingerprint(tree) -> dict[str, int]:
    """{path: u32} of every array: the sum mod 2^32 of a hash of (bits, position) of its elements.

    Runs where the arrays lie and does not depend on their sharding. A change in one element always shows.
    """
    prints = [
        (path, _hash(array) if isinstance(array, jax.Array) else _host_hash(np.asarray(array)))
        for path, array in by_path(tree)
    ]
    return {
        path: int(value)
        for path, value in zip((p for p, _ in prints), jax.device_get([v for _, v in prints]), strict=True)
    }


def _host_hash(x: np.ndarray) -> np.uint32:
    """`_hash` of an array of the host, by rows, so that little of it is on the device at once."""
    words = 2 if jax.dtypes.canonicalize_dtype(x.dtype).itemsize == 8 else 1  # in which an element's bits are hashed
    total = start = 0
    for part in by_rows(x):
        total += int(_hash(part, np.uint32(start * words % 2**32)))
        start += part.size
    return np.uint32(total % 2**32)


@jax.jit
def _hash(x, start=0):
    bits = _bits(x)
    position, stride = jnp.full(bits.shape, start, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(position)), dtype=jnp.uint32)


def _bits(x):
    """The bits of any array as u32; 8-byte elements give a last axis of 2."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (Appleby, public domain), a bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def by_path(tree) -> list[tuple[str, jax.Array]]:
    """Every array by its path "params/block/kernel"; the same for a TrainState and for its plain dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
