"""The caption Transformer: who sees whom, and what stands in a padded place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run
from unclip_jax.models.text import TextEncoder

L = 6
SIZES = dict(vocab_size=11, max_len=L, width=8, layers=2, heads=2)
TOKENS = np.array([[1, 5, 6, 7, 2, 0], [1, 8, 2, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)


def reach(encoder) -> np.ndarray:
    """bool[L, L]: whether the state at i changes when token j does, all positions being real."""
    tokens = np.array([[1, 5, 6, 7, 8, 2]])
    changed = np.repeat(tokens, L + 1, axis=0)
    changed[np.arange(L), np.arange(L)] = 10  # row j has another token j; the last row is as it was
    states = np.asarray(run(encoder, draw(encoder, TOKENS, MASK), changed, np.ones(changed.shape, bool)))
    return (states[:L] != states[L:]).any(-1).T


def test_causal_states_see_themselves_and_what_precedes():
    np.testing.assert_array_equal(reach(TextEncoder(**SIZES)), np.tril(np.ones((L, L), bool)))


def test_otherwise_all_see_all():
    assert reach(TextEncoder(**SIZES, causal=False)).all()


def test_padding_does_not_reach_a_causal_caption():
    """Whatever stands behind EOS, the states up to EOS are the same."""
    encoder = TextEncoder(**SIZES)
    p = draw(encoder, TOKENS, MASK)
    a, b = (run(encoder, p, tokens, MASK) for tokens in (TOKENS, np.where(MASK, TOKENS, 9)))
    np.testing.assert_array_equal(a[MASK], b[MASK])
    assert (a[~MASK] != b[~MASK]).any()


def test_learned_padding_replaces_the_tokens_in_padded_places():
    encoder = TextEncoder(**SIZES, causal=False, learned_padding=True)
    p = draw(encoder, TOKENS, MASK)
    states = run(encoder, p, TOKENS, MASK)
    np.testing.assert_array_equal(states, run(encoder, p, np.where(MASK, TOKENS, 9), MASK))
    p["padding"] = p["padding"] + 1.0
    assert (run(encoder, p, TOKENS, MASK) != states).any(-1).all()


def test_captions_of_another_length_are_refused():
    with pytest.raises(ValueError, match="captions have 5 tokens, this encoder takes max_len=6"):
        jax.eval_shape(lambda: TextEncoder(**SIZES).init(jax.random.key(0), jnp.zeros((1, 5), int), None))
