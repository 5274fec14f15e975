"""A whole Karlo: our weights written for diffusers, loaded by its own classes, and UnCLIPPipeline's images are ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline  # noqa: E402

from tests.interop import karlo_files as files  # noqa: E402
from unclip_jax import tasks  # noqa: E402
from unclip_jax.diffusion.sample import initial_noise, step_noise  # noqa: E402
from unclip_jax.interop import karlo  # noqa: E402
from unclip_jax.models.clip import CLIP  # noqa: E402

STEPS = {"prior": 5, "decoder": 3, "upsampler": 7}
LENGTH, EMBED = 5, 6
MODELS = {
    "prior": ref.PriorTransformer,
    "decoder": ref.UNet2DConditionModel,
    "text_proj": ref.UnCLIPTextProjModel,
    "super_res_first": ref.UNet2DModel,
    "super_res_last": ref.UNet2DModel,
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Ours, of random numbers."""
    rng = np.random.default_rng(0)

    def fill(path, shape):
        noise, name = rng.standard_normal(shape), path.rpartition("/")[2]
        if name == "kernel":
            return noise / np.sqrt(np.prod(shape[:-1]) if len(shape) != 3 else shape[1])
        return 0.1 * noise + (name in ("scale", "std"))

    return files.drawn(files.lay(tmp_path_factory.mktemp("json"), files.SMALL), fill)


@pytest.fixture(scope="module")
def loaded(stages, tmp_path_factory):
    """(models by part, scheduler configs by part) as diffusers reads what we wrote."""
    root = tmp_path_factory.mktemp("written")
    folder = karlo.write_stack(files.save(root / "stack", stages), root / "out")
    models = {}
    for part, cls in MODELS.items():
        models[part], info = cls.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info.values()), (part, info)
    for name, (part, *_) in karlo.SCHEDULERS.items():
        made = ref.UnCLIPScheduler.from_pretrained(folder / part)
        for key, value in {"clip_sample_range": 1.0, **ref.SCHEDULERS[name]}.items():
            assert made.config[key] == value
    return {part: ref.double(model.eval()) for part, model in models.items()}


@pytest.mark.slow
def test_images_of_a_whole_pipeline(stages, loaded):
    """In f64, with diffusers' tables in f64; 5, 3 and 7 steps; the noise is given to both."""
    rng = np.random.default_rng(1)
    rows, empty = [0, 1], [2, 2]
    states, z_txt = rng.standard_normal((3, LENGTH, EMBED)), rng.standard_normal((3, EMBED))
    mask = np.arange(LENGTH)[None] < np.array([3, 5, 2])[:, None]
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(3), 2)
        drawn = draw(stages, keys, states, mask, z_txt)
        own = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)  # of the prior's one candidate
        noises, starts = [], {}
        for name, shape in (("prior", (EMBED,)), ("decoder", (16, 16, 3)), ("upsampler", (64, 64, 3))):
            k = own if name == "prior" else keys
            turn = ref.nchw if len(shape) == 3 else lambda x: torch.from_numpy(np.array(x))
            starts[name] = turn(initial_noise(k, shape))
            noises += [turn(step_noise(k, i, shape)) for i in range(STEPS[name] - 1, 0, -1)]

    schedulers = {part: ref.scheduler(name, STEPS[name]) for name, (part, *_) in karlo.SCHEDULERS.items()}
    pipeline = UnCLIPPipeline(**loaded, **schedulers, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    halves = [torch.from_numpy(a[empty + rows]) for a in (z_txt, states, mask)]
    pipeline._encode_prompt = lambda *_: halves
    pending = iter(noises)
    with ref.given_noise(lambda: next(pending)):
        wanted = pipeline(
            prompt=["", ""],
            prior_num_inference_steps=STEPS["prior"],
            decoder_num_inference_steps=STEPS["decoder"],
            super_res_num_inference_steps=STEPS["upsampler"],
            prior_latents=starts["prior"],
            decoder_latents=starts["decoder"],
            super_res_latents=starts["upsampler"],
            output_type="np",
        ).images
    assert next(pending, None) is None, "all noise is used"
    # diffusers gives f32 images.
    assert ref.error((np.asarray(drawn) + 1) / 2, wanted) < 1e-6


def draw(stages, keys, states, mask, z_txt):
    """Ours, from captions 0 and 1, the empty one being 2: f64[2, 64, 64, 3]."""
    text = dict(vocab_size=20, max_len=LENGTH, width=EMBED, layers=1, heads=1)
    clip = CLIP(EMBED, dict(image_size=16, patch=8, width=8, layers=1, heads=1), text, norm=None)

    def texts(rows):
        chosen = {"states": states[rows], "mask": mask[rows], "z_txt": z_txt[rows]}
        return {"tokens": np.zeros((2, LENGTH), np.int32), **chosen}

    cond, out = {**texts([0, 1]), "empty": texts([2, 2])}, {}
    for name, stage in stages.items():
        config = stage.config.copy_and_resolve_references()
        config.model.dtype = "float64"
        task = tasks.make(config, clip=clip)
        params = jax.tree.map(lambda a: a.astype(np.float64), stage.params)
        out[name] = jax.jit(lambda p, c, k, task=task, n=STEPS[name]: task.sample(p, c, k, steps=n))(params, cond, keys)
        if name == "prior":
            cond = {**cond, "z_img": out[name]}
        if name == "decoder":
            cond = {"low": out[name]}
    return jnp.clip(out["upsampler"], -1, 1)
