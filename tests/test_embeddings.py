"""Embeddings worked out once: the same numbers as through the frozen CLIP, the same training."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from unclip_jax import data, tasks
from unclip_jax.data import loader
from unclip_jax.data.folder import held_out
from unclip_jax.data.show import contact_sheet
from unclip_jax.embed import embed
from unclip_jax.errors import UserError
from unclip_jax.tokenizer import Tokenizer

WORDS = {"source": "shapes", "size": 16, "seed": 3, "length": 150}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("embed") / "out"
    return embed(out, tiny_stack.path(), WORDS, batch_size=32, states=True)


@pytest.mark.slow
def test_records_are_what_clip_says_of_each_picture(folder):
    clip = tasks.load_clip(tiny_stack.path())
    tokenizer, source = Tokenizer.from_json(clip.tokenizer_json), data.make(**WORDS)
    embedded = data.make("embeddings", size=16, path=str(folder))
    assert len(embedded) == 150 and len(data.make("embeddings", "test", size=16, path=str(folder))) == 150
    for i in (0, 31, 32, 149):
        tokens, mask = tokenizer.encode([source[i]["caption"]])
        image = data.images.to_float(source[i]["image"])[None]
        z_txt, states = clip.model.apply({"params": clip.params}, tokens, mask, method="embed_text")
        z_img = clip.model.apply({"params": clip.params}, image, method="embed_image")
        record = embedded[i]
        np.testing.assert_array_equal(record["tokens"], tokens[0])
        np.testing.assert_array_equal(record["mask"], mask[0])
        for name, value in (("z_img", z_img), ("z_txt", z_txt), ("states", states)):
            np.testing.assert_allclose(record[name], value[0], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_records(folder):
    embedded = data.make("embeddings", size=16, path=str(folder))
    z = np.stack([embedded[i]["z_img"] for i in range(150)]).astype(np.float64)
    said = json.loads((folder / "embeddings.json").read_text())["z_img"]
    np.testing.assert_allclose(said["mean"], z.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(said["std"], z.std(0), rtol=1e-6, atol=1e-9)


def test_a_folder_is_known_by_its_records(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    own, copy = (data.make("embeddings", size=16, path=str(path)) for path in (folder, tmp_path / "copy"))
    other = data.make("embeddings", "test", size=16, path=str(folder))
    assert own.digest(200) == copy.digest(200) and len({own.digest(1), own.digest(2), other.digest(2)}) == 3


def test_a_clip_that_computes_in_bf16_leaves_f32(folder, tmp_path, monkeypatch):
    frozen = tasks.load_clip(tiny_stack.path())
    half = frozen._replace(model=frozen.model.clone(dtype="bfloat16"))
    monkeypatch.setattr(tasks, "load_clip", lambda _: half)
    out = embed(tmp_path / "out", "of bf16", {**WORDS, "length": 32}, ("train",), batch_size=32, states=True)
    half, whole = (data.make("embeddings", size=16, path=str(path)) for path in (out, folder))
    for name in ("z_img", "z_txt", "states"):
        a, b = half[3][name], whole[3][name]
        assert a.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max(), name


@pytest.mark.slow
def test_a_prior_trains_from_them_as_through_the_frozen_clip(folder):
    clip = tasks.load_clip(tiny_stack.path())
    task = tasks.make(tiny_stack.configs()["prior"], clip.model)
    pictures = loader.batches(data.make(**WORDS), Tokenizer.from_json(clip.tokenizer_json), 16, seed=5)
    embedded = loader.batches(data.make("embeddings", size=16, path=str(folder)), None, 16, seed=5)
    encode = jax.jit(task.encode)
    batches = [encode({"clip": clip.params}, next(source)) for _ in range(2) for source in (pictures, embedded)]
    params = task.init(jax.random.key(0))
    # The gradient in f64, so that only what f32 rounds in the embeddings is told apart.
    with jax.enable_x64():
        task = dataclasses.replace(task, model=task.model.clone(dtype=np.float64))
        gradient = jax.jit(jax.value_and_grad(lambda params, batch: task.loss(params, batch, jax.random.key(1))[0]))
        got = [gradient(*jax.tree.map(in_f64, (params, batch))) for batch in batches]
    for through, direct in (got[:2], got[2:]):
        for a, b in zip(*map(jax.tree.leaves, (through, direct)), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def in_f64(a):
    return np.asarray(a, np.float64 if a.dtype == np.float32 else a.dtype)


def test_an_interrupted_call_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    from unclip_jax import embed as module

    monkeypatch.setattr(module, "SHARD_BATCHES", 2)
    write, files = module._write_records, []

    def stop_at_third(file, records):
        if len(files) == 2:
            raise KeyboardInterrupt
        files.append(file)
        write(file, records)

    monkeypatch.setattr(module, "_write_records", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "o", tiny_stack.path(), WORDS, ("train",), 32)
    with pytest.raises(UserError, match="holds no embeddings"):
        data.make("embeddings", size=16, path=str(tmp_path / "o"))
    with pytest.raises(UserError, match="begun with another"):
        embed(tmp_path / "o", tiny_stack.path(), WORDS, ("train",), 16)
    monkeypatch.setattr(module, "_write_records", write)
    out = embed(tmp_path / "o", tiny_stack.path(), WORDS, ("train",), 32)
    a, b = (data.make("embeddings", size=16, path=str(path)) for path in (folder, out))
    for i in range(150):
        np.testing.assert_array_equal(a[i]["z_img"], b[i]["z_img"])
    with pytest.raises(UserError, match="holds finished embeddings"):
        embed(out, tiny_stack.path(), WORDS, ("train",), 32)


def test_pictures_are_of_the_size_that_the_clip_sees_unless_said(folder, tmp_path, recwarn, monkeypatch):
    frozen = tasks.load_clip(tiny_stack.path())
    frozen = frozen._replace(model=frozen.model.clone(vision={**frozen.model.vision, "image_size": 32}))
    words = {name: value for name, value in WORDS.items() if name != "size"}
    out = embed(tmp_path / "out", tiny_stack.path(), {**words, "length": 32}, ("train",), batch_size=32)
    assert not [w for w in recwarn if "enlarged" in str(w.message)]
    usual, whole = (data.make("embeddings", size=16, path=str(path)) for path in (out, folder))
    np.testing.assert_allclose(usual[3]["z_img"], whole[3]["z_img"], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(tasks, "load_clip", lambda _: frozen)
    with pytest.warns(UserWarning, match="pictures of 16 pixels are enlarged for the CLIP in large, which sees 32"):
        with pytest.raises(UserError, match="already"):
            embed(tmp_path / "few", "large", {"source": "embeddings", "path": str(folder), "size": 16}, ("train",))


def test_a_split_that_is_empty_is_left_out_by_name(tmp_path):
    name = next(f"{k}.png" for k in range(9) if not held_out(f"{k}.png"))
    (tmp_path / "few").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "few" / name)
    (tmp_path / "few" / name).with_suffix(".txt").write_text("black")
    with pytest.raises(UserError, match="the split 'test' of .* is empty. Fix: leave it out: --splits train$"):
        embed(tmp_path / "out", tiny_stack.path(), {"source": "folder", "path": str(tmp_path / "few"), "size": 16})


def test_mistakes_are_user_errors(folder, tmp_path):
    def refused(match, **kw):
        with pytest.raises(UserError, match=match):
            data.make("embeddings", **{"size": 16, "path": str(folder), **kw})

    source = {"source": "embeddings", "path": str(folder), "size": 16}
    with pytest.raises(UserError, match="are embeddings already"):
        embed(tmp_path / "again", tiny_stack.path(), source, ("train",))
    with pytest.raises(UserError, match="holds embeddings, and pictures are shown"):
        contact_sheet(data.make(**source), 2, 2, tmp_path / "s.png")
    refused("needs data.path", path="")
    refused("holds no embeddings", path=str(tmp_path))
    refused("data.split='tset' was not embedded.*test", split="tset")
    meta = json.loads((folder / "embeddings.json").read_text())
    odd = [{"z": ["<f3", [1]]}, {"z": ["<f4", [1] * 99]}, {"z": ["<f4", [2**32, 2**32]]}]
    for change in ({"z": ["O", [1]]}, {"z": ["<f4", [0]]}, {"z": 4}, None, *odd):
        (tmp_path / "embeddings.json").write_text(json.dumps({**meta, "fields": change}))
        refused("not what", path=str(tmp_path))
    for name, change in {"version": {"version": 9}, "not what": {"splits": {"train": "9"}}, "holds 0": {}}.items():
        (tmp_path / "embeddings.json").write_text(json.dumps({**meta, **change}))
        refused(name, path=str(tmp_path))
    (tmp_path / "embeddings.json").write_text("{")
    refused("not readable JSON", path=str(tmp_path))
    shutil.copytree(folder, tmp_path / "cut")
    for cut in (b"", b"no records" * 10_000):
        next((tmp_path / "cut").glob("train-*")).write_bytes(cut)
        refused("holds no records of 'train' that can be read", path=str(tmp_path / "cut"))
