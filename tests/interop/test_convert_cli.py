"""`unclip convert`: what it writes, what trains on it, and that every mistake is one line and writes nothing."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from tests import tiny_stack
from tests.parity import tiny_clip
from unclip_jax import cli, tasks, weights
from unclip_jax.interop import hf_clip
from unclip_jax.interop.layout import views
from unclip_jax.tokenizer import Tokenizer


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run("--from", …) -> (exit code, stdout, lines of stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = cli.main(["convert", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def save(folder, dtype=np.float32, **change):
    """A CLIPModel's directory with random weights, made without torch; `change` goes into its config.json."""
    size = tiny_clip.save_tokenizer(folder)
    about = {**tiny_clip.config(size), **{key: value for key, value in change.items() if "." not in key}}
    for key, value in change.items():
        if "." in key:
            about[key.split(".")[0]][key.split(".")[1]] = value
    (folder / "config.json").write_text(json.dumps(about))
    clip = {"embed_dim": 8, "vision": {"image_size": 16, "patch": 8, "width": 32, "layers": 2, "heads": 4}}
    clip["text"] = {"width": 16, "layers": 2, "heads": 2}
    config = tiny_stack.configs()["clip"]
    with config.unlocked():
        config.model, config.tokenizer = clip, {"vocab_size": size, "max_len": tiny_clip.LENGTH}
    params = jax.tree.map(lambda array: array.astype(np.float32), tiny_stack.weights(config))
    flat = {path: hf_at(params, path).astype(dtype) for path, _, _ in hf_clip.TABLE}
    turned = {name: np.array(array, order="C") for name, array in views(hf_clip.TABLE, flat).items()}
    save_file(turned, folder / "model.safetensors")
    return params


def hf_at(params, path):
    for name in path.split("/"):
        params = params[name]
    return np.asarray(params)


def test_a_directory_becomes_a_stack_with_a_clip(run, tmp_path):
    params = save(tmp_path / "clip-tiny")
    (tmp_path / "clip-tiny/README.md").write_text("---\ntags: [clip]\nlicense: mit\n---\n# CLIP\nlicense: none\n")
    code, out, err = run("--from", "hf-clip", "clip-tiny", "made")
    assert (code, err) == (0, []) and "made: 0.2 MB" in out
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["clip.safetensors", "stack.json", "tokenizer.json"]
    stage = weights.load_stack("made").stages["clip"]
    for path, _, _ in hf_clip.TABLE:
        np.testing.assert_array_equal(hf_at(stage.params, path), hf_at(params, path))
        assert hf_at(stage.params, path).dtype == np.float32
    assert stage.config.model.norm is None and stage.config.model.text.activation == "quick_gelu"
    extra = {"source": "clip-tiny", "format": "hf-clip", "licence": "mit"}
    assert stage.extra == {"clip_identity": tasks.clip_identity(params), **extra}
    assert str(tmp_path) not in (tmp_path / "made/stack.json").read_text()


def test_a_prior_can_be_trained_and_a_clip_exported_with_it(run, tmp_path):
    """What `--config.clip=OUT` and `export --clip OUT` read."""
    save(tmp_path / "theirs")
    run("--from", "hf-clip", "theirs", "made")
    clip = tasks.load_clip("made")
    tokens, mask = Tokenizer.from_json(clip.tokenizer_json).encode(["a red cat"])
    assert tokens.shape == (1, tiny_clip.LENGTH) == mask.shape
    z_txt, states = clip.model.apply({"params": clip.params}, tokens, mask, method="embed_text")
    assert z_txt.shape == (1, 8) and states.shape == (1, tiny_clip.LENGTH, 16) and np.isfinite(z_txt).all()
    assert tasks.load_stage("made", "clip").config.task == "clip"


def test_half_precision_becomes_float32_or_bfloat16(run, tmp_path):
    params = save(tmp_path / "theirs", np.float16)
    for dtype in ("float32", "bfloat16"):
        assert run("--from", "hf-clip", "theirs", dtype, "--dtype", dtype)[0] == 0
        kernel = weights.load_stack(dtype).stages["clip"].params["text_projection"]["kernel"]
        want = params["text_projection"]["kernel"].astype(np.float16).astype(kernel.dtype)
        assert kernel.dtype == dtype and (np.asarray(kernel) == want).all()
    identity = {weights.load_stack(d).stages["clip"].extra["clip_identity"] for d in ("float32", "bfloat16")}
    assert len(identity) == 1


def test_there_and_back_is_bit_for_bit(run, tmp_path):
    save(tmp_path / "theirs")
    run("--from", "hf-clip", "theirs", "made")
    code, out, err = run("--to", "hf-clip", "made", "back")
    assert (code, err) == (0, []) and "back: 0.2 MB" in out
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes()
    about = json.loads((tmp_path / "back/config.json").read_text())
    assert about["text_config"]["eos_token_id"] == about["text_config"]["vocab_size"] - 1
    assert run("--from", "hf-clip", "back", "again")[0] == 0
    first, second = (weights.load_stack(path).stages["clip"] for path in ("made", "again"))
    assert first.config == second.config and first.extra["clip_identity"] == second.extra["clip_identity"]


def test_the_length_of_our_embeddings_survives(run, tmp_path):
    save(tmp_path / "theirs", unclip_jax={"norm": 17.2})
    run("--from", "hf-clip", "theirs", "made")
    assert weights.load_stack("made").stages["clip"].config.model.norm == 17.2


def test_the_tokenizer_cuts_as_theirs(run, tmp_path):
    """CLIP's files in the two forms they come in, against transformers' own class."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    save(tmp_path / "theirs")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "theirs")
    run("--from", "hf-clip", "theirs", "made")
    mine = Tokenizer.from_json((tmp_path / "made/tokenizer.json").read_text())
    texts = ["A RED  cat", "it's 2 cats,\nok?", "", "the hat and the mat " * 9, "cats, 1234 hats!?", "été ☃"]
    tokens, mask = mine.encode(texts, warn=False)
    want = theirs(texts, padding="max_length", max_length=tiny_clip.LENGTH, truncation=True)
    np.testing.assert_array_equal(mask, np.asarray(want["attention_mask"], bool))
    np.testing.assert_array_equal(np.where(mask, tokens, mine.eos), want["input_ids"])
    assert (tokens[~mask] == 0).all() and (tokens[np.arange(len(texts)), mask.sum(1) - 1] == mine.eos).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "siglip"}, "of the type 'siglip'; expected 'clip'"),
        ({"text_config.layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06 must be 1e-05"),
        ({"vision_config.intermediate_size": 96}, "intermediate_size=96 must be 128"),
        ({"vision_config.hidden_act": "relu"}, "hidden_act='relu' is unknown"),
        ({"vision_config.num_attention_heads": 5}, "hidden_size=32 must be a multiple of its 5 heads"),
        ({"vision_config.num_channels": 4}, "num_channels=4 must be 3"),
        ({"vision_config.image_size": 20}, "image_size=20 must be a multiple of"),
        ({"text_config.hidden_size": "16"}, "hidden_size='16' must be a whole number"),
        ({"text_config.num_hidden_layers": 3}, "lacks 16 of the network's arrays"),
        ({"vision_config.patch_size": 4}, "does not fit visual/"),
        ({"text_config.vocab_size": 7}, "the CLIP an embedding of 7"),
        ({"text_config.eos_token_id": 5}, "eos_token_id=5 reads captions at token 5"),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
    ids=str,
)
def test_what_our_clip_is_not_is_refused(run, tmp_path, change, told):
    save(tmp_path / "theirs", **change)
    code, out, err = run("--from", "hf-clip", "theirs", "made")
    assert code == 2 and out == "" and len(err) == 1
    assert err[0].startswith("error: ") and told in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_bad_arguments_and_directories_are_refused_in_one_line(run, tmp_path):
    save(tmp_path / "theirs")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "open").mkdir()
    (tmp_path / "open/open_clip_config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    stack = tiny_stack.path()
    before = sorted(tmp_path.rglob("*"))
    for argv, told in (
        (("--from", "hf-clop", "theirs", "made"), "format 'hf-clop' is unknown. Fix: did you mean 'hf-clip'?"),
        (("--to", "karlo2", stack, "made"), "format 'karlo2' is unknown"),
        (("--from", "hf-clip", "--to", "hf-clip", "theirs", "made"), "not allowed with"),
        (("theirs", "made"), "required"),
        (("--from", "hf-clip", "nowhere/at/all", "made"), "nowhere/at/all does not exist"),
        (("--from", "hf-clip", "theirs", "full"), "full exists. Fix: choose another directory, or ask to replace it"),
        (("--from", "hf-clip", "theirs", "full", "--overwrite"), "full exists and is not a stack"),
        (("--from", "hf-clip", "theirs/model.safetensors", "made"), "expected a directory with config.json"),
        (("--from", "hf-clip", "theirs", "made", "--tokenizer", "full"), "no tokenizer at"),
        (("--from", "hf-clip", "bare", "made"), "give CLIP's with --tokenizer DIR"),
        (("--from", "hf-clip", "bare", "made", "--tokenizer", "theirs"), "holds no weights"),
        (("--from", "hf-clip", "open", "made"), "give --from open-clip"),
        (("--from", "open-clip", "theirs", "made"), "give --from hf-clip"),
        (("--from", "open-clip", "open", "made"), "holds no weights"),
        (("--from", "hf-clip", stack, "made"), "config.json is missing"),
        (("--to", "hf-clip", "theirs", "made"), "theirs is neither a stack nor the workdir of a run. Fix: give"),
        (("--to", "hf-clip", "nowhere", "made"), "nowhere does not exist. Fix: give the workdir of a run of 'clip'"),
        (("--to", "hf-clip", stack, "made", "--tokenizer", "theirs"), "--tokenizer is for --from"),
        (("--from", "hf-clip", "theirs", "made", "--dtype", "float16"), "float16"),
        (("--from", "karlo", "theirs", "made"), "theirs is in another format than karlo. Fix: give --from hf-clip"),
        (("--from", "hf-clip", "theirs", "made", "--sha256", "ab" * 32), "a SHA-256 is of one file"),
        (("--from", "open-clip", "theirs/model.safetensors", "made", "--sha256", "ab" * 32), "not abababab"),
        (("--from", "open-clip", "theirs/model.safetensors", "made", "--sha256", "abc"), "64 hexadecimal digits"),
        (("--to", "hf-clip", stack, "made", "--sha256", "ab" * 32), "--sha256 is for --from"),
    ):
        code, out, err = run(*argv)
        assert (code, out, len(err)) == (2, "", 1), (argv, err)
        assert err[0].startswith("error: ") and told in err[0], (argv, err)
        assert sorted(tmp_path.rglob("*")) == before, argv


def test_unsound_weights_are_refused_and_nothing_is_written(run, tmp_path):
    save(tmp_path / "theirs")
    arrays = load_file(tmp_path / "theirs/model.safetensors")
    name, sound = "visual_projection.weight", arrays["visual_projection.weight"]
    for other, told in ((sound * np.nan, "holds NaN"), (np.int8(100 * sound), "is int8, and weights are floating")):
        save_file({**arrays, name: other}, tmp_path / "theirs/model.safetensors")
        code, _, err = run("--from", "hf-clip", "theirs", "made")
        assert code == 2 and f"{name} {told}" in err[0]
        assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_overwrite_replaces_a_stack(run, tmp_path):
    save(tmp_path / "theirs")
    assert run("--from", "hf-clip", "theirs", "made")[0] == 0
    code, _, err = run("--from", "hf-clip", "theirs", "made")
    assert code == 2 and "exists" in err[0]
    assert run("--from", "hf-clip", "theirs", "made", "--overwrite")[0] == 0
    assert run("--to", "hf-clip", "made", "back")[0] == run("--to", "hf-clip", "made", "back", "--overwrite")[0] == 0
    code, _, err = run("--to", "hf-clip", "made", "theirs", "--overwrite")
    assert code == 2 and "is the work of others" in err[0] and (tmp_path / "theirs/vocab.json").is_file()
    (tmp_path / "pictures").mkdir()
    code, _, err = run("--to", "hf-clip", "made", "pictures", "--overwrite")
    assert code == 2 and "is the work of others" in err[0] and (tmp_path / "pictures").is_dir()
    assert tokenizers.Tokenizer.from_file("back/tokenizer.json").token_to_id("<|endoftext|>") is not None


def test_a_temperature_above_clip_s_limit_is_told(run, tmp_path):
    save(tmp_path / "theirs")
    arrays = load_file(tmp_path / "theirs/model.safetensors")
    arrays["logit_scale"] = np.array(5, np.float32)
    save_file(arrays, tmp_path / "theirs/model.safetensors")
    code, _, err = run("--from", "hf-clip", "theirs", "made")
    assert code == 0 and len(err) == 1 and "warning: logit_scale=5 counts as ln 100" in err[0]
