"""Layers against Flax's own: the same gradients, of the same products; and how a CPU computes a weight's."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.cost import count_gradient
from unclip_jax.nn import layers
from unclip_jax.nn.layers import Conv, Dense, DenseGeneral
from unclip_jax.nn.remat import of_weights

LAYERS = {  # our layer, Flax's, the shape of its input; all give as many numbers as they take
    "features": (Dense(4), nn.Dense(4), (3, 7, 4)),
    "heads": (DenseGeneral((2, 4)), nn.DenseGeneral((2, 4)), (3, 7, 8)),
    "of_heads": (DenseGeneral(8, axis=(-2, -1)), nn.DenseGeneral(8, axis=(-2, -1)), (3, 7, 2, 4)),
}
CONVOLUTIONS = {
    name: (Conv(*args, **more), nn.Conv(*args, **more), (3, 5, 6, 4))
    for name, args, more in (
        ("of_three", (4, (3, 3)), {}),
        ("of_one", (4, (1, 1)), {}),
        ("oblong", (4, (5, 3)), {}),
        ("even", (4, (2, 2)), {}),
        ("in_groups", (4, (3, 3)), {"feature_group_count": 2}),
        ("dilated", (4, (3, 3)), {"kernel_dilation": 2}),
    )
}
each_layer = pytest.mark.parametrize(("own", "flax", "shape"), LAYERS.values(), ids=LAYERS)
each = pytest.mark.parametrize(("own", "flax", "shape"), [*LAYERS.values(), *CONVOLUTIONS.values()],
                               ids=[*LAYERS, *CONVOLUTIONS])  # fmt: skip
on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")


@pytest.fixture(autouse=True)
def none_too_narrow(monkeypatch):
    """For nine products in place of a convolution's gradient."""
    monkeypatch.setattr(layers, "WIDE", 0)


def drawn(layer, shape, *more):
    """(params, x) in f64, of which there are `more`."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros(shape)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.standard_normal((*more, *a.shape)) / 3, shapes)
    return params, rng.standard_normal((*more, *shape))


def loss(layer):
    return lambda params, x: jnp.sin(layer.apply({"params": params}, x)).sum()


def deep(layer):
    """Three of them in a scan that keeps products alone."""

    def body(x, params):
        return jnp.tanh(layer.apply({"params": params}, x)).reshape(x.shape), None

    kept = jax.checkpoint(body, policy=of_weights, prevent_cse=False)
    return lambda params, x: jnp.square(jax.lax.scan(kept, x, params)[0]).sum()


def gradient(function):
    return jax.grad(function, argnums=(0, 1))


def same(one, other, *args):
    found, wanted = (jax.jit(f)(*args) for f in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, wanted)
    assert all(a.dtype == np.float64 and np.abs(a).max() > 1e-3 for a in jax.tree.leaves(found))


@each
def test_gradients_are_those_of_flax(own, flax, shape):
    with jax.enable_x64():
        same(gradient(loss(own)), gradient(loss(flax)), *drawn(own, shape))


@on_a_cpu
@pytest.mark.parametrize(("few", "not_many", "convolutions"), [(0, 0, 2), (0, 90, 1), (89, 89, 2), (90, 90, 0)])
@pytest.mark.parametrize("name", ["of_three", "oblong"])
def test_convolutions_of_many_pixels_and_of_few(name, few, not_many, convolutions, monkeypatch):
    """Of 90: as one product where these are few, forward and for the input's gradient; always the same."""
    monkeypatch.setattr(layers, "FEW", few)
    monkeypatch.setattr(layers, "NOT_MANY", not_many)
    own, flax, shape = CONVOLUTIONS[name]
    with jax.enable_x64():
        args = drawn(own, shape)
        same(gradient(loss(own)), gradient(loss(flax)), *args)
        assert str(jax.make_jaxpr(gradient(loss(own)))(*args)).count("conv_general_dilated[") == convolutions


SHARED = [(*case, axes) for case in (LAYERS["features"], CONVOLUTIONS["oblong"]) for axes in ((None, 0), (0, None))]


@pytest.mark.parametrize(
    ("own", "flax", "shape", "axes"), [(*case, (0, 0)) for case in (LAYERS | CONVOLUTIONS).values()] + SHARED
)
def test_also_of_each_sample(own, flax, shape, axes):
    """By vmap over weights and inputs, over inputs, over weights."""
    with jax.enable_x64():
        args = (arg if axis == 0 else jax.tree.map(lambda a: a[0], arg)
                for arg, axis in zip(drawn(own, shape, 2), axes, strict=True))  # fmt: skip
        same(*(jax.vmap(gradient(loss(layer)), axes) for layer in (own, flax)), *args)


@each
def test_also_in_a_scan_with_remat_and_of_the_same_products(own, flax, shape):
    with jax.enable_x64():
        params, x = drawn(own, shape, 3)
        same(gradient(deep(own)), gradient(deep(flax)), params, x[0])
        (flops, kept), of_flax = (count_gradient(deep(layer), params, x[0]) for layer in (own, flax))
    assert (flops, kept) == of_flax
    if not isinstance(flax, nn.Conv):
        inner, outer = x[0].size // 21, params["bias"][0].size
        assert flops == 3 * 3 * 2 * 21 * inner * outer  # none of them twice


@on_a_cpu
def test_a_striding_convolution_is_flax_s():
    own, flax = (make(4, (2, 2), strides=2, padding="VALID") for make in (Conv, nn.Conv))
    text = lambda layer: str(jax.make_jaxpr(gradient(loss(layer)))(*drawn(layer, (3, 6, 6, 4))))  # noqa: E731
    assert text(own) == text(flax)


@on_a_cpu
def test_a_narrow_convolution_is_flax_s(monkeypatch):
    own, flax, shape = CONVOLUTIONS["of_three"]
    text = lambda layer: str(jax.make_jaxpr(gradient(loss(layer)))(*drawn(layer, shape)))  # noqa: E731
    for width, same_text in ((4 * 4, False), (4 * 4 + 1, True)):
        monkeypatch.setattr(layers, "WIDE", width)
        assert (text(own) == text(flax)) == same_text


@on_a_cpu
@pytest.mark.parametrize("wish", [{"precision": "highest"}, {"preferred_element_type": jnp.float32}])
def test_a_wish_is_passed_on(wish):
    x, kernel = jnp.ones((1, 4, 4, 8), jnp.bfloat16), jnp.ones((3, 3, 8, 8), jnp.bfloat16)
    how = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, **wish}
    how["dimension_numbers"] = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    for call, weights in (
        (lambda x, kernel: layers.convolution(x, kernel, (1, 1), "SAME", **how), kernel),
        (lambda x, kernel: layers.product(x, kernel, (((3,), (0,)), ((), ())), **wish), kernel[0, 0]),
    ):
        (done,) = jax.make_jaxpr(call)(x, weights).eqns
        assert all(done.params[name] is not None for name in wish)


@on_a_cpu
@each_layer
def test_no_product_on_a_cpu_reads_its_left_matrix_across(own, flax, shape):
    """As XLA's of Flax's Dense does; those with axes of heads it may turn by itself."""
    params, x = drawn(own, shape)
    found = []
    for layer in (own, flax):
        text = jax.jit(gradient(loss(layer))).lower(params, x).compile().as_text()
        found.append([line.split("lhs_contracting_dims=")[1][:3] for line in text.splitlines() if " dot(" in line])
    assert found[0] == ["{1}"] * 3 and len(found[1]) == 3
    assert "{0}" in found[1] or isinstance(flax, nn.DenseGeneral)


@on_a_cpu
def test_what_is_turned_is_computed_before():
    """A fused one would ask for the values of tanh across: none does, that of an axis more is one pass."""
    x = np.ones((64, 96), np.float32)
    text = jax.jit(lambda x: layers._turned(jnp.tanh(x), (1, 0))).lower(x).compile().as_text()
    fused = re.findall(r"(?ms)^%?[\w.\-]*fused_computation.*?^}", text)
    assert text.count("tanh(") >= 1 and not any("tanh(" in part and "[96,64]" in part for part in fused)


@on_a_cpu
def test_a_convolution_s_gradient_holds_one_place_of_the_kernel_at_a_time():
    """Of 49 copies of x, moved, there is room for one, with x in its zeros and g, turned."""
    x, kernel = np.ones((4, 32, 32, 64), np.float32), np.ones((7, 7, 64, 64), np.float32)
    conv = functools.partial(
        layers.convolution, strides=(1, 1), padding="SAME", lhs_dilation=(1, 1), rhs_dilation=(1, 1),
        feature_group_count=1, dimension_numbers=None,
    )  # fmt: skip
    of_kernel = jax.grad(lambda kernel, x: jnp.sin(conv(x, kernel)).sum())
    held = jax.jit(of_kernel).lower(kernel, x).compile().memory_analysis().temp_size_in_bytes
    assert held < 8 * x.nbytes


@pytest.mark.parametrize(("own", "flax", "shape"), [*LAYERS.values(), CONVOLUTIONS["of_three"]])
def test_elsewhere_the_program_is_flax_s(own, flax, shape, monkeypatch):
    text = lambda layer: str(jax.make_jaxpr(gradient(loss(layer)))(*drawn(layer, shape)))  # noqa: E731
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(layers, "platform", lambda platform=platform: platform)
        assert (text(own) == text(flax)) == (platform != "cpu") == ("cond[" not in text(own))
