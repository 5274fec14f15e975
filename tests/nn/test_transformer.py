"""The Transformer against its blocks in NumPy, kept keys and values against the whole sequence, and causality."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.cost import count_flops, count_gradient
from unclip_jax.nn import attention, device, layers, transformer
from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.drawing import layers_apart
from unclip_jax.nn.remat import POLICIES
from unclip_jax.nn.transformer import ACTIVATIONS, LayerNorm, Transformer

WIDTH, LAYERS, HEADS = 8, 3, 2
erf = np.vectorize(math.erf)


def tokens(n=5, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((2, n, WIDTH)).astype(dtype)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(x, p, seen):
    """One block in NumPy; `seen` bool[N, N]."""
    h = layer_norm(x, p["norm1"]["norm"])
    q, k, v = (np.einsum("bnc,chd->bnhd", h, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value"))
    weight = np.exp(np.einsum("bnhd,bshd->bhns", q, k) / math.sqrt(WIDTH / HEADS)) * seen
    h = np.einsum("bhns,bshd->bnhd", weight / weight.sum(-1, keepdims=True), v)
    x = x + np.einsum("bnhd,hdc->bnc", h, p["out"]["kernel"]) + p["out"]["bias"]
    h = layer_norm(x, p["norm2"]["norm"]) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    h = 0.5 * h * (1 + erf(h / math.sqrt(2)))
    return x + h @ p["fc2"]["kernel"] + p["fc2"]["bias"]


@pytest.mark.parametrize("causal", [False, True])
def test_is_its_blocks_one_after_the_other(causal):
    x, module = tokens(), Transformer(WIDTH, LAYERS, HEADS)
    p = draw(module, x)
    seen, want = np.tril(np.ones((5, 5), bool)) if causal else np.ones((5, 5), bool), x.astype(np.float64)
    for layer in range(LAYERS):
        want = block(want, jax.tree.map(lambda a, i=layer: a[i], p["blocks"]), seen)
    got = run(module, p, x, causal_mask(5, 5) if causal else None)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def exact(name, x):
    """An activation in NumPy."""
    return {
        "gelu": lambda: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda: x / (1 + np.exp(-1.702 * x)),
    }[name]()


def exact_slope(name, x, h=1e-5):
    return (exact(name, x + h) - exact(name, x - h)) / (2 * h)


each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
POINTS = np.linspace(-4, 4, 33)  # which bfloat16 holds as they are


@each_activation
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-6), (np.float64, 1e-9)])
def test_activations_and_their_slopes(name, dtype, atol):
    with jax.enable_x64(dtype == np.float64):
        for function, want in ((ACTIVATIONS[name], exact), (jax.vmap(jax.grad(ACTIVATIONS[name])), exact_slope)):
            got = function(POINTS.astype(dtype))
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want(name, POINTS), rtol=0, atol=atol)


@each_activation
def test_in_bfloat16_an_activation_is_rounded_once(name):
    """Where it is nearly 0, too, but for what f32 loses there: gelu at -4 is -1e-4."""
    x = jnp.asarray(POINTS, jnp.bfloat16)
    for function, want in ((ACTIVATIONS[name], exact), (jax.vmap(jax.grad(ACTIVATIONS[name])), exact_slope)):
        got = function(x)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want(name, POINTS), rtol=2**-8, atol=1e-6)


@each_activation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_of_an_activation_keeps_its_input_alone(name, dtype):
    x = jnp.asarray(POINTS, dtype)
    (kept,) = jax.tree.leaves(jax.vjp(ACTIVATIONS[name], x)[1])
    assert kept.dtype == dtype and (kept == x).all()
    beside_x = lambda function: count_gradient(lambda x: function(x).sum(), x)[1]  # noqa: E731
    assert beside_x(ACTIVATIONS[name]) == 0 < beside_x(nn.gelu)


WAYS = {"apart": layers_apart, "joined": functools.partial(layers_apart, join=True)}


def parts(kv, *more):
    """Of each layer one part for each of these, a pair for all rows."""
    return tuple(tuple((pair,) for pair in layer) for layer in zip(kv, *more, strict=True))


def whole_of(module, p, x):
    """Outputs from layers that lie in a stack, and keys and values from layers apart."""
    seen = causal_mask(x.shape[1], x.shape[1])
    return run(module, p, x, seen), run(module, layers_apart(p), x, seen, return_kv=True)[1]


@pytest.mark.parametrize(("cut", "way"), [(1, "apart"), (4, "apart"), (4, "joined")])
def test_a_kept_prefix_gives_what_the_whole_sequence_gives(cut, way):
    with jax.enable_x64():
        x = tokens(7, dtype=np.float64)
        module = Transformer(WIDTH, LAYERS, HEADS, dtype=jnp.float64)
        p = draw(module, x, dtype=np.float64)
        (whole, all_kv), p = whole_of(module, p, x), WAYS[way](p)
        head, kv = run(module, p, x[:, :cut], causal_mask(cut, cut), return_kv=True)
        tail = run(module, p, x[:, cut:], causal_mask(7 - cut, 7), parts(kv))
        assert len(kv) == LAYERS and kv[0][0].shape == (2, cut, HEADS, WIDTH // HEADS) and whole.dtype == np.float64
        np.testing.assert_allclose(np.concatenate([head, tail], 1), whole, rtol=0, atol=1e-12)
        np.testing.assert_allclose(kv, np.asarray(all_kv)[:, :, :, :cut], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cut", "way"), [(0, "joined"), (1, "apart"), (4, "apart"), (4, "joined")])
def test_tokens_written_into_a_buffer_one_by_one_give_what_the_whole_sequence_gives(cut, way):
    """After a prefix that lies elsewhere, if there is one; the buffer starts with numbers that nothing may see."""
    with jax.enable_x64():
        x = tokens(7, dtype=np.float64)
        module = Transformer(WIDTH, LAYERS, HEADS, dtype=jnp.float64)
        p = draw(module, x, dtype=np.float64)
        (whole, all_kv), p = whole_of(module, p, x), WAYS[way](p)
        before, after = (jax.tree.map(lambda a, at=at: a[:, at], all_kv) for at in (slice(cut), slice(cut, None)))
        prefix = [before] if cut else []

        def step(buffer, at):
            seen = (jnp.arange(7) <= at)[None, None, None]
            token = jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1)
            kv = parts(*prefix, buffer)
            out, buffer = module.apply({"params": p}, token, seen, kv, return_kv=True, at=at - cut)
            return buffer, out[:, 0]

        buffer = jax.tree.map(lambda a: jnp.full_like(a, 9), after)
        filled, tail = jax.jit(lambda b: jax.lax.scan(step, b, jnp.arange(cut, 7)))(buffer)
        np.testing.assert_allclose(tail.swapaxes(0, 1), whole[:, cut:], rtol=0, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), filled, after)


def test_layers_in_a_stack_keep_no_keys_and_values():
    x, module = tokens(), Transformer(WIDTH, LAYERS, HEADS)
    p = draw(module, x)
    with pytest.raises(ValueError, match="see nn.drawing.layers_apart"):
        module.apply({"params": p}, x, return_kv=True)


def read_of(outputs, read):
    """Of each row of [B, N, W] the token that is read."""
    return outputs[:, read] if isinstance(read, int) else outputs[np.arange(len(read)), read]


EACH_ITS_OWN = np.array([3, 1])


@pytest.mark.parametrize(
    ("way", "read", "layers"),
    [("cut", 0, LAYERS), ("cut", -1, LAYERS), ("cut", EACH_ITS_OWN, LAYERS), ("cut", EACH_ITS_OWN, 1),
     ("whole", EACH_ITS_OWN, LAYERS), ("unrolled", -1, LAYERS), ("apart", 0, LAYERS), ("joined", EACH_ITS_OWN, LAYERS)],
    ids=str,
)  # fmt: skip
def test_one_token_read_is_that_of_all_as_is_its_gradient(way, read, layers, monkeypatch):
    """The gradient but of layers apart, which are not for training."""
    if way == "unrolled":
        on_a_gpu(monkeypatch)
    monkeypatch.setattr(transformer, "COPY", {"cut": 0}.get(way, 1000))
    with jax.enable_x64():
        x, module = tokens(dtype=np.float64), Transformer(WIDTH, layers, HEADS, dtype=jnp.float64)
        p = draw(module, x, dtype=np.float64)
        p = WAYS.get(way, dict)(p)
        outputs = lambda p, x, **how: module.apply({"params": p}, x, causal_mask(5, 5), **how)  # noqa: E731
        of_all = lambda p, x: jnp.sin(read_of(outputs(p, x), read))  # noqa: E731
        of_one = lambda p, x: jnp.sin(outputs(p, x, read=read))  # noqa: E731
        assert jax.eval_shape(of_one, p, x).shape == (2, WIDTH)
        slopes = lambda f, *args: () if way in WAYS else jax.grad(lambda *a: f(*a).sum(), (0, 1))(*args)  # noqa: E731
        found = [jax.jit(lambda p, x, f=f: (f(p, x), slopes(f, p, x)))(p, x) for f in (of_all, of_one)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *found)
        spared = count_flops(of_all, p, x) - count_flops(of_one, p, x)
    product = 2 * 2 * WIDTH * WIDTH  # of a token in both rows
    unread = 4 * ((2 + 2 * 4) * product + 2 * 2 * 2 * 5 * WIDTH)  # query, out and the MLP; attention to five
    if way == "joined":  # the query is computed with keys and values
        unread -= 4 * product
    assert spared == (0 if way == "whole" else unread)


@pytest.mark.parametrize("way", WAYS)
def test_one_token_is_read_after_a_prefix(way):
    with jax.enable_x64():
        x, module = tokens(7, dtype=np.float64), Transformer(WIDTH, LAYERS, HEADS, dtype=jnp.float64)
        p = draw(module, x, dtype=np.float64)
        whole, p = run(module, p, x, causal_mask(7, 7)), WAYS[way](p)
        kv = parts(run(module, p, x[:, :4], causal_mask(4, 4), return_kv=True)[1])
        tail = run(module, p, x[:, 4:], causal_mask(3, 7), kv, read=1)
        np.testing.assert_allclose(tail, whole[:, 5], rtol=0, atol=1e-12)
        again, own = run(module, p, x[:, 4:], causal_mask(3, 7), kv, return_kv=True, read=1)
        assert own[LAYERS - 1][0].shape == (2, 3, HEADS, WIDTH // HEADS)  # of all tokens, read or not
        np.testing.assert_allclose(again, tail, rtol=0, atol=1e-12)


def test_one_token_read_has_the_same_gradient_whatever_is_kept(monkeypatch):
    monkeypatch.setattr(transformer, "COPY", 0)
    with jax.enable_x64():
        x, found = tokens(dtype=np.float64), []
        for policy in POLICIES:
            module = Transformer(WIDTH, LAYERS, HEADS, remat=policy, dtype=jnp.float64)
            p = draw(module, x, dtype=np.float64)
            square = lambda p, m=module: jnp.square(m.apply({"params": p}, x, read=-1)).sum()  # noqa: E731
            found.append((jax.jit(jax.grad(square))(p), count_gradient(square, p)[1]))
    (plain, all_kept), *others = found
    for gradient, kept in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), plain, gradient)
        assert kept < all_kept


def on_a_gpu(monkeypatch):
    for module in (transformer, device, layers, attention):
        monkeypatch.setattr(module, "platform", lambda: "gpu")


@pytest.mark.parametrize("policy", POLICIES)
def test_on_a_gpu_layers_are_no_loop_and_lie_in_order(policy, monkeypatch):
    """And give the same, as does their gradient; a loop stays where the least memory is asked for."""
    with jax.enable_x64():
        x = tokens(dtype=np.float64)
        module = Transformer(WIDTH, LAYERS, HEADS, remat=policy, dtype=jnp.float64)
        p, texts, found = draw(module, x, dtype=np.float64), [], []
        for platform in ("cpu", "gpu"):
            if platform == "gpu":
                on_a_gpu(monkeypatch)
            square = lambda p, x: jnp.square(module.apply({"params": p}, x, causal_mask(5, 5))).sum()  # noqa: E731
            lowered = jax.jit(jax.value_and_grad(square, argnums=(0, 1))).lower(p, x)
            texts.append(lowered.as_text())
            found.append(lowered.compile()(p, x))
        scanned, unrolled = texts
        assert "stablehlo.while" in scanned and "LayoutConstraint" not in scanned
        assert ("stablehlo.while" in unrolled) == (policy == "full") and "LayoutConstraint" in unrolled
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *found)


def test_without_a_causal_mask_the_prefix_does_not_do():
    """So that the test above could fail."""
    x, module = tokens(7), Transformer(WIDTH, LAYERS, HEADS)
    p = draw(module, x)
    apart = layers_apart(p)
    _, kv = run(module, apart, x[:, :4], return_kv=True)
    assert not np.allclose(run(module, apart, x[:, 4:], None, parts(kv)), run(module, p, x)[:, 4:], atol=1e-3)


def test_nothing_reaches_back_through_a_causal_mask():
    x, module = tokens(), Transformer(WIDTH, LAYERS, HEADS)
    variables = {"params": draw(module, x)}
    outputs = lambda x: module.apply(variables, x, causal_mask(5, 5)).sum((0, 2))  # noqa: E731
    reach = np.abs(jax.jit(jax.jacrev(outputs))(x)).sum((1, 3))  # [position read, position changed]
    assert (reach[np.triu_indices(5, 1)] == 0).all() and (reach[np.tril_indices(5)] > 0).all()


def test_bfloat16_computes_in_it_and_keeps_f32_parameters():
    x, module = tokens(), Transformer(WIDTH, LAYERS, HEADS, dtype="bfloat16")
    p = draw(module, x)
    assert {a.dtype for a in jax.tree.leaves(p)} == {np.dtype(np.float32)}
    got = run(module, p, x)
    assert got.dtype == jnp.bfloat16
    exact = run(Transformer(WIDTH, LAYERS, HEADS), p, x)
    assert np.abs(np.asarray(got, np.float32) - exact).max() < 0.1


def test_layer_norm():
    x, norm = 5 + 3 * tokens(), LayerNorm()
    p = draw(norm, x)
    np.testing.assert_allclose(norm.apply({"params": p}, x), layer_norm(x, p["norm"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_of_a_layer_norm_keeps_its_input_alone(dtype):
    x, norm = jnp.asarray(tokens(), dtype), LayerNorm(dtype)
    pull = jax.vjp(lambda p, x: norm.apply({"params": p}, x), draw(norm, x), x)[1]
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(pull) if a.size > WIDTH] == [(x.shape, dtype)]


def test_the_gradient_of_a_layer_norm_is_that_of_flax_s():
    with jax.enable_x64():
        x, norm = tokens(dtype=np.float64), LayerNorm(jnp.float64)
        p = draw(norm, x, dtype=np.float64)
        flax = nn.LayerNorm(epsilon=1e-5)
        found, wanted = (
            jax.grad(lambda p, x, f=f: jnp.sin(f(p, x)).sum(), argnums=(0, 1))(p, x)
            for f in (lambda p, x: norm.apply({"params": p}, x), lambda p, x: flax.apply({"params": p["norm"]}, x))
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), found, wanted)


def test_width_must_split_into_heads():
    with pytest.raises(ValueError, match="width=8 must be a multiple of heads=3"):
        jax.eval_shape(lambda: Transformer(8, 1, 3).init(jax.random.key(0), tokens()))
