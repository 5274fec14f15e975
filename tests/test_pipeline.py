"""pipeline: what decides a picture, and what may not."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from tests.compiling import compiled
from unclip_jax import pipeline
from unclip_jax.data.images import center_crop_resize, to_float, to_uint8
from unclip_jax.data.source import Source
from unclip_jax.errors import UserError
from unclip_jax.nn import drawing
from unclip_jax.pca import PCA
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import SETTINGS, Settings
from unclip_jax.stack import OnDemand
from unclip_jax.weights import load_stack, save_stack

PROMPTS = ["a red circle", "a large green star above a blue square", "two rings"]


@pytest.fixture(scope="module")
def pipe():
    return UnCLIP.load(tiny_stack.path())


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe.generate(PROMPTS, seed=7, num=2, return_stages=True)


def close(a, b):
    """The same pictures but for rounding."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_pictures_come_prompt_by_prompt(drawn):
    assert drawn.images.shape == (6, 32, 32, 3) and drawn.images.dtype == np.uint8
    assert drawn.base.shape == (6, 16, 16, 3)
    assert np.array_equal(drawn.z_txt[0], drawn.z_txt[1]) and not np.array_equal(
        drawn.z_txt[1], drawn.z_txt[2]
    )
    assert len({image.tobytes() for image in drawn.images}) == 6


def test_the_same_call_gives_the_same_bytes(pipe, drawn):
    assert np.array_equal(pipe.generate(PROMPTS, seed=7, num=2), drawn.images)


def test_a_picture_does_not_depend_on_its_batch(pipe, drawn):
    assert close(pipe.generate(PROMPTS, seed=7, num=2, batch_size=4), drawn.images)  # 4 and 2, filled up


@pytest.mark.parametrize(("prompts", "batch_size"), [(PROMPTS, 8), (PROMPTS[:1], 1)])
def test_a_batch_spread_over_devices_gives_the_same_pictures(pipe, drawn, prompts, batch_size):
    spread = pipe.spread(jax.devices()[:4])
    got = spread.generate(prompts, seed=7, num=2, batch_size=batch_size, return_stages=True)
    assert close(got.images, drawn.images[: 2 * len(prompts)])
    np.testing.assert_allclose(got.z_img, drawn.z_img[: 2 * len(prompts)], rtol=1e-4, atol=1e-5)
    assert all(len(array.sharding.device_set) == 4 for array in jax.tree.leaves(spread.params))


def test_a_picture_does_not_depend_on_num_or_later_prompts(pipe, drawn):
    assert close(pipe.generate(PROMPTS, seed=7, num=1), drawn.images[::2])
    assert close(pipe.generate(PROMPTS[:2], seed=7, num=2), drawn.images[:4])


@pytest.mark.parametrize(("held", "blocks"), [(0, 2), (5, 2), (6, 2), (8, 1)])
def test_pictures_come_one_by_one_of_blocks_that_one_program_draws(pipe, drawn, monkeypatch, held, blocks):
    """However small the last block is."""
    pipe.generate(PROMPTS, seed=7, num=2, batch_size=4)
    known, seen, draw = set(pipe._programs), [], UnCLIP._draw
    monkeypatch.setattr(UnCLIP, "_draw", lambda *args: seen.append(1) or draw(*args))
    monkeypatch.setattr(pipeline, "HELD", held * drawn.images[0, ..., 0].size)
    images = list(pipe.stream(PROMPTS, 7, num=2, batch_size=4))
    assert close(np.stack(images), drawn.images) and len(images) == len(drawn.images)
    assert set(pipe._programs) == known and len(seen) == blocks
    with pytest.raises(UserError, match="num=0"):
        pipe.stream(PROMPTS, num=0)  # before the first is asked for


@pytest.mark.parametrize("change", [{"seed": 8}, {"guidance": 5.0}, {"rescale": 0.7}], ids=str)
def test_the_seed_and_settings_count(pipe, drawn, change):
    base = pipe.without_upsamplers()
    assert not close(base.generate(PROMPTS, num=2, **{"seed": 7, **change}), drawn.base)


def test_several_upsamplers_run_one_after_another_with_keys_of_their_own(pipe, monkeypatch):
    """What runs a stage is replaced, and makes pictures of one value."""
    last = dataclasses.replace(pipe.tasks["upsampler"], image_size=64)
    more = dataclasses.replace(pipe, tasks={**pipe.tasks, "upsampler_64": last})
    assert more.upsamplers == ["upsampler", "upsampler_64"] and more.size == 64
    keys, noted = pipeline.picture_keys(7, 1, 2), []

    def run(self, stage, given, options, *_, **__):
        if stage == "clip":
            return {"z_txt": np.ones((2, 8))}
        noted.append((stage, jax.random.key_data(given[1]), options, given[0]))
        return np.full((2, 8) if stage == "prior" else (2, 8, 8, 3), len(noted) / 10)

    monkeypatch.setattr(UnCLIP, "run", run)
    used = {name: {"name": name} for name in ("prior", "decoder", "upsampler", "upsampler_64")}
    caption = {"tokens": np.zeros((2, 4)), "mask": np.ones((2, 4))}
    drawn = more._draw(caption, keys, used, 8, True, False)
    assert [stage for stage, *_ in noted] == list(used)
    for number, (stage, own, options, rows) in enumerate(noted, start=1):
        wanted = jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys)
        np.testing.assert_array_equal(own, jax.random.key_data(wanted))
        assert options == used[stage]
        if stage.startswith("upsampler"):
            assert (rows["low"] == (number - 1) / 10).all() and rows.keys() == {"low", "tokens", "mask"}
    assert (noted[1][3]["z_img"] == 0.1).all()
    assert (drawn.base == to_uint8(np.float32(0.2))).all() and (drawn.images == to_uint8(np.float32(0.4))).all()


# {stage: {keyword of its Task.sample: (the setting, a value of it)}}, each value of one stage alone, and no config's
EVERY_SETTING = {
    "prior": {
        "steps": ("prior_steps", 2),
        "name": ("prior_sampler", "dpm"),
        "guidance": ("prior_guidance", 3.0),
        "rescale": ("prior_rescale", 0.25),
        "interval": ("prior_interval", (0.125, 0.5)),
        "threshold": ("prior_threshold", 0.75),
        "candidates": ("candidates", 4),
    },
    "prior_ar": {
        "guidance": ("prior_guidance", 4.0),
        "temperature": ("prior_temperature", 0.5),
        "top_p": ("prior_top_p", 0.25),
        "candidates": ("candidates", 3),
    },
    "decoder": {
        "steps": ("steps", 6),
        "name": ("sampler", "heun"),
        "guidance": ("guidance", 5.0),
        "rescale": ("rescale", 0.5),
        "interval": ("interval", (0.0, 0.75)),
        "threshold": ("threshold", 0.875),
    },
    "upsampler": {
        "steps": ("upsample_steps", 5),
        "name": ("upsample_sampler", "ddpm"),
        "threshold": ("upsample_threshold", 0.5),
        "tile": ("tile", 16),
        "overlap": ("overlap", 8),
    },
}


@pytest.mark.parametrize("prior", ["prior", "prior_ar"])
def test_every_setting_reaches_the_sampling_of_its_stage_and_no_other(pipe, drawn, prior, monkeypatch):
    """As it is given, and without any what the configs say; the sampling itself is replaced, and only notes it."""
    kept, told = {key: program for key, program in pipe._programs.items() if key[0] == "clip"}, {}
    noting, stages = dataclasses.replace(pipe, _programs=kept), (prior, "decoder", "upsampler")

    def noted(stage, shape):
        def sample(task, params, cond, keys, **how):
            scale = {"guidance": how.pop("guidance")} if "guidance" in how else {}  # an argument of the program
            jax.debug.callback(lambda **given: told.update({stage: how | jax.tree.map(float, given)}), **scale)
            return jnp.zeros((len(keys), *shape))

        return sample

    for stage, shape in zip(stages, (drawn.z_img.shape[1:], drawn.base.shape[1:], drawn.images.shape[1:]), strict=True):
        monkeypatch.setattr(type(pipe.tasks[stage]), "sample", noted(stage, shape))
    configs = {stage: pipe.configs[stage].sampler.to_dict() for stage in stages}
    changes = {stage: {key: value for key, (_, value) in EVERY_SETTING[stage].items()} for stage in stages}
    given = dict(setting for stage in stages for setting in EVERY_SETTING[stage].values())
    for settings, wanted in (({}, configs), (given, {stage: configs[stage] | changes[stage] for stage in stages})):
        noting.generate(PROMPTS, seed=7, num=2, prior={"prior": "diffusion", "prior_ar": "ar"}[prior], **settings)
        jax.effects_barrier()
        assert told == wanted
        told.clear()


def test_no_setting_is_left_out_above():
    assert {stage: {key: name for key, (name, _) in own.items()} for stage, own in EVERY_SETTING.items()} == SETTINGS


def test_upsample_steps_change_the_last_stage_only(pipe, drawn):
    more = pipe.generate(PROMPTS, seed=7, num=2, upsample_steps=5, return_stages=True)
    assert np.array_equal(more.base, drawn.base) and not close(more.images, drawn.images)


def test_settings_that_repeat_the_config_change_nothing(pipe, drawn):
    said = {"prior_steps": 4, "prior_guidance": 2.0, "candidates": 2, "steps": 4, "guidance": 2.0}
    images = pipe.generate(PROMPTS, seed=7, num=2, sampler="ddpm", upsample_steps=3, **said)
    assert np.array_equal(images, drawn.images)


def test_the_stages_are_those_of_the_tasks(pipe, drawn):
    """By hand, one picture alone, without the pipeline's batches and programs."""

    @jax.jit
    def by_hand(params, tokens, mask, key):
        task = pipe.tasks
        cond = task["decoder"].encode({"clip": params["clip"]}, {"tokens": tokens, "mask": mask})
        keys = [jax.random.fold_in(key, stage)[None] for stage in (1, 2, 3)]
        cond["z_img"] = task["prior"].sample(params["prior"], cond, keys[0])
        low = task["decoder"].sample(params["decoder"], cond, keys[1])
        return cond["z_img"], low, task["upsampler"].sample(params["upsampler"], {"low": low}, keys[2])

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 1)
    z_img, low, image = by_hand(pipe.params, *pipe.tokenizer.encode(PROMPTS[1:2]), key)
    np.testing.assert_allclose(drawn.z_img[3], z_img[0], rtol=1e-4, atol=1e-4)
    assert close(drawn.base[3], np.asarray(to_uint8(low))[0])
    assert close(drawn.images[3], np.asarray(to_uint8(image))[0])


def test_each_stage_is_compiled_once(pipe, drawn):
    """Other prompts, as many of them, and another seed compile nothing at all."""
    with compiled() as names:
        pipe.generate(PROMPTS[::-1], seed=9, num=2)
    assert not names


def test_another_guidance_compiles_nothing_but_none_does(pipe):
    draw = lambda **scales: pipe.generate(PROMPTS, seed=7, num=2, **scales)  # noqa: E731
    strong = draw(guidance=4, prior_guidance=2.5)
    with compiled() as names:
        weak = draw(guidance=np.float32(2), prior_guidance=1.5)
    assert not names and not np.array_equal(weak, strong)
    assert np.array_equal(draw(guidance=4.0, prior_guidance=np.float64(2.5)), strong)
    with compiled() as names:
        draw(guidance=1, prior_guidance=1)  # half as much is run
    assert names


def test_a_stack_with_another_stage_draws_with_that(pipe, drawn):
    other = dataclasses.replace(pipe.tasks["decoder"], target="eps")
    changed = dataclasses.replace(pipe, tasks={**pipe.tasks, "decoder": other})
    assert not np.array_equal(changed.generate(PROMPTS, seed=7, num=2), drawn.images)
    assert np.array_equal(pipe.generate(PROMPTS, seed=7, num=2), drawn.images)


@pytest.mark.parametrize("name", ["upsample_steps", "tile", "overlap"])
def test_settings_of_an_upsampler_need_one(pipe, name):
    with pytest.raises(UserError, match=f"{name} is of an upsampler, and this stack draws without one"):
        pipe.without_upsamplers().settings(**{name: 4})


def test_low_memory_gives_the_same_pictures(pipe, drawn):
    low = UnCLIP.load(tiny_stack.path(), low_memory=True)
    low = dataclasses.replace(low, tasks=pipe.tasks, _programs=pipe._programs)
    assert np.array_equal(low.generate(PROMPTS, seed=7, num=2), drawn.images)


def test_with_low_memory_a_program_is_compiled_before_its_weights_are_there(monkeypatch):
    pipe, read, before = UnCLIP.load(tiny_stack.path(), low_memory=True), OnDemand.read, []
    monkeypatch.setattr(OnDemand, "read", lambda *args: before.append((args[1], len(pipe._programs))) or read(*args))
    pipe.generate(PROMPTS, seed=7, num=2)
    assert before == [("clip", 1), ("prior", 2), ("decoder", 3), ("upsampler", 4)]


def test_weights_that_lie_as_on_a_gpu_give_the_same_pictures(monkeypatch, drawn):
    """Programs are compiled for layouts that are foreseen; a CPU can have them, too."""
    monkeypatch.setattr(drawing, "platform", lambda: "gpu")
    pipe = UnCLIP.load(tiny_stack.path(), low_memory=True).without_upsamplers()
    apart = pipe.generate(PROMPTS, seed=7, num=2).astype(int) - drawn.base.astype(int)
    assert np.abs(apart).max() <= 1  # of 255; one product of query, key and value may round differently
    (decoder,) = (program for key, (program, _) in pipe._programs.items() if key[0] == "decoder")
    assert decoder.input_formats[0][0]["net"]["stem"]["kernel"].layout.major_to_minor == (3, 0, 1, 2)


def test_weights_are_f32_on_a_cpu_and_bf16_on_request():
    dtypes = {str(x.dtype) for x in jax.tree.leaves(UnCLIP.load(tiny_stack.path(), dtype="bfloat16").params)}
    assert dtypes == {"bfloat16", "float32"}  # statistics stay
    if jax.default_backend() == "cpu":
        assert {str(x.dtype) for x in jax.tree.leaves(UnCLIP.load(tiny_stack.path()).params)} == {"float32"}


def test_bf16_weights_draw_nearly_the_same(drawn):
    """They are what a stack stores and what an accelerator keeps; the computation stays f32."""
    pipe = UnCLIP.load(tiny_stack.path(), dtype="bfloat16").without_upsamplers()
    apart = np.abs(pipe.generate(PROMPTS, seed=7, num=2).astype(int) - drawn.base.astype(int))
    assert apart.mean() < 1  # of 255; the f32 weights are bf16's numbers


def test_an_interval_may_be_a_list(pipe, drawn):
    low = pipe.without_upsamplers()
    pair, several = (low.generate(PROMPTS, seed=7, interval=kind((0.2, 0.8))) for kind in (tuple, list))
    assert np.array_equal(pair, several)


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_is_a_path(path):
    with pytest.raises(UserError, match="must be a path"):
        UnCLIP.load(path)


def test_other_weights_may_be_put_in(pipe, drawn):
    """Of the same dtype they are drawn with by the programs there are, of another by others."""
    rounded = {**pipe.params, "decoder": jax.tree.map(lambda a: a.astype("bfloat16"), pipe.params["decoder"])}
    back = {**pipe.params, "decoder": jax.tree.map(lambda a: a.astype(np.float32), rounded["decoder"])}
    low, same = (dataclasses.replace(pipe, params=params) for params in (rounded, back))
    apart = low.generate(PROMPTS, num=2, seed=7).astype(int) - drawn.images
    assert np.abs(apart).mean() < 1  # of 255
    with compiled() as names:
        same.generate(PROMPTS, num=2, seed=7)
    assert not names


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_every_u32_seed_has_its_own_keys(seed):
    """By the prompt's place, then the picture's; counted from `first` on."""
    data = np.asarray(jax.random.key_data(pipeline.picture_keys(seed, 3, 4)))
    other = np.asarray(jax.random.key_data(pipeline.picture_keys(seed ^ 1, 3, 4)))
    assert len({tuple(row) for row in np.concatenate([data, other]).tolist()}) == 24
    of_prompt = jax.random.fold_in(jax.random.key(np.uint32(seed)), 2)
    own = [jax.random.key_data(jax.random.fold_in(of_prompt, i)) for i in range(4)]
    np.testing.assert_array_equal(data[8:], own)
    np.testing.assert_array_equal(jax.random.key_data(pipeline.picture_keys(seed, 1, 4, first=2)), own)


def test_the_null_caption_is_drawn(pipe, drawn):
    images = pipe.generate(["", *PROMPTS[1:]], seed=7, num=2)
    assert not close(images[:2], drawn.images[:2]) and close(images[2:], drawn.images[2:])


def test_a_long_prompt_is_cut_with_a_warning(pipe, drawn):
    long = "a red circle " * 12
    with pytest.warns(UserWarning, match="left out.*zebra"):
        one = pipe.generate([long + "zebra", *PROMPTS[1:]], seed=7, num=2)
    with pytest.warns(UserWarning, match="left out.*horse"):
        other = pipe.generate([long + "horse", *PROMPTS[1:]], seed=7, num=2)
    assert np.array_equal(one, other)


def test_a_prompt_that_fits_gives_no_warning(pipe, drawn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate(PROMPTS, seed=7, num=2)


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_nan_is_an_error_and_names_its_stage(pipe, drawn, stage):
    params = {**pipe.params, stage: jax.tree.map(lambda x: x * np.nan, pipe.params[stage])}
    with pytest.raises(UserError, match=f"'{stage}' gave NaN"):
        dataclasses.replace(pipe, params=params).generate(PROMPTS, num=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": "a red circle"}, "must be a list"),
        ({"prompts": []}, "at least one"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"num": 0}, "num=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 21}, "decoder: 21 steps are more than the 20"),
        ({"prior_steps": 21}, "prior: 21 steps"),
        ({"upsample_steps": 21}, "upsampler: 21 steps"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": -1.0}, "guidance=-1"),
        ({"prior_guidance": float("inf")}, "prior_guidance=inf"),
        ({"candidates": 0}, "candidates=0"),
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"prior_sampler": "ddmp"}, "prior_sampler='ddmp' is unknown"),
        ({"prior_sampler": "analytic"}, "prior: the sampler analytic needs a table.* export … --analytic prior"),
        ({"threshold": 0}, "threshold=0 must be a quantile"),
        ({"prior_rescale": 2}, "prior_rescale=2 must be"),
        ({"interval": (0.7, 0.2)}, "interval=.0.7, 0.2. must be two noise levels"),
        ({"tile": 0}, "tile=0 must be a whole number"),
        ({"tile": 16, "overlap": 16}, "overlap=16 must be at most 15 with tile=16"),
        ({"overlap": 4}, "overlap=4 is of tiles, and none are asked for"),
        ({"stpes": 3}, "did you mean 'steps'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_told_before_anything_runs(pipe, change, words, monkeypatch):
    monkeypatch.setattr(UnCLIP, "run", None)
    with pytest.raises(UserError, match=words):
        pipe.generate(**{"prompts": ["a red circle"], **change})


def test_settings_name_what_each_stage_will_use(pipe):
    used = pipe.settings(steps=3, prior_guidance=1.5)
    assert used["decoder"] == {"name": "ddpm", "steps": 3, "guidance": 2.0}
    assert used["prior"] == {"name": "ddpm", "steps": 4, "guidance": 1.5, "candidates": 2}
    assert used["upsampler"] == {"name": "ddim", "steps": 3}
    assert pipe.settings(steps=20)["decoder"]["steps"] == 20  # as many as it was trained with
    with pytest.raises(UserError):
        Settings(steps=True)


def photo(side=40):
    return np.random.default_rng(side).integers(0, 256, (side, side + 8, 3), np.uint8)


@pytest.mark.parametrize("public", [True, False])
def test_a_public_clip_is_shown_pictures_as_it_was_trained(pipe, public):
    """One that wants other pixels than ours, such as a converted one: bicubic, where ours see means."""
    clip = pipe.tasks["clip"]
    vision = {**clip.model.vision, **({"mean": (0.4, 0.5, 0.6)} if public else {})}
    made = dataclasses.replace(clip, model=clip.model.clone(vision=vision))
    look = dataclasses.replace(pipe, tasks={**pipe.tasks, "clip": made})._look([photo()])
    seen, small = Image.fromarray(photo()), pipe.tasks["decoder"].image_size
    want = to_float(center_crop_resize(seen, vision["image_size"], bicubic=public))
    np.testing.assert_array_equal(look["image"][0], want)
    np.testing.assert_array_equal(look["small"][0], to_float(center_crop_resize(seen, small)))


def test_variations_are_drawn_from_the_embedding_of_the_middle_square(pipe):
    """By hand: CLIP sees the square, the decoder sees z_img and no caption."""
    image = photo()
    drawn = pipe.variations([photo(33), image], seed=7, num=2, return_stages=True)
    assert drawn.images.shape == (4, 32, 32, 3) and len({x.tobytes() for x in drawn.images}) == 4
    side = pipe.tasks["clip"].model.vision["image_size"]
    square = to_float(center_crop_resize(Image.fromarray(image), side))[None]

    @jax.jit
    def by_hand(params, square, tokens, mask, key):
        task = pipe.tasks["decoder"]
        cond = task.encode({"clip": params["clip"]}, {"tokens": tokens, "mask": mask, "image": square})
        key = jax.random.fold_in(key, 2)[None]
        return cond["z_img"], task.sample(params["decoder"], cond, key, caption=False)

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 1)
    z_img, base = by_hand(pipe.params, square, *pipe.tokenizer.encode(["whatever"]), key)
    np.testing.assert_allclose(drawn.z_img[3], z_img[0], rtol=1e-4, atol=1e-4)
    assert close(drawn.base[3], np.asarray(to_uint8(base))[0])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([photo().astype(np.float32)], "image 0 is float32"),
        ([photo(), photo()[..., 0]], "image 1 is uint8.40, 48.; expected uint8.height, width, 3."),
        ([photo()[:0]], "image 0 is uint8.0, 48, 3."),
        ([], "at least one"),
    ],
    ids=["dtype", "grey", "empty", "none"],
)
def test_pictures_that_are_none_cannot_be_varied(pipe, images, words):
    with pytest.raises(UserError, match=words):
        pipe.variations(images)


def test_either_prior_draws_from_prompts(pipe, drawn):
    """The autoregressive one by hand, its settings passed on; the rest of the way is the same."""
    found = pipe.generate(PROMPTS[:1], seed=7, prior="ar", prior_temperature=0.5, candidates=1, return_stages=True)
    np.testing.assert_allclose(found.z_txt[0], drawn.z_txt[0], rtol=1e-4, atol=1e-4)
    assert not close(found.images, drawn.images[:1])
    used = pipe.settings(prior="ar", prior_temperature=0.5, candidates=1)
    assert used["prior_ar"] == {"temperature": 0.5, "top_p": 1.0, "guidance": 2.0, "candidates": 1}
    assert "prior" not in used and "prior_ar" not in pipe.settings() and pipe.settings() == pipe.settings(
        prior="diffusion"
    )
    cond = jax.jit(pipe.tasks["prior_ar"].encode)(
        {"clip": pipe.params["clip"]}, dict(zip(("tokens", "mask"), pipe.tokenizer.encode(PROMPTS[:1]), strict=True))
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 0), 1)[None]
    sample = jax.jit(lambda *args: pipe.tasks["prior_ar"].sample(*args, temperature=0.5, candidates=1))
    np.testing.assert_allclose(found.z_img, sample(pipe.params["prior_ar"], cond, key), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prior": "art"}, "prior='art' is unknown.*did you mean 'ar'"),
        ({"prior": "ar", "prior_steps": 3}, "prior_steps is no setting of prior='ar'"),
        ({"prior_top_p": 0.5}, "prior_top_p is no setting of prior='diffusion'"),
        ({"prior_temperature": 0.0}, "prior_temperature is no setting of prior='diffusion'"),
        ({"prior": "ar", "prior_top_p": 0.0}, "prior_top_p=0.0 must be"),
        ({"prior": "ar", "prior_temperature": float("nan")}, "prior_temperature=nan"),
    ],
    ids=str,
)
def test_settings_of_a_prior_are_for_that_prior(pipe, change, words):
    with pytest.raises(UserError, match=words):
        pipe.settings(**change)


@pytest.mark.parametrize(("without", "prior"), [("prior_ar", "ar"), ("prior", "diffusion")])
def test_a_prior_that_a_stack_lacks_is_named(without, prior, tmp_path):
    other = UnCLIP.load(part_of_stack(tmp_path / "part", without))
    with pytest.raises(UserError, match=f"no prior='{prior}', only prior="):
        other.settings(prior=prior)
    assert len({"prior", "prior_ar"} & other.settings().keys()) == 1


class Noise(Source):
    """Pictures of noise, brighter and brighter."""

    name, size = "noise", 16

    def __len__(self):
        return 24

    def __getitem__(self, i):
        image = np.random.default_rng(i).integers(0, 100 + 6 * i, (16, 16, 3), np.uint8)
        return {"image": image, "caption": ""}


@pytest.mark.slow
def test_pictures_are_reconstructed_from_the_first_components(pipe):
    """Of z_img by numpy; from all of them the pictures are variations'; one noise for all of an image's."""
    images = [photo(33), photo()]
    pca = pipe.components_of(Noise(), num=24, batch_size=8)
    pictures = np.stack([Noise()[i]["image"] for i in range(24)])
    z = np.asarray(jax.jit(pipe.tasks["clip"].sample)(pipe.params["clip"], {"image": to_float(pictures)}, None))
    _, values, vectors = np.linalg.svd(z.astype(np.float64) - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.std, values / np.sqrt(24), rtol=1e-3, atol=1e-3)
    whole = pipe.variations(images, seed=7, return_stages=True)
    found = pipe.reconstruct(images, [3, 8, 3], seed=7, pca=pca, return_stages=True)
    assert found.images.shape == (6, 32, 32, 3)
    assert close(found.images[1::3], whole.images) and np.array_equal(found.images[::3], found.images[2::3])
    first = z.mean(0) + (whole.z_img - z.mean(0)) @ vectors[:3].T @ vectors[:3]
    np.testing.assert_allclose(found.z_img[::3], first, rtol=1e-2, atol=2e-2)
    assert not close(found.images[::3], whole.images)


def test_each_picture_s_components_come_image_by_image_with_one_noise(pipe, monkeypatch):
    """What the decoder is given, in float64: the components' part of z_img about the mean; the drawing is replaced."""
    rng, told = np.random.default_rng(0), []
    z, mean = rng.standard_normal((2, 2, 8))
    vectors = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    monkeypatch.setattr(UnCLIP, "embed_images", lambda *_, **__: np.float32(z))
    monkeypatch.setattr(UnCLIP, "_draw", lambda self, cond, keys, used, *_: told.append((cond, keys, used)))
    pipe.reconstruct([photo(33), photo()], [1, 8, 3], seed=7, pca=PCA(mean[0], vectors, np.ones(8)), steps=3)
    ((cond, keys, used),) = told
    wanted = [mean[0] + (one - mean[0]) @ vectors[:, :k] @ vectors[:, :k].T for one in z for k in (1, 8, 3)]
    np.testing.assert_allclose(cond["z_img"], wanted, rtol=1e-5, atol=1e-6)
    assert cond["z_img"].dtype == np.float32
    own = jax.random.key_data(pipeline.picture_keys(7, 2, 1))
    np.testing.assert_array_equal(jax.random.key_data(keys), own[np.array([0, 0, 0, 1, 1, 1])])
    assert used["decoder"] == {**pipe.settings(steps=3)["decoder"], "caption": False}
    tokens, mask = pipe.tokenizer.encode([""] * 6)
    np.testing.assert_array_equal(cond["tokens"], tokens)
    np.testing.assert_array_equal(cond["mask"], mask)


def test_components_are_measured_on_as_many_pictures_as_were_asked_for_in_whole_batches(pipe):
    """By numpy's singular values of all 24; CLIP is arithmetic here."""
    look = lambda task, params, rows, rng: rows["image"].reshape(len(rows["image"]), -1)[:, 3::91][:, :8]  # noqa: E731
    clip = type("Clip", (), {"model": pipe.tasks["clip"].model, "sample": look})()
    looking = dataclasses.replace(pipe, tasks={**pipe.tasks, "clip": clip})
    z = np.float64(look(None, None, {"image": to_float(np.stack([Noise()[i]["image"] for i in range(24)]))}, None))
    for num, size in ((24, 8), (20, 8), (13, 12), (24, 64)):
        found = looking.components_of(Noise(), num=num, batch_size=size)
        np.testing.assert_allclose(found.mean, z.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.std, np.linalg.svd(z - z.mean(0))[1] / np.sqrt(24), rtol=1e-3)
    large = type("Large", (Noise,), {"__getitem__": lambda self, i: {"image": photo(32)[:, :32], "caption": ""}})()
    with pytest.raises(UserError, match="the source's pictures have 32 pixels, and this CLIP takes 16"):
        looking.components_of(large, num=9)


def test_components_come_from_the_prior_or_from_data(pipe, tmp_path):
    kept = pipe.params["prior_ar"]["components"]
    assert pipe.kept_components().components is kept and kept.shape == (8, 6)
    for dims in ([], [0], [7], [2.5]):
        with pytest.raises(UserError, match="in 1 … 6, the components that there are"):
            pipe.reconstruct([photo()], dims)
    other = UnCLIP.load(part_of_stack(tmp_path / "part", "prior_ar"))
    with pytest.raises(UserError, match="no autoregressive prior.*--data"):
        other.reconstruct([photo()], [2])


def part_of_stack(out, *without):
    stack = load_stack(tiny_stack.path())
    stages = {name: tuple(stage) for name, stage in stack.stages.items() if name not in without}
    return save_stack(out, stages, stack.tokenizer_json)


def test_a_stack_without_a_prior_draws_variations_only(pipe, tmp_path):
    other = UnCLIP.load(part_of_stack(tmp_path / "part", "prior", "prior_ar"))
    images = [photo()]
    assert close(other.variations(images, seed=3), pipe.variations(images, seed=3))
    with pytest.raises(UserError, match="no prior, so it cannot draw from prompts"):
        other.generate(["a red circle"])


def test_a_clip_of_captions_only_draws_from_prompts_only(pipe, drawn, tmp_path):
    """As of the pipelines that are published without an image encoder."""
    stack = load_stack(tiny_stack.path())
    stages = {name: tuple(stage) for name, stage in stack.stages.items()}
    params, config, step, extra = stages["clip"]
    with config.unlocked():
        config.model.vision = None
    params = {name: value for name, value in params.items() if name not in ("visual", "image_projection")}
    save_stack(tmp_path / "text", {**stages, "clip": (params, config, step, extra)}, stack.tokenizer_json)
    other = UnCLIP.load(tmp_path / "text")
    assert np.array_equal(other.generate(PROMPTS, seed=7, num=2), drawn.images)
    with pytest.raises(UserError, match="no image tower, so it cannot look at pictures"):
        other.variations([photo()])


def test_a_stack_lacking_a_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stages of the task 'decoder'"):
        UnCLIP.load(part_of_stack(tmp_path / "part", "decoder"))


def test_two_priors_are_refused(tmp_path):
    stack = load_stack(tiny_stack.path())
    stages = {name: tuple(stage) for name, stage in stack.stages.items()}
    save_stack(tmp_path / "two", {**stages, "prior_b": stages["prior"]}, stack.tokenizer_json)
    with pytest.raises(UserError, match="2 stages of the task 'prior_diffusion'"):
        UnCLIP.load(tmp_path / "two")


@pytest.mark.parametrize(
    ("path", "words"), [("no-such", "name of a bundled stack: shapes"), ("/nowhere/at/all", "does not exist")]
)
def test_a_missing_stack_is_named(path, words):
    with pytest.raises(UserError, match=words):
        UnCLIP.load(path)


@pytest.mark.parametrize("width", [8, 12])
def test_a_stage_of_another_clip_is_refused(tmp_path, width):
    """By what identifies its CLIP; where that was not recorded, by the width of the embedding."""
    stack = load_stack(tiny_stack.path())
    stages = {name: tuple(stage) for name, stage in stack.stages.items()}
    config = tiny_stack.configs()["clip"]
    config.model.embed_dim = width
    stages["clip"] = (
        tiny_stack.weights(config, seed=5),
        config,
        1,
        {"clip_identity": "b"} if width == 8 else {},
    )
    save_stack(tmp_path / "mixed", stages, stack.tokenizer_json)
    with pytest.raises(UserError, match="prior.*another CLIP"):
        UnCLIP.load(tmp_path / "mixed")
