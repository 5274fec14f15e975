"""Fingerprints beside numpy's arithmetic: the same however an array lies, another for every other array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding, tensors
from unclip_jax.fingerprint import by_path, fingerprint


def _reference(array) -> int:
    """The fingerprint by numpy in 64-bit arithmetic."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    array = np.ascontiguousarray(array)
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}").astype(np.uint64)
    return int(mix(bits ^ mix(np.arange(bits.size, dtype=np.uint64))).sum() % 2**32)


def test_fingerprints_do_not_depend_on_sharding():
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(fsdp=8)
    tree = {
        "block": {"kernel": rng.normal(size=(64, 256)).astype(np.float32), "bias": jnp.arange(256, dtype=jnp.bfloat16)},
        "rest": [np.float32([0.0, -0.0, np.nan, np.inf, 1e-37]), np.array([True, False, True]), np.int32(7)],
    }
    expected = {path: _reference(x) for path, x in by_path(tree)}
    assert set(expected) == {"block/kernel", "block/bias", "rest/0", "rest/1", "rest/2"}
    assert fingerprint(tree) == expected
    split = sharding.infer(tree, ((".*", "fsdp"),), mesh, min_size=1)
    placed = jax.tree.map(jax.device_put, tree, split)
    assert len(placed["block"]["kernel"].sharding.device_set) == 8
    assert fingerprint(placed) == expected


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_array_of_the_host_is_hashed_by_rows_to_the_same(monkeypatch, dtype):
    monkeypatch.setattr(tensors, "CHUNK", 40)
    array = np.random.default_rng(3).integers(0, 100, (7, 3, 5)).astype(dtype)
    turned = array.transpose(2, 1, 0)
    assert fingerprint({"a": array, "b": turned}) == {"a": _reference(array), "b": _reference(turned)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_every_single_bit_and_every_exchange_shows(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(
        0, 2 if dtype == "bool" else 256, size=(3, 4, jnp.dtype(dtype).itemsize), dtype=np.uint8
    )
    array = bits.view(jnp.dtype(dtype))[..., 0]
    seen = [fingerprint({"a": array})["a"]]
    for place in range(0 if dtype == "bool" else 8 * bits.size):
        changed = bits.copy().reshape(-1)
        changed[place // 8] ^= 1 << (place % 8)
        seen.append(fingerprint({"a": changed.reshape(bits.shape).view(array.dtype)[..., 0]})["a"])
    if dtype == "bool":
        for place in range(array.size):
            changed = array.copy().reshape(-1)
            changed[place] ^= True
            seen.append(fingerprint({"a": changed.reshape(array.shape)})["a"])
    else:
        seen.append(fingerprint({"a": array[::-1]})["a"])
        seen.append(fingerprint({"a": array[:, ::-1]})["a"])
    assert len(set(seen)) == len(seen)
