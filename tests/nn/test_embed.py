"""The time embedding against its formula."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw
from unclip_jax.nn.embed import TimeEmbedding, sinusoid

TIMES = [0, 1, 17, 500, 999]


@pytest.mark.parametrize("width", [2, 8, 320])
def test_cosines_then_sines_of_geometric_frequencies(width):
    got = np.asarray(sinusoid(jnp.array(TIMES), width))
    assert got.shape == (len(TIMES), width) and got.dtype == np.float32
    for row, t in zip(got, TIMES, strict=True):
        angles = [t * 10000 ** (-i / (width // 2)) for i in range(width // 2)]
        # f32 angles up to 999 are off by some 1e-4.
        np.testing.assert_allclose(row, [*map(math.cos, angles), *map(math.sin, angles)], rtol=0, atol=3e-4)


def test_times_stay_apart():
    """All 1,000 steps of a schedule differ, neighbours included."""
    e = np.asarray(sinusoid(jnp.arange(1000), 32))
    assert np.linalg.norm(np.diff(e, axis=0), axis=-1).min() > 0.1


def test_integers_and_floats_agree():
    assert (sinusoid(jnp.array([3]), 8) == sinusoid(jnp.array([3.0]), 8)).all()


@pytest.mark.parametrize("frequencies", [None, 6])
def test_time_embedding_is_two_layers_over_it(frequencies):
    module, time = TimeEmbedding(8, frequencies), jnp.array([0, 5, 900])
    p = draw(module, time)
    h = np.asarray(sinusoid(time, frequencies or 8), np.float64) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    h = h / (1 + np.exp(-h)) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    np.testing.assert_allclose(module.apply({"params": p}, time), h, rtol=0, atol=1e-5)
