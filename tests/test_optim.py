"""AdamW against a numpy one written from the paper, and what decay, clipping and accumulation reach."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax import optim
from unclip_jax.errors import UserError


def _params(rng):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "dense": {"kernel": normal(4, 3), "bias": normal(3)},
        "stack": {"kernel": normal(2, 4, 4), "bias": normal(2, 4), "scale": normal(2, 4)},
        "mean": normal(4),
        "components": normal(4, 2),
        "logit_scale": np.float32(2.5),
    }


def _run(tx, params, gradients):
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(jnp.asarray, gradient))
    return params


def _adamw(params, gradients, rates, *, decay, b1, b2, eps, clip):
    """Loshchilov & Hutter 2019, algorithm 2, in float64, over a flat {name: array}."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradient.values()))
        for k, g in gradient.items():
            g = np.asarray(g, np.float64) * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            ratio = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            params[k] = params[k] - rate * (
                ratio + (decay if k in ("w", "stack/kernel") else 0.0) * params[k]
            )
    return params


def test_follows_the_paper():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    gradients = [
        {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()} for _ in range(8)
    ]
    rates = [0.05, 0.1] + [0.1 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(6)]
    tx = optim.make(
        8, lr=0.1, warmup=2, final=0.2, weight_decay=0.3, b1=0.8, b2=0.95, eps=1e-3, clip_norm=0.5
    )
    expected = _adamw(params, gradients, rates, decay=0.3, b1=0.8, b2=0.95, eps=1e-3, clip=0.5)
    result = _run(tx, params, gradients)
    for name in params:
        np.testing.assert_allclose(result[name], expected[name], rtol=2e-5, atol=2e-6)


def _orthogonal(matrix, eps):
    """Jordan et al. 2024: five iterations of X <- a X + b (X Xt) X + c (X Xt)^2 X, from X of Frobenius norm 1."""
    x = matrix / (np.linalg.norm(matrix) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    return x


KERNELS = {  # as they lie in a network, and as the matrices [how many, in, out] that they are
    "dense": ((6, 4), (1, 6, 4)),
    "conv": ((3, 3, 2, 5), (1, 18, 5)),
    **{name: ((6, 2, 3), (1, 6, 6)) for name in ("query", "key", "context_key", "context_value")},
    "out": ((2, 3, 6), (1, 6, 6)),
    "blocks/fc": ((2, 6, 4), (2, 6, 4)),
    "blocks/value": ((2, 6, 2, 3), (2, 6, 6)),
}


def test_muon_makes_the_momentum_of_each_kernels_matrix_orthogonal():
    rng = np.random.default_rng(4)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in KERNELS.items()}
    steps = [{name: rng.normal(size=v.shape).astype(np.float32) for name, v in flat.items()} for _ in range(3)]

    def nested(values):
        norm = dict.fromkeys(("scale", "kernel"), values["dense"][0])  # of one axis
        tree = {"blocks": {}, "norm": norm, "embed": {"embedding": values["dense"]}}
        for name, value in values.items():
            *outer, last = name.split("/")
            (tree["blocks"] if outer else tree)[last] = {"kernel": value}
        return tree

    same = dict(b1=0.8, b2=0.95, eps=1e-2)
    tx = optim.make(3, name="muon", lr=0.1, schedule="constant", weight_decay=0.3, clip_norm=None, **same)
    result = _run(tx, nested(flat), [nested(step) for step in steps])
    for name, (shape, matrices) in KERNELS.items():
        expected, m = flat[name].astype(np.float64), np.zeros(shape)
        for t, gradient in enumerate(steps, start=1):
            m = 0.95 * m + 0.05 * gradient[name]
            ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * gradient[name] / (1 - 0.95**t)
            o = np.stack([_orthogonal(one, 1e-2) for one in ahead.reshape(matrices)]).reshape(shape)
            expected -= 0.1 * (0.2 * math.sqrt(max(matrices[1:])) * o + 0.3 * expected)
        *outer, last = name.split("/")
        got = (result["blocks"] if outer else result)[last]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=name)
    adam = optax.nadamw(0.1, weight_decay=0.0, **same)
    rest = {name: nested(flat)[name] for name in ("norm", "embed")}
    rest = _run(adam, rest, [{name: nested(step)[name] for name in rest} for step in steps])
    for name in rest:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result[name], rest[name])


def test_left_to_itself_it_is_optax_s_adam_along_half_a_cosine():
    rng = np.random.default_rng(5)
    params = {"w": rng.normal(size=(5, 4)).astype(np.float32)}
    tiny = np.where(np.arange(4) < 1, 1e-7, 1.0)  # one column that the least eps tells of
    gradients = [{"w": (size * tiny * rng.normal(size=(5, 4))).astype(np.float32)} for size in (0.1, 3, 0.5, 1e-2, 2)]
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.1, 5)))
    found, wanted = (_run(tx, params, gradients)["w"] for tx in (optim.make(5, lr=0.1), adam))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_zero_gradients_leave_undecayed_arrays_bit_identical():
    params = _params(np.random.default_rng(1))
    params["mean"] = np.array([0.0, -0.0, 1e-37, -3e38], np.float32)
    zeros = jax.tree.map(np.zeros_like, params)
    after = _run(optim.make(9, lr=1.0, weight_decay=0.5, warmup=1), params, [zeros] * 3)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True
        )
        if np.asarray(old).tobytes() != np.asarray(new).tobytes()
    }
    assert changed == {"dense/kernel", "stack/kernel"}


@pytest.mark.parametrize("size", [0.1, 3.0])
def test_clipping_is_optax_s_whether_the_norm_is_known_or_not(size):
    grads = {"a": size * np.array([0.6, 0.0, 0.8], np.float32), "b": jnp.asarray([[2.0]], jnp.bfloat16)}
    wanted, _ = optax.clip_by_global_norm(1.5).update(grads, optax.EmptyState())
    for known in ({}, {"norm": optax.global_norm(grads)}):
        found, _ = optim.clip(1.5).update(grads, optax.EmptyState(), **known)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2 if a.ndim > 1 else 1e-6), found, wanted)
        assert found["b"].dtype == jnp.bfloat16
    told, _ = optim.clip(1.5).update(grads, optax.EmptyState(), norm=jnp.float32(15.0))
    np.testing.assert_allclose(told["a"], grads["a"] / 10, rtol=1e-6)


def test_of_accumulated_batches_their_mean_s_norm_counts():
    """Not that of the last one, which a train step tells of."""
    params, after = {"w": jnp.zeros(2)}, []
    for tell in (False, True):
        tx = optax.with_extra_args_support(optim.make(4, lr=1.0, accumulate=2, clip_norm=1.0, eps=1.0))
        state = tx.init(params)
        for g in ({"w": jnp.array([9.0, 0.0])}, {"w": jnp.array([-8.0, 0.0])}):
            updates, state = tx.update(g, state, params, **({"norm": optax.global_norm(g)} if tell else {}))
        after.append(updates["w"])
    np.testing.assert_array_equal(*after)
    assert after[0][0] != 0


def test_no_decay_and_no_clipping():
    params = _params(np.random.default_rng(2))
    huge = jax.tree.map(lambda x: np.full_like(x, 1e6), params)
    after = _run(optim.make(9, lr=0.5, schedule="constant", clip_norm=None), params, [huge])
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(old - new, 0.5, rtol=1e-4)  # Adam's first step is lr times the sign


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_accumulated_batches_equal_their_mean(schedule):
    rng = np.random.default_rng(3)
    params = _params(rng)["dense"]
    small = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(12)]
    mean = [jax.tree.map(lambda *g: np.mean(g, axis=0), *small[i : i + 3]) for i in range(0, 12, 3)]
    same = dict(lr=0.1, warmup=2, schedule=schedule, weight_decay=0.1)
    accumulated = _run(optim.make(12, accumulate=3, **same), params, small)
    at_once = _run(optim.make(4, **same), params, mean)
    for a, b in zip(jax.tree.leaves(accumulated), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_learning_rate_by_batch():
    rate = optim.learning_rate(100, lr=2.0, warmup=10, schedule="linear", final=0.1, weight_decay=0.1)
    np.testing.assert_allclose([rate(i) for i in range(10)], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rate(55), (2.0 + 0.2) / 2, rtol=1e-6)
    np.testing.assert_allclose([rate(100), rate(1000)], 0.2, rtol=1e-6)
    np.testing.assert_allclose(rate(99), 0.2 + 1.8 / 90, rtol=1e-5)  # the last update's
    cosine = np.array([optim.learning_rate(50, lr=1.0)(i) for i in range(51)])
    assert (np.diff(cosine) < 0).all() and cosine[0] == 1 and abs(cosine[50]) < 1e-6
    assert optim.learning_rate(50, lr=1.0, schedule="constant")(49) == 1
    assert optim.learning_rate(4, lr=1.0, accumulate=4)(3) == 1  # one update in all
    slow = optim.learning_rate(40, lr=1.0, warmup=2, accumulate=4)
    np.testing.assert_allclose([slow(i) for i in range(8)], [0.5] * 4 + [1.0] * 4)
    left = optim.learning_rate(10, lr=1.0, schedule="linear", accumulate=4)  # two updates, and two batches over
    np.testing.assert_allclose([left(i) for i in (0, 3, 4, 7, 8)], [1, 1, 0.5, 0.5, 0])
    np.testing.assert_allclose([optim.learning_rate(4, lr=1.0, warmup=4)(i) for i in range(5)], [0.25, 0.5, 0.75, 1, 1])


def test_sharpness_aware_gradients_are_those_of_two_steps():
    """Of sum (a p)^4 / 4 over two arrays, in float64; at a place without slope the gradient is plain."""
    rng = np.random.default_rng(4)
    factors = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=3)}
    params = {k: rng.normal(size=v.shape) for k, v in factors.items()}
    slope = lambda at: {k: factors[k] ** 4 * at[k] ** 3 for k in at}  # noqa: E731
    here, rho = slope(params), 0.3
    norm = math.sqrt(sum((g**2).sum() for g in here.values()))
    expected = slope({k: params[k] + rho * here[k] / norm for k in params})
    value = sum(((factors[k] * params[k]) ** 4).sum() / 4 for k in params)
    loss = lambda p: sum(jnp.sum((factors[k].astype(np.float32) * p[k]) ** 4) / 4 for k in p)  # noqa: E731
    low = jax.tree.map(np.float32, params)
    got = jax.jit(optim.sharpness_aware(jax.value_and_grad(loss), rho))(low)
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got[1], expected)
    flat = optim.sharpness_aware(jax.value_and_grad(loss), rho)(jax.tree.map(jnp.zeros_like, low))[1]
    assert all((g == 0).all() for g in flat.values())
    low_loss = optim.sharpness_aware(jax.value_and_grad(lambda p: 1e-6 * loss(p)), rho)(low)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(1e6 * a, b, rtol=1e-4), low_loss, expected)  # as far
    places = []
    optim.sharpness_aware(lambda p: (0.0, (places.append(p), {"w": jnp.ones(2)})[1]), rho)({"w": jnp.bfloat16([1, 2])})
    assert [place["w"].dtype for place in places] == [jnp.bfloat16] * 2
    plain = jax.value_and_grad(loss)
    assert optim.sharpness_aware(plain, 0.0) is plain


@pytest.mark.parametrize(
    "change, told",
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"name": "moun"}, "did you mean 'muon'"),
        ({"lr": -1e-3}, "> 0"),
        ({"lr": math.nan}, "nan"),
        ({"lr": math.inf}, "inf"),
        ({"lr": "abc"}, "'abc'"),
        ({"lr": True}, "True"),
        ({"lr": None}, "None"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1.5}, "an integer"),
        ({"warmup": 11}, "warmup=11 must not exceed the 10 updates"),
        ({"warmup": 6, "accumulate": 2}, "5 updates"),
        ({"warmup": -1}, ">= 0"),
        ({"warmup": 1.5}, "an integer"),
        ({"accumulate": 1.5}, "an integer"),
        ({"final": -0.1}, ">= 0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"final": 1.5}, "<= 1"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"b1": 1.0}, "b1=1.0 must be a finite number, >= 0, < 1"),
        ({"b2": -0.1}, "b2"),
        ({"b2": 1.0}, "b2=1.0 must be a finite number, >= 0, < 1"),
        ({"eps": 0.0}, "eps"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 11}, "optim.accumulate=11 must not exceed num_steps=10"),
        ({"sam_rho": -0.1}, "optim.sam_rho=-0.1"),
        ({"sam_rho": math.nan}, "optim.sam_rho=nan"),
    ],
)
def test_refuses(change, told):
    with pytest.raises(UserError, match=".") as error:
        optim.make(**{"num_steps": 10, "lr": 1e-3, **change})
    assert told in str(error.value)
