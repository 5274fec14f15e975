"""transformers' CLIPModel and ours, on the same random weights: the same numbers, in and out.

Checked with transformers 5.24.0 and torch 2.13.0.
"""

import json

import jax
import numpy as np
import pytest

from tests import tiny_stack
from tests.parity import tiny_clip
from unclip_jax import tasks, weights
from unclip_jax.errors import UserError
from unclip_jax.interop import convert, files, hf_clip, stages
from unclip_jax.models.clip import CLIP
from unclip_jax.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="parity with transformers needs the package torch")
transformers = pytest.importorskip("transformers", reason="parity needs the package transformers")

PROMPTS = ["a red cat", "", "A CAT  on a mat", "the cat and the hat and the mat and a red hat"]


@pytest.fixture(scope="module", params=[("quick_gelu", 2), ("gelu", None)], ids=["openai", "gelu"])
def theirs(request, tmp_path_factory):
    """A CLIPModel with random weights, and its directory; as OpenAI's (EOS 2 means the largest token), and newer."""
    act, eos = request.param
    folder = tmp_path_factory.mktemp("clip")
    return tiny_clip.save(folder, act, eos), folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    return convert.convert_in("hf-clip", str(theirs[1]), tmp_path_factory.mktemp("stack") / "clip")


def error(got, want) -> float:
    """The largest difference, relative to the largest number."""
    got, want = np.asarray(got, np.float64), want.detach().double().numpy()
    return float(np.abs(got - want).max() / np.abs(want).max())


def tokenizer(folder) -> Tokenizer:
    return stages.load_tokenizer(folder, None, tiny_clip.LENGTH)


def batch(folder, dtype=np.float32):
    """Tokens and mask of ours, pixels in [-1, 1], and the same pixels as their preprocessor_config.json says."""
    tokens, mask = tokenizer(folder).encode(PROMPTS, warn=False)
    image = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype(dtype)
    normal = ((image + 1) / 2 - np.asarray(stages.OPENAI_MEAN)) / np.asarray(stages.OPENAI_STD)
    return tokens, mask, image, torch.tensor(normal.transpose(0, 3, 1, 2).astype(dtype))


def compare(model, theirs, params, tokens, mask, image, pixels) -> dict[str, float]:
    z_txt, states = jax.jit(lambda *a: model.apply({"params": a[0]}, a[1], a[2], method="embed_text"))(
        params, tokens, mask
    )
    z_img = jax.jit(lambda p, x: model.apply({"params": p}, x, method="embed_image"))(params, image)
    with torch.no_grad():
        ids = torch.tensor(tokens.astype(np.int64))
        text = theirs.text_model(input_ids=ids, attention_mask=torch.tensor(mask.astype(np.int64)))
        want_txt = theirs.text_projection(text.pooler_output)
        want_img = theirs.visual_projection(theirs.vision_model(pixel_values=pixels).pooler_output)
    return {
        "z_txt": error(z_txt, want_txt),
        "z_img": error(z_img, want_img),
        "states": error(np.asarray(states)[mask], text.last_hidden_state[torch.tensor(mask)]),
    }


def test_embeddings_and_states_are_theirs(theirs, ours):
    """All that a prior and a decoder see of a CLIP, for prompts of several lengths, in f32."""
    clip = tasks.load_clip(str(ours))
    errors = compare(clip.model, theirs[0], clip.params, *batch(theirs[1]))
    print(errors)
    assert max(errors.values()) <= 1e-5
    np.testing.assert_allclose(clip.params["logit_scale"], theirs[0].logit_scale.item(), rtol=1e-7)


def test_in_float64_only_rounding_is_left(theirs, ours):
    config = weights.load_stack(ours).stages["clip"].config
    model = tasks.make(config).model
    with jax.enable_x64(True):
        wide = CLIP(**{**{f: getattr(model, f) for f in ("embed_dim", "vision", "text", "norm")}, "dtype": np.float64})
        with files.open_weights(theirs[1]) as arrays:
            params = stages.read_params(config, hf_clip.TABLE, arrays)
        params = jax.tree.map(lambda array: array.astype(np.float64), params)
        errors = compare(wide, theirs[0].double(), params, *batch(theirs[1], np.float64))
    theirs[0].float()
    print(errors)
    assert max(errors.values()) <= 1e-10


def test_the_two_halves_of_a_pipeline_join(theirs, ours, tmp_path):
    """CLIPTextModelWithProjection and CLIPVisionModelWithProjection, each a directory of its own."""
    whole, folder = theirs
    for name, kind in (("text", "CLIPTextModelWithProjection"), ("vision", "CLIPVisionModelWithProjection")):
        config = getattr(whole.config, f"{name}_config")
        config.projection_dim = 8
        half = getattr(transformers, kind)(config)
        half.load_state_dict({k: v for k, v in whole.state_dict().items() if k in half.state_dict()})
        half.save_pretrained(tmp_path / name)
    params, config, words = hf_clip.read_halves(tmp_path / "text", tmp_path / "vision", folder, folder)
    want = weights.load_stack(ours).stages["clip"]
    assert config == want.config.copy_and_resolve_references().unlock() and words.max_len == tiny_clip.LENGTH
    np.testing.assert_allclose(params["logit_scale"], np.log(100), rtol=1e-7)
    params["logit_scale"] = want.params["logit_scale"]
    jax.tree.map(np.testing.assert_array_equal, params, want.params)
    with pytest.raises(UserError, match="holds 'clip_vision_model'; expected 'clip_text_model'"):
        hf_clip.read_halves(tmp_path / "vision", tmp_path / "text", folder, folder)
    alone = weights.load_stack(convert.convert_in("hf-clip", str(tmp_path / "text"), tmp_path / "alone", str(folder)))
    assert alone.stages["clip"].config.model.vision is None
    for part in ("textual", "text_projection"):
        jax.tree.map(np.testing.assert_array_equal, alone.stages["clip"].params[part], want.params[part])
    with pytest.raises(UserError, match="expected 'clip' or 'clip_text_model'"):
        convert.convert_in("hf-clip", str(tmp_path / "vision"), tmp_path / "no", str(folder))


def test_ours_loads_there_and_comes_back_bit_for_bit(theirs, ours, tmp_path):
    convert.convert_out("hf-clip", ours, tmp_path / "theirs")
    back = transformers.CLIPModel.from_pretrained(tmp_path / "theirs")
    for name, tensor in theirs[0].state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)
    again = convert.convert_in("hf-clip", str(tmp_path / "theirs"), tmp_path / "again")
    first, second = (weights.load_stack(path) for path in (ours, again))
    jax.tree.map(np.testing.assert_array_equal, first.stages["clip"].params, second.stages["clip"].params)
    assert first.stages["clip"].config == second.stages["clip"].config
    assert first.stages["clip"].extra["clip_identity"] == second.stages["clip"].extra["clip_identity"]
    tokens, mask, image, pixels = batch(theirs[1])
    with torch.no_grad():
        one, two = (
            model(input_ids=torch.tensor(tokens.astype(np.int64)), pixel_values=pixels) for model in (theirs[0], back)
        )
    torch.testing.assert_close(one.logits_per_image, two.logits_per_image)


def test_the_written_tokenizer_and_preprocessor_are_read_as_meant(theirs, ours, tmp_path):
    convert.convert_out("hf-clip", ours, tmp_path / "theirs")
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    tokens, mask = tokenizer(theirs[1]).encode(PROMPTS, warn=False)
    for text, row, seen in zip(PROMPTS, tokens, mask, strict=True):
        assert written(text, truncation=True)["input_ids"] == row[seen].tolist()
    padded = written(PROMPTS, padding="max_length", truncation=True, return_tensors="np")
    assert padded["input_ids"].shape == (len(PROMPTS), tiny_clip.LENGTH)
    np.testing.assert_array_equal(padded["attention_mask"].astype(bool), mask)
    about = json.loads((tmp_path / "theirs/preprocessor_config.json").read_text())
    np.testing.assert_allclose(about["image_mean"], stages.OPENAI_MEAN)


def test_a_clip_with_a_tokenizer_of_our_own_is_read_there(tmp_path):
    """Its EOS is 2, which transformers takes for "the largest token"; prompts to embeddings, by their classes alone."""
    out = convert.convert_out("hf-clip", tiny_stack.path(), tmp_path / "theirs")
    clip = tasks.load_clip(tiny_stack.path())
    prompts = ["a red circle", "", "a Blue  ring, and a star"]
    tokens, mask = Tokenizer.from_json(clip.tokenizer_json).encode(prompts)
    assert tokens.max() > 2
    z_txt, _ = clip.model.apply({"params": clip.params}, tokens, mask, method="embed_text")
    words = transformers.AutoTokenizer.from_pretrained(out)
    asked = words(prompts, padding="max_length", return_tensors="pt")
    np.testing.assert_array_equal(asked["attention_mask"].numpy().astype(bool), mask)
    with torch.no_grad():
        model = transformers.CLIPModel.from_pretrained(out)
        text = model.text_projection(model.text_model(**asked).pooler_output)
    np.testing.assert_allclose(z_txt, 17.2 * text / text.norm(dim=-1, keepdim=True), rtol=0, atol=1e-4)
    again = tasks.load_clip(convert.convert_in("hf-clip", str(out), tmp_path / "again"))
    tokens, mask = Tokenizer.from_json(again.tokenizer_json).encode(prompts)
    z_again, _ = again.model.apply({"params": again.params}, tokens, mask, method="embed_text")
    np.testing.assert_array_equal(z_again, z_txt)


def test_in_bfloat16_the_temperature_stays_float32(theirs, ours, tmp_path):
    """It is an exponent: rounded to 8 bits, all similarities would be a percent off."""
    out = convert.convert_out("hf-clip", ours, tmp_path / "theirs", "bfloat16")
    back, want = transformers.CLIPModel.from_pretrained(out, dtype=torch.float32), theirs[0].state_dict()
    for name, tensor in back.state_dict().items():
        wanted = want[name] if name == "logit_scale" else want[name].bfloat16().float()
        np.testing.assert_array_equal(tensor.numpy(), wanted.numpy(), err_msg=name)
    again = weights.load_stack(convert.convert_in("hf-clip", str(out), tmp_path / "again")).stages["clip"]
    assert float(again.params["logit_scale"]) == want["logit_scale"].item()


def test_the_bias_of_a_sigmoid_loss_comes_back(tmp_path):
    """transformers, which has no place for it, loads the rest."""
    config = tiny_stack.configs()["clip"]
    config.objective = {"loss": "sigmoid"}
    params = tiny_stack.weights(config)
    words = tiny_stack.tokenizer().to_json()
    stack = weights.save_stack(tmp_path / "stack", {"clip": (params, config, 1, {})}, words, "float32")
    out = convert.convert_out("hf-clip", stack, tmp_path / "theirs")
    _, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    again = weights.load_stack(convert.convert_in("hf-clip", str(out), tmp_path / "again")).stages["clip"]
    assert again.params["logit_bias"] == params["logit_bias"] != 0
    task = tasks.make(again.config)
    assert task.loss_name == "sigmoid"
    assert jax.tree.map(np.shape, again.params) == jax.tree.map(np.shape, params)


def test_defaults_of_the_configs_are_theirs():
    for defaults, config in (
        (hf_clip.TEXT_DEFAULTS, transformers.CLIPTextConfig()),
        (hf_clip.VISION_DEFAULTS, transformers.CLIPVisionConfig()),
    ):
        assert defaults == {key: getattr(config, key) for key in defaults}
