"""Remat policies: the same gradient; what is kept and what is computed again, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw
from unclip_jax.cost import count_gradient
from unclip_jax.errors import UserError
from unclip_jax.models import unet as unet_module
from unclip_jax.models.unet import UNet
from unclip_jax.nn.remat import POLICIES, named
from unclip_jax.nn.transformer import Transformer
from unclip_jax.nn.unet_blocks import context_kv

TIME = np.array([3, 800])
B, N, W, LAYERS, HEADS = 2, 12, 16, 3, 2
PIXELS, TOKENS, C = 8, 3, 8


def transformer(remat, dtype=np.float32):
    net = Transformer(W, LAYERS, HEADS, remat=remat, dtype=dtype)
    return net, (np.random.default_rng(0).standard_normal((B, N, W)).astype(dtype),)


def unet(remat, dtype=np.float32):
    """Three residual blocks and attention in the middle, which also sees a context; dropout draws the same again."""
    net = UNet(C, (1,), 0, (1,), head_channels=4, groups=4, dropout=0.3, remat=remat, dtype=dtype)
    x = np.random.default_rng(0).standard_normal((B, PIXELS, PIXELS, 3)).astype(dtype)
    return net, (x, TIME, None, np.ones((B, TOKENS, 5), dtype), None, True)


def levels(remat, dtype=np.float32, dropout=0.0):
    """A level down of two residual blocks and attention, alike, and one up of three; the context is given projected."""
    net = UNet(C, (1,), 2, (4,), head_channels=4, groups=4, dropout=dropout, remat=remat, dtype=dtype)
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal((B, *shape)).astype(dtype) for shape in ((4, 4, 3), (TOKENS, 5)))
    params = draw(net, x, TIME, None, context, dtype=dtype)
    seen = np.array([[True] * TOKENS, [True] + [False] * (TOKENS - 1)])
    return net, params, (x, TIME, None, context_kv(params, context, dtype), seen, True)


def square(net, args):
    """(params, x) → a scalar that depends on all of the output."""
    (x, *rest), rngs = args, {"dropout": jax.random.key(1)}
    return lambda params, x: jnp.square(net.apply({"params": params}, x, *rest, rngs=rngs)).mean(), x


@pytest.mark.parametrize(
    ("make", "dtype", "rtol"),
    [(transformer, np.float32, 1e-4), (transformer, np.float64, 1e-9), (unet, np.float64, 1e-9)],
)
def test_gradients_are_those_without(make, dtype, rtol):
    """For the same parameters, so of networks of the same arrays."""
    found, held = [], []
    with jax.enable_x64(dtype == np.float64):
        for policy in POLICIES:
            net, args = make(policy, dtype)
            loss, x = square(net, args)
            params = draw(net, *args, dtype=dtype)
            compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
            found.append(compiled(params, x))
            held.append(compiled.memory_analysis().temp_size_in_bytes)
    plain, *others = found
    last = plain["blocks" if make is transformer else "mid_attn"]
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(last["out"]))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100), plain, other)
    if make is transformer:  # outside of loops XLA undoes on CPUs what is computed again
        assert held[0] > held[1] > held[2]


def test_a_unet_runs_equal_blocks_in_a_loop_where_the_least_is_asked_for(monkeypatch):
    """To train, and not on a GPU; with the same gradient."""
    found, loops = [], {}
    with jax.enable_x64():
        for policy in POLICIES:
            net, params, args = levels(policy, np.float64)
            losses = [square(net, (*args[:-1], train))[0] for train in (True, False)]
            loops[policy] = [str(jax.make_jaxpr(loss)(params, args[0])).count(" scan[") for loss in losses]
            if policy != "dots":
                found.append(jax.jit(jax.grad(losses[0]))(params, args[0]))
    assert loops == {"none": [0, 0], "dots": [0, 0], "full": [2, 0]}
    monkeypatch.setattr(unet_module, "platform", lambda: "gpu")
    net, params, args = levels("full")
    assert " scan[" not in str(jax.make_jaxpr(square(net, args)[0])(params, args[0]))
    plain, looped = found
    last = [plain[f"{where}_{what}1"] for where in ("down0", "up0") for what in ("block", "attn")]
    assert all(np.abs(layer["out" if "out" in layer else "conv2"]["kernel"]).max() > 1e-6 for layer in last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), plain, looped)


def test_blocks_in_a_loop_drop_out_each_their_own(monkeypatch):
    net, params, args = levels("full", dropout=0.3)
    keys, scan = [], jax.lax.scan

    def spied(body, carry, each):
        keys.append(each[1].rngs["dropout"])
        return scan(body, carry, each)

    def drawn():
        net.apply({"params": params}, *args, rngs={"dropout": jax.random.key(1)})
        return jnp.concatenate(keys)

    monkeypatch.setattr(jax.lax, "scan", spied)
    assert len(np.unique(jax.random.key_data(jax.jit(drawn)()), axis=0)) == 5


def counts(make):
    """(FLOPs of the gradient, bytes kept) by each policy."""
    net, args = make("none")
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), *args))["params"]
    losses = (square(make(policy)[0], args) for policy in POLICIES)
    return [count_gradient(loss, params, x) for loss, x in losses]


def test_a_transformer_keeps_and_recomputes_what_is_promised():
    (flops, kept), (dots_flops, dots_kept), (full_flops, full_kept) = counts(transformer)
    attention, fc = 2 * 2 * B * N * N * W * LAYERS, 2 * B * N * W * W * LAYERS
    assert dots_flops - flops == attention
    assert full_flops - flops == attention + (4 + 4) * fc  # the last product's output is not asked for again
    vectors, output = 4 * B * N * W * LAYERS, 4 * B * N * W
    assert full_kept == vectors + output
    assert dots_kept == (1 + 3 + 1 + 4) * vectors + output  # input; query, key and value; out; fc1
    assert kept > dots_kept


def test_a_unet_keeps_and_recomputes_what_is_promised():
    (flops, kept), (dots_flops, dots_kept), (full_flops, full_kept) = counts(unet)
    blocks, places = 3, PIXELS**2
    assert dots_flops - flops == 2 * 2 * B * places * (places + TOKENS) * C
    convolution = 2 * B * places * 9 * C * C
    assert full_flops - dots_flops > blocks * convolution  # the first of each block; the second's output is not needed
    block = places * C + 2 * C  # the first convolution, and scale and shift; nobody reads the last products
    assert dots_kept - full_kept == 4 * B * (blocks * block + 3 * places * C + 2 * TOKENS * C)  # query; keys and values
    assert kept > 2 * dots_kept


def test_true_and_false_are_names():
    assert [named(True), named(False), *map(named, POLICIES)] == ["full", "none", *POLICIES]
    a, b = (repr(jax.make_jaxpr(lambda x, r=r: transformer(r)[0].init(jax.random.key(0), x))(jnp.ones((1, 2, W))))
            for r in (True, "full"))  # fmt: skip
    assert a == b


@pytest.mark.parametrize("wrong", ["dot", "", 1, None])
def test_other_names_are_refused(wrong):
    with pytest.raises(UserError, match="remat=.* is no remat policy. Fix: .*dots, full, none"):
        transformer(wrong)[0].init(jax.random.key(0), jnp.ones((1, 2, W)))
