"""Principal components against numpy's singular values, measured batch by batch and on a split batch; and codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import pca, sharding
from unclip_jax.errors import UserError

D, SIZE, BATCHES = 7, 48, 5


@functools.cache
def data():
    """f32[240, D], correlated, far from 0: an uncentred f32 sum of squares would lose the smallest variance."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((SIZE * BATCHES, D)) * [9, 7, 5, 3, 1, 0.5, 0.05] @ rng.standard_normal((D, D))
    return (mixed + 300).astype(np.float32)


def measured(place=lambda batch: batch):
    seen, moments = None, jax.jit(pca.batch_moments)
    for batch in np.split(data(), BATCHES):
        seen = pca.merge(seen, SIZE, *jax.device_get(moments(place(batch))))
    return seen


@pytest.fixture(scope="module")
def found():
    return pca.fit(measured())


def test_components_are_the_right_singular_vectors_of_all_data(found):
    z = data().astype(np.float64)
    _, values, vectors = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(found.mean, z.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, values / np.sqrt(len(z)), rtol=1e-5, atol=2e-4)
    assert (np.diff(found.std) < 0).all()
    np.testing.assert_allclose(np.abs(np.sum(found.components * vectors.T, 0)), 1, atol=1e-4)
    np.testing.assert_allclose(found.components.T @ found.components, np.eye(D), atol=1e-12)
    assert (found.components[np.abs(found.components).argmax(0), range(D)] > 0).all()


def test_a_direction_without_variance_gets_the_least():
    z = data().astype(np.float64)[:, [0, 1, 1]]
    found = pca.fit(pca.merge(None, len(z), z.mean(0), (z - z.mean(0)).T @ (z - z.mean(0))))
    assert found.std[-1] == pytest.approx(1e-3) and (found.std[:2] > 0.1).all()


def test_a_batch_split_over_devices_is_measured_whole(found):
    place = sharding.batch_sharding(sharding.make_mesh(data=4, fsdp=2))
    split = measured(lambda batch: jax.device_put(batch, place))
    whole = measured()
    np.testing.assert_allclose(split.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(split.scatter, whole.scatter, rtol=1e-4, atol=1e-4 * np.abs(whole.scatter).max())


def test_projection_and_back(found):
    z = data()[:5].astype(np.float64)
    np.testing.assert_allclose(found.back(found.project(z)), z, rtol=1e-9)
    few = found.keep(np.int64(3))
    assert few.std.shape == (3,) and few.components.shape == (D, 3)
    y = few.project(z)
    np.testing.assert_allclose(y, ((z - found.mean) @ found.components)[:, :3])
    # What is lost is the distance to the subspace, which no other point of it undercuts.
    lost = z - few.back(y)
    np.testing.assert_allclose(lost @ few.components, 0, atol=1e-9)
    np.testing.assert_allclose(few.project(few.back(y)), y)


def test_as_many_components_as_hold_the_share(found):
    held = np.cumsum(found.std**2) / np.sum(found.std**2)
    for share in (0.2, 0.9, 0.99, 0.999999):
        k = found.keep(share).std.shape[0]
        assert held[k - 1] >= share and (k == 1 or held[k - 2] < share)
    assert pca.dims_for(np.ones(4), 0.5) == 2  # just the share, and no more than it takes
    for bad in (0, 8, 0.0, 1.0, 1.5):
        with pytest.raises(UserError):
            found.keep(bad)


@pytest.mark.parametrize("buckets", [2, 16, 1024])
def test_codes_are_the_buckets_of_four_deviations_to_either_side(buckets):
    std = np.array([3.0, 0.01])
    edges = np.linspace(-4, 4, buckets + 1)
    rng = np.random.default_rng(0)
    y = rng.uniform(-4.5, 4.5, (500, 2))
    codes = np.asarray(pca.to_codes(jnp.asarray(y * std, jnp.float32), jnp.asarray(std, jnp.float32), buckets))
    expected = np.clip(np.digitize(y, edges) - 1, 0, buckets - 1)
    near = np.abs(y[..., None] - edges).min(-1) < 1e-5  # rounding of f32
    np.testing.assert_array_equal(codes[~near], expected[~near])
    assert codes.min() == 0 and codes.max() == buckets - 1
    back = np.asarray(pca.from_codes(codes, std, buckets)) / std
    np.testing.assert_allclose(back, ((edges[:-1] + edges[1:]) / 2)[codes], atol=1e-5)
    assert np.abs(back - y)[np.abs(y) <= 4].max() <= 4 / buckets + 1e-5
