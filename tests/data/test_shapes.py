"""The shapes world: pictures and captions agree, splits hold, and `parse` inverts the grammar."""

import itertools
import math
import pickle
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip_jax.data.shapes import (
    HELD_OUT,
    PAIRS,
    Claim,
    Object,
    Scene,
    Shapes,
    Thing,
    describe,
    is_held_out,
    parse,
    prompts,
    render,
    sample_scene,
)
from unclip_jax.data.shapes_parse import PHRASES
from unclip_jax.data.shapes_world import BACKGROUNDS, COLOURS, RADII, SHAPES
from unclip_jax.errors import UserError


def scenes(n, held_out=False, seed=1):
    """n scenes, each with a caption and its claim."""
    rng = Random(seed)
    for _ in range(n):
        scene = sample_scene(rng, held_out)
        yield scene, *describe(scene, rng)


def holds(claim, scene):
    """Whether some matching of things to objects makes every claim true, from the scene's own numbers."""
    if len(claim.things) != len(scene.objects) or claim.background not in (None, scene.background):
        return False
    return any(_matches(claim, objects) for objects in itertools.permutations(scene.objects))


def _matches(claim, objects):
    for t, o in zip(claim.things, objects, strict=True):
        if t.shape not in (None, o.shape) or t.colour not in (None, o.colour) or t.size not in (None, o.size):
            return False
        far = 0.25 * (1 - 2 * o.r - 0.06) if len(objects) == 1 else 0.05  # half of the room to one side
        words = (t.position or "").split()
        if "center" in words and (abs(o.x - 0.5) > far or abs(o.y - 0.5) > far):
            return False
        if "left" in words and o.x > 0.5 - far or "right" in words and o.x < 0.5 + far:
            return False
        if "top" in words and o.y > 0.5 - far or "bottom" in words and o.y < 0.5 + far:
            return False
    for subjects, word, others in claim.relations:
        for a, b in itertools.product(subjects, others):
            along = {"left": "x", "right": "x", "above": "y", "below": "y"}[word]
            offset = getattr(objects[a], along) - getattr(objects[b], along)
            if (offset < 0) != (word in ("left", "above")):
                return False
    return True


def test_captions_are_true_and_parse_inverts_them():
    for held_out in (False, True):
        for scene, caption, claim in scenes(600, held_out):
            assert parse(caption) == claim, caption
            assert holds(claim, scene), (caption, scene)
            assert caption == caption.lower() and len(caption.split()) <= 48


def test_a_claim_of_another_scene_rarely_holds():
    drawn = list(scenes(300))
    assert sum(holds(claim, drawn[k - 1][0]) for k, (_, _, claim) in enumerate(drawn)) < 15


def test_splits_keep_the_rule():
    assert set(HELD_OUT) == {("star", "red"), ("square", "orange"), ("cross", "green"), ("triangle", "cyan"),
                             ("circle", "blue"), ("ring", "purple")}
    assert len(PAIRS) == 36 and not set(PAIRS) & set(HELD_OUT)
    for split in ("train", "test", "heldout"):
        for i in range(500):
            held = [is_held_out(o.shape, o.colour) for o in Shapes(split).scene(i).objects]
            assert any(held) == (split == "heldout")


def test_records_depend_on_seed_split_and_index_alone():
    a, b = Shapes("train", 32), pickle.loads(pickle.dumps(Shapes("train", 32)))
    record = a[7]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    for i in (0, 7, 123456, 7, np.int64(7)):
        np.testing.assert_array_equal(a[i]["image"], b[i]["image"])
        assert a[i]["caption"] == b[i]["caption"] == Shapes("train", 64)[i]["caption"]
    others = [Shapes("test"), Shapes("heldout"), Shapes("train", seed=1)]
    assert len({repr(s.scene(7)) for s in [a, *others]}) == 4
    assert len({repr(a.scene(i)) for i in range(1000)}) == 1000


def test_misuse_is_told():
    for wrong, message in (({"split": "trian"}, "trian"), ({"size": 8}, "size=8"),
                           ({"length": 0}, "length=0"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(UserError, match=message):
            Shapes(**wrong)
    with pytest.raises(IndexError):
        Shapes(length=5)[5]
    with pytest.raises(UserError, match="kind"):
        prompts("three", False, 1)
    assert len(Shapes(length=5)) == 5


def test_shares_of_counts_colours_and_omissions():
    drawn = list(scenes(3000))
    counts = np.bincount([len(s.objects) for s, _, _ in drawn], minlength=4)[1:] / len(drawn)
    np.testing.assert_allclose(counts, (0.45, 0.40, 0.15), atol=0.03)
    objects = [o for s, _, _ in drawn for o in s.objects]
    for k, names in (("colour", COLOURS), ("shape", SHAPES)):
        assert {getattr(o, k) for o in objects} == set(names)
    partial = np.mean([any(not (t.shape and t.colour) for t in c.things) for _, _, c in drawn])
    assert 0.05 < partial < 0.11


def test_at_least_a_hundred_thousand_captions():
    # Pairs of equal draws estimate the sum of p^2, whose inverse is at most the number of captions.
    rng = Random(2)
    captions = [describe(sample_scene(rng, count=3), rng)[0] for _ in range(3000)]
    equal = sum(n * (n - 1) / 2 for n in np.unique(captions, return_counts=True)[1])
    assert 3000 * 2999 / 2 / (equal + 3) > 100_000


def test_objects_are_apart_and_inside():
    for scene, _, _ in scenes(800):
        for o in scene.objects:
            assert 0.029 < min(o.x, o.y) - o.r and max(o.x, o.y) + o.r < 0.971
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.r - b.r > 2 / 32


def test_sizes_are_apart():
    for sizes in RADII.values():
        radii = sorted(sizes.values())
        assert all(b * 0.97 > a * 1.03 * 1.15 for a, b in itertools.pairwise(radii))


AREAS = {  # by plane geometry, in units of r^2
    "circle": math.pi,
    "ring": math.pi * (1 - 0.52**2),
    "square": (2 * 0.88) ** 2,
    "cross": 2 * (2 * 0.68) - 0.68**2,
    "triangle": 2 * 1.8 / 2,
    "star": 10 * 0.5 * 1.05 * (0.45 * 1.05) * math.sin(math.pi / 5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 200])
def test_rendered_area_is_the_shape_s(shape, size):
    r = 0.3
    image = render(Scene((Object(shape, "red", "large", 0.52, 0.49, r),), "white"), size).astype(float)
    white, red = np.array(BACKGROUNDS["white"]), np.array(COLOURS["red"])
    share = (white - image)[..., 1] / (white - red)[1]
    assert share.mean() == pytest.approx(AREAS[shape] * r * r, rel=0.03 if size == 32 else 0.012)
    rows, cols = (np.flatnonzero(share.max(axis) > 0.5) for axis in (1, 0))
    for along, centre in ((rows, 0.49), (cols, 0.52)):  # centred, and r to each side or little less
        assert (along[0] + along[-1] + 1) / 2 / size == pytest.approx(centre, abs=1 / size)
        assert 0.86 * 2 * r - 2 / size < (along[-1] + 1 - along[0]) / size < 2 * r + 1.01 / size


def test_rendering_is_antialiased_as_if_by_supersampling():
    for scene, _, _ in itertools.islice(scenes(40), 20, 40):
        fine = render(scene, 512).astype(float).reshape(32, 16, 32, 16, 3).mean((1, 3))
        error = np.abs(render(scene, 32) - fine)
        assert error.mean() < 1.0 and np.quantile(error, 0.999) < 100


@pytest.mark.parametrize("caption, things, relations, background", [
    ("a red circle", [("circle", "red")], (), None),
    ("A Red Circle.", [("circle", "red")], (), None),
    ("red disk", [("circle", "red")], (), None),
    ("a red circle above a blue square", [("circle", "red"), ("square", "blue")],
     (((0,), "above", (1,)),), None),
    ("a red circle on top of a blue square", [("circle", "red"), ("square", "blue")],
     (((0,), "above", (1,)),), None),
    ("The red circle is under the blue square", [("circle", "red"), ("square", "blue")],
     (((0,), "below", (1,)),), None),
    ("a red star left of a red ring", [("star", "red"), ("ring", "red")], (((0,), "left", (1,)),), None),
    ("two red circles", [("circle", "red")] * 2, (), None),
    ("2 red circles on a grey background", [("circle", "red")] * 2, (), "gray"),
    ("three yellow rings", [("ring", "yellow")] * 3, (), None),
    ("two objects: a red star, a blue ring", [("star", "red"), ("ring", "blue")], (), None),
    ("two stars side by side", [("star", None)] * 2, (((0,), "left", (1,)),), None),
    ("a large green star on a black background", [("star", "green", "large")], (), "black"),
    ("there is a small blue star in the top left corner", [("star", "blue", "small", "top left")], (), None),
    ("in the centre, a huge thing", [(None, None, "large", "center")], (), None),
    ("a shape that is red", [(None, "red")], (), None),
    ("a yellow cross to the left of a purple triangle, and a red circle below them",
     [("cross", "yellow"), ("triangle", "purple"), ("circle", "red")],
     (((0,), "left", (1,)), ((2,), "below", (0, 1))), None),
    ("two red circles above a blue square", [("circle", "red")] * 2 + [("square", "blue")],
     (((0, 1), "above", (2,)),), None),
])
def test_parse_reads_what_people_write(caption, things, relations, background):
    assert parse(caption) == Claim(tuple(Thing(*t) for t in things), relations, background)


@pytest.mark.parametrize("caption, message", [
    ("a red dog", "'dog'"), ("a pink circle", "'pink'"), ("a red cirle", "did you mean 'circle'"),
    ("a black circle", "'black'.*backgrounds only"), ("", "0 objects"), ("a red", "ends before"),
    ("a red circle above", "ends before"), ("above a red circle", "needs an object"),
    ("four circles", "'four'"), ("two circles and two stars", "4 objects"),
    ("a red blue circle", "two words of colour"),
    ("three objects: a star and a ring", "announces 3"), ("a star below them", "refers to nothing"),
    ("a medium star and a ring", "'medium'"), ("two circle", "number"),
])
def test_parse_names_what_is_wrong(caption, message):
    with pytest.raises(ValueError, match=message):
        parse(caption)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(PHRASES)), max_size=9))
def test_parse_answers_or_raises_value_error_for_any_words(words):
    try:
        claim = parse(" ".join(words))
    except ValueError:
        return
    assert 1 <= len(claim.things) <= 3
    n = len(claim.things)
    assert all(0 <= k < n for a, _, b in claim.relations for k in (*a, *b))


@pytest.mark.parametrize("kind, count", [("one", 1), ("two", 2)])
@pytest.mark.parametrize("heldout", [False, True])
def test_prompts(kind, count, heldout):
    texts = prompts(kind, heldout, 100, seed=3)
    assert texts == prompts(kind, heldout, 100, seed=3) != prompts(kind, heldout, 100, seed=4)
    assert texts[:40] == prompts(kind, heldout, 40, seed=3) and len(set(texts)) == 100
    for text in texts:
        things = parse(text).things
        assert len(things) == count and all(t.shape and t.colour for t in things)
        assert any(is_held_out(t.shape, t.colour) for t in things) == heldout
