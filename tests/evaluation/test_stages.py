"""evaluation.stages: CLIP, prior, decoder and upsampler of tiny runs, against numbers computed another way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny_runs, tiny_stack
from tests.bound import bpd
from unclip_jax import cli, tasks
from unclip_jax.data import shapes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import clip, stages, trained
from unclip_jax.interop.stages import clip_config, clip_stage
from unclip_jax.metrics import probes
from unclip_jax.weights import save_stack


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: workdir} with random weights."""
    root, made = tmp_path_factory.mktemp("runs"), {"clip": str(tiny_runs.folder() / "clip")}
    for name in ("prior_diffusion", "decoder"):
        config = tiny_runs.config(name, diffusion__num_steps=20)
        clip = tasks.load_clip(config.clip)
        with config.unlocked():
            config.clip_identity = clip.identity
        params = tiny_stack.weights(config, clip.model)
        tiny_runs.save(root / name, config, params, clip.tokenizer_json)
        made[name] = str(root / name)
    return made


def tables(report):
    return {table.title: table for table in report.tables}


@pytest.mark.parametrize("num", [0, -1, 2.5, "5"])
def test_a_number_of_examples_that_is_none_is_refused(num):
    with pytest.raises(UserError, match=f"num={num!r} must be a whole number of at least 1"):
        stages.measure("nowhere", num)


@pytest.mark.slow
def test_clip_is_measured_by_what_its_embeddings_say(runs):
    report = stages.measure(runs["clip"], num=16, seed=3)
    own = trained.load(runs["clip"])
    order = np.random.default_rng(3).permutation(len(own.source))[:16]
    records = [own.source[int(i)] for i in order]
    tokens, mask = own.tokenizer.encode([r["caption"] for r in records], warn=False)
    images = np.stack([r["image"] for r in records]) / 127.5 - 1
    apply = lambda method, *x: own.task.model.apply({"params": own.params}, *x, method=method)  # noqa: E731
    z_img = np.asarray(apply("embed_image", images.astype(np.float32)))
    z_txt = np.asarray(apply("embed_text", tokens, mask)[0])
    expected = probes.recall(z_img, z_txt)
    rows = {row[0]: row[1] for row in tables(report)["Retrieval among 16"].rows}
    assert rows["image to text recall@5"] == expected["image_to_text"][5]
    assert rows["text to image recall@10"] == expected["text_to_image"][10]
    title = next(t for t in tables(report) if t.startswith("Classification"))
    assert title == "Classification of 16 into 42 classes"
    names = [row[0] for row in tables(report)[title].rows]
    assert names[0] == "zero-shot, 5 templates, top-1" and names[2].startswith("linear probe on 64 of 'train'")
    json.dumps(report.facts)


def test_a_converted_clip_is_measured_on_a_given_source(tmp_path):
    """Its config tells of no data and no training."""
    words = tiny_stack.tokenizer()
    model = {**tiny_stack.configs()["clip"].model.to_dict(), "norm": None}
    config = clip_config(model, words, words.vocab_size)
    converted = clip_stage(tiny_stack.weights(config), config, "someone/clip", "hf-clip")
    save_stack(tmp_path / "s", {"clip": converted}, words.to_json(), "float32")
    with pytest.raises(UserError, match="the stage clip was converted, .* give --data SOURCE"):
        stages.measure(tmp_path / "s", num=8, stage="clip")
    found = tables(stages.measure(tmp_path / "s", num=8, stage="clip", source="shapes"))
    names = [row[0] for row in found["Classification of 64 into 42 classes"].rows]
    assert len(found["Retrieval among 64"].rows) == 6 and all(name.startswith("zero-shot") for name in names)


def test_captions_are_asked_of_the_stages_that_learn_from_them_alone(tmp_path):
    for k in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{k}.png")
    given = dict(source="folder", path=str(tmp_path))
    for stage in ("clip", "prior", "decoder"):
        with pytest.raises(UserError, match="none of the 3 pictures in .* has a caption"):
            trained.load(tiny_stack.path(), stage=stage, **given)
    own = trained.load(tiny_stack.path(), stage="upsampler", **given)
    assert len(own.source) == 3 and next(own.batches(0))["image"].shape == (4, 32, 32, 3)


def test_classes_are_of_scenes_captions_or_folders():
    source = shapes.Shapes("train", 32)
    names, label = clip.labeller(source, None)
    lone = next(i for i in range(50) if len(source.scene(i).objects) == 1)
    crowd = next(i for i in range(50) if len(source.scene(i).objects) == 2)
    thing = source.scene(lone).objects[0]
    assert names[label(source, lone, None)] == f"{thing.colour} {thing.shape}" and len(names) == 42
    assert label(source, crowd, None) is None
    names, label = clip.labeller(source, ["Cat", "cattle", "red dog"])
    of = lambda text: label(source, 0, {"caption": text})  # noqa: E731
    assert [of("A cat."), of("the CATTLE!"), of("a red dog")] == [0, 1, 2]
    assert of("a dog") is None and of("a cat, a red dog") is None

    class Files:
        records = [("b/1.png", ""), ("a/x/2.png", "")]

    names, label = clip.labeller(Files, None)
    assert names == ["a", "b"] and label(None, 0, {"file": "b/9.png"}) == 1


@pytest.mark.slow
def test_the_prior_is_measured_by_guidance_and_steps(runs):
    report = stages.measure(runs["prior_diffusion"], num=8, sweep=["guidance=1,3", "steps=4"])
    rows = tables(report)["Cosine with the true z_img"].rows
    assert [row[:3] for row in rows] == [[1.0, 4, 2], [3.0, 4, 2]]
    assert rows[0][3] != rows[1][3] and rows[0][4:] == rows[1][4:]
    own = trained.load(runs["prior_diffusion"])
    task = dataclasses.replace(own.task, sampler={**own.task.sampler, "guidance": 3.0, "steps": 4})
    found = tasks.measurer(task)(own.frozen, own.params, own.batches(0), 1)
    assert rows[1][3] == pytest.approx(found["cosine"], rel=1e-5)


@pytest.mark.slow
def test_the_decoders_bits_are_those_of_the_whole_bound(runs):
    """Ten tenths of two steps each, against a pass over all twenty steps."""
    report = stages.measure(runs["decoder"], num=64)
    found = tables(report)["Bits/dim"].rows[0]
    own = trained.load(runs["decoder"])

    @jax.jit
    def exact(batch):
        batch = own.task.encode(own.frozen, batch)
        keep = jnp.ones(batch["image"].shape[0], bool)
        cond = own.task.condition(own.params, batch, keep, keep)
        net = own.task.model
        from unclip_jax.tasks.pictures import split_variance

        denoise = lambda xt, time: split_variance(  # noqa: E731
            net.apply({"params": own.params}, xt, time, cond, method="denoise")
        )
        return bpd(own.task.schedule, denoise, batch["image"], jax.random.key(1), target=own.task.target)

    stream = own.batches(0)
    parts = [jax.device_get(exact(next(stream))) for _ in range(8)]
    total, end = (np.mean([p[key] for p in parts]) for key in ("total", "prior"))
    assert found[1] == pytest.approx(end, rel=1e-4)
    assert found[0] == pytest.approx(total, rel=0.1)
    rows = tables(report)["Error by time"].rows
    assert [row[0] for row in rows][:2] == ["0 – 1", "2 – 3"] and len(rows) == 10
    assert all(a[1] > b[1] for a, b in zip(rows, rows[1:], strict=False))


def test_the_error_by_time_is_that_of_the_loss_at_these_times(runs):
    own = trained.load(runs["decoder"])
    task = dataclasses.replace(own.task, clip_drop=0.0, text_drop=0.0)
    batch = jax.jit(task.encode)(own.frozen, next(own.batches(0)))
    loss = jax.jit(lambda t, key: task.loss(own.params, batch, key, t)[1]["mse"])
    at = [float(loss(jnp.full(8, t), jax.random.key(0))) for t in (0, 19)]
    mixed = float(loss(jnp.array([0] * 4 + [19] * 4), jax.random.key(0)))
    assert min(at) < mixed < max(at)


BAD = {
    "step": (["--step", "7"], "7"),
    "templates of a prior": (["--templates", "good.txt"], "--templates is for a run of 'clip'"),
    "sweep of a prior": (["--sweep", "sampler=ddim"], "'sampler' is unknown"),
    "sweep beyond": (["--sweep", "steps=21"], "21"),
    "template": (["--templates", "bad.txt"], "must hold {} once"),
    "classes empty": (["--classes", "empty.txt"], "is empty"),
    "classes missing": (["--classes", "no.txt"], "no.txt is missing"),
    "classes twice": (["--classes", "twice.txt"], "more than once"),
    "path of no source": (["--path", "pictures"], "give --data SOURCE as well"),
    "classes latin": (["--classes", "latin.txt"], "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(case, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {"good": "a {}", "bad": "a photo", "empty": " \n", "twice": "cat\ncat"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("año".encode("latin-1"))
    argv, words = BAD[case]
    assert cli.main(["evaluate", "--checkpoint", runs["prior_diffusion"], "--num", "8", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and words in err


def test_classes_that_no_caption_names_are_told(runs, tmp_path):
    (tmp_path / "c.txt").write_text("cat\ndog")
    with pytest.raises(UserError, match="has any of the classes"):
        stages.measure(runs["clip"], num=8, classes=str(tmp_path / "c.txt"))


def test_the_command_prints_and_writes(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--checkpoint", runs["prior_diffusion"], "--num", "8", "--out", "p.json"]) == 0
    out = capsys.readouterr().out
    assert "prior_diffusion at step 1" in out and "text embedding" in out
    facts = json.loads((tmp_path / "p.json").read_text())
    assert facts["n"] == 8 and facts["results"][0]["columns"][0] == "guidance"
