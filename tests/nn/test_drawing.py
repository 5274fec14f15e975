"""Weights that lie as a GPU likes to draw with them are the same weights, and give the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.nn import drawing
from unclip_jax.nn.drawing import for_loops, layers_apart, placed
from unclip_jax.nn.layers import Conv
from unclip_jax.nn.transformer import Transformer

WIDTH, LAYERS, HEADS = 8, 3, 2


class Net(nn.Module):
    """A convolution, and a Transformer over its pixels, among other layers."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Conv(WIDTH, (5, 3), dtype=self.dtype, name="conv")(x)
        x = Transformer(WIDTH, LAYERS, HEADS, dtype=self.dtype, name="inner")(x.reshape(x.shape[0], -1, WIDTH))
        return nn.Dense(2, dtype=self.dtype, name="last")(x)


def pictures(dtype=np.float32):
    return np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(dtype)


def on_a(monkeypatch, platform):
    monkeypatch.setattr(drawing, "platform", lambda: platform)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_layers_apart_are_those_of_the_stack_and_may_have_one_projection_for_three(of):
    p = jax.tree.map(of, draw(Net(), pictures()))
    cut, joined, stack = layers_apart(p), layers_apart(p, join=True), p["inner"]["blocks"]
    for found in (cut, joined):
        assert all(isinstance(a, type(of(0.0))) for a in jax.tree.leaves(found))  # the host's stay the host's
        assert found["last"] == p["last"] and set(found["inner"]) == {f"block{i}" for i in range(LAYERS)}
    for i in range(LAYERS):
        own = jax.tree.map(lambda a, i=i: a[i], dict(stack))
        jax.tree.map(np.testing.assert_array_equal, cut["inner"][f"block{i}"], own)
        found = dict(joined["inner"][f"block{i}"])
        all_three = found.pop("query_key_value")
        assert all_three["kernel"].shape == (WIDTH, 3 * HEADS, WIDTH // HEADS)
        for at, name in enumerate(("query", "key", "value")):
            projection, heads = own.pop(name), slice(HEADS * at, HEADS * (at + 1))
            np.testing.assert_array_equal(all_three["kernel"][:, heads], projection["kernel"])
            np.testing.assert_array_equal(all_three["bias"][heads], projection["bias"])
        jax.tree.map(np.testing.assert_array_equal, found, own)


@pytest.mark.parametrize("join", [False, True])
def test_they_give_the_same(join):
    with jax.enable_x64():
        x, net = pictures(np.float64), Net(jnp.float64)
        p = draw(net, x, dtype=np.float64)
        np.testing.assert_allclose(run(net, layers_apart(p, join), x), run(net, p, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_for_loops_they_are_cut_once_and_joined_on_a_gpu(platform, monkeypatch):
    p = draw(Net(), pictures())
    on_a(monkeypatch, platform)
    wanted = layers_apart(p, join=platform == "gpu")
    for given in (p, wanted):
        jax.tree.map(np.testing.assert_array_equal, for_loops(given), wanted)


def test_on_a_gpu_weights_are_placed_as_its_loops_and_cudnn_read_them(monkeypatch):
    x, net, device = pictures(), Net(), jax.devices()[1]
    p = draw(net, x)
    there = placed(p, device)
    assert order(there["conv"]["kernel"]) == (0, 1, 2, 3)
    on_a(monkeypatch, "gpu")
    for where in (device, jax.sharding.SingleDeviceSharding(device)):
        turned = placed(p, where)
        assert order(turned["conv"]["kernel"]) == (3, 0, 1, 2) and order(turned["conv"]["bias"]) == (0,)
        assert all(a.devices() == {device} for a in jax.tree.leaves(turned))
        jax.tree.map(np.testing.assert_array_equal, turned, layers_apart(p, join=True))
        assert all(order(a) == tuple(range(a.ndim)) for a in jax.tree.leaves(turned["inner"]))
        jax.tree.map(np.testing.assert_array_equal, placed(turned, where), turned)
    apply = jax.jit(lambda params, x: net.apply({"params": params}, x))
    np.testing.assert_allclose(apply(turned, x), apply(there, x), rtol=0, atol=1e-5)
    taken = apply.lower(turned, x).compile().input_formats[0][0]  # as it lies: nothing is turned on the way
    assert taken["conv"]["kernel"].layout.major_to_minor == (3, 0, 1, 2)


def test_a_cpu_takes_what_the_host_has_cut_where_it_lies(monkeypatch):
    on_a(monkeypatch, "cpu")
    p = jax.tree.map(np.asarray, jax.device_put(draw(Net(), pictures()), jax.devices("cpu")[0]))
    fc1 = placed(p, jax.devices("cpu")[0])["inner"]["block1"]["fc1"]["kernel"]
    assert fc1.unsafe_buffer_pointer() == p["inner"]["blocks"]["fc1"]["kernel"][1].ctypes.data


def order(array):
    return array.format.layout.major_to_minor
