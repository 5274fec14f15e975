"""Tiles against the untiled network: equal where its reach is covered, and otherwise blended without a seam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.tile import check_tiles, places, tiled
from unclip_jax.errors import UserError


def network(reach, out=3):
    """Looks `reach` pixels far, by 3x3 means and sines; zeros beyond the picture's edge, as for convolutions."""
    def run(x, time):
        for k in range(reach):
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            h, w = x.shape[1:3]
            x = sum(padded[:, i : i + h, j : j + w] * (1 + i + 2 * j) for i in range(3) for j in range(3)) / 36
            x = jnp.sin(3 * x + 0.1 * k + time[:, None, None, None] / 100)
        return jnp.concatenate([x] * 2, -1)[..., :out]

    return run


def picture(height, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, height, width, 4)), jnp.float32)


@pytest.mark.parametrize("height, width, tile, overlap, align", [
    (40, 40, 24, 12, 1), (48, 40, 24, 12, 4), (37, 53, 20, 12, 1), (24, 70, 24, 13, 1)])
def test_equal_to_the_untiled_where_a_quarter_of_the_overlap_covers_the_reach(height, width, tile, overlap, align):
    net, x, time = network(3, out=6), picture(height, width), jnp.array([3, 70])
    whole = net(x, time)
    np.testing.assert_allclose(tiled(net, tile, overlap, align)(x, time), whole, atol=1e-5)
    if align == 1:
        short = tiled(net, tile, 4, align)(x, time)  # a quarter of it is less than the reach: not equal
        assert float(jnp.abs(short - whole).max()) > 1e-3


def test_a_picture_within_one_tile_is_run_as_it_is():
    net, x, time = network(3), picture(16, 16), jnp.array([3, 70])
    for tile in (16, 32):
        np.testing.assert_array_equal(tiled(net, tile, 4)(x, time), net(x, time))


def test_pooling_networks_are_tiled_at_multiples_of_their_factor():
    def pooling(x, time):
        b, h, w, c = x.shape
        return jnp.repeat(jnp.repeat(x.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4)), 4, 1), 4, 2)

    x, time = picture(48, 40), jnp.array([0, 0])
    np.testing.assert_allclose(tiled(pooling, 16, 6, 4)(x, time), pooling(x, time), atol=1e-6)


@pytest.mark.parametrize(
    "size, tile, overlap, align", [(64, 32, 8, 1), (100, 24, 11, 1), (96, 32, 8, 8), (33, 32, 31, 1)]
)
def test_weights_sum_to_one_and_tiles_cover(size, tile, overlap, align):
    starts, weights = places(size, tile, overlap, align)
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        assert 0 <= start <= size - tile and start % align == 0
        total[start : start + tile] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    assert (weights >= 0).all() and np.diff(starts).max() <= tile - overlap
    assert np.diff(starts).min() > 0  # no tile is run twice


def test_weights_rise_evenly_in_the_middle_half_of_an_overlap():
    starts, weights = places(32, 24, 16, 1)
    rising = np.interp(np.arange(16) + 0.5, [4, 12], [0, 1])
    np.testing.assert_array_equal(starts, [0, 8])
    np.testing.assert_allclose(weights, [[*np.ones(8), *rising[::-1]], [*rising, *np.ones(8)]], atol=1e-12)


def test_no_seam_where_tiles_disagree():
    """A network that answers each tile by its own mean, as a normalisation does: neighbouring pixels stay near."""
    own_mean = lambda x, time: jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)  # noqa: E731
    x = jnp.broadcast_to(jnp.linspace(-1, 1, 96)[None, None, :, None], (1, 96, 96, 3))
    got = np.asarray(tiled(own_mean, 48, 24)(x, jnp.array([0])))
    jump = np.abs(np.diff(got[0, 0, :, 0]))
    assert jump.max() < 2 * (got.max() - got.min()) / 24  # spread over the blend, where a hard seam is all at once
    assert np.abs(np.diff(np.asarray(tiled(own_mean, 48, 0)(x, jnp.array([0])))[0, 0, :, 0])).max() > 3 * jump.max()


def test_the_network_is_traced_for_one_tile():
    """Which bounds what is held: one tile's activations, however many tiles there are."""
    shapes = set()

    def net(x, time):
        shapes.add(x.shape)
        return x[..., :3].astype(jnp.bfloat16)

    got = jax.eval_shape(tiled(net, 16, 4), picture(128, 64), jnp.array([0, 0]))
    assert shapes == {(2, 16, 16, 4)} and got.dtype == jnp.float32  # overlaps are added up in full


@pytest.mark.parametrize("tile, overlap, words", [
    (0, 0, "tile=0 must be"), (12, 3, "tile=12 must be a multiple of the network's 8"), (16, -1, "overlap=-1 must be"),
    (16, 9, "overlap=9 must be at most 8 with tile=16"), (16.0, 4, "tile=16.0 must be a whole number"),
])  # fmt: skip
def test_mistakes_are_named(tile, overlap, words):
    with pytest.raises(UserError, match=words):
        tiled(network(1), tile, overlap, 8)
    check_tiles(16, 8, 8)  # tiles that advance by just the network's factor
    for height, width in ((40, 44), (8, 40)):
        with pytest.raises(UserError, match=f"{height} x {width} pixels cannot be cut into tiles of 16"):
            tiled(network(1), 16, 4, 8)(picture(height, width), jnp.array([0, 0]))
