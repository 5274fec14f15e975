"""slerp: lengths, angles, and the cases without one shortest way."""

import numpy as np
import pytest

from unclip_jax.diffusion.slerp import slerp


def angle(a, b):
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.arccos(np.clip(cosine, -1, 1))


def pair(n=5, d=32):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d)), rng.standard_normal((n, d))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_angles_and_lengths_move_evenly_and_the_plane_is_kept(share):
    a, b = pair()
    got = slerp(a, b, share)
    length = (1 - share) * np.linalg.norm(a, axis=1) + share * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), length, rtol=1e-12)
    np.testing.assert_allclose(angle(a, got), share * angle(a, b), atol=1e-7)
    np.testing.assert_allclose(angle(got, b), (1 - share) * angle(a, b), atol=1e-7)


def test_it_is_the_textbooks_formula_for_unit_vectors():
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair())
    w = np.arccos((a * b).sum(1, keepdims=True))
    expected = (np.sin(0.7 * w) * a + np.sin(0.3 * w) * b) / np.sin(w)
    np.testing.assert_allclose(slerp(a, b, 0.3), expected, atol=1e-12)


def test_pictures_are_single_vectors():
    a, b = (x.reshape(5, 4, 4, 2) for x in pair())
    got = slerp(a, b, 0.4)
    assert got.shape == a.shape
    np.testing.assert_array_equal(got.reshape(5, -1), slerp(a.reshape(5, -1), b.reshape(5, -1), 0.4))


def test_noise_halfway_keeps_its_spread():
    a, b = pair(2, 20_000)
    assert slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.02)
    assert ((a + b) / 2).std() < 0.75


def test_parallel_vectors_change_their_length_only():
    a, _ = pair()
    np.testing.assert_allclose(slerp(a, 3 * a, 0.25), 1.5 * a, rtol=1e-9)
    np.testing.assert_allclose(slerp(a, a, 0.6), a, rtol=1e-12)


def test_opposite_vectors_are_joined_by_a_half_circle():
    a, _ = pair()
    a[0] = np.eye(32)[3]
    middle = slerp(a, -a, 0.5)
    np.testing.assert_allclose(np.linalg.norm(middle, axis=1), np.linalg.norm(a, axis=1), rtol=1e-9)
    np.testing.assert_allclose(angle(a, middle), np.pi / 2, atol=1e-9)
    np.testing.assert_allclose(slerp(a, -a, 1.0), -a, atol=1e-9)


def test_zeros_take_the_others_direction():
    a, _ = pair()
    np.testing.assert_allclose(slerp(0 * a, a, 0.25), 0.25 * a, rtol=1e-12)
    np.testing.assert_allclose(slerp(a, 0 * a, 0.25), 0.75 * a, rtol=1e-12)
    assert not slerp(0 * a, 0 * a, 0.5).any()
