"""metrics.manifold, scores, probes, intervals: each against its definition written out in loops."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from unclip_jax.errors import UserError
from unclip_jax.metrics import intervals, probes, scores
from unclip_jax.metrics.manifold import precision_recall

RNG = np.random.default_rng(1)
X, Y = RNG.standard_normal((50, 6)), 0.8 * RNG.standard_normal((40, 6)) + 0.5


def share_inside(queries, points, k):
    radius = [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]
    return np.mean([any(np.linalg.norm(q - p) <= r for p, r in zip(points, radius, strict=True)) for q in queries])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_precision_and_recall_are_those_of_the_definition(k):
    exact = share_inside(Y, X, k), share_inside(X, Y, k)
    assert precision_recall(X, Y, k) == precision_recall(X, Y, k, chunk=7) == exact
    assert 0 < exact[0] <= 1


def test_precision_and_recall_tell_lost_kinds_from_bad_pictures():
    same = RNG.standard_normal((50, 6))
    assert precision_recall(X, X) == (1, 1) and precision_recall(X, X + 100) == (0, 0)
    precision, recall = precision_recall(np.r_[X, same + 100], X[:50])  # one of two kinds is drawn, and well
    assert precision == 1 and recall == 0.5
    one = np.zeros((5, 6))  # the same picture over and over: balls without radius, and each holds all
    assert precision_recall(one, one) == (1, 1) and precision_recall(one, one + 1) == (0, 0)


@pytest.mark.parametrize("k", [0, 40])
def test_neighbours_beyond_the_pictures_are_refused(k):
    with pytest.raises(UserError, match=f"k={k}"):
        precision_recall(X, Y, k)


def test_clip_scores_are_cosines_by_both_conventions():
    got = scores.clip_score(X[:40], Y)
    cos = np.array([p @ q / math.sqrt((p @ p) * (q @ q)) for p, q in zip(X[:40], Y, strict=True)])
    np.testing.assert_allclose(got["clip_score"], 100 * cos, rtol=1e-12)
    np.testing.assert_allclose(got["clip_s"], 2.5 * np.where(cos > 0, cos, 0), rtol=1e-12)
    assert (cos < 0).any()
    with pytest.raises(UserError, match="50 pictures and 40 captions"):
        scores.clip_score(X, Y)


def test_inception_score_is_the_exponent_of_the_mean_divergence():
    logits = 3 * RNG.standard_normal((40, 7))
    p, log_p = softmax(logits, 1), log_softmax(logits, 1)
    exact = np.exp(np.mean([(a * (b - np.log(p.mean(0)))).sum() for a, b in zip(p, log_p, strict=True)]))
    assert scores.inception_score(logits, 1) == (pytest.approx(exact, rel=1e-12), 0)
    assert scores.inception_score(800 * np.eye(8), 1)[0] == pytest.approx(8)  # 8 kinds, each certain
    assert scores.inception_score(50 * np.eye(8).repeat(4, 0), 2)[0] > 5  # whatever the order they come in
    assert scores.inception_score(np.ones((8, 5)), 2)[0] == pytest.approx(1)
    assert scores.inception_score(logits, 40) == pytest.approx((1, 0))  # of single pictures nothing differs
    with pytest.raises(UserError, match="splits=10"):
        scores.inception_score(logits[:9])


def found(z_img, z_txt, k):
    """Recall by sorting, both ways."""
    near = z_img @ z_txt.T / np.outer(np.linalg.norm(z_img, axis=1), np.linalg.norm(z_txt, axis=1))
    return tuple(np.mean([i in np.argsort(-sims[i])[:k] for i in range(len(z_img))]) for sims in (near, near.T))


def test_recall_is_what_sorting_finds():
    z_img = RNG.standard_normal((30, 5))
    z_txt = z_img + 0.8 * RNG.standard_normal((30, 5))
    for chunk in (4, 100):
        got = probes.recall(z_img, z_txt, chunk=chunk)
        for k in (1, 5, 10):
            assert (got["image_to_text"][k], got["text_to_image"][k]) == found(z_img, z_txt, k)
    assert 0.2 < got["image_to_text"][1] < got["image_to_text"][10]
    assert probes.recall(z_img, z_txt, (30,)) == {"image_to_text": {30: 1}, "text_to_image": {30: 1}}  # of all, all


def test_embeddings_all_alike_find_nothing():
    alike = RNG.standard_normal(60) * RNG.uniform(1, 2, (20, 1))  # their cosines are 1 but for rounding
    assert probes.recall(alike, alike)["image_to_text"] == {1: 0, 5: 0, 10: 0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: probes.recall(X, Y), "50 images and 40 captions"),
        (lambda: probes.recall(X[:8], X[:8]), "recall@10 needs at least 10"),
        (lambda: probes.class_prompts([], ["a {}"]), "empty"),
        (lambda: probes.class_prompts(["cat", "dog", "cat"], ["a {}"]), "'cat' is listed more than once"),
        (lambda: probes.class_prompts(["cat"], []), "no prompt template"),
        (lambda: probes.class_prompts(["cat"], ["a photo"]), "must hold {} once"),
        (lambda: probes.class_prompts(["cat"], ["a {0}"]), "must hold {} once"),
        (lambda: probes.top_k(np.ones((2, 3)), [0, 3]), "label 3 is out of range"),
        (lambda: probes.top_k(np.ones((2, 3)), [0, 2], 5), "top-5 needs"),
        (lambda: probes.linear_probe(X, np.full(50, -1), 2), "label -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_prompts_are_ensembled_class_by_class():
    assert probes.class_prompts(["a {cat", "dog"], ["one {}", "two {}s"]) == [
        "one a {cat", "two a {cats", "one dog", "two dogs"
    ]  # fmt: skip
    z = RNG.standard_normal((6, 4))
    got = probes.class_embeddings(z, 3)
    for c in range(3):
        mean = sum(v / np.linalg.norm(v) for v in z[2 * c : 2 * c + 2])
        np.testing.assert_allclose(got[c], mean / np.linalg.norm(mean), rtol=1e-12)
    of_three = np.array([[3, 2, 1], [1, 2, 3], [2, 2, 1]])
    best = [probes.top_k(of_three, [0, 0, 0], k).tolist() for k in (1, 2, 3)]
    assert best == [[True, False, False], [True, False, True], [True] * 3]


def test_the_linear_probe_is_at_its_minimum():
    """The gradient vanishes there, taken by differences of the loss written out anew."""
    labels = RNG.integers(0, 3, 50)
    probe = probes.linear_probe(X, labels, 3, penalty=0.01)
    bias = probe(X.mean(0, keepdims=True))
    weights = np.stack([probe(X.mean(0, keepdims=True) + X.std(0) * row[None])[0] for row in np.eye(6)]) - bias

    def loss(w, b):
        z = (X - X.mean(0)) / X.std(0)
        return -np.mean(log_softmax(z @ w + b, 1)[np.arange(50), labels]) + 0.005 * (w**2).sum()

    for _ in range(10):
        step = 1e-4 * RNG.standard_normal((7, 3))
        slope = (loss(weights + step[:6], bias + step[6:]) - loss(weights - step[:6], bias - step[6:])) / 2e-4
        assert abs(slope) < 1e-5
    still = np.c_[X, np.full(50, 3.0)]  # a component that never varies
    assert np.isfinite(probes.linear_probe(still, labels, 3)(still)).all()
    apart = np.eye(3)[labels]
    assert (probes.linear_probe(apart, labels, 3)(apart).argmax(1) == labels).all()


@pytest.mark.parametrize(("k", "n"), [(1, 10), (8, 10), (150, 200), (199, 200)])
def test_wilson_ends_are_the_shares_that_a_score_test_just_accepts(k, n):
    for p in intervals.wilson(k, n):
        assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)


def test_wilson_is_sound_at_the_ends():
    low, high = intervals.wilson(0, 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)  # z^2 / (n + z^2)
    low, high = intervals.wilson(10, 10)
    assert low == pytest.approx(1 - 0.2775, abs=1e-4) and high == 1
    for n in range(1, 60):  # to the bit, whatever rounding does
        assert intervals.wilson(0, n)[0] == 0 and intervals.wilson(n, n)[1] == 1
    assert intervals.wilson(0, 0) == (0, 1)  # nothing is known


def test_the_bootstrap_of_a_mean_tends_to_its_formula():
    values = RNG.exponential(size=200)
    weights = intervals.counts(200, 4000, seed=3)
    assert (weights.sum(1) == 200).all()
    got = intervals.bootstrap(lambda r: weights[r] @ values / 200, values.mean(), 4000)
    np.testing.assert_allclose(got, intervals.mean_interval(values), atol=0.05 * values.std() / math.sqrt(200))
    assert (weights[:9] != intervals.counts(200, 9, seed=4)).any()


def test_the_interval_of_a_mean_is_of_the_population_s_deviation_in_float64():
    for start in (0, 2**24):  # in float32 the sum of the two rounds
        low, high = intervals.mean_interval(np.float32([start, start + 2]))
        assert (low - start, high - start) == pytest.approx([1 - 1.959964 / 2**0.5, 1 + 1.959964 / 2**0.5])


def test_the_bootstraps_deviation_is_that_of_a_sample():
    assert intervals.bootstrap(float, 5.0, 3) == pytest.approx((5 - 1.959964, 5 + 1.959964))  # of 0, 1 and 2: 1


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    held = [low <= 1 <= high for low, high in (intervals.mean_interval(RNG.exponential(size=200)) for _ in range(1000))]
    assert 0.91 < np.mean(held) < 0.97
