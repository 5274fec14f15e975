"""The autoregressive prior: decoding by cache against the whole sequence, causality, what a dropped caption hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.models.prior_ar import PriorAR
from unclip_jax.nn.drawing import layers_apart

B, D, L, K, STATES, BUCKETS, DOTS = 2, 5, 4, 6, 7, 9, 3
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
TOKENS = np.array([[1, 6, 2, 0], [1, 2, 0, 0]])
KEEP = np.ones(B, bool)
CODES = np.random.default_rng(3).integers(0, BUCKETS, (B, K))
DOT = np.array([0, 2])
Z_TXT = np.random.default_rng(1).standard_normal((B, D))
CAPTION_STATES = np.random.default_rng(2).standard_normal((B, L, STATES))
ENCODER = {"width": 8, "layers": 1, "heads": 2}
KINDS = {"tokens": (11, None), "states": (0, None), "encoder": (11, ENCODER)}


def make(kind="tokens", dtype="float64"):
    vocab_size, text = KINDS[kind]
    net = PriorAR(D, L, K, BUCKETS, 8, 2, 2, DOTS, vocab_size, text, dtype=jnp.dtype(dtype))
    caption = TOKENS if vocab_size else CAPTION_STATES
    return net, caption, draw(net, CODES, DOT, caption, MASK, Z_TXT, KEEP, dtype=np.float64)


@pytest.mark.parametrize(("sizes", "join"), [((B,), False), ((1, 1), True)], ids=["of_rows", "of_each_row_joined"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_what_the_whole_sequence_gives(kind, sizes, join):
    """Each code's logits, decoded token by token into the cache in one scan; one caption is dropped; two embeddings
    share each.
    """
    with jax.enable_x64():
        net, caption, p = make(kind)
        keep = np.array([False, True])
        twice = functools.partial(jnp.repeat, repeats=2, axis=0)
        codes = np.random.default_rng(4).integers(0, BUCKETS, (2 * B, K))
        whole = run(net, p, codes, twice(DOT), twice(caption), twice(MASK), twice(Z_TXT), twice(keep))
        assert whole.shape == (2 * B, K, BUCKETS) and whole.dtype == np.float64

        @jax.jit
        def decode(p, codes):
            apply = functools.partial(net.apply, {"params": p})
            prefixes = apply(caption, MASK, Z_TXT, keep, sizes, method="prefix")
            assert [prefix.before[0][0].shape for prefix in prefixes] == [(b, L + 1, 2, 4) for b in sizes]

            def step(own, inputs):
                logits, own = apply(*inputs, prefixes, own, method="step")
                return own, logits

            first = twice(jnp.where(keep, net.first(DOT), net.first(None, B)))
            inputs = jnp.concatenate([first[None], codes.T[:-1]]), jnp.arange(K)
            return jax.lax.scan(step, net.room(2 * B), inputs)[1].swapaxes(0, 1)

        np.testing.assert_allclose(decode(layers_apart(p, join), codes), whole, rtol=0, atol=1e-12)


def test_a_code_is_predicted_from_those_before_it_only():
    with jax.enable_x64():
        net, caption, p = make()
        base = run(net, p, CODES, DOT, caption, MASK, Z_TXT, KEEP)
        for place in range(K):
            other = CODES.copy()
            other[:, place] = (other[:, place] + 1) % BUCKETS
            changed = (run(net, p, other, DOT, caption, MASK, Z_TXT, KEEP) != base).all((0, 2))
            np.testing.assert_array_equal(changed, np.arange(K) > place)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence(kind):
    with jax.enable_x64():
        net, caption, p = make(kind)
        other = np.where(MASK if caption is TOKENS else MASK[..., None], caption, 9)
        a, b = (run(net, p, CODES, DOT, c, MASK, Z_TXT, KEEP) for c in (caption, other))
        np.testing.assert_array_equal(a, b)
        assert (run(net, p, CODES, DOT, other, np.ones_like(MASK), Z_TXT, KEEP) != a).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_caption_is_not_seen_nor_its_dot_product(kind):
    with jax.enable_x64():
        net, caption, p = make(kind)
        keep = np.array([False, True])
        a = run(net, p, CODES, DOT, caption, MASK, Z_TXT, keep)
        b = run(net, p, CODES, (DOT + 1) % DOTS, (caption + 3) % 11, ~MASK, -Z_TXT, keep)
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).all()


def test_everything_else_is_seen():
    with jax.enable_x64():
        net, caption, p = make()
        args = (CODES, DOT, caption, MASK, Z_TXT, KEEP)
        base = run(net, p, *args)
        for i, other in enumerate(((CODES + 1) % BUCKETS, (DOT + 1) % DOTS, caption + 1, MASK[::-1], -Z_TXT, ~KEEP)):
            last = run(net, p, *args[:i], other, *args[i + 1 :])[:, -1]
            assert (last != base[:, -1]).all(), i


def test_bfloat16_returns_f32():
    net = PriorAR(D, L, K, BUCKETS, 8, 1, 2, DOTS, 11, ENCODER, remat=True, dtype="bfloat16")
    args = (CODES, DOT, TOKENS, MASK, jnp.zeros((B, D)), KEEP)
    out, variables = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), *args))
    assert out.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
