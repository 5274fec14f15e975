"""Attention against softmax written out in NumPy, and what its masks let through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.nn.attention import attention, attention_in_parts, causal_mask

B, N, S, H, D = 2, 3, 5, 2, 4


def inputs(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((B, N, H, D), (B, S, H, D), (B, S, H, D))]


def by_hand(q, k, v, mask=None):
    """For each sample, head and query: exp of the scores of the visible keys, divided by their sum."""
    out = np.zeros(q.shape)
    for b, n, h in np.ndindex(*q.shape[:3]):
        score = k[b, :, h].astype(np.float64) @ q[b, n, h] / np.sqrt(D)
        seen = True if mask is None else np.broadcast_to(mask, (len(q), H, N, S))[b, h, n]
        weight = np.exp(score) * seen
        out[b, n, h] = weight @ v[b, :, h] / weight.sum()
    return out


@pytest.mark.parametrize("shape", [None, (B, 1, 1, S), (1, 1, N, S), (B, 1, N, S), (B, H, N, S)])
def test_is_softmax_over_the_visible_keys(shape):
    q, k, v = inputs()
    mask = None
    if shape:
        mask = np.random.default_rng(1).random(shape) < 0.5
        mask[..., 0] = True
    np.testing.assert_allclose(attention(q, k, v, mask), by_hand(q, k, v, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_keys_in_parts_are_one_long_row_of_keys_also_where_samples_share_them(masked):
    """The first part lies once for both samples, the second apart for each."""
    q, k, v = inputs()
    k[:, :3], v[:, :3] = k[:1, :3], v[:1, :3]
    mask = np.random.default_rng(1).random((B, 1, N, S)) < 0.6 if masked else None
    parts = [[(k[:1, :3], v[:1, :3])], [(k[:, 3:], v[:, 3:])]]
    np.testing.assert_allclose(attention_in_parts(q, parts, mask), by_hand(q, k, v, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seen", [False, True])
def test_one_mask_for_the_keys_of_all_parts(seen):
    """Where nothing is seen all is, alike."""
    q, k, v = inputs()
    out = attention_in_parts(q, [[(k[:, :3], v[:, :3])], [(k[:, 3:], v[:, 3:])]], np.full((1, 1, 1, 1), seen))
    expected = by_hand(q, k, v, None) if seen else np.broadcast_to(v.mean(1, keepdims=True), q.shape)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_each_half_of_the_rows_has_its_own_keys(masked):
    """The first three rows have a caption's keys each, the last three share one's."""
    q, k, v = (np.concatenate([a] * 3) for a in inputs())
    k[3:, :4], v[3:, :4] = k[3:4, :4], v[3:4, :4]
    mask = np.random.default_rng(1).random((3 * B, 1, N, S)) < 0.6 if masked else None
    halves = [(k[:3, :4], v[:3, :4]), (k[3:4, :4], v[3:4, :4])]
    out = attention_in_parts(q, [halves, [(k[:, 4:], v[:, 4:])]], mask)
    np.testing.assert_allclose(out, by_hand(q, k, v, mask), rtol=0, atol=1e-6)


def test_in_float64_only_rounding_of_float64_is_left():
    mask = np.tril(np.ones((N, S), bool))[None, None]
    with jax.enable_x64(True):
        q, k, v = inputs(dtype=np.float64)
        out = attention(*map(jnp.asarray, (q, k, v)), mask)
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, by_hand(q, k, v, mask), rtol=0, atol=1e-14)
        empty = attention(*map(jnp.asarray, (q, k, v)), np.zeros((1, 1, 1, S), bool))
    np.testing.assert_allclose(empty, np.broadcast_to(v.mean(1, keepdims=True), q.shape), rtol=0, atol=1e-14)


def test_hidden_keys_have_exactly_no_influence():
    q, k, v = inputs()
    mask = np.array([True, True, False, True, False])[None, None, None]
    changed = [np.where(mask[0, 0].T[None, :, None], a, 1e6) for a in (k, v)]
    assert (attention(q, k, v, mask) == attention(q, *changed, mask)).all()


def test_a_row_without_visible_keys_is_the_mean_of_all():
    q, k, v = inputs()
    out = attention(q, k, v, np.zeros((1, 1, 1, S), bool))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), q.shape), rtol=0, atol=1e-6)


def test_bfloat16_rounds_in_and_out_but_not_the_softmax():
    """5,000 equal weights, which would not sum to 1 in bfloat16's 8 bits."""
    q = jnp.zeros((1, 1, 1, D), jnp.bfloat16)
    k = jnp.ones((1, 5000, 1, D), jnp.bfloat16)
    v = jnp.ones((1, 5000, 1, D), jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=0, atol=2**-8)


def test_large_scores_stay_finite():
    q, k, v = inputs()
    assert np.isfinite(attention(1e3 * q, 1e3 * k, v)).all()
    gradients = jax.jit(jax.grad(lambda *x: attention(*x).sum(), (0, 1, 2)))(1e3 * q, 1e3 * k, v)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("shape", [None, (B, 1, 1, S), (1, 1, N, S), (B, H, N, S)])
def test_the_gradient_is_that_of_the_formula(shape):
    """Where a query sees nothing, too: all values have a part in its mean, no key or query."""
    mask = None
    if shape:
        mask = np.random.default_rng(1).random(shape) < 0.5
        mask[0, 0, 0] = False

    def formula(q, k, v):
        scores = jnp.einsum("bnhd,bshd->bhns", q, k) / np.sqrt(D)
        scores = scores if mask is None else jnp.where(mask, scores, -1e9)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return jnp.einsum("bhns,bshd->bnhd", weights / weights.sum(-1, keepdims=True), v)

    with jax.enable_x64():
        args = inputs(dtype=np.float64)
        found, wanted = (
            jax.jit(jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2)))(*args)
            for f in (lambda *a: attention(*a, mask), formula)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_weights_once_in_the_dtype_of_the_queries(dtype):
    q, k, v = (jnp.asarray(a, dtype) for a in inputs())
    mask = np.ones((1, 1, N, S), bool)
    kept = jax.tree.leaves(jax.vjp(lambda *a: attention(*a, mask), q, k, v)[1])
    weights = [a for a in kept if a.size == B * H * N * S]
    assert [(a.shape, a.dtype) for a in weights] == [((B, H, N, S), dtype)]
    assert sum(a.size for a in kept if a.size > 1) <= q.size + k.size + v.size + weights[0].size + mask.size


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 7), (1, 5)])
def test_causal_mask_lets_each_see_itself_and_all_before(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.shape == (1, 1, queries, keys) and mask.dtype == bool
    for i, j in np.ndindex(queries, keys):
        assert bool(mask[0, 0, i, j]) == (j <= keys - queries + i)
