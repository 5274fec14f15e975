"""Holes: how often and how large they come in training, and what stays of a given one at another size."""

import jax
import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.images import center_crop_resize, to_float
from unclip_jax.data.masks import KINDS, known_at, random_holes, square_hole


def test_training_holes_are_of_all_kinds_at_their_rates():
    n, size = 600, 16
    holes = np.asarray(jax.jit(lambda rng: random_holes(rng, n, size))(jax.random.key(0)))
    assert holes.shape == (n, size, size) and holes.dtype == bool and sum(KINDS.values()) == pytest.approx(1)
    share = holes.mean((1, 2))
    boxes = []
    for hole in holes:
        rows, cols = hole.any(1), hole.any(0)
        boxes.append((hole == rows[:, None] & cols[None]).all() and 0 < hole.mean() < 1)
    for found, rate in (((share == 1), KINDS["all"]), ((share == 0), KINDS["none"]), (np.array(boxes), KINDS["box"])):
        assert abs(found.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / n) + 0.02  # a stroke may be a box, rarely
    partial = share[(share > 0) & (share < 1)]
    assert partial.min() < 0.05 and partial.max() > 0.6 and len(np.unique(partial)) > 40


@pytest.mark.parametrize("size", [2, 4, 5, 7, 8])
def test_a_pixel_is_in_the_hole_if_it_takes_anything_from_there(size):
    hole = np.zeros((8, 12), bool)
    hole[3, 2:4] = True  # of the middle square's columns 2 … 10, the first two
    hole[7, 9] = True
    image = np.full((8, 12, 3), 100, np.uint8)
    other = np.where(hole[..., None], np.uint8(255), image)
    small, changed = (center_crop_resize(Image.fromarray(x), size) for x in (image, other))
    np.testing.assert_array_equal(square_hole(hole, size), (small != changed).any(-1))


@pytest.mark.parametrize(("side", "size"), [(1024, 16), (4096, 64), (1000, 7)])
def test_a_hole_of_one_pixel_is_not_lost(side, size):
    hole = np.zeros((side, side), bool)
    hole[side // 3, side - 1] = True
    assert square_hole(hole, size).sum() == 1


def test_a_hole_is_enlarged_with_its_picture():
    hole = np.random.default_rng(0).integers(0, 2, (4, 4)).astype(bool)
    np.testing.assert_array_equal(square_hole(hole, 8), hole.repeat(2, 0).repeat(2, 1))


def test_what_a_stage_is_told():
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    hole = np.zeros((2, 8, 8), bool)
    hole[1, :4] = True
    told = known_at(image, hole, 4)
    means = image.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(told["known"] - to_float(means)).max() < 1 / 127
    np.testing.assert_array_equal(told["keep"][..., 0], [np.ones((4, 4)), np.repeat([[0], [0], [1], [1]], 4, 1)])
    assert told["keep"].dtype == told["known"].dtype == np.float32
    assert known_at(image, None, 8).keys() == {"known"}
