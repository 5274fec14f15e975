"""Karlo's files, in and out: sizes from its own JSON, what is refused, and there and back bit for bit."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from tests.interop import karlo_files as files
from tests.interop.karlo_files import lay
from unclip_jax import tasks
from unclip_jax.config import load_config
from unclip_jax.errors import UserError
from unclip_jax.interop import karlo
from unclip_jax.interop.files import Source, open_weights
from unclip_jax.models.clip import CLIP
from unclip_jax.weights import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = object()  # in place of a value: the key is left out


def changed(stage, change):
    """The stage with other values in its config."""
    config = {**flatten_dict(stage.config.to_dict()), **flatten_dict(change)}
    config = {path: value for path, value in config.items() if value is not ABSENT}
    return Stage(stage.params, ConfigDict(unflatten_dict(config)), 0, {})


def count(shapes, prefix=""):
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefix))


def test_full_size_parameter_counts(tmp_path):
    """Of the published networks, as diffusers counts them; nothing is allocated."""
    shapes = files.shapes_of(lay(tmp_path, files.FILES))
    assert count(shapes["prior"]) == 1_022_030_080
    assert count(shapes["decoder"], "net/") == 885_439_686
    assert count(shapes["upsampler"], "net/") == count(shapes["upsampler"], "last/") == 691_579_523


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Karlo in diffusers' layout, of random numbers."""
    out, rng = tmp_path_factory.mktemp("karlo"), np.random.default_rng(0)
    files.publish(out, files.SMALL, lambda path, shape: rng.standard_normal(shape))
    return out


@pytest.fixture(scope="module")
def stages(folder):
    return dict(karlo.read_stages(folder))


@pytest.fixture(scope="module")
def written(stages, tmp_path_factory):
    """The same, written for diffusers."""
    root = tmp_path_factory.mktemp("written")
    return karlo.write_stack(files.save(root / "stack", stages), root / "out")


def test_there_and_back_bit_for_bit(folder, stages, written):
    again = dict(karlo.read_stages(written))
    assert set(again) == {"prior", "decoder", "upsampler"}
    for name, stage in stages.items():
        assert again[name].config.to_dict() == stage.config.to_dict()
        jax.tree.map(np.testing.assert_array_equal, again[name].params, stage.params)
    for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last"):
        a, b = (load_file(root / part / karlo.WEIGHTS_FILE) for root in (folder, written))
        assert sorted(a) == sorted(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_json_says_the_same_after_there_and_back(written):
    for path, content in files.SMALL.items():
        got = json.loads((written / path).read_text())
        wanted = {key: value for key, value in content.items() if key != "_diffusers_version"}
        if path.startswith("super_res_last"):
            wanted["sample_size"] = 64  # null there: of the first
        assert {key: got[key] for key in wanted} == wanted, path


def test_the_stages_are_tasks(stages):
    """Their configs make tasks with just these parameters; sampling and training find what they need in them."""
    text = dict(vocab_size=20, max_len=5, width=6, layers=1, heads=1)
    clip = CLIP(6, dict(image_size=16, patch=8, width=8, layers=1, heads=1), text, norm=None)
    for name, stage in stages.items():
        task = tasks.make(stage.config, clip=clip)
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        assert jax.tree.map(np.shape, stage.params) == jax.tree.map(np.shape, shapes), name
        if name == "upsampler":
            with pytest.raises(UserError, match="last_steps=0"):
                task.loss(stage.params, {}, jax.random.key(0))


def test_a_folder_without_a_prior_gives_the_rest(folder, tmp_path):
    """As that of image variations."""
    for path in folder.iterdir():
        if not path.name.startswith("prior"):
            (tmp_path / path.name).symlink_to(path)
    assert set(dict(karlo.read_stages(tmp_path))) == {"decoder", "upsampler"}


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("prior/config.json", {"added_emb_type": None}, "prior: added_emb_type=None must be 'prd'"),
        ("prior/config.json", {"norm_in_type": "layer"}, "norm_in_type='layer' must be None"),
        ("prior/config.json", {"dropout": 0.1}, "dropout=0.1 must be 0.0"),
        ("prior/config.json", {"new_thing": 1}, "new_thing=1 is a key not known of PriorTransformer"),
        ("decoder/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep' must be 'identity'"),
        ("decoder/config.json", {"norm_eps": 1e-6}, "norm_eps=1e-06 must be 1e-05"),
        ("decoder/config.json", {"cross_attention_dim": 12}, "cross_attention_dim=10 must be 12"),
        ("decoder/config.json", {"block_out_channels": [8, 12, 24]}, "must be a list of multiples of its first"),
        ("decoder/config.json", {"down_block_types": ["DownBlock2D"] * 3}, "down_block_types="),
        ("decoder/config.json", {"up_block_types": [files.UP, *[files.ATTENTION_UP] * 2]}, "up_block_types="),
        ("decoder/config.json", {"down_block_types": [files.DOWN] * 3, "up_block_types": [files.UP] * 3},
         "at least one SimpleCrossAttnDownBlock2D"),
        ("decoder/config.json", {"layers_per_block": [1, 1, 1]}, "layers_per_block="),
        ("decoder/config.json", {"layers_per_block": 10**9}, "one whole number in 1 … 64"),
        ("decoder/config.json", {"block_out_channels": [0, 0, 0]}, "must be a list of multiples of its first"),
        ("decoder/config.json", {"block_out_channels": ["8%s"] * 3}, "must be a list of multiples of its first"),
        ("decoder/config.json", {"up_block_types": 3}, "must be a list of blocks"),
        ("text_proj/config.json", {"time_embed_dim": 64}, "text_proj: time_embed_dim=64 must be 32"),
        ("super_res_first/config.json", {"add_attention": True}, "add_attention=True must be False"),
        ("super_res_last/config.json", {"layers_per_block": 2}, "as in super_res_first"),
        ("super_res_first/config.json", {"sample_size": None}, "sample_size=None must be a whole number"),
        ("super_res_first/config.json", {"resnet_time_scale_shift": "ada_group"}, "'default' or 'scale_shift'"),
        ("prior_scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "must be 'sample'"),
        ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "must be 'learned_range'"),
        ("decoder_scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "clip_sample_range=2.0 must be 1.0"),
        ("super_res_scheduler/scheduler_config.json", {"clip_sample": False}, "clip_sample=False must be True"),
    ],
)  # fmt: skip
def test_what_our_modules_cannot_express_is_refused(tmp_path, path, change, said):
    lay(tmp_path, files.SMALL, **{path: change})
    with pytest.raises(UserError) as refused:
        for read in karlo._READ.values():
            read(tmp_path)
    assert said in str(refused.value) and "Fix:" in str(refused.value)


def test_configs_are_of_karlos_networks(tmp_path):
    """configs/karlo describe what its published JSON does, but for how it is computed and the dropout in training."""
    lay(tmp_path, files.FILES)
    for name, stem in (("prior", "prior_diffusion"), ("decoder", "decoder"), ("upsampler", "upsampler")):
        published, _ = karlo._READ[name](tmp_path)
        config = load_config(str(ROOT / f"configs/karlo/{stem}.py"))
        for block in ("diffusion", "sampler"):
            assert config[block].to_dict() == published[block].to_dict()
        assert config.task == published.task
        wanted, got = (flatten_dict(c.model.to_dict()) for c in (published, config))
        for key in set(got) - {("dtype",), ("remat",), ("unet", "remat"), ("unet", "dropout")}:
            assert got[key] == wanted[key], key
        objective = published.objective.to_dict()
        assert all(config.objective.get(k, v) == v for k, v in objective.items() if k != "last_steps")


def test_an_absent_key_has_diffusers_default(tmp_path):
    """Which is another than Karlo's for some."""
    contents = dict(files.SMALL)
    decoder = contents["decoder/config.json"]
    contents["decoder/config.json"] = {k: v for k, v in decoder.items() if k != "mid_block_type"}
    with pytest.raises(UserError, match="mid_block_type='UNetMidBlock2DCrossAttn' must be"):
        karlo._read_decoder(lay(tmp_path, contents))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is missing"), ("{", "is not readable JSON"), ("[]", "must hold a JSON object")],
)
def test_bad_files_are_refused(tmp_path, content, said):
    lay(tmp_path, files.SMALL)
    scheduler = tmp_path / "prior_scheduler/scheduler_config.json"
    scheduler.unlink() if content is None else scheduler.write_text(content)
    with pytest.raises(UserError, match=said):
        list(karlo.read_stages(tmp_path))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="text_encoder/config.json is missing"):
        karlo.read_stack(Source(tmp_path, "theirs"))


def test_missing_unknown_and_misshapen_arrays_are_named(folder, tmp_path):
    lay(tmp_path, {path: content for path, content in files.SMALL.items() if path.startswith("prior")})
    with open_weights(folder / "prior") as weights:
        arrays = {name: weights.take(name) for name in weights.names}
    cases = (
        ({k: v for k, v in arrays.items() if k != "prd_embedding"}, "prd_embedding"),
        ({**arrays, "more": np.zeros(1, np.float32)}, "more"),
        ({**arrays, "clip_std": np.ones((1, 7), np.float32)}, "clip_std"),
    )
    for content, said in cases:
        save_file(content, tmp_path / "prior" / karlo.WEIGHTS_FILE)
        with pytest.raises(UserError, match=said):
            list(karlo.read_stages(tmp_path))


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("prior", {"model": {"caption": "tokens"}}, "must read CLIP's text states"),
        ("prior", {"model": {"activation": "gelu_tanh"}}, "activation='gelu_tanh' must be 'gelu'"),
        ("prior", {"objective": {"empty_caption": False}}, "drop captions by the empty one"),
        ("prior", {"diffusion": {"name": "linear"}}, "the schedule linear"),
        ("prior", {"objective": {"clip_x0": None}}, "clip_x0=None must be a number"),
        ("prior", {"diffusion": {"shift": 0.5}}, "the prior's diffusion.shift=0.5 must be 1"),
        ("decoder", {"diffusion": {"shift": 0.5}}, "the decoder's diffusion.shift=0.5 must be 1"),
        ("decoder", {"objective": {"target": "x0"}}, "the target x0"),
        ("decoder", {"objective": {"empty_caption": False}}, "the decoder must drop captions by the empty one"),
        ("decoder", {"objective": {"empty_caption": ABSENT}}, "the decoder must drop captions by the empty one"),
        ("decoder", {"model": {"add_text_embedding": False}}, "add_text_embedding=False must be True"),
        ("decoder", {"model": {"add_text_embedding": ABSENT}}, "add_text_embedding=False must be True"),
        ("decoder", {"model": {"unet": {"patch": 2}}}, "patch=2 must be 1"),
        ("decoder", {"model": {"unet": {"positions": True}}}, "positions=True must be False"),
        ("decoder", {"model": {"unet": {"outer": 8}}}, "outer=8 must be 0"),
        ("decoder", {"model": {"unet": {"attention": ()}}}, "attention=() must name a resolution"),
        ("upsampler", {"diffusion": {"shift": 2.0}}, "the upsampler's diffusion.shift=2.0 must be 1"),
        ("upsampler", {"objective": {"last_steps": 0}}, "a second network for its last step"),
        ("upsampler", {"objective": {"enlarge": "linear"}}, "objective.enlarge='linear' must be 'bicubic'"),
        ("upsampler", {"model": {"attention": (8,)}}, "must be ()"),
        ("upsampler", {"model": {"positions": True}}, "positions=True must be False"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_and_nothing_written(stages, tmp_path, stage, change, said):
    stack = files.save(tmp_path / "stack", {**stages, stage: changed(stages[stage], change)})
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        karlo.write_stack(stack, tmp_path / "out")
    assert "Fix:" in str(refused.value)
    assert list(tmp_path.iterdir()) == [stack]


def test_a_key_left_out_is_written_as_the_task_reads_it(folder, stages, tmp_path):
    """The bound of a prior's x0 is 5, what decoders and upsamplers predict the noise."""
    left_out = {"prior": "clip_x0", "decoder": "target", "upsampler": "target"}
    short = {name: changed(stages[name], {"objective": {key: ABSENT}}) for name, key in left_out.items()}
    out = karlo.write_stack(files.save(tmp_path / "stack", short), tmp_path / "out")
    for name in left_out:
        assert karlo._scheduler(out, name) == karlo._scheduler(folder, name), name


@pytest.mark.parametrize(("task", "more"), [("upsampler", "upsampler_2"), ("prior_ar", "prior_ar")])
def test_a_stage_without_a_place_in_the_pipeline_is_refused_by_name(stages, tmp_path, task, more):
    stage = changed(stages["upsampler"], {"task": task})
    stack = files.save(tmp_path / "stack", {**stages, more: stage})
    with pytest.raises(UserError, match=f"the stack's {more} has no place .* Fix: .* `unclip export`"):
        karlo.write_stack(stack, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [stack]


@pytest.mark.parametrize("left_out", ["decoder", "upsampler"])
def test_a_stage_that_diffusers_cannot_be_without_is_named(stages, tmp_path, left_out):
    rest = {name: stage for name, stage in stages.items() if name != left_out}
    with pytest.raises(UserError, match=f"the stack has no {left_out}"):
        karlo.write_stack(files.save(tmp_path / "stack", rest), tmp_path / "out")


def test_without_a_prior_it_is_a_pipeline_of_variations_and_needs_the_image_tower(stages, tmp_path):
    rest = {name: stage for name, stage in stages.items() if name != "prior"}
    with pytest.raises(UserError, match="whose CLIP must have an image tower"):
        karlo.write_stack(files.save(tmp_path / "blind", rest), tmp_path / "out")
    vision = {"image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}
    out = karlo.write_stack(files.save(tmp_path / "stack", rest, vision), tmp_path / "out")
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPImageVariationPipeline" and "image_encoder" in index


def test_a_folder_in_use_is_refused(folder, stages, tmp_path):
    with pytest.raises(UserError, match=f"{folder} exists"):
        karlo.write_stack(files.save(tmp_path / "stack", stages), folder)
