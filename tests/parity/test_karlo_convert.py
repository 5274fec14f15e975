"""`unclip convert` of a whole pipeline of diffusers, there and back; what it draws, and what diffusers loads of it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline  # noqa: E402
from transformers import (  # noqa: E402  # noqa: E402
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.interop import karlo_files as files  # noqa: E402
from tests.parity import tiny_clip  # noqa: E402
from unclip_jax import cli  # noqa: E402
from unclip_jax.nn.drawing import for_loops  # noqa: E402
from unclip_jax.pipeline import UnCLIP  # noqa: E402
from unclip_jax.weights import load_stack  # noqa: E402

WIDTH = 8  # of the text states and of the embedding, equal in Karlo
JSONS = {
    **files.SMALL,
    "prior/config.json": {
        **files.SMALL["prior/config.json"],
        "embedding_dim": WIDTH,
        "num_embeddings": tiny_clip.LENGTH,
    },
    "text_proj/config.json": {**files.SMALL["text_proj/config.json"], "clip_embeddings_dim": WIDTH},
}
PROMPTS = ["a red cat", "the hat on the mat and the cat"]
DRAW = {"seed": 5, "prior_steps": 3, "steps": 3, "batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"t2i": as UnCLIPPipeline is published, "variation": as UnCLIPImageVariationPipeline}, of random numbers."""
    root = tmp_path_factory.mktemp("karlo")
    rng = np.random.default_rng(0)
    fill = lambda path, shape: 0.1 * rng.standard_normal(shape) + path.endswith(("scale", "std"))  # noqa: E731
    stages = files.publish(root / "t2i", JSONS, fill)
    files.publish(root / "variation", {path: JSONS[path] for path in JSONS if not path.startswith("prior")}, fill)
    torch.manual_seed(0)
    for kind in ("t2i", "variation"):
        about = tiny_clip.config(tiny_clip.save_tokenizer(root / kind / "tokenizer"), eos=2)
        text = {**about["text_config"], "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "projection_dim": WIDTH}
        CLIPTextModelWithProjection(CLIPTextConfig(**text)).save_pretrained(root / kind / "text_encoder")
    vision = CLIPVisionConfig(**{**about["vision_config"], "projection_dim": WIDTH})
    CLIPVisionModelWithProjection(vision).save_pretrained(root / "variation" / "image_encoder")
    return {"t2i": root / "t2i", "variation": root / "variation", "stages": stages}


def converted(folders, kind, tmp_path_factory):
    out = tmp_path_factory.mktemp(kind) / "stack"
    assert cli.main(["convert", "--from", "karlo", str(folders[kind]), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def stack(folders, tmp_path_factory):
    return converted(folders, "t2i", tmp_path_factory)


@pytest.mark.slow
def test_a_converted_pipeline_draws_from_prompts(folders, stack):
    pipe = UnCLIP.load(stack)
    assert pipe.size == 64 and list(pipe.tasks) == ["clip", "prior", "decoder", "upsampler"]
    for name, stage in folders["stages"].items():
        jax.tree.map(np.testing.assert_array_equal, pipe.params[name], for_loops(stage.params))
    drawn = pipe.generate(PROMPTS, return_stages=True, **DRAW)
    assert drawn.images.shape == (2, 64, 64, 3) and drawn.base.shape == (2, 16, 16, 3)
    assert not np.array_equal(drawn.images[0], drawn.images[1])
    low = UnCLIP.load(stack, low_memory=True)
    assert np.array_equal(low.generate(PROMPTS, **DRAW), drawn.images)


def test_its_text_half_is_the_text_encoder(folders, stack):
    """The embedding that conditions every stage, for prompts of different lengths."""
    tokenizer = CLIPTokenizer.from_pretrained(folders["t2i"] / "tokenizer")
    model = CLIPTextModelWithProjection.from_pretrained(folders["t2i"] / "text_encoder").eval()
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=tiny_clip.LENGTH, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**tokens).text_embeds.numpy()
    assert ref.error(UnCLIP.load(stack).embed_texts(PROMPTS), wanted) < 1e-5


def test_one_without_a_prior_draws_variations(folders, tmp_path_factory):
    stack = converted(folders, "variation", tmp_path_factory)
    pipe = UnCLIP.load(stack)
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    settings = {name: value for name, value in DRAW.items() if name != "prior_steps"}
    assert pipe.size == 64 and list(pipe.tasks) == ["clip", "decoder", "upsampler"]
    assert pipe.without_upsamplers().variations([image], num=2, **settings).shape == (2, 16, 16, 3)


def test_diffusers_loads_what_is_converted_back_and_it_is_the_same(folders, stack, tmp_path):
    assert cli.main(["convert", "--to", "karlo", str(stack), str(tmp_path / "back")]) == 0
    pipeline = UnCLIPPipeline.from_pretrained(tmp_path / "back")
    for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder"):
        given = load_file(next((folders["t2i"] / part).glob("*.safetensors")))
        state = getattr(pipeline, part).state_dict()
        for name, array in given.items():
            assert np.array_equal(state[name].numpy(), array), (part, name)
    assert pipeline.tokenizer(PROMPTS).input_ids == CLIPTokenizer.from_pretrained(
        folders["t2i"] / "tokenizer"
    )(PROMPTS).input_ids
    assert cli.main(["convert", "--from", "karlo", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    assert cli.main(["convert", "--to", "karlo", str(stack), str(tmp_path / "back"), "--overwrite"]) == 0
    own = dict(json.loads((tmp_path / "back" / "model_index.json").read_text()))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model_index.json").write_text(json.dumps({k: own[k] for k in own if k != "_unclip_jax"}))
    assert cli.main(["convert", "--to", "karlo", str(stack), str(tmp_path / "theirs"), "--overwrite"]) == 2
    first, again = load_stack(stack), load_stack(tmp_path / "again")
    for name, stage in first.stages.items():
        jax.tree.map(np.testing.assert_array_equal, stage.params, again.stages[name].params)
        assert stage.config == again.stages[name].config


def test_diffusers_loads_bfloat16_whole(stack, tmp_path):
    """Statistics too: of a mixture it leaves some arrays as they are where the package accelerate is missing."""
    out = tmp_path / "half"
    assert cli.main(["convert", "--to", "karlo", str(stack), str(out), "--dtype", "bfloat16"]) == 0
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = UnCLIPPipeline.from_pretrained(out, dtype=dtype)
        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert len(networks) == 6 and {p.dtype for part in networks for p in part.parameters()} == {dtype}


def test_a_stack_that_is_not_of_karlos_kind_is_not_written(tmp_path, capsys):
    assert cli.main(["convert", "--to", "karlo", "unclip_jax/bundled/shapes", str(tmp_path / "out")]) == 2
    assert "must be None, to be written for diffusers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_missing_is_named(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text(json.dumps({}))
    assert cli.main(["convert", "--from", "karlo", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "text_encoder" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
