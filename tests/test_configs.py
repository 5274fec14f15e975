"""Every config in configs/: it loads, is stored and read back unchanged, and describes networks that can be built.

Networks are traced, never filled with numbers, so the paper's sizes cost no memory.
"""

import functools
import importlib
import inspect
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unclip_jax import config, data, optim, run, sharding, tasks
from unclip_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text(encoding="utf-8"))
STAGES = {"clip", "prior_diffusion", "decoder", "upsampler"}
AR = ("shapes", "icons", "folder", "dalle2")  # Karlo has no autoregressive prior
SMALL = ("shapes", "icons", "folder")
LARGE = ("dalle2", "karlo")
WITHOUT_PICTURES = ("clip", "prior_diffusion", "prior_ar")  # they draw embeddings


def variants(path: Path) -> list[str]:
    """What the file answers to a variant it does not have."""
    with pytest.raises(UserError) as error:
        config.load_config(f"{path}:none-such")
    return re.search(r"use one of (.+?) \(", str(error.value))[1].split(", ")


SPECS = [f"{path.relative_to(ROOT)}:{variant}" for path in FILES for variant in variants(path)]
# Folder has the networks of icons, but for the captions; the tiny ones differ in numbers only.
TRACED = [s for s in SPECS if "folder/" not in s and ":tiny" not in s]


@functools.cache
def load(spec: str):
    return config.load_config(str(ROOT / spec))


def clip_of(spec: str):
    """(task, the shapes of its parameters) of the CLIP of the same system: the variant of the same name, or the first.
    """
    path = str(Path(spec).parent / "clip.py")
    of = [s for s in SPECS if s.startswith(path)]
    return built(next((s for s in of if s.split(":")[1] == spec.split(":")[1]), of[0]))


@functools.cache
def built(spec: str):
    """(task, the shapes of its parameters)."""
    task = tasks.make(load(spec), None if load(spec).task == "clip" else clip_of(spec)[0].model)
    return task, jax.eval_shape(task.init, jax.random.key(0))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_there_are_all_stages_of_all_systems():
    found = {system: {p.stem for p in FILES if p.parent.name == system} for system in (*SMALL, *LARGE)}
    assert all(STAGES <= stages for stages in found.values()), found
    assert all("prior_ar" in found[system] for system in AR)


def offending(check, specs) -> dict[str, str]:
    """What is wrong with those that fail a check, all of them."""
    found = {}
    for spec in specs:
        try:
            check(spec)
        except (Exception, pytest.fail.Exception) as error:
            found[spec] = f"{type(error).__name__}: {error}"
    return found


def test_all_that_fail_a_check_are_told():
    def check(spec):
        assert spec != "b", "b is wrong"
        with pytest.raises(KeyError):
            {"d": 0}[spec]

    found = offending(check, "abcd")
    assert list(found) == ["b", "d"] and "b is wrong" in found["b"] and "DID NOT RAISE" in found["d"]


def test_they_survive_json():
    def check(spec):
        loaded = load(spec)
        assert config.from_json(config.to_json(loaded)) == loaded and loaded.is_locked

    assert offending(check, SPECS) == {}


def test_the_first_variant_is_the_default_and_the_docstring_names_all():
    def check(path):
        spec, names = str(path.relative_to(ROOT)), variants(path)
        assert load(spec) == load(f"{spec}:{names[0]}")
        text = inspect.cleandoc(re.match(r'"""(.+?)"""', path.read_text(encoding="utf-8"), re.DOTALL)[1])
        assert all(name in text for name in names)
        assert {named.split(":")[0] for named in check_commands(text.replace("\\\\\n", "\\\n"))} == {spec}

    assert offending(check, FILES) == {}


def check_commands(text: str) -> list[str]:
    """The configs that the `unclip train` commands of a text name, each loaded with its overrides."""
    named = []
    for command in re.findall(r"unclip train (--config (?:.*\\\n)*.*)", text):
        command = command.replace("\\\n", " ").split("#")[0]
        named.append(re.search(r"--config (\S+)", command)[1])
        config.load_config(str(ROOT / named[-1]), re.findall(r"--config\.(\S+)", command))
        assert "--workdir " in command
    return named


def test_the_commands_of_the_manual_load():
    named = check_commands((ROOT / "docs/training.md").read_text(encoding="utf-8"))
    for system in ("shapes", "folder"):
        assert {f"configs/{system}/{stage}.py" for stage in STAGES} <= set(named)


def test_the_config_of_ones_own_in_the_manual_can_be_built(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    manual = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (tmp_path / "configs/mine").mkdir()
    (tmp_path / "configs/mine/clip.py").write_text(re.search(r"```python\n(.+?)```", manual, re.DOTALL)[1])
    task = tasks.make(config.load_config(str(tmp_path / "configs/mine/clip.py")))
    assert task.model.text["width"] == 384
    jax.eval_shape(task.init, jax.random.key(0))


NAMED = {  # by docs/training.md, for stages that they concern
    "clip": ("model.vision.remat=full", "model.text.remat=dots", "optim.sam_rho=0.1"),
    "prior_diffusion": ("model.remat=full",),
    "prior_ar": ("model.remat=full",),
    "decoder": ("model.unet.remat=full",),
    "upsampler": ("model.remat=full", "loader.degrade=bsr", "loader.factor=2", "objective.blur_share=0"),
}


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_the_keys_that_the_manual_names_can_be_set(path):
    overrides = ["model.dtype=bfloat16", "optim.sam_rho=0.1", "optim.accumulate=2", *NAMED[path.stem]]
    if path.stem in ("prior_diffusion", "decoder") and path.parent.name != "karlo":  # whose samplers are its JSON's
        overrides += ["sampler.rescale=0.7", "sampler.interval=0.2,0.8", "sampler.threshold=0.995"]
    flat = config.flatten(config.load_config(str(path), overrides))
    assert flat["model.dtype"] == "bfloat16" and flat["optim.sam_rho"] == 0.1
    assert flat.get("objective.blur_share", 0) == 0 and flat.get("sampler.interval", (0.2, 0.8)) == (0.2, 0.8)
    with pytest.raises(UserError, match="no key 'optim.sam_roh'. Fix: did you mean 'optim.sam_rho'"):
        config.load_config(str(path), ["optim.sam_roh=0.1"])


def test_blocks_fit_what_they_configure():
    def check(spec):
        c = load(spec)
        optim.make(c.num_steps, **c.optim)
        assert c.batch_size % c.mesh.fsdp == 0
        assert (c.loader.crop or c.data.size) <= c.data.size
        module, name = data.SOURCES[c.data.source].split(":")
        known = {"source", *inspect.signature(getattr(importlib.import_module(module), name)).parameters}
        assert set(c.data) <= known
        if c.data.source == "folder":
            with pytest.raises(UserError, match="needs data.path"):
                data.make(**c.data)

    assert offending(check, SPECS) == {}


def test_their_networks_have_f32_parameters():
    def check(spec):
        task, params = built(spec)
        run.check_attention(load(spec), task)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    assert offending(check, SPECS) == {}


def test_every_array_over_a_megabyte_is_split():
    """By the config's own rules on its own mesh, twice over; optimizer and average have paths that end alike."""

    def check(spec):
        c, params = load(spec), built(spec)[1]
        mesh = sharding.make_mesh(**c.mesh, devices=2 * c.mesh.fsdp)
        found = jax.tree.leaves(sharding.infer(params, c.rules, mesh))
        for leaf, where in zip(jax.tree.leaves(params), found, strict=True):
            part = leaf.size // math.prod(where.shard_shape(leaf.shape))
            assert part == c.mesh.fsdp > 1 or leaf.size * leaf.dtype.itemsize <= 2**20

    assert offending(check, [s for s in SPECS if "dalle2/" in s]) == {}


@pytest.mark.parametrize("spec", TRACED)
def test_trains_and_samples_as_traced(spec):
    """Loss over an encoded batch, and samples of the size that the next stage takes."""
    c, (task, params), (clip, of_clip) = load(spec), built(spec), clip_of(spec)
    side, b = c.loader.crop or c.data.size, 2
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((b, clip.model.text["max_len"]), jnp.int32),
        "mask": jax.ShapeDtypeStruct((b, clip.model.text["max_len"]), bool),
    }

    def both(frozen, params, batch):
        key = jax.random.key(0)
        batch = task.encode(frozen, batch)
        return task.loss(params, batch, key)[0], task.sample(params, batch, jax.random.split(key, b))

    loss, drawn = jax.eval_shape(both, {"clip": of_clip}, params, batch)
    assert loss.shape == () and loss.dtype == jnp.float32
    size = c.objective.get("image_size", side) if c.task == "decoder" else side
    assert drawn.shape == ((b, clip.model.embed_dim) if c.task in WITHOUT_PICTURES else (b, size, size, 3))


@pytest.mark.parametrize("system", [*SMALL, *LARGE])
def test_stages_hand_pictures_on_at_the_sizes_they_take(system):
    specs = [s for s in SPECS if s.startswith(f"configs/{system}/")]
    sizes = {s: built(s)[0].image_size for s in specs if load(s).task in ("decoder", "upsampler")}
    drawn = {size for s, size in sizes.items() if load(s).task == "decoder"}
    for spec in sorted((s for s in sizes if load(s).task == "upsampler"), key=sizes.get):
        assert sizes[spec] // load(spec).objective.factor in drawn
        drawn |= {sizes[spec]}
    for spec in (s for s in specs if load(s).task == "clip"):
        assert load(spec).data.size == load(spec).model.vision.image_size


# The paper's sizes. Counts of parameters that are given in the paper's table 3 have one or two digits.


@pytest.mark.parametrize(
    ("variant", "released"), [("vit_l14", 427_616_513), ("vit_b16", 149_620_737), ("vit_b32", 151_277_313)]
)
def test_clip_has_the_parameters_of_openais(variant, released):
    """Those of the released weights, buffers of masks left out."""
    assert count(built(f"configs/dalle2/clip.py:{variant}")[1]) == released


def test_clip_h16_has_the_parameters_of_its_formula():
    """Per block of width w 12 w^2 + 13 w; open_clip's ViT-H/16 has 986.26M with 196 patches in place of 256."""
    w, t, d = 1280, 1024, 1024
    blocks = 32 * (12 * w**2 + 13 * w) + 24 * (12 * t**2 + 13 * t)
    vision = 16 * 16 * 3 * w + w + (256 + 1) * w + 2 * 2 * w + w * d
    text = 49408 * t + 77 * t + 2 * t + t * d
    total = count(built("configs/dalle2/clip.py:vit_h16")[1])
    assert total == blocks + vision + text + 1
    assert total - (256 - 196) * w == pytest.approx(986.26e6, abs=0.005e6)


@pytest.mark.parametrize(
    ("spec", "paper"),
    [
        ("decoder.py:paper", 3.5e9),  # with its caption Transformer
        ("upsampler.py:64-256", 700e6),
        ("upsampler.py:256-1024", 300e6),
    ],
)
def test_pixel_networks_have_the_papers_parameters(spec, paper):
    assert count(built(f"configs/dalle2/{spec}")[1]) == pytest.approx(paper, rel=0.1)


def test_decoder_is_a_unet_and_a_caption_transformer_like_glides():
    """GLIDE (Nichol et al. 2021, section 4): 2.3B for the pictures and 1.2B for the text."""
    params = built("configs/dalle2/decoder.py:paper")[1]
    assert count(params["net"]) == pytest.approx(2.3e9, rel=0.1)
    assert count(params["caption"]) == pytest.approx(1.2e9, rel=0.1)


def test_prior_has_the_papers_blocks():
    """The paper says 1B, in one digit; the 24 blocks of width 2048 that it names have 1.21B."""
    net = built("configs/dalle2/prior_diffusion.py:paper")[1]["net"]
    assert count(net["transformer"]) == 24 * (12 * 2048**2 + 13 * 2048)
    assert round(count(net) / 1e9) == 1
    assert count(net) - 49408 * 2048 == pytest.approx(count(net["transformer"]), rel=0.02)


def test_prior_ar_has_the_papers_blocks_and_codes():
    """The paper says 1B; the blocks of the two networks that its table names have 2.01B."""
    params = built("configs/dalle2/prior_ar.py:paper")[1]
    net = params["net"]
    assert count(net["encoder"]["transformer"]) == 24 * (12 * 2048**2 + 13 * 2048)
    assert count(net["transformer"]) == 24 * (12 * 1664**2 + 13 * 1664)
    assert params["components"].shape == (1024, 319) and net["out"]["kernel"].shape == (1664, 1024)
    assert count(net) - 49408 * 2048 == pytest.approx(2.01e9, rel=0.01)


def test_docstrings_state_the_counts():
    def check(spec):
        tree = built(spec)[1]
        text = (ROOT / spec.split(":")[0]).read_text(encoding="utf-8")
        assert f"{count(tree.get('net', tree) if 'prior' in spec else tree):,}" in text

    assert offending(check, [s for s in SPECS if s.split("/")[1] in LARGE]) == {}
