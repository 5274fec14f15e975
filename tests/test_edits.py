"""edits: latents give their pictures back, paths end where they should, odds are CLIP's."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from tests.test_pipeline import close, part_of_stack, photo
from unclip_jax.data.images import to_float
from unclip_jax.diffusion.sample import initial_noise, picture_keys
from unclip_jax.diffusion.slerp import slerp
from unclip_jax.edits import LEAST, Latents
from unclip_jax.errors import UserError
from unclip_jax.pipeline import UnCLIP
from unclip_jax.runner import fold

FEW = {"steps": 4, "batch_size": 4}
PROMPTS = ["a red circle", "a large green star above a blue square", "two rings"]


@pytest.fixture(scope="module")
def pipe():
    return UnCLIP.load(tiny_stack.path()).without_upsamplers()


@pytest.fixture(scope="module")
def images():
    return [photo(33), photo(40)]


@pytest.fixture(scope="module")
def latents(pipe, images):
    return pipe.latents(images, **FEW)


@pytest.fixture(scope="module")
def seen(pipe):
    """What each stage was given and what it gave: a stand-in for `run` that computes the embeddings alone."""

    def make(monkeypatch):
        calls, true = [], UnCLIP.run

        def run(self, stage, rows, options, batch_size, progress, method="sample"):
            calls.append((stage, method, dict(rows[0]), dict(options)))
            if stage == "clip":
                return true(self, stage, rows, options, batch_size, progress)
            if method == "invert":
                return rows[0]["image"] * np.float32(2)
            total = len(rows[0]["tokens"])
            if stage == "prior":
                return np.arange(total * 8, dtype=np.float32).reshape(total, 8) + 1
            return np.zeros((total, 16, 16, 3), np.float32)

        monkeypatch.setattr(UnCLIP, "run", run)
        return calls

    return make


def test_none_is_no_setting(pipe):
    nothing = {"sampler": None, "guidance": None, "steps": None}
    assert pipe.exact_settings(nothing) == pipe.exact_settings({})
    with pytest.raises(UserError, match="has no eta"):
        pipe.variations([np.zeros((8, 8, 3), np.uint8)], eta=0.5, sampler="ddpm")


def test_eta_zero_gives_what_ddim_draws_from_the_latents(pipe, images, latents):
    """By hand through the decoder's task; whatever the seed."""
    assert latents.noise.shape == (2, 16, 16, 3)
    task, options = pipe.tasks["decoder"], pipe.exact_settings({"steps": 4})["decoder"]
    tokens, mask = pipe.tokenizer.encode(["", ""])
    square = to_float(pipe.squares(images, 16))

    @jax.jit
    def by_hand(params, image, noise):
        cond = task.encode({"clip": params["clip"]}, {"tokens": tokens, "mask": mask, "image": image})
        keys = jax.random.split(jax.random.key(9), 2)
        return cond["z_img"], task.sample(params["decoder"], {**cond, "noise": noise}, keys, **options)

    z_img, expected = map(np.asarray, by_hand(pipe.params, square, latents.noise))
    np.testing.assert_allclose(latents.z_img, z_img, rtol=1e-4, atol=1e-4)
    drawn = to_float(pipe.variations(images, seed=1, eta=0.0, **FEW))
    np.testing.assert_allclose(drawn, expected, atol=0.02)


def test_variations_hand_the_noise_on_and_drop_the_caption(pipe, images, seen, monkeypatch):
    calls = seen(monkeypatch)
    pipe.variations(images, num=2, eta=0.3, steps=5, sampler="ddim")
    inverts = [c for c in calls if c[1] == "invert"]
    assert [c[3] for c in inverts] == [
        {"steps": 5, "guidance": 1.0, "caption": False, "least": LEAST}
    ]
    stage, _, rows, options = calls[-1]
    assert stage == "decoder" and options == {
        "name": "ddim", "steps": 5, "guidance": 1.0, "caption": False, "least": LEAST, "eta": 0.3
    }  # fmt: skip
    small = to_float(pipe.squares(images, 16))
    np.testing.assert_array_equal(rows["noise"], (2 * small).repeat(2, 0))
    calls.clear()
    pipe.variations(images, steps=5)
    assert "invert" not in [c[1] for c in calls] and "noise" not in calls[-1][2]
    assert calls[-1][3] == {"name": "ddpm", "steps": 5, "guidance": 2.0, "caption": False}


def test_a_blend_of_pictures_ends_at_their_latents(pipe, images, seen, monkeypatch):
    calls = seen(monkeypatch)
    z, x = pipe.latents(images)
    pipe.interpolate(images + [images[0]], frames=4)
    rows = calls[-1][2]
    assert len(rows["noise"]) == 7
    for name, ends in (("z_img", z), ("noise", x)):
        np.testing.assert_allclose(rows[name][[0, 3, 6]], ends[[0, 1, 0]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rows[name][1], slerp(ends[:1], ends[1:], 1 / 3)[0], rtol=1e-5, atol=1e-5)
    pipe.interpolate(images, frames=3, noise="fixed")
    noise = calls[-1][2]["noise"]
    assert (noise == noise[:1]).all() and noise.std() == pytest.approx(1, abs=0.1)


def test_a_blend_of_prompts_and_pictures(pipe, images, seen, monkeypatch):
    calls = seen(monkeypatch)
    pipe.interpolate(["a red circle", images[1], "a blue ring"], frames=2)
    rows = calls[-1][2]
    np.testing.assert_array_equal(rows["z_img"][[0, 2]], np.arange(16, dtype=np.float32).reshape(2, 8) + 1)
    np.testing.assert_allclose(rows["noise"][1], 2 * to_float(pipe.squares(images[1:], 16))[0], rtol=1e-5)
    pipe.interpolate(["a red circle", "a blue ring"], frames=3)
    noise = calls[-1][2]["noise"]
    assert (noise == noise[:1]).all()  # held, where there is no picture to come back to


def test_prompts_of_a_blend_have_the_embeddings_and_the_noise_that_they_are_drawn_from(pipe, images):
    drawn, used = pipe.generate(PROMPTS, seed=7, return_stages=True), pipe.exact_settings({}, prompted=True)
    z, _ = pipe._ends([PROMPTS[0], images[0], PROMPTS[2]], 7, "fixed", used, 8, False)
    np.testing.assert_allclose(z[::2], drawn.z_img[::2], rtol=1e-4, atol=1e-4)
    _, x = pipe._ends(PROMPTS[:2], 7, "slerp", used, 8, False)
    keys = fold(picture_keys(7, 2, 1), 2)
    np.testing.assert_allclose(x, initial_noise(keys, (16, 16, 3)), atol=1e-6)


def test_a_text_diff_turns_towards_the_difference_and_holds_the_noise(pipe, images, seen, monkeypatch):
    calls = seen(monkeypatch)
    z, x = pipe.latents(images)
    pipe.text_diff(images, "red", "green", (0, 0.25, 1))
    inverted, drawn = [c[3] for c in calls if c[0] == "decoder"][-2:]
    assert inverted.items() <= drawn.items() and drawn["guidance"] == 2  # the same, or theta 0 were not the picture
    rows = calls[-1][2]
    np.testing.assert_allclose(rows["z_img"][::3], z, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows["noise"], x.repeat(3, 0))
    tokens, mask = pipe.tokenizer.encode(["green", "red"])
    model = pipe.tasks["clip"].model
    embed = jax.jit(lambda p: model.apply({"params": p}, tokens, mask, method="embed_text")[0])
    z_txt = np.asarray(embed(pipe.params["clip"]), np.float64)
    z_d = z_txt[0] - z_txt[1]
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(unit(rows["z_img"][2::3]), np.stack([unit(z_d)] * 2), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rows["z_img"], axis=1), np.linalg.norm(z, axis=1).repeat(3), rtol=1e-5)
    full = np.arccos((unit(z) * unit(z_d)).sum(-1))
    np.testing.assert_allclose(np.arccos((unit(rows["z_img"][1::3]) * unit(z)).sum(-1)), 0.25 * full, atol=1e-3)


@pytest.mark.parametrize("logit_scale", [None, 9.0])
def test_odds_are_the_softmax_of_clips_own_logits(logit_scale, pipe, images):
    """Whose scale is 100 at most."""
    if logit_scale is not None:
        clip = {**pipe.params["clip"], "logit_scale": jnp.float32(logit_scale)}
        pipe = dataclasses.replace(pipe, params={**pipe.params, "clip": clip})
    labels = ["red circle", "blue ring", "star"]
    odds = pipe.probe(images, labels, "this is {}, drawn")
    tokens, mask = pipe.tokenizer.encode([f"this is {label}, drawn" for label in labels])
    task = pipe.tasks["clip"]
    square = to_float(pipe.squares(images, 16))
    image, text, scale = jax.jit(lambda p: task.model.apply({"params": p}, square, tokens, mask))(pipe.params["clip"])
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    expected = jax.nn.log_softmax(scale * unit(image) @ unit(text).T)
    np.testing.assert_allclose(np.log(odds), expected, atol=1e-5 * float(scale))


def test_embeddings_are_what_clips_towers_give(pipe, images):
    tokens, mask = pipe.tokenizer.encode(PROMPTS)
    model, square = pipe.tasks["clip"].model, to_float(pipe.squares(images, 16))
    text = jax.jit(lambda p: model.apply({"params": p}, tokens, mask, method="embed_text")[0])
    image = jax.jit(lambda p: model.apply({"params": p}, square, method="embed_image"))
    z_txt, z_img = pipe.embed_texts(PROMPTS, batch_size=2), pipe.embed_images(images, batch_size=1)
    assert z_txt.dtype == z_img.dtype == np.float32
    np.testing.assert_allclose(z_txt, text(pipe.params["clip"]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z_img, image(pipe.params["clip"]), rtol=1e-4, atol=1e-4)


def test_a_drawn_embedding_is_decoded_to_the_picture_it_was_of(pipe):
    """Whatever the batch, and as the first of several."""
    drawn = pipe.generate(PROMPTS, seed=7, return_stages=True)
    again = pipe.decode(drawn.z_img, PROMPTS, seed=7, return_stages=True)
    assert close(again.images, drawn.images) and np.array_equal(again.z_img, drawn.z_img)
    np.testing.assert_allclose(again.z_txt, drawn.z_txt, rtol=1e-4, atol=1e-4)
    several = pipe.decode(jnp.asarray(drawn.z_img), PROMPTS, seed=7, num=2, batch_size=4)
    assert close(several[::2], drawn.images) and not close(several[1::2], drawn.images)
    assert not close(pipe.decode(drawn.z_img, PROMPTS, seed=8), drawn.images)


def test_an_embedding_without_a_prompt_is_drawn_as_a_variation(pipe, images):
    """White noise, the picture's embedding, no caption."""
    whole = pipe.variations(images, seed=7, num=2, steps=3)
    assert close(pipe.decode(pipe.embed_images(images), seed=7, num=2, steps=3), whole)


def test_a_stack_without_clip_has_no_embeddings(pipe, images):
    glide = dataclasses.replace(pipe, tasks={"decoder": pipe.tasks["decoder"]})
    for call in (
        lambda: glide.embed_texts(PROMPTS),
        lambda: glide.embed_images(images),
        lambda: glide.decode(np.ones((3, 8), np.float32), PROMPTS),
        lambda: glide.interpolate(PROMPTS),
    ):
        with pytest.raises(UserError, match="decoder knows no CLIP"):
            call()


Z = np.ones((2, 8), np.float32)
BAD = {
    "z_img of integers": (lambda p, i: p.decode(Z.astype(int)), "z_img is int64[2, 8]; expected float[N, 8]"),
    "z_img of another CLIP": (lambda p, i: p.decode(Z[:, :6]), "z_img is float32[2, 6]"),
    "one z_img": (lambda p, i: p.decode(Z[0]), "z_img is float32[8]"),
    "no z_img": (lambda p, i: p.decode(Z[:0]), "z_img is float32[0, 8]"),
    "ragged z_img": (lambda p, i: p.decode([Z[0], Z[0, :3]]), "z_img must be an array float[N, 8]"),
    "z_img NaN": (lambda p, i: p.decode(Z * np.nan), "must be finite"),
    "other prompts": (lambda p, i: p.decode(Z, PROMPTS), "3 prompts for 2 embeddings"),
    "no prompts": (lambda p, i: p.decode(Z, []), "at least one text"),
    "decode num": (lambda p, i: p.decode(Z, num=0), "num=0"),
    "decode steps": (lambda p, i: p.decode(Z, steps=21), "21 steps are more than the 20"),
    "text to embed": (lambda p, i: p.embed_texts("a red circle"), "list of texts"),
    "no text to embed": (lambda p, i: p.embed_texts([]), "at least one text"),
    "no picture to embed": (lambda p, i: p.embed_images([]), "at least one picture"),
    "batch of none": (lambda p, i: p.embed_images(i, batch_size=0), "batch_size=0"),
    "eta": (lambda p, i: p.variations(i, eta=1.5), "eta=1.5"),
    "eta NaN": (lambda p, i: p.variations(i, eta=float("nan")), "eta=nan"),
    "eta of another sampler": (lambda p, i: p.variations(i, eta=0.5, sampler="heun"), "'heun' has no eta"),
    "steps": (lambda p, i: p.latents(i, steps=21), "21 steps are more than the 20"),
    "rescale": (lambda p, i: p.latents(i, rescale=0.5), "rescale=0.5 is not undone"),
    "interval": (lambda p, i: p.variations(i, eta=0.1, interval=(0.2, 0.7)), "interval=(0.2, 0.7) is not undone"),
    "threshold": (lambda p, i: p.interpolate(i, threshold=0.9), "threshold=0.9 is not undone"),
    "one input": (lambda p, i: p.interpolate(i[:1]), "at least two"),
    "one text": (lambda p, i: p.interpolate("ab"), "at least two"),
    "frames": (lambda p, i: p.interpolate(i, frames=1), "frames=1"),
    "noise": (lambda p, i: p.interpolate(i, noise="slurp"), "did you mean 'slerp'"),
    "no picture": (lambda p, i: p.text_diff([], "red", "green"), "at least one"),
    "theta": (lambda p, i: p.text_diff(i, "red", "green", [0, 2]), "0 … 1"),
    "no theta": (lambda p, i: p.text_diff(i, "red", "green", []), "at least one"),
    "thetas": (lambda p, i: p.text_diff(i, "red", "green", 0.5), "thetas=0.5"),
    "text": (lambda p, i: p.text_diff(i, 3, "green"), "list of texts"),
    "no list of pictures": (lambda p, i: p.variations(None), "at least one picture"),
    "no list of prompts": (lambda p, i: p.generate(None), "list of texts"),
    "steps of no prior": (lambda p, i: p.variations(i, prior_steps=2), "prior_steps is of the prior"),
    "prior of exact variations": (lambda p, i: p.variations(i, eta=0.5, prior="ar"), "prior is of the prior"),
    "prior of embeddings": (lambda p, i: p.decode(Z, candidates=2), "candidates is of the prior"),
    "prior of edits": (lambda p, i: p.text_diff(i, "red", "green", prior_guidance=2), "prior_guidance is of the prior"),
    "prior of components": (lambda p, i: p.reconstruct(i, [2], prior_top_p=0.5), "prior_top_p is of the prior"),
    "prior of a blend": (lambda p, i: p.interpolate(i, prior_steps=2), "prior_steps is of the prior"),
    "dims": (lambda p, i: p.reconstruct(i, 3), "dims=3"),
    "few pictures": (lambda p, i: p.components_of(None, num=8), "num=8 pictures do not tell all 8 components"),
    "no list to blend": (lambda p, i: p.interpolate(None), "at least two"),
    "one Pillow picture": (lambda p, i: p.variations(Image.fromarray(i[0])), "write [picture] for one"),
    "pictures once": (lambda p, i: p.variations(iter(i)), "must be a list"),
    "prompts once": (lambda p, i: p.generate(iter(PROMPTS)), "must be a list"),
    "prompts in no order": (lambda p, i: p.generate(set(PROMPTS)), "must be a list"),
    "devices": (lambda p, i: p.spread(2), "devices=2 must be a list"),
    "no devices": (lambda p, i: p.spread([]), "devices=[] must be a list"),
    "numbers as labels": (lambda p, i: p.probe(i, [1, 2]), "labels=[1, 2] must be texts"),
    "labels": (lambda p, i: p.probe(i, ["red"]), "two are needed"),
    "template": (lambda p, i: p.probe(i, ["red", "green"], "a picture"), "one {}"),
    "template index": (lambda p, i: p.probe(i, ["red", "green"], "{} {0.x}"), "one {}"),
    "picture": (lambda p, i: p.latents([i[0], i[0][..., :2]]), "image 1 is uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_told_before_anything_runs(case, pipe, images, monkeypatch):
    call, words = BAD[case]
    monkeypatch.setattr(UnCLIP, "run", None)
    with pytest.raises(UserError, match=re.escape(words)):
        call(pipe, images)


def test_texts_that_mean_the_same_make_no_difference(pipe, images):
    with pytest.raises(UserError, match="mean the same"):
        pipe.text_diff(images, "red", "red")


def test_a_stack_without_a_prior_blends_pictures_only(images, tmp_path, seen, monkeypatch):
    other = UnCLIP.load(part_of_stack(tmp_path / "part", "prior", "prior_ar")).without_upsamplers()
    seen(monkeypatch)
    assert other.interpolate(images, frames=2).shape == (2, 16, 16, 3)
    with pytest.raises(UserError, match="no prior"):
        other.interpolate(["a red circle", images[0]])


def test_latents_are_named(latents):
    assert isinstance(latents, Latents) and latents.noise.dtype == latents.z_img.dtype == np.float32
