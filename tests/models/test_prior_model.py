"""The prior: causality of its prefix, which is what lets samplers run it once; and what a dropped caption hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.models.prior import Prior
from unclip_jax.nn import rows as nn_rows
from unclip_jax.nn.drawing import layers_apart

B, D, L, STATES = 2, 5, 4, 7
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
TOKENS = np.array([[1, 6, 2, 0], [1, 2, 0, 0]])
KEEP = np.ones(B, bool)
TIME = np.array([3, 800])
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


XT, Z_TXT, CAPTION_STATES = normal(B, D), normal(B, D, seed=1), normal(B, L, STATES, seed=2)


def make(vocab_size=11, dtype="float64"):
    prior = Prior(D, L, width=8, layers=2, heads=2, vocab_size=vocab_size, dtype=jnp.dtype(dtype))
    caption = TOKENS if vocab_size else CAPTION_STATES
    return prior, caption, draw(prior, XT, TIME, caption, MASK, Z_TXT, KEEP, dtype=np.float64)


@pytest.mark.parametrize("vocab_size", [0, 11])
def test_prefix_and_step_give_what_the_whole_sequence_gives(vocab_size):
    with jax.enable_x64():
        prior, caption, p = make(vocab_size)
        for keep in (KEEP, np.array([False, True])):
            whole = run(prior, p, XT, TIME, caption, MASK, Z_TXT, keep)
            assert whole.shape == (B, D) and whole.dtype == np.float64
            for params in (layers_apart(p), layers_apart(p, join=True)):
                args = (caption, MASK, Z_TXT, keep, np.array([3, 500, 800]))
                (both,) = run(prior, params, *args, method="prefix", sizes=(B,))
                one, other = run(prior, params, *args, method="prefix", sizes=(1, 1))
                at = lambda i, xt, *prefixes, p=params: run(prior, p, xt, prefixes, i, method="step")  # noqa: E731
                for row, (own, place) in enumerate([(one, 0), (other, 2)]):  # of TIME
                    want = whole[row : row + 1]
                    close(at(place, XT, both)[row : row + 1], want)
                    close(at(place, XT, one, other)[row : row + 1], want)
                    close(at(place, XT[[row]], own), want)
                    thrice = np.repeat(XT, 3, axis=0)  # three embeddings to a caption
                    close(at(place, thrice, both)[3 * row : 3 * row + 3], np.repeat(want, 3, axis=0))
                    halves = at(place, np.concatenate([XT, XT]), both, own)  # the last two share one caption
                    close(halves[row::2], np.repeat(want, 2, axis=0))


def test_prefixes_are_the_same_in_one_pass_and_in_one_each(monkeypatch):
    """The tests have several devices, on which each is a pass of its own."""
    with jax.enable_x64():
        prior, caption, p = make()

        def prefixes(one_device):
            monkeypatch.setattr(nn_rows, "alone", lambda: one_device)
            args = (caption, MASK, Z_TXT, np.array([True, False]), np.array([3, 500]), (1, 1))
            apply = lambda p: prior.apply({"params": p}, *args, method="prefix")  # noqa: E731
            return jax.jit(apply).trace(layers_apart(p))

        one, each = prefixes(True), prefixes(False)
        products = [str(traced.jaxpr).count("dot_general[") for traced in (one, each)]
        assert products[1] > 1.8 * products[0]
        jax.tree.map(close, *(traced.lower().compile()(layers_apart(p)) for traced in (one, each)))


def all_keys_and_values(prior, xt, time, caption, mask, z_txt, keep):
    """Keys and values of the whole sequence in every layer, as training computes them."""
    prefix, mask = prior._prefix(caption, mask, z_txt, keep)
    x = jnp.concatenate([prefix, prior._times(time)[:, None], prior._suffix(xt)], axis=1)
    return jnp.array(prior.transformer(x, prior._mask(mask, x.shape[1]), return_kv=True)[1])


def test_no_layer_of_the_prefix_sees_time_or_noise():
    with jax.enable_x64():
        prior, caption, p = make()

        def kept(xt, time):
            args = (xt, time, caption, MASK, Z_TXT, KEEP)
            return prior.apply({"params": layers_apart(p)}, *args, method=all_keys_and_values)

        @jax.jit
        def pull(xt, weight):
            return jax.grad(lambda xt: jnp.sum(kept(xt, TIME) * weight))(xt)

        one, other = jax.jit(kept)(XT, TIME), jax.jit(kept)(XT, TIME[::-1])
        weight = normal(*one.shape)  # [layer, k or v, B, position, head, channel]
        before = np.arange(L + 4) < L + 1
        at = before[:, None, None]
        assert (pull(XT, weight * at) == 0).all() and (pull(XT, weight * ~at) != 0).all()
        np.testing.assert_array_equal(one[:, :, :, before], other[:, :, :, before])
        assert (one[:, :, :, L + 1] != other[:, :, :, L + 1]).any((-1, -2)).all()


@pytest.mark.parametrize("vocab_size", [0, 11])
def test_padding_has_no_influence(vocab_size):
    with jax.enable_x64():
        prior, caption, p = make(vocab_size)
        other = np.where(MASK if vocab_size else MASK[..., None], caption, 9)
        a, b = (run(prior, p, XT, TIME, c, MASK, Z_TXT, KEEP) for c in (caption, other))
        np.testing.assert_array_equal(a, b)
        assert (run(prior, p, XT, TIME, other, np.ones_like(MASK), Z_TXT, KEEP) != a).all()


def test_a_dropped_caption_is_not_seen():
    with jax.enable_x64():
        prior, caption, p = make()
        keep = np.array([False, True])
        a = run(prior, p, XT, TIME, caption, MASK, Z_TXT, keep)
        b = run(prior, p, XT, TIME, (caption + 3) % 11, ~MASK, -Z_TXT, keep)
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).all()
        with pytest.raises(ValueError, match="keep must be None without a learned null, and only then"):
            run(prior, p, XT, TIME, caption, MASK, Z_TXT, None)


def test_everything_else_is_seen():
    with jax.enable_x64():
        prior, caption, p = make()
        args = (XT, TIME, caption, MASK, Z_TXT, KEEP)
        base = run(prior, p, *args)
        for i, other in enumerate((-XT, TIME + 1, caption + 1, MASK[::-1], -Z_TXT, ~KEEP)):
            assert (run(prior, p, *args[:i], other, *args[i + 1 :]) != base).all(), i
        assert (run(prior, {**p, "query": -p["query"]}, *args) != base).all()  # where the output is read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_bf16_do_not_round_the_embedding(dtype):
    """As stacks store them: what is predicted has f32's digits, not bf16's."""
    prior = Prior(D, L, width=8, layers=1, heads=2, vocab_size=11, dtype=jnp.dtype(dtype))
    xt, caption, mask = jnp.ones((1, D)), jnp.ones((1, L), jnp.int32), jnp.ones((1, L), bool)
    args = (xt, jnp.zeros((1,), jnp.int32), caption, mask, xt, jnp.ones((1,), bool))
    z = run(prior, jax.tree.map(lambda a: a.astype(jnp.bfloat16), draw(prior, *args)), *args)
    assert z.dtype == jnp.float32 and (z != z.astype(jnp.bfloat16)).any()


def test_bfloat16_returns_f32():
    prior = Prior(D, L, width=8, layers=1, heads=2, vocab_size=11, dtype="bfloat16", remat=True)
    args = (jnp.zeros((B, D)), TIME, TOKENS, MASK, jnp.zeros((B, D)), KEEP)
    out, variables = jax.eval_shape(lambda: prior.init_with_output(jax.random.key(0), *args))
    assert out.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
