"""`unclip convert --from glide`: what is refused and named, the tokenizer, and what a stack without a CLIP does."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop import glide_files as files
from tests.interop.glide_files import small  # noqa: F401 (fixture)
from unclip_jax import cli, tasks
from unclip_jax.errors import UserError
from unclip_jax.interop import glide, layout, stages
from unclip_jax.interop.files import Source
from unclip_jax.pipeline import UnCLIP
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import load_stack

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run("theirs", "made") -> (exit code, lines of stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = cli.main(["convert", "--from", "glide", *argv])
        return code, capsys.readouterr().err.splitlines()

    return run


def expected(name, vocab):
    config = files.config(name, vocab)
    shapes = stages.network_shapes(config)
    return layout.expected(glide.table(shapes, config.model.unet.blocks), shapes)


@pytest.fixture(scope="module")
def published(small):  # noqa: F811
    """{"base": arrays, "upsample": arrays} of a file's names and shapes."""
    rng, vocab = np.random.default_rng(0), len(files.MERGES) + 257
    draw = lambda shape: (rng.standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float16)  # noqa: E731
    return {
        stem: {key: draw(shape) for key, shape in expected(name, vocab).items()} for name, stem in glide.FILES.items()
    }


def save(folder, arrays, packed=True):
    files.save_tokenizer(folder, packed)
    for stem, content in arrays.items():
        save_file(content, folder / f"{stem}.safetensors")


def test_it_becomes_a_stack_without_a_clip(run, tmp_path, published):
    save(tmp_path / "theirs", published)
    (tmp_path / "theirs/README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert run("theirs", "made") == (0, [])
    made = sorted(p.name for p in (tmp_path / "made").iterdir())
    assert made == ["decoder.safetensors", "stack.json", "tokenizer.json", "upsampler.safetensors"]
    stack = load_stack("made")
    assert stack.stages["decoder"].extra == {"source": "theirs", "format": "glide", "licence": "cc-by-4.0"}
    query = stack.stages["decoder"].params["net"]["mid_attn"]["query"]["kernel"]
    fused = published["base"]["middle_block.1.qkv.weight"][..., 0].astype(np.float32)
    head = files.UNET["head_channels"]
    for k in range(query.shape[1]):
        np.testing.assert_array_equal(query[:, k], fused[3 * k * head : (3 * k + 1) * head].T)
    pipe = UnCLIP.load("made")
    assert list(pipe.tasks) == ["decoder", "upsampler"] and pipe.upsamplers == ["upsampler"]
    with pytest.raises(UserError, match="decoder knows no CLIP, so it cannot look at pictures"):
        pipe.variations([np.zeros((8, 8, 3), np.uint8)])


def test_the_upsampler_may_be_left_out(run, tmp_path, published):
    save(tmp_path / "theirs", {"base": published["base"]}, packed=False)
    assert run("theirs", "made", "--dtype", "bfloat16") == (0, [])
    assert list(load_stack("made").stages) == ["decoder"] and UnCLIP.load("made").size == files.SIDES["decoder"]


def for_inpainting(published):
    """Arrays of the two networks for inpainting, whose first layers see four channels more."""
    made = {stem: dict(content) for stem, content in published.items()}
    for content in made.values():
        stem = content["input_blocks.0.0.weight"]
        content["input_blocks.0.0.weight"] = np.concatenate([stem, stem[:, :1], stem[:, :3]], axis=1)
    return {f"{stem}_inpaint": content for stem, content in made.items()}


@pytest.mark.parametrize(
    ("stems", "read"),
    [
        ("base upsample base_inpaint upsample_inpaint", "base upsample"),
        ("base base_inpaint upsample_inpaint", "base upsample_inpaint"),
        ("base_inpaint upsample upsample_inpaint", "base_inpaint upsample_inpaint"),
        ("base_inpaint upsample", "base_inpaint upsample"),
    ],
)
def test_the_upsampler_is_of_the_decoders_kind_where_there_are_both(tmp_path, published, stems, read):
    arrays = {**published, **for_inpainting(published)}
    save(tmp_path, {stem: arrays[stem] for stem in stems.split()})
    stages_read = dict(glide.read_stack(Source(tmp_path, "theirs")).stages)
    assert list(stages_read) == ["decoder", "upsampler"]
    for stem, (name, (params, config, *_)) in zip(read.split(), stages_read.items(), strict=True):
        inpaint = stem.endswith("_inpaint")
        assert config.objective.get("inpaint", False) is inpaint
        assert params["net"]["stem"]["kernel"].shape[2] == glide.CHANNELS[name] + 4 * inpaint
        sampling = {"decoder": {"guidance": 5.0}, "upsampler": {"name": "ddpm"}}[name] if inpaint else {}
        assert config.sampler.to_dict() == {**glide.STAGES[name]["sampler"], **sampling}


@pytest.mark.slow
@pytest.mark.parametrize("sees", [True, False])
def test_a_hole_is_painted_from_a_prompt_alone(run, tmp_path, published, sees):
    """By the network for inpainting, which sees the rest of the picture, and by the other one; there is no prior."""
    save(tmp_path / "theirs", for_inpainting(published) if sees else {"base": published["base"]})
    assert run("theirs", "made") == (0, [])
    pipe = UnCLIP.load("made")
    assert {task.inpaint for task in pipe.tasks.values()} == {sees} and pipe.prompted
    side, rng = pipe.size, np.random.default_rng(0)
    image, hole = rng.integers(0, 256, (side, side, 3), np.uint8), np.zeros((side, side), bool)
    hole[side // 4 : -side // 4, side // 4 : -side // 4] = True
    other = np.where(hole[..., None], image, 255 - image)
    options = dict(steps=2, resample=1, progress=False, return_stages=True, upsample_steps=2 if sees else None)
    drawn = pipe.inpaint([image, image, other], [hole] * 3, ["a cat", "the cat", "a cat"], 3, **options)
    first, *rest = drawn.images
    np.testing.assert_array_equal(first[~hole], image[~hole])
    for picture in (image, *rest):
        assert (first[hole] != picture[hole]).any()
    with pytest.raises(UserError, match="cannot look at pictures"):
        pipe.inpaint([image], [hole], None)


@pytest.mark.parametrize(
    ("stem", "name", "change", "told"),
    [
        ("base", "padding_embedding", None, "lacks 1 of the network's arrays: padding_embedding"),
        ("upsample", "transformer_proj.bias", None, "lacks 1 of the network's arrays: transformer_proj.bias"),
        ("base", "unemb.weight", (3, 3), "has unknown 1 of the network's arrays: unemb.weight"),
        ("base", "middle_block.1.qkv.weight", (32, 96, 1), "middle_block.1.qkv.weight has the shape (32, 96, 1)"),
        ("base", "token_embedding.weight", (9, 24), "token_embedding.weight has the shape (9, 24)"),
        ("base", "transformer.resblocks.1.mlp.c_fc.weight", (24, 96), "c_fc.weight has the shape (24, 96)"),
        ("base", "input_blocks.0.0.weight", (16, 7, 3, 3), "base sees 7 channels and not 3; networks for inpainting"),
        ("upsample", "input_blocks.0.0.weight", (16, 10, 3, 3), "upsample sees 10 channels and not 6"),
        ("base", "out.2.bias", "nan", "out.2.bias holds NaN"),
    ],
)
def test_what_is_not_glide_is_named_and_nothing_written(run, tmp_path, published, stem, name, change, told):
    arrays = {key: dict(content) for key, content in published.items()}
    if change is None:
        arrays[stem].pop(name)
    else:
        given = np.full(6, np.nan) if change == "nan" else np.ones(change)
        arrays[stem][name] = given.astype(np.float32)
    save(tmp_path / "theirs", arrays)
    code, err = run("theirs", "made")
    assert code == 2 and len(err) == 1 and told in err[0], err
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_what_a_directory_lacks_is_named(run, tmp_path, published):
    save(tmp_path / "inpaint", {"base_inpaint": published["base"]})
    save(tmp_path / "wordless", {"base": published["base"]})
    (tmp_path / "wordless/vocab.bpe.gz").unlink()
    save(tmp_path / "torn", {"base": published["base"]})
    (tmp_path / "torn/encoder.json.gz").write_bytes(b"\x1f\x8b torn")
    (tmp_path / "empty").mkdir()
    for folder, told in (
        ("inpaint", "base_inpaint sees 3 channels and not 7"),
        ("wordless", "has no encoder.json.gz and vocab.bpe.gz"),
        ("torn", "do not make a tokenizer"),
        ("empty", "empty has no base.pt and no base_inpaint.pt"),
        ("wordless/base.safetensors", "is a file; expected a directory with base.pt"),
    ):
        code, err = run(folder, "made")
        assert code == 2 and len(err) == 1 and told in err[0], (folder, err)
        assert not (tmp_path / "made").exists()
    assert run("wordless", "made", "--tokenizer", "inpaint") == (0, [])


def test_captions_have_no_marks_and_are_cut_at_the_end(tmp_path):
    vocab = files.save_tokenizer(tmp_path)
    words = Tokenizer.from_json(glide.load_tokenizer(tmp_path).to_json())
    assert words.vocab_size == vocab and words.pad == vocab - 1
    tokens, mask = words.encode(["A red CAT", "", "the cat " * 20], warn=False)
    assert mask.sum(1).tolist() == [3, 0, files.LENGTH] and (tokens[~mask] == vocab - 1).all()
    assert words.decode(tokens)[:2] == ["a red cat", ""]
    with pytest.warns(UserWarning, match="12 fit"):
        words.encode(["the cat " * 20])


def test_the_tokenizer_cuts_as_gpt_2_s(tmp_path):
    """transformers' class of the same form, which is given lower-case texts."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    files.save_tokenizer(tmp_path, packed=False)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    mine = glide.load_tokenizer(tmp_path, 64)
    texts = ["A RED  cat", "it's 2 cats,\nok? ", " the cat's redder!?", "1234 ab12", "été ☃\t the  "]
    tokens, mask = mine.encode(texts)
    for row, seen, text in zip(tokens, mask, texts, strict=True):
        assert row[seen].tolist() == theirs(text.lower())["input_ids"], text


def test_a_packed_bomb_is_not_unpacked(tmp_path, monkeypatch):
    files.save_tokenizer(tmp_path)
    monkeypatch.setattr(glide, "MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match="holds more than 100 bytes"):
        glide.load_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_both_can_be_trained_on(name):
    """The loss of a batch is finite, and each caption moves it: its gradient reaches the caption's Transformer."""
    task, rng = tasks.make(files.config(name, 40)), np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    side = files.SIDES[name]
    tokens = rng.integers(0, 40, (2, files.LENGTH)).astype(np.int32)
    batch = {"image": rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32), "tokens": tokens, "mask": tokens >= 0}

    def loss(params):
        return task.loss(params, task.encode({}, batch), jax.random.key(1))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and np.abs(grads["caption"]["embed"]["embedding"]).max() > 0


def test_a_decoder_with_neither_clip_nor_transformer_is_refused():
    config = files.config("decoder", 40)
    with config.unlocked(), config.model.ignore_type():
        config.model.text = None
    with pytest.raises(UserError, match="there is no CLIP. Fix: give model.text"):
        tasks.make(config)
    config = files.config("decoder", 40)
    del config.model.embed_dim
    with pytest.raises(UserError, match="task decoder needs a trained CLIP"):
        tasks.make(config)
