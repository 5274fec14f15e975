"""The UNet: shapes, its start at zero, and what reaches what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run, with_initial
from unclip_jax.models.unet import UNet, fold, unfold

SIZES = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8, groups=4)
TIME = np.array([3, 800])
MASK = np.array([[True, True, False], [True, False, False]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, EMB, CONTEXT = normal(2, 8, 8, 3), normal(2, 32, seed=1), normal(2, 3, 5, seed=2)


@pytest.fixture(scope="module")
def net():
    """(module, parameters), with attention at 4x4 and in the middle."""
    module = UNet(**SIZES)
    return module, draw(module, X, TIME, EMB, CONTEXT, MASK)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_fold_takes_blocks_in_reading_order_and_unfold_inverts_it(patch):
    x = np.arange(2 * 8 * 4 * 3).reshape(2, 8, 4, 3)
    folded = np.asarray(fold(x, patch))
    assert folded.shape == (2, 8 // patch, 4 // patch, 3 * patch**2)
    np.testing.assert_array_equal(folded[1, 1, 0], x[1, patch : 2 * patch, :patch].reshape(-1))
    np.testing.assert_array_equal(unfold(folded, patch), x)


@pytest.mark.parametrize(
    ("over", "size"),
    [
        ({}, (8, 8)),
        ({"patch": 2}, (16, 8)),
        ({"patch": 4, "outer": 8}, (8, 16)),
        ({"multipliers": (1, 1, 2), "scale_shift": False}, (8, 12)),
    ],
)
@pytest.mark.parametrize("out_channels", [3, 6])
def test_output_has_the_size_of_the_input(over, size, out_channels):
    net = UNet(**{**SIZES, **over}, out_channels=out_channels)
    args = (jnp.zeros((2, *size, 3)), TIME, EMB, CONTEXT, MASK)
    out = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), *args)[0])
    assert out.shape == (2, *size, out_channels) and out.dtype == jnp.float32


def test_starts_at_zero(net):
    module, p = net
    args = (X, TIME, EMB, CONTEXT, MASK)
    assert (run(module, with_initial(p, "out", module, *args), *args) == 0).all()


def test_masked_context_has_no_influence(net):
    module, p = net
    a, b = (run(module, p, X, TIME, EMB, c, MASK) for c in (CONTEXT, np.where(MASK[..., None], CONTEXT, 9)))
    np.testing.assert_array_equal(a, b)
    seen = run(module, p, X, TIME, EMB, np.where(MASK[..., None], 9, CONTEXT).astype(np.float32), MASK)
    assert (a != seen).mean() > 0.99


def test_no_mask_is_a_mask_of_all(net):
    module, p = net
    a, b = (run(module, p, X, TIME, EMB, CONTEXT, mask) for mask in (None, np.ones_like(MASK)))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_samples_of_a_batch_are_independent(net):
    module, p = net
    one = run(module, p, X, TIME, EMB, CONTEXT, MASK)
    others = [np.concatenate([a[:1], np.ones_like(a[1:])]) for a in (X, TIME, EMB, CONTEXT, MASK)]
    other = run(module, p, *others)
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1] != other[1]).all()


def test_every_input_is_seen(net):
    module, p = net
    args = (X, TIME, EMB, CONTEXT, MASK)
    base = run(module, p, *args)
    for i, other in enumerate((-X, TIME + 1, -EMB, -CONTEXT, ~MASK)):
        assert (run(module, p, *args[:i], other, *args[i + 1 :]) != base).mean() > 0.99, i


def test_attention_stands_at_its_resolutions_and_in_the_middle(net):
    assert sorted(n for n in net[1] if "attn" in n) == ["down1_attn0", "mid_attn", "up1_attn0", "up1_attn1"]
    without = UNet(**{**SIZES, "attention": ()})
    assert not [n for n in draw(without, X, TIME) if "attn" in n]


def test_without_attention_it_runs_at_any_size():
    """As the upsamplers do, which train on crops."""
    net = UNet(**{**SIZES, "attention": ()})
    small, large = (draw(net, np.zeros((1, size, size, 3)), TIME[:1]) for size in (8, 32))
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, large)


def test_the_outer_level_sees_pixels_alike_wherever_they_lie():
    """A spot moved by one pixel moves what the outer level makes of it; folded blocks of 4 pixels know no such move."""
    net = UNet(**{**SIZES, "attention": ()}, patch=4, outer=8)
    spot = np.zeros((1, 32, 32, 3), np.float32)
    spot[:, 13:17, 13:17] = normal(1, 4, 4, 3)
    moved = np.roll(spot, 1, axis=2)
    p = draw(net, spot, TIME[:1])
    alone = {**p, "outer_in": jax.tree.map(np.zeros_like, p["outer_in"])}
    for params, alike in ((alone, True), (p, False)):
        a, b = (run(net, params, x, TIME[:1])[:, 8:24, 8:24] for x in (spot, moved))
        error = np.abs(np.roll(a, 1, axis=2)[:, :, 1:] - b[:, :, 1:]).max() / np.abs(a).max()
        assert (error < 1e-4) == alike, error


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="image 6x8 must be divisible by 4"):
        jax.eval_shape(lambda: UNet(**SIZES, patch=2).init(jax.random.key(0), jnp.zeros((1, 6, 8, 3)), TIME[:1]))


def test_positions_are_a_vector_for_every_folded_place():
    """Far from the edges an even picture is even without them, and not with them."""
    net = UNet(**{**SIZES, "attention": ()}, patch=2, positions=True)
    even = np.full((1, 128, 128, 3), 0.3, np.float32)
    p = draw(net, even, TIME[:1])
    assert p["positions"].shape == (64, 64, SIZES["channels"])
    for params, alike in ((p, False), ({**p, "positions": np.zeros_like(p["positions"])}, True)):
        inner = run(net, params, even, TIME[:1])[0, 60:68, 60:68].reshape(2, 4, 2, 4, -1)
        assert (np.ptp(inner, axis=(0, 2)).max() < 1e-4) == alike
