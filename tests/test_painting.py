"""inpaint, from Python and from the command line: what stays to the bit, what a hole may be, and every mistake."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from tests.test_cli import files, load_once, run, stack  # noqa: F401 (fixtures)
from unclip_jax import painting
from unclip_jax.data.images import center_crop_resize, to_float
from unclip_jax.data.masks import square_hole
from unclip_jax.errors import UserError
from unclip_jax.runner import Drawn

SIDE = 32  # of the tiny stack's pictures


@pytest.fixture(scope="module")
def pipe():
    return load_once(str(tiny_stack.path()))


def photo(height=40, width=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def hole_of(image, y0, y1, x0, x1):
    hole = np.zeros(image.shape[:2], bool)
    hole[y0:y1, x0:x1] = True
    return hole


@pytest.fixture(scope="module")
def painted(pipe):
    """Two pictures, each with a hole of its own, twice."""
    images = [photo(), photo(SIDE, SIDE, 1)]
    holes = [hole_of(images[0], 10, 30, 12, 30), hole_of(images[1], 5, 20, 0, 9)]
    prompts = ["a red circle", "two rings"]
    return images, holes, prompts, pipe.inpaint(images, holes, prompts, 7, num=2, return_stages=True)


def test_outside_the_hole_the_given_picture_stays_to_the_bit(painted):
    images, holes, _, drawn = painted
    assert drawn.images.shape == (4, SIDE, SIDE, 3) and drawn.images.dtype == np.uint8
    for k in range(4):
        square = center_crop_resize(Image.fromarray(images[k // 2]), SIDE)
        changed = (drawn.images[k] != square).any(-1)
        if k >= 2:  # of the output's size: the hole as it was given
            assert not changed[~holes[1]].any() and changed[holes[1]].mean() > 0.9
        else:  # 48 x 40 pixels: the middle 40, brought to 32
            inside = np.zeros((SIDE, SIDE), bool)
            inside[int(10 * 0.8) : int(30 * 0.8), int((12 - 4) * 0.8) : int(np.ceil((30 - 4) * 0.8))] = True
            assert not changed[~inside].any() and changed[inside].mean() > 0.8
    assert (drawn.images[0] != drawn.images[1]).any()


def test_a_picture_does_not_depend_on_the_others(pipe, painted):
    images, holes, prompts, drawn = painted
    alone = pipe.inpaint([Image.fromarray(images[0])], [Image.fromarray(holes[0])], prompts[:1], 7, num=1)
    assert np.abs(alone[0].astype(int) - drawn.images[0]).max() <= 1


def test_the_prior_is_led_to_the_given_picture(pipe, painted):
    """Of the embeddings drawn for a prompt the nearest to what CLIP sees in the picture is taken."""
    images, holes, prompts, drawn = painted
    filled = painting._filled(images, holes)
    near = pipe.embed_images(filled).repeat(2, 0)
    free = pipe.generate(prompts, 7, num=2, candidates=painting.CANDIDATES, return_stages=True)
    led, unled = ((made.z_img * near).sum(1) for made in (drawn, free))
    assert (led >= unled - 1e-4).all() and (led > unled + 1e-3).any()


def test_without_a_prompt_clip_sees_the_whole_picture(pipe, painted):
    images, holes, _, _ = painted
    given = pipe._given(images, holes, None, 8, False)
    np.testing.assert_array_equal(given["image"], pipe._look(images)["image"])


def test_a_stack_that_cannot_look_at_pictures_paints_from_prompts_with_the_candidates_of_its_own(pipe, painted):
    """There is no embedding to come near to; and one without a prior paints without prompts only."""
    images, holes, prompts, _ = painted
    clip = pipe.tasks["clip"]
    clip = dataclasses.replace(clip, model=clip.model.clone(vision=None))
    blind = dataclasses.replace(pipe, tasks={**pipe.tasks, "clip": clip})
    assert blind.painting_settings({}, True)["prior"] == blind.settings()["prior"]
    assert blind._given(images, holes, prompts, 8, False).keys() == {"tokens", "mask"}
    without = dataclasses.replace(pipe, tasks={k: v for k, v in pipe.tasks.items() if not k.startswith("prior")})
    with pytest.raises(UserError, match="no prior, so it cannot draw from prompts. Fix: give no prompt"):
        without.inpaint(images, holes, prompts)


def test_what_is_cut_out_is_not_seen(pipe, painted):
    images, holes, prompts, drawn = painted
    hidden = [np.where(hole[..., None], 255 - image, image) for image, hole in zip(images, holes, strict=True)]
    inside = holes[1]
    assert (hidden[1] != images[1]).any()
    again = pipe.inpaint(hidden, holes, prompts, 7, num=2)
    np.testing.assert_array_equal(again[2:][:, inside], drawn.images[2:][:, inside])
    near = [pipe._given(pictures, holes, prompts, 8, False)["near"] for pictures in (images, hidden)]
    np.testing.assert_array_equal(near[0], near[1])  # what the prior is led to
    assert np.abs(near[0] - pipe.embed_images(images)).max() > 0.01
    np.testing.assert_array_equal(painting._filled(images[:1], [np.ones((40, 48), bool)])[0], images[0])  # no outside
    for image, hole, filled in zip(images, holes, painting._filled(hidden, holes), strict=True):
        np.testing.assert_array_equal(filled[~hole], image[~hole])
        for y, x in np.argwhere(hole)[::37]:
            rows, columns = np.nonzero(~hole)
            apart = (rows - y) ** 2 + (columns - x) ** 2
            near = apart == apart.min()
            assert (filled[y, x] == image[rows[near], columns[near]]).all(-1).any()


@pytest.mark.slow
def test_prompt_strength_and_resampling_count(pipe, painted):
    images, holes, prompts, drawn = painted
    for change in ({"resample": 1}, {"strength": 0.5}, {"guidance": 6.0}):
        other = pipe.inpaint(images, holes, prompts, 7, num=2, **change)
        assert np.abs(other.astype(int) - drawn.images).mean() > 0.1, change
    assert (pipe.inpaint(images, holes, prompts[::-1], 7, num=2) != drawn.images).any()


def test_image_to_image_needs_no_prompt_and_stays_near_at_a_weak_strength(pipe):
    image = center_crop_resize(Image.fromarray(photo()), SIDE)

    def apart(strength):
        drawn = pipe.inpaint([image], None, None, 3, strength=strength, return_stages=True)
        assert drawn.images.shape == (1, SIDE, SIDE, 3)
        return np.abs(drawn.base[0].astype(float) - center_crop_resize(Image.fromarray(image), 16)).mean()

    assert apart(0.01) < 0.8 * apart(1.0)


@pytest.mark.parametrize("learned", [False, True])
def test_how_it_goes_back_and_forth_unless_told(learned, pipe, monkeypatch):
    used, tasks = [], {**pipe.tasks, "decoder": dataclasses.replace(pipe.tasks["decoder"], inpaint=learned)}
    pipe, nothing = dataclasses.replace(pipe, tasks=tasks), np.zeros((1, SIDE, SIDE, 3), np.uint8)
    monkeypatch.setattr(type(pipe), "_given", lambda *_: {"tokens": np.zeros((1, 2), int)})

    def draw(self, cond, keys, settings, batch_size, return_stages, progress, known):
        used.append(settings)
        for size in (16, SIDE):  # every stage is led by the picture at its size, outside of the hole at its size
            shown, outside = known(size), ~square_hole(hole[0], size)
            picture = to_float(center_crop_resize(Image.fromarray(square), size))
            np.testing.assert_array_equal(shown["known"], picture[None])
            np.testing.assert_array_equal(shown["keep"], outside[None, ..., None])
        return Drawn(nothing, nothing, None, None)

    monkeypatch.setattr(type(pipe), "_draw", draw)
    hole = [hole_of(photo(), 5, 20, 10, 20)]
    told = {"steps": 3, "jump": 2, "resample": 5, "candidates": 3}
    square, inside = pipe.squares([photo()], SIDE)[0], square_hole(hole[0], SIDE)
    embedded = {name: value for name, value in told.items() if name != "candidates"}
    ring = ["a ring"]
    for prompts, more in ((ring, {"steps": 18}), (ring, {"steps": 5}), (None, embedded), (ring, told)):
        (given,), stages = pipe.inpaint([photo()], hole, prompts, **more), {**more, "return_stages": True}
        np.testing.assert_array_equal(given, np.where(inside[..., None], 0, square))  # whatever was drawn outside
        np.testing.assert_array_equal(pipe.inpaint([photo()], hole, prompts, **stages).images[0], given)
        used.pop()
    ways = [[each["decoder"].get(name) for name in ("jump", "resample", "caption")] for each in used]
    default = 1 if learned else painting.RESAMPLE
    assert ways == [[3, default, None], [1, default, None], [2, 5, False], [2, 5, None]]
    drawn = [each.get("prior", {}).get("candidates") for each in used]
    assert drawn == [painting.CANDIDATES, painting.CANDIDATES, None, 3]


@pytest.mark.parametrize(("change", "words"), [
    ({"holes": [np.zeros((40, 48), np.uint8)]}, "hole 0 is uint8.40, 48.; expected bool.40, 48."),
    ({"holes": [np.ones((48, 40), bool)]}, "hole 0 is bool.48, 40.; expected bool.40, 48."),
    ({"holes": [np.zeros((40, 48), bool)]}, "hole 0 has no pixel in the picture"),
    ({"holes": [hole_of(photo(), 0, 40, 0, 3)]}, "hole 0 has no pixel in the middle square"),
    ({"prompts": ["a", "b"]}, "2 prompts for 1 images"),
    ({"images": None}, "images must be a list"),
    ({"images": [photo().astype(float)]}, "image 0 is float64"),
    ({"strength": 0}, "strength=0 must be above 0"),
    ({"strength": 1.1}, "strength=1.1 must be above 0 and at most 1"),
    ({"resample": 0}, "resample=0 must be a whole number of at least 1"),
    ({"jump": 1.5}, "jump=1.5 must be a whole number"),
    ({"seed": -1}, "seed=-1"),
    ({"stpes": 3}, "did you mean 'steps'"),
    ({"prompts": None, "candidates": 3}, "candidates is of the prior"),
])  # fmt: skip
def test_bad_arguments_are_told_before_anything_runs(pipe, change, words, monkeypatch):
    monkeypatch.setattr(type(pipe), "run", None)
    good = {"images": [photo()], "holes": [hole_of(photo(), 5, 20, 10, 20)], "prompts": ["a ring"]}
    with pytest.raises(UserError, match=words):
        pipe.inpaint(**{**good, **change})


@pytest.fixture
def inputs(tmp_path):
    """A picture, masks, and files that are none, in the folder where commands run."""
    Image.fromarray(photo(SIDE, SIDE)).save(tmp_path / "in.png")
    Image.fromarray(photo(SIDE, SIDE + 8)).save(tmp_path / "wide.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for name, value in (("black", 0), ("white", 255)):
        Image.fromarray(mask + np.uint8(value)).save(tmp_path / f"{name}.png")
    mask[4:12, 6:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:, :20]).save(tmp_path / "narrow.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def drawn_by(folder):
    index = json.loads((folder / "pictures.json").read_text())
    painted = [p for p in index["pictures"] if p["role"] == "painted"]
    return index, [np.asarray(Image.open(folder / p["file"])) for p in painted]


def test_the_command_paints_a_mask_or_a_box(run, stack, inputs):  # noqa: F811
    given = photo(SIDE, SIDE)
    argv = ["inpaint", "in.png", "a red circle", "--model", stack, "--num", 2, "--resample", 2]
    code, out, err = run(*argv, "--mask", "mask.png", "--out", "a")
    assert (code, err) == (0, []) and "3 pictures of 32 x 32 pixels in a" in out
    index, pictures = drawn_by(inputs / "a")
    assert index["pictures"][0]["image"] == "in.png" and index["resample"] == 2
    assert index["settings"]["decoder"]["steps"] == 4
    assert index["settings"]["prior"]["candidates"] == painting.CANDIDATES
    hole = hole_of(given, 4, 12, 6, 20)
    for picture in pictures:
        assert (picture == given)[~hole].all() and (picture != given).any(-1)[hole].mean() > 0.9
    assert run(*argv, "--box", "6,4,20,12", "--out", "b")[0] == 0
    assert all((a == b).all() for a, b in zip(pictures, drawn_by(inputs / "b")[1], strict=True))


def test_the_command_paints_around_a_picture(run, stack, inputs):  # noqa: F811
    Image.fromarray(photo(16, 24)).save(inputs / "small.png")
    argv = ["inpaint", "small.png", "a red circle", "--outpaint", "8,6,0,10", "--model", stack, "--num", 1]
    assert run(*argv, "--resample", 1, "--out", "o")[0] == 0
    picture = drawn_by(inputs / "o")[1][0]
    np.testing.assert_array_equal(picture[6:22, 8:], photo(16, 24))


def test_the_command_begins_from_a_picture_without_a_prompt(run, stack, inputs):  # noqa: F811
    assert run("inpaint", "wide.png", "--strength", 0.5, "--model", stack, "--num", 2, "--out", "o")[0] == 0
    assert drawn_by(inputs / "o")[0]["pictures"][1]["prompt"] == "as it is"


BOX = ["--box", "2,2,9,9"]
BAD = {
    "no picture": (["none.png", "x", *BOX], "none.png cannot be read"),
    "empty picture": (["empty.png", "x", *BOX], "empty.png is empty"),
    "text": (["text.png", "x", *BOX], "text.png is not a picture"),
    "folder": ([".", "x", *BOX], "cannot be read"),
    "no prompt": (["in.png", *BOX], "no prompt was given"),
    "empty prompt": (["in.png", "", *BOX], "must not be empty"),
    "control character": (["in.png", "a\x1bb", *BOX], r"'\x1b'"),
    "nothing to paint": (["in.png", "x"], "nothing says what to paint"),
    "black mask": (["in.png", "x", "--mask", "black.png"], "all black"),
    "white mask": (["in.png", "x", "--mask", "white.png"], "all of the picture"),
    "mask of another size": (["in.png", "x", "--mask", "narrow.png"], "is 20 x 32 pixels and the picture 32 x 32"),
    "no mask": (["in.png", "x", "--mask", "none.png"], "none.png cannot be read"),
    "mask that is none": (["in.png", "x", "--mask", "text.png"], "not a picture"),
    "box outside": (["in.png", "x", "--box", "32,0,40,9"], "does not overlap the picture of 32 x 32"),
    "box of nothing": (["in.png", "x", "--box", "5,5,5,9"], "must have x0 < x1"),
    "box < 0": (["in.png", "x", "--box=-3,0,5,9"], "none negative"),
    "box of three": (["in.png", "x", "--box", "1,2,3"], "four whole numbers"),
    "box of all": (["in.png", "x", "--box", "0,0,99,99"], "all of the picture"),
    "box off the square": (["wide.png", "x", "--box", "0,0,3,9"], "no pixel in the middle square"),
    "no border": (["in.png", "x", "--outpaint", "0,0,0,0"], "a number above 0"),
    "border too wide": (["in.png", "x", "--outpaint", "99999,0,0,0"], "none above 10000"),
    "no square": (["in.png", "x", "--outpaint", "4,0,0,0"], "36 x 32 pixels, and a square is needed"),
    "strength 0": (["in.png", "--strength", "0"], "'0' must be a number in 0 … 1, above 0"),
    "strength 2": (["in.png", "--strength", "2"], "--strength"),
    "too many": (["in.png", "x", *BOX, "--num", "10001"], "more than 10000 pictures"),
    "resample 0": (["in.png", "x", *BOX, "--resample", "0"], "--resample"),
    "sampler": (["in.png", "x", *BOX, "--sampler", "dimm"], "did you mean 'ddim'"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(run, stack, inputs, argv, words):  # noqa: F811
    before = files(inputs)
    code, out, err = run("inpaint", *argv, "--out", "o", "--model", stack)
    assert code == 2 and out == "" and len(err) == 1, err
    assert err[0].startswith("error: ") and words in err[0] and err[0].isprintable()
    assert files(inputs) == before
