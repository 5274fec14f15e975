"""The oracle says right to what is right and wrong to everything else."""

import dataclasses
import itertools
from random import Random

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.shapes import Object, Scene, Shapes, describe, render, sample_scene
from unclip_jax.data.shapes_world import BACKGROUNDS, COLOURS, SHAPES
from unclip_jax.metrics.shapes_oracle import Seen, components, in_place, read, score, size_class


def enlarged(image, size):
    """By cubic interpolation, as an upsampler's input would be."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("split", ["train", "test", "heldout"])
@pytest.mark.parametrize("size, shown", [(32, 32), (64, 64), (32, 64), (128, 128)])
def test_true_pictures_are_right_and_other_captions_wrong(split, size, shown):
    n = 120 if shown < 128 else 20
    source = Shapes(split, size, seed=5)
    right = wrong = 0
    for i in range(n):
        picture = source[i]["image"]
        reading = read(enlarged(picture, shown) if shown != size else picture)
        right += score(reading, source[i]["caption"])["right"]
        wrong += score(reading, source[n + i]["caption"])["right"]
        objects = source.scene(i).objects
        for seen in reading.objects:
            assert min(abs(o.x - seen.x) + abs(o.y - seen.y) + abs(o.r - seen.r) for o in objects) < 0.02
    assert right >= 0.99 * n
    assert wrong <= 0.05 * n  # a few are true by chance: "we see a circle"


def test_reading_withstands_blur_and_noise():
    source, rng, right = Shapes("train", 32, seed=6), np.random.default_rng(0), 0
    for i in range(100):
        picture = source[i]["image"].astype(float)
        padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge")
        picture = sum(padded[1 + a : 33 + a, 1 + b : 33 + b] * (0.7, 0.15)[a != 0] * (0.7, 0.15)[b != 0]
                      for a in (-1, 0, 1) for b in (-1, 0, 1))
        picture = np.clip(picture + rng.normal(0, 15, picture.shape), 0, 255).astype(np.uint8)
        right += score(picture, source[i]["caption"])["right"]
    assert right >= 98


RED = Object("circle", "red", "small", 0.3, 0.3, 0.135)
BLUE = Object("square", "blue", "large", 0.35, 0.7, 0.205)
CAPTION = "a small red circle above a large blue square on white"


def test_every_claim_is_judged_by_itself():
    def failed(*objects, background="white", caption=CAPTION):
        verdict = score(render(Scene(objects, background), 32), caption)
        assert verdict["right"] == all(v for k, v in verdict.items() if k != "right")
        return {k for k, v in verdict.items() if not v} - {"right"}

    change = dataclasses.replace
    assert failed(RED, BLUE) == failed(BLUE, RED) == set()
    assert failed(change(RED, colour="orange"), BLUE) == {"colour"}
    assert failed(change(RED, shape="ring"), BLUE) == {"shape"}
    assert failed(change(RED, r=0.205), BLUE) == {"size"}
    assert failed(RED, BLUE, background="beige") == {"background"}
    assert failed(change(RED, y=0.75), change(BLUE, y=0.3)) == {"relation"}
    assert failed(change(RED, x=0.2, y=0.5), change(BLUE, x=0.7, y=0.5)) == {"relation"}
    assert failed(RED, BLUE, change(RED, x=0.8)) == {"count"}
    for one in ("a red circle", "a blue square"):
        assert failed(RED, BLUE, caption=one) == {"count"}
    assert failed(RED) >= {"count", "colour", "shape", "relation"}
    assert failed(change(RED, colour="blue"), change(BLUE, colour="red")) == {"colour"}  # binding, not a bag
    corner = Object("star", "cyan", "small", 0.2, 0.2, 0.15)
    assert failed(corner, caption="a star in the top left corner") == set()
    assert failed(corner, caption="a star in the center") == {"position"}
    assert failed(change(corner, x=0.8), caption="a star in the top left corner") == {"position"}
    inside = change(corner, x=0.42, y=0.42)  # of the middle still
    assert failed(inside, caption="a star in the top left corner") == {"position"}
    assert failed(inside, caption="a star in the center") == set()
    assert failed(corner, caption="a star") == failed(corner, caption="a cyan shape") == set()
    assert set(score(render(Scene((corner,), "white"), 32), "a star")) == {"count", "shape", "right"}


@pytest.mark.parametrize(
    ("alone", "x", "y", "r", "held"),
    [
        (True, 0.3, 0.5, 0.15, {"left"}),  # of the room of 0.32 to either side by more than a half
        (True, 0.37, 0.63, 0.15, {"center"}),
        (True, 0.7, 0.7, 0.15, {"right", "bottom"}),
        (True, 0.4, 0.55, 0.33, {"left"}),  # the larger, the less room there is
        (True, 0.45, 0.45, 0.33, {"center"}),
        (True, 0.4, 0.5, 0.49, {"left"}),  # no room at all, and yet it is on the left
        (False, 0.46, 0.54, 0.15, {"center"}),  # of the picture's half: beyond a tenth it is at a side
        (False, 0.44, 0.6, 0.15, {"left", "bottom", "center"}),
        (False, 0.65, 0.36, 0.1, {"right", "top", "center"}),  # and up to 0.35 in the middle
        (False, 0.7, 0.5, 0.1, {"right"}),
    ],
)
def test_where_an_object_is_alone_and_among_others(alone, x, y, r, held):
    places, seen = ("left", "right", "top", "bottom", "center"), Seen("ring", "red", x, y, r, 1.0)
    assert {place for place in places if in_place(seen, place, alone)} == held


def test_sizes_are_told_apart_by_ratio():
    """Between 0.15, 0.23 and 0.33 at the geometric means, 0.186 and 0.275."""
    assert [size_class(r, 1) for r in (0.184, 0.187, 0.274, 0.277)] == ["small", "medium", "medium", "large"]


def test_all_shapes_and_colours_are_told_apart_at_the_smallest_size():
    for k, (shape, colour) in enumerate((s, c) for s in SHAPES for c in COLOURS):
        background = ("white", "black", "gray", "beige")[k % 4]
        scene = Scene((Object(shape, colour, "small", 0.41 + 0.003 * k, 0.52, 0.125),), background)
        (seen,) = read(render(scene, 32)).objects
        assert (seen.shape, seen.colour, read(render(scene, 32)).background) == (shape, colour, background)
        assert seen.r == pytest.approx(0.125, rel=0.02)


def test_garbage_is_not_right():
    rng = np.random.default_rng(0)
    blank = np.full((32, 32, 3), 255, np.uint8)
    assert read(blank).objects == () and read(blank).background == "white"
    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pink = np.full((32, 32, 3), (255, 60, 200), np.uint8)
    bar = blank.copy()
    bar[14:17, 3:29] = COLOURS["red"]
    (seen,) = read(bar).objects
    assert (seen.shape, seen.colour) == (None, "red")
    blobs = []
    for ground, other in itertools.permutations(BACKGROUNDS, 2):  # no colours of objects, but to be seen
        if (ground, other) == ("white", "beige"):
            continue  # passes for yellow at less than half its strength, which is overlooked
        blobs.append(np.full((32, 32, 3), BACKGROUNDS[ground], np.uint8))
        blobs[-1][10:20, 10:20] = BACKGROUNDS[other]
        (seen,) = read(blobs[-1]).objects
        assert None in (seen.shape, seen.colour)
    assert read(pink).background is None
    for garbage in (blank, noise, pink, bar, *blobs):
        for caption in ("a red circle", "a blue square and a red star", "a ring"):
            assert not score(garbage, caption)["right"]


def painted(colour, height, width, ground=(255, 255, 255)):
    """A rectangle in the middle of 32 x 32 pixels."""
    picture = np.full((32, 32, 3), ground, np.uint8)
    top, left = (32 - height) // 2, (32 - width) // 2
    picture[top : top + height, left : left + width] = colour
    return picture


def test_what_is_too_small_or_too_weak_to_be_an_object():
    """Fewer than 6 of 32 x 32 pixels; less than half of any colour's strength."""
    red = COLOURS["red"]
    assert [len(read(painted(red, *size)).objects) for size in ((1, 5), (2, 2), (2, 3), (3, 3))] == [0, 0, 1, 1]
    for (name, colour), ground in itertools.product(COLOURS.items(), BACKGROUNDS.values()):
        for strength, seen in ((0.45, []), (0.6, [name])):
            mixed = (strength * np.array(colour) + (1 - strength) * np.array(ground)).round()
            assert [s.colour for s in read(painted(mixed, 12, 12, ground)).objects] == seen


def test_an_object_is_seen_on_a_ground_of_a_colour_of_objects():
    """Which is no background of the world, and no object either."""
    names = list(COLOURS)
    for ground, name in zip(names, names[1:] + names[:1], strict=True):
        reading = read(painted(COLOURS[name], 12, 12, COLOURS[ground]))
        assert [(s.shape, s.colour) for s in reading.objects] == [("square", name)] and reading.background is None


def test_a_rectangle_that_is_no_square_is_no_shape():
    read_as = [read(painted(COLOURS["red"], height, 20)).objects[0].shape for height in (8, 10, 18, 20)]
    assert read_as == [None, None, "square", "square"]


def test_a_stray_blob_is_an_extra_object():
    source, caught = Shapes("test", 32), 0
    for i in range(60):
        picture = source[i]["image"].copy()
        ground = (picture == picture[0, 0]).all(-1)
        free = np.lib.stride_tricks.sliding_window_view(ground, (9, 9)).all((2, 3))
        y, x = np.argwhere(free)[i % free.sum()] + 2
        picture[y : y + 5, x : x + 5] = list(COLOURS.values())[i % 7]
        caught += not score(picture, source[i]["caption"])["count"]
    assert caught == 60


def test_a_fringe_of_another_colour_is_part_of_its_object_and_a_patch_is_not():
    picture = render(Scene((Object("square", "red", "large", 0.5, 0.5, 0.33),), "white"), 32)
    picture[8:24, 25:27] = COLOURS["purple"]
    assert [(s.shape, s.colour) for s in read(picture).objects] == [("square", "red")]
    picture[8:24, 25:29] = COLOURS["purple"]
    assert len(read(picture).objects) == 2


def flood(classes):
    """Regions by flood fill, as a set of frozen sets of pixels."""
    left, regions = {tuple(p) for p in np.argwhere(classes)}, set()
    while left:
        stack = [left.pop()]
        region = set(stack)
        while stack:
            y, x = stack.pop()
            for near in ((y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                if near in left and classes[near] == classes[y, x]:
                    left.discard(near)
                    region.add(near)
                    stack.append(near)
        regions.add(frozenset(region))
    return regions


@pytest.mark.parametrize("seed", range(6))
def test_components_against_flood_fill(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (9 + seed, 13)) * (rng.random((9 + seed, 13)) < 0.3 + 0.1 * seed)
    labels = components(classes)
    assert {frozenset(map(tuple, np.argwhere(labels == k))) for k in range(1, labels.max() + 1)} == flood(classes)
    assert (labels > 0).tolist() == (classes > 0).tolist()


def test_more_objects_than_captions_can_name():
    spots = [(x, y) for x in (0.15, 0.38, 0.61, 0.84) for y in (0.2, 0.5, 0.8)]
    scene = Scene(tuple(Object("circle", "red", "small", x, y, 0.1) for x, y in spots), "black")
    assert len(read(render(scene, 64)).objects) == 12
    assert score(render(scene, 64), "three red circles") == {
        "count": False, "colour": True, "shape": True, "right": False}
    star = Object("star", "cyan", "small", *spots[5], 0.08)  # smaller than four of the others, and found
    some = Scene((*scene.objects[:4], star), "black")
    assert score(render(some, 64), "a cyan star") == {"count": False, "colour": True, "shape": True, "right": False}


def test_a_claim_will_do_for_a_caption_and_wrong_pictures_are_told():
    rng = Random(3)
    scene = sample_scene(rng)
    caption, claim = describe(scene, rng)
    picture = render(scene, 32)
    assert score(picture, claim) == score(picture, caption) and score(picture, claim)["right"]
    with pytest.raises(ValueError, match="uint8"):
        read(picture / 255.0)
    for least in (picture[:, :20], picture[:15, :15]):
        with pytest.raises(ValueError, match="must be .S, S, 3. with S at least 16"):
            read(least)
    assert read(np.full((16, 16, 3), 255, np.uint8)).background == "white"
