"""GLIDE's converted weights against its network and loops in torch (`glide_reference`), and what would differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

ref = pytest.importorskip("tests.parity.glide_reference", reason="needs the package torch")
torch = ref.torch

from tests.interop import glide_files as files  # noqa: E402
from tests.interop.glide_files import small  # noqa: E402, F401 (fixture)
from unclip_jax import cli, tasks  # noqa: E402
from unclip_jax.diffusion.sample import initial_noise, step_noise  # noqa: E402
from unclip_jax.diffusion.schedule import make_schedule, respace  # noqa: E402
from unclip_jax.interop import glide, layout, stages  # noqa: E402
from unclip_jax.interop.files import Weights  # noqa: E402
from unclip_jax.pipeline import UnCLIP  # noqa: E402
from unclip_jax.weights import load_stack  # noqa: E402

pytestmark = pytest.mark.usefixtures("small")
VOCAB = 40
STEPS = 4
PUBLISHED = dict(glide.STAGES)
# What users of glide-text2im report of the released files: sum(x.numel() for x in model.parameters()).
COUNTS = {"decoder": 385_030_726, "upsampler": 398_361_286}
RNG = np.random.default_rng(0)
TIME = np.array([999, 500, 1, 0], np.int32)
TOKENS = RNG.integers(0, VOCAB, (4, files.LENGTH)).astype(np.int32)
MASK = np.arange(files.LENGTH)[None] < np.array([5, files.LENGTH, 0, 1])[:, None]  # the third is the dropped caption


def theirs(name):
    """The reference of a stage, its weights drawn."""
    model = ref.Text2ImUNet(files.MODELS[name], VOCAB, files.LENGTH, seed=3)
    model(*pictures(name, torch.float32))
    return model


def pictures(name, dtype):
    """Arguments of the reference for four captions and times."""
    rng, side = np.random.default_rng(1), files.SIDES[name]
    x = torch.from_numpy(rng.standard_normal((4, 3, side, side))).to(dtype)
    low = torch.from_numpy(rng.uniform(-1, 1, (4, 3, side // 2, side // 2))).to(dtype) if name == "upsampler" else None
    return x, torch.from_numpy(TIME), torch.from_numpy(TOKENS), torch.from_numpy(MASK), low


def arrays(state):
    """A state dict as the converter reads it."""
    readers = {name: (tuple(a.shape), lambda a=a: a.numpy()) for name, a in state.items()}
    return Weights(readers)


def ours(name, state, dtype=np.float32):
    """(task, parameters) of converted weights."""
    config = files.config(name, VOCAB, dtype=np.dtype(dtype).name)
    params = glide.read_stage(name, config, arrays(state))
    return tasks.make(config), jax.tree.map(lambda a: a.astype(dtype), params)


def predicted(name, task, params, dtype):
    x, time, tokens, mask, low = (a if a is None else a.numpy() for a in pictures(name, dtype))

    def run(params):
        if name == "decoder":
            batch = {"tokens": tokens, "mask": mask}
            cond = task.condition(params, batch, None, None)
            return task.model.apply({"params": params}, nhwc(x), time, cond, method="denoise")
        out = task._denoise(params, {"low": nhwc(low), "tokens": tokens, "mask": mask}, x.shape[2])(nhwc(x), time)
        return jnp.concatenate(out, -1)

    return jax.jit(run)(params)


def nhwc(x):
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def error(got, wanted) -> float:
    """Largest difference over the largest number wanted; ours NHWC, theirs NCHW."""
    got, wanted = np.asarray(got, np.float64), wanted.double().numpy().transpose(0, 2, 3, 1)
    assert got.shape == wanted.shape and np.isfinite(wanted).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_in_f32(name):
    model = theirs(name)
    task, params = ours(name, model.state)
    assert error(predicted(name, task, params, torch.float32), model(*pictures(name, torch.float32))) < 1e-5


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_in_f64_and_what_would_differ(name):
    model = theirs(name)
    with jax.enable_x64():
        task, params = ours(name, model.state, np.float64)
        got, given = predicted(name, task, params, torch.float64), pictures(name, torch.float64)
        assert error(got, model(*given)) < 1e-10
        wrongs = ["parts in thirds", "first position", "no padding embedding", "causal"]
        for wrong in wrongs + ["bicubic", "nearest"] * (name == "upsampler"):
            assert error(got, model(*given, wrong=wrong)) > 1e-3, wrong


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_networks_for_inpainting_see_the_known_part_then_where_it_is(name):
    """In f64: GLIDE's channels are x, picture times mask, mask, and then an upsampler's small picture."""
    rng, side = np.random.default_rng(2), files.SIDES[name]
    x, *given, low = pictures(name, torch.float64)
    known = torch.from_numpy(rng.uniform(-1, 1, (4, 3, side, side)))
    keep = torch.from_numpy(rng.integers(0, 2, (4, 1, side, side))).double()
    model = ref.Text2ImUNet(files.MODELS[name], VOCAB, files.LENGTH, seed=3)
    model(torch.cat([x, x, x[:, :1]], 1).float(), *given, None if low is None else low.float())
    with jax.enable_x64():
        config = files.config(name, VOCAB, dtype="float64")
        config.objective.inpaint = True
        task, params = tasks.make(config), glide.read_stage(name, config, arrays(model.state))
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
        batch = {"tokens": TOKENS, "mask": MASK, "known": nhwc(known), "keep": nhwc(keep), "image": nhwc(x)}
        batch |= {} if low is None else {"low": nhwc(low)}
        got = jnp.concatenate(jax.jit(lambda p, b: task.x0_and_denoise(p, b)[1](b["image"], TIME))(params, batch), -1)
    assert error(got, model(torch.cat([x, known * keep, keep], 1), *given, low)) < 1e-10
    for wrong in ([x, keep, known * keep], [x, known, keep], [x, known * keep, 1 - keep]):
        assert error(got, model(torch.cat(wrong, 1), *given, low)) > 1e-3


def test_guided_steps_of_the_base_with_learned_variance():
    """In f64, at guidance 3; the uncond half has a caption that is padding alone."""
    model, rows, scale, shape = theirs("decoder"), 2, 3.0, (files.SIDES["decoder"],) * 2 + (3,)
    with jax.enable_x64():
        task, params = ours("decoder", model.state, np.float64)
        keys = jax.random.split(jax.random.key(3), rows)
        cond = {"tokens": TOKENS[:rows], "mask": MASK[:rows]}
        got = jax.jit(lambda p, c, k: task.sample(p, c, k, steps=STEPS))(params, cond, keys)
        noises = [nchw(step_noise(keys, i, shape)) for i in range(STEPS)]
        tokens = torch.from_numpy(np.concatenate([TOKENS[:rows], np.full_like(TOKENS[:rows], VOCAB - 1)]))
        mask = torch.from_numpy(np.concatenate([MASK[:rows], np.zeros_like(MASK[:rows])]))

        def predict(x, t, vary_too=False):
            c, u = model(torch.cat([x, x]), torch.full((2 * rows,), t), tokens, mask).chunk(2)
            guided = u + scale * (c - u)
            return guided if vary_too else torch.cat([guided[:, :3], c[:, 3:]], 1)

        start, at = nchw(initial_noise(keys, shape)), ref.levels("cosine", [STEPS])
        assert error(got, ref.ancestral(predict, start, noises, *at)) < 1e-9
        vary_too = lambda x, t: predict(x, t, vary_too=True)  # noqa: E731
        assert error(got, ref.ancestral(vary_too, start, noises, *at)) > 1e-3


def test_steps_of_the_upsampler_in_sections():
    """In f64, by DDIM from noise times 0.997, the caption read and not guided; six steps, in two sections."""
    model, rows, side = theirs("upsampler"), 1, files.SIDES["upsampler"]
    low = pictures("upsampler", torch.float64)[4][:rows]
    with jax.enable_x64():
        task, params = ours("upsampler", model.state, np.float64)
        keys = jax.random.split(jax.random.key(3), rows)
        cond = {"low": nhwc(low), "tokens": TOKENS[:rows], "mask": MASK[:rows]}
        got = jax.jit(lambda p, c, k: task.sample(p, c, k, steps=[4, 2]))(params, cond, keys)
        tokens, mask = torch.from_numpy(TOKENS[:rows]), torch.from_numpy(MASK[:rows])

        def predict(x, t):
            return model(x, torch.full((rows,), t), tokens, mask, low)

        start, at = nchw(initial_noise(keys, (side, side, 3))), ref.levels("linear", [4, 2])
        assert error(got, ref.deterministic(predict, 0.997 * start, *at)) < 1e-9
        assert error(got, ref.deterministic(predict, start, *at)) > 1e-4


def test_the_steps_are_those_of_the_published_settings():
    for name, steps, sections in (("decoder", 100, ([100],)), ("upsampler", "fast27", ([10, 10, 3, 2, 2], 2))):
        stage = PUBLISHED[name]
        assert stage["sampler"]["steps"] == steps
        made = respace(make_schedule(**stage["diffusion"]), steps)
        abar, times = ref.levels(stage["diffusion"]["name"], *sections)
        np.testing.assert_array_equal(made.timesteps, times)
        np.testing.assert_allclose(made.alphas_cumprod, abar, rtol=1e-12)


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_full_size(name):
    """All names and shapes are the reference's, and there are as many numbers as in the released files."""
    stage = PUBLISHED[name]
    words = dict(path="", vocab_size=50257, max_len=128)
    config = files.ConfigDict(dict(task=name, clip="", clip_identity="", tokenizer=words, **stage))
    shapes = stages.network_shapes(config)
    wanted = layout.expected(glide.table(shapes, config.model.unet.blocks), shapes)
    model, side = ref.Text2ImUNet(stage["model"], 50257, 128, seed=None), stage["data"]["size"]
    with torch.device("meta"):
        low = torch.empty(1, 3, side // 4, side // 4) if name == "upsampler" else None
        tokens = torch.empty(1, 128, dtype=torch.long)
        model(torch.empty(1, 3, side, side), torch.empty(1), tokens, tokens > 0, low)
    assert wanted == {name: tuple(a.shape) for name, a in model.state.items()}
    assert sum(a.numel() for a in model.state.values()) == sum(map(np.prod, shapes.values())) == COUNTS[name]


@pytest.mark.slow
def test_a_converted_stack_draws_from_prompts(tmp_path, monkeypatch):
    """From torch files, in one go: convert, load, generate."""
    monkeypatch.chdir(tmp_path)
    vocab = files.save_tokenizer(tmp_path / "theirs")
    states = {}
    for name, stem in (("decoder", "base"), ("upsampler", "upsample")):
        model = ref.Text2ImUNet(files.MODELS[name], vocab, files.LENGTH, seed=5)
        model(*pictures(name, torch.float32))
        states[name] = model.state
        torch.save(model.state, tmp_path / f"theirs/{stem}.pt")
    assert cli.main(["convert", "--from", "glide", "theirs", "glide"]) == 0
    stack = load_stack("glide")
    assert list(stack.stages) == ["decoder", "upsampler"]
    for name, stage in stack.stages.items():
        assert stage.extra == {"source": "theirs", "format": "glide", "licence": "mit"}
        wanted = glide.read_stage(name, stage.config, arrays(states[name]))
        for path, array in flatten_dict(wanted, sep="/").items():
            np.testing.assert_array_equal(stages.at(stage.params, path), array)
    pipe = UnCLIP.load("glide", low_memory=True)
    assert pipe.size == 16 and pipe.settings()["decoder"] == dict(name="ddpm", steps=100, guidance=3.0)
    draw = {"seed": 5, "steps": 3, "upsample_steps": 2, "batch_size": 2, "progress": False}
    drawn = pipe.generate(["a red cat", "the cat"], return_stages=True, **draw)
    assert drawn.images.shape == (2, 16, 16, 3) and drawn.base.shape == (2, 8, 8, 3) and drawn.z_img is None
    assert not np.array_equal(drawn.images[0], drawn.images[1])
