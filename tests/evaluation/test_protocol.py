"""evaluation.protocol and `unclip evaluate` of pictures: the numbers, resuming, devices, references, mistakes."""

import functools
import json
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from unclip_jax import cli, data
from unclip_jax.data import shapes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features, pictures, plot, protocol, reference, sweep, work
from unclip_jax.metrics import distances, manifold, scores
from unclip_jax.metrics.shapes_oracle import score
from unclip_jax.pipeline import UnCLIP

ROOT = Path(__file__).resolve().parents[2]
N = 10
CLIP_METRICS = "fid,kid,precision_recall,cmmd,clip_score,shapes_oracle"


load = UnCLIP.load


@functools.cache
def stack():
    return load(tiny_stack.path())


@functools.cache
def network() -> features.Network:
    """A network that is no network: 6 numbers of a picture, which numpy can compute as well."""

    def see(params, images):
        x = images.astype(np.float32) / 255
        return {"features": jax.numpy.concatenate([x.mean((1, 2)), x[:, ::2].std((1, 2))], -1) * params["scale"]}

    return features.Network("clip", "moments", 6, see, {"scale": np.float32(3)})


def seen(images):
    x = images.astype(np.float64) / 255
    return 3 * np.concatenate([x.mean((1, 2)), x[:, ::2].std((1, 2))], -1)


def texts(captions):
    return np.stack([np.random.default_rng(len(c)).standard_normal(6) for c in captions]).astype(np.float32)


class World(pictures.DrawnPictures):
    """Pictures of the shapes world as if drawn; counts how many are asked for."""

    def __init__(self, num, seed):
        self.source, self.asked = shapes.Shapes("test", 32, seed), []
        super().__init__(self.make, [self.source[i]["caption"] for i in range(num)], 32, {"seed": seed})

    def make(self, captions, first):
        self.asked.append(first)
        return np.stack([self.source[first + i]["image"] for i in range(len(captions))])


def plan(metrics=CLIP_METRICS, **more):
    return protocol.Protocol(metrics.split(","), {"clip": network()}, texts, **{"replicates": 5, **more})


def measured(tmp, own=None, num=40):
    own = own or plan()
    drawn = World(num, 1)
    real = pictures.RealPictures(shapes.Shapes("test", 32, 2), num, {"data": "shapes", "size": 32})
    folder = work.Work(tmp)
    known = reference.of_series(own.look("real", real, folder), own.networks, "clip")
    return own.measure(own.look("drawn", drawn, folder), known), drawn, known


@pytest.fixture
def blocks_of_16(monkeypatch):
    monkeypatch.setattr(work, "BLOCK", 16)


def test_every_number_is_that_of_the_metric_over_all_pictures(tmp_path, blocks_of_16):
    found, drawn, _ = measured(tmp_path)
    ours = np.stack([drawn.source[i]["image"] for i in range(40)])
    real = np.stack([shapes.Shapes("test", 32, 2)[i]["image"] for i in range(40)])
    x, y = seen(real), seen(ours)
    mean = lambda a: (a.mean(0), np.cov(a, rowvar=False))  # noqa: E731
    verdicts = [score(image, caption) for image, caption in zip(ours, drawn.captions, strict=True)]
    precision, recall = manifold.precision_recall(x, y, 3)
    expected = {
        "FD-CLIP": distances.frechet(*mean(x), *mean(y)),
        "KID-CLIP": 1000 * distances.kid(x, y)[0],
        "precision (CLIP)": precision,
        "recall (CLIP)": recall,
        "CMMD": distances.cmmd(x, y),
        "CLIP score (100 cos)": 100 * scores.cosines(y, texts(drawn.captions)).mean(),
        "oracle: right": np.mean([v["right"] for v in verdicts]),
        "oracle: count": np.mean([v["count"] for v in verdicts]),
    }
    rows = {row.name: row for row in found.rows}
    for name, value in expected.items():
        assert rows[name].value == pytest.approx(value, rel=1e-4, abs=1e-6), name
        if rows[name].low is not None:
            assert rows[name].low <= rows[name].value <= rows[name].high
    assert rows["oracle: right"].n == 40 and rows["oracle: right"].value > 0.9
    assert found.samples.shape == (16, 32, 32, 3) and found.captions == drawn.captions[:16]
    assert not any("rank" in text for text in found.warnings)


def test_one_two_and_eight_devices_give_the_same_numbers(tmp_path):
    values = [
        [row.value for row in measured(tmp_path / str(n), plan(devices=jax.devices()[:n]))[0].rows] for n in (1, 2, 8)
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-6)


def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path, blocks_of_16):
    whole, drawn, _ = measured(tmp_path / "whole")
    assert drawn.asked == [0, 16, 32]

    class Stops(World):
        def make(self, captions, first):
            if first == 32:
                raise KeyboardInterrupt
            return super().make(captions, first)

    own, folder = plan(), work.Work(tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        own.look("drawn", Stops(40, 1), folder)
    (damaged,) = (tmp_path / "part").glob("drawn-*-00001.npz")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    again, drawn, _ = measured(tmp_path / "part")
    assert drawn.asked == [16, 32]
    assert again.rows == whole.rows
    assert measured(tmp_path / "part")[1].asked == []


def test_clearing_removes_what_evaluations_left_and_nothing_else(tmp_path):
    folder = work.Work(tmp_path / "w")
    plan().look("drawn", World(4, 1), folder)
    (tmp_path / "w" / "drawn-mine.npz").write_text("mine")
    folder.clear()
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["drawn-mine.npz"]
    (tmp_path / "w" / "drawn-mine.npz").unlink()
    folder.clear()
    assert not (tmp_path / "w").exists()


def test_other_pictures_or_weights_are_not_taken_for_the_same(tmp_path):
    own, folder = plan(), work.Work(tmp_path)
    names = {own.look("drawn", World(4, seed), folder).name for seed in (1, 2)}
    other = protocol.Protocol(own.metrics, {"clip": features.dataclasses.replace(network(), identity="b")}, texts)
    names |= {other.look("drawn", World(4, 1), folder).name, own.look("drawn", World(5, 1), folder).name}
    assert len(names) == 4


def test_metrics_may_be_added_to_what_was_measured(tmp_path):
    for metrics in ("shapes_oracle", "clip_score,shapes_oracle", "clip_score"):
        drawn, folder = World(20, 1), work.Work(tmp_path)
        own = plan(metrics)
        assert own.measure(own.look("drawn", drawn, folder), None).rows
        again = World(20, 1)
        own.measure(own.look("drawn", again, folder), None)
        assert drawn.asked and not again.asked


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_other_pictures_of_the_same_names_and_sizes_are_not_taken_for_them(tmp_path, kind):
    def write(value, last):
        root = tmp_path / f"{value}-{last}"
        root.mkdir()
        members = []
        for k in range(4):
            name, pixels = f"{k}.bmp", np.full((8, 8, 3), value if k < 3 else last, np.uint8)
            Image.fromarray(pixels).save(root / name)
            (root / f"{k}.txt").write_text(f"number {k}")
            members += [root / name, root / f"{k}.txt"]
        if kind == "webdataset":
            with tarfile.open(root / "a.tar", "w") as tar:
                for file in members:
                    tar.add(file, file.name)
        path = root / "a.tar" if kind == "webdataset" else root
        more = {"index": str(root / "index")} if kind == "webdataset" else {}
        return data.make(kind, "all", size=8, path=str(path), **more)

    first, same, other = write(1, 2), write(1, 3), write(4, 2)
    about = lambda source, num: pictures.RealPictures(source, num, {}).about  # noqa: E731
    assert about(first, 3) == about(same, 3) and about(first, 4) != about(same, 4)
    assert about(first, 3) != about(other, 3)
    assert pictures.RealPictures(first, 4, {}).captions() == [f"number {k}" for k in range(4)]


def test_a_real_picture_is_made_once(monkeypatch):
    made, make = [], shapes.Shapes.__getitem__
    monkeypatch.setattr(shapes.Shapes, "__getitem__", lambda self, i: made.append(i) or make(self, i))
    block = pictures.RealPictures(shapes.Shapes("test", 16), 4, {}).block(1, 3)
    assert made == [1, 2] and len(block.images) == len(block.captions) == 2


def test_embeddings_are_not_measured_as_pictures(monkeypatch):
    class Embedded(list):
        clip_identity = "a"

    monkeypatch.setattr(data, "make", lambda *_, **__: Embedded())
    with pytest.raises(UserError, match="holds embeddings, and pictures are measured"):
        pictures.source("embeddings", 32)


def test_few_pictures_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="full rank"):
        found, _, _ = measured(tmp_path, num=5)
    assert len(found.warnings) == 1


def test_features_that_are_not_finite_are_told(tmp_path):
    bad = features.dataclasses.replace(network(), params={"scale": np.float32(np.nan)})
    own = protocol.Protocol(["fid"], {"clip": bad})
    with pytest.raises(protocol.UserError, match="clip features of picture 0 hold NaN"):
        own.look("drawn", World(4, 1), work.Work(tmp_path))


def test_statistics_come_back_and_are_refused_where_they_do_not_belong(tmp_path):
    _, _, known = measured(tmp_path / "work")
    file, about, nets = tmp_path / "s.npz", {"data": "shapes", "size": 32}, {"clip": network()}
    reference.save(file, known, about, nets)
    again = reference.load(file, network(), nets, 32, about)
    np.testing.assert_allclose(again.moments.covariance, known.moments.covariance, rtol=1e-12)
    np.testing.assert_allclose(again.features, known.features, rtol=1e-7)
    with np.load(file) as stored:  # as clean-fid wants them
        np.testing.assert_allclose(stored["sigma"], np.cov(known.features, rowvar=False), rtol=1e-9)
    other = features.dataclasses.replace(network(), identity="others")
    for call, words in (
        (lambda: reference.load(file, other, {"clip": other}, 32), "was made with moments, not others"),
        (lambda: reference.load(file, network(), nets, 64), "of 32 px, and the drawn ones have 64 px"),
        (lambda: reference.load(file, network(), nets, 32, {**about, "data": "icons"}), "other data: data differ"),
        (lambda: reference.load(tmp_path / "none.npz", network(), nets, 32), "does not exist"),
    ):
        with pytest.raises(protocol.UserError, match=words):
            call()


def test_foreign_statistics_serve_fid_alone(tmp_path):
    _, drawn, known = measured(tmp_path / "work")
    np.savez(tmp_path / "f.npz", mu=known.moments.mean, sigma=known.moments.covariance)
    with pytest.warns(UserWarning, match="does not say"):
        foreign = reference.load(tmp_path / "f.npz", network(), {"clip": network()}, 32)
    own = plan("fid")
    series = own.look("drawn", drawn, work.Work(tmp_path / "work"))
    assert own.measure(series, foreign).rows[0].value == pytest.approx(own.measure(series, known).rows[0].value)
    with pytest.raises(protocol.UserError, match="'kid' needs clip features"):
        plan("kid").measure(series, foreign)
    np.savez(tmp_path / "g.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(protocol.UserError, match="3,.* features, and clip has 6"):
        reference.load(tmp_path / "g.npz", network(), {"clip": network()}, 32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mu": np.full(6, np.nan)}, "'mu' must be of finite numbers"),
        ({"mu": np.array(list("abcdef"))}, "'mu' must be of finite numbers"),
        ({"n": np.array("x")}, "'n' must be of finite numbers"),
        ({"n": np.array(4), "clip_features": np.zeros((4, 7))}, r"clip features \(4, 7\); expected \(4, 6\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* does not say")
def test_statistics_of_no_numbers_are_refused(tmp_path, change, told):
    np.savez(tmp_path / "r.npz", **{"mu": np.zeros(6), "sigma": np.eye(6), **change})
    with pytest.raises(protocol.UserError, match=told):
        reference.load(tmp_path / "r.npz", network(), {"clip": network()}, 32)


def test_files_that_are_no_statistics_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(6))
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("mu.npy", b"\x93NUMPY\1\0\x76\0" + head)
    for name in ("one.npy", "huge.npz"):
        with pytest.raises(protocol.UserError, match="is no .npz file of statistics"):
            reference.load(tmp_path / name, network(), {"clip": network()}, 32)


def test_numbers_too_unlike_are_refused_where_they_would_mislead(tmp_path):
    _, _, known = measured(tmp_path)
    own = plan("fid,precision_recall")
    few = own.look("drawn", World(19, 1), work.Work(tmp_path))
    with pytest.raises(protocol.UserError, match="19 drawn and 40 real pictures would mislead"):
        own.measure(few, known)
    with pytest.warns(UserWarning, match="19 drawn and 40 real pictures; its bias"):
        assert len(plan("fid,kid").measure(few, known).rows) == 2


@pytest.mark.slow
def test_clip_looks_at_pictures_resized_as_clean_fid_does():
    clip = stack().tasks["clip"].model
    images = World(3, 1).make(["", "", ""], 0)
    got = features.extractor(features.clip(clip, stack().params["clip"], "a"), batch=4)(images)["features"]
    plane = lambda x: np.asarray(Image.fromarray(x.astype(np.float32), mode="F").resize((16, 16), 3))  # noqa: E731
    small = np.stack([np.stack([plane(image[..., c]) for c in range(3)], -1) for image in images]).clip(0, 255)
    exact = clip.apply({"params": stack().params["clip"]}, small / 127.5 - 1, method="embed_image")
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=2e-3)


# The command.


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run(…) -> (exit code, stdout, lines of stderr) of `unclip evaluate`; the stack is read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UnCLIP, "load", lambda *_, **__: stack())
    monkeypatch.setattr(UnCLIP, "spread", lambda self: self)

    def run(*argv):
        code = cli.main(["evaluate", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def drawing(*more):
    return ["--model", tiny_stack.path(), "--data", "shapes", "--num", N, "--bootstrap", 3, *more]


@pytest.mark.slow
def test_the_command_writes_three_reports_that_agree(run, tmp_path):
    code, out, err = run(*drawing("--metrics", CLIP_METRICS, "--out", "r.json", "--reference", "real.npz"))
    assert code == 0 and len(err) == 1 and "of 10 captions have more than the 30 tokens" in err[0]
    facts = json.loads((tmp_path / "r.json").read_text())
    (point,) = facts["points"]
    values = {row["name"]: row["value"] for row in point["rows"]}
    assert "FID" not in values and "FD-CLIP" in values and f"{values['CMMD']:.5g}" in out
    assert facts["seed"] == 0 and facts["data"]["split"] == "test" and point["pictures"]["settings"]["decoder"]
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    assert page.count("data:image/png;base64,") == N and f"{values['CMMD']:.5g}" in page and "FD-CLIP" in text
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.md", "real.npz"]
    again = run(*drawing("--metrics", CLIP_METRICS, "--out", "s.json", "--reference", "real.npz"))
    assert again[0] == 0
    other = json.loads((tmp_path / "s.json").read_text())
    for row, same in zip(point["rows"], other["points"][0]["rows"], strict=True):
        assert row["value"] == pytest.approx(same["value"], rel=1e-6)
    code, out, _ = run("--compare", "r.json", "s.json", "--out", "c.json")
    assert code == 0 and "FD-CLIP" in out
    results = json.loads((tmp_path / "c.json").read_text())["results"]
    assert all(abs(row["change"]) < 1e-6 and row["intervals"] != "apart" for row in results)


def test_pictures_of_the_command_are_those_of_the_pipeline(run, tmp_path):
    assert run(*drawing("--metrics", "clip_score", "--work", "w"))[0] == 0
    captions = [shapes.Shapes("test", 32)[i]["caption"] for i in range(N)]
    images = stack().generate(captions, 0)
    clip = features.clip(stack().tasks["clip"].model, stack().params["clip"], "")
    z_img = features.extractor(clip)(images)["features"]
    (shard,) = (tmp_path / "w").glob("drawn-*.npz")
    with np.load(shard) as stored:
        np.testing.assert_allclose(stored["clip_features"], z_img, atol=1e-4)
        assert stored["sample_captions"].tolist() == captions


def test_a_sweep_draws_every_combination_and_plots_the_frontier(run, tmp_path, monkeypatch):
    figures, address = [], plot.address
    monkeypatch.setattr(plot, "address", lambda figure: figures.append(figure) or address(figure))
    sweep = ["--sweep", "steps=4", "guidance=2,3"]
    code, out, _ = run(*drawing("--metrics", "fid,clip_score", *sweep, "--out", "r.json"))
    assert code == 0
    facts = json.loads((tmp_path / "r.json").read_text())
    assert [p["settings"] for p in facts["points"]] == [
        {"steps": 4, "guidance": 2.0}, {"steps": 4, "guidance": 3.0}
    ]  # fmt: skip
    assert len({p["rows"][0]["value"] for p in facts["points"]}) == 2
    assert (tmp_path / "r.html").read_text().count("data:image/svg+xml;base64,") == 1
    (line,) = figures[0].axes[0].lines
    assert line.get_label() == "steps=4"
    rows = [{row["name"]: row["value"] for row in p["rows"]} for p in facts["points"]]
    names = ("CLIP score (100 cos)", "FD-CLIP")
    np.testing.assert_array_equal(line.get_xydata(), [[row[name] for name in names] for row in rows])


def folder(path: Path, captions=True, sizes=(32,), count=6):
    path.mkdir()
    source = shapes.Shapes("test", 32)
    for i in range(count):
        image = Image.fromarray(source[i]["image"]).resize((sizes[i % len(sizes)],) * 2)
        image.save(path / f"{i}.png")
        if captions:
            (path / f"{i}.txt").write_text(source[i]["caption"])
    return path


def test_a_folder_of_pictures_is_measured_as_it_is(run, tmp_path):
    folder(tmp_path / "mine")
    argv = ["--model", tiny_stack.path(), "--images", "mine", "--data", "shapes"]
    code, out, err = run(*argv, "--metrics", "fid,cmmd,shapes_oracle", "--out", "r.json", "--bootstrap", 0)
    assert code == 0
    rows = {r["name"]: r for r in json.loads((tmp_path / "r.json").read_text())["points"][0]["rows"]}
    assert abs(rows["FD-CLIP"]["value"]) < 1e-3 and abs(rows["CMMD"]["value"]) < 1e-6  # they are the real ones
    assert rows["FD-CLIP"]["low"] is None


def test_pictures_without_captions_are_compared_where_nothing_asks_for_them(run, tmp_path):
    folder(tmp_path / "mine", captions=False)
    (tmp_path / "mine/readme.txt").write_text("a text of no picture")
    argv = ["--model", tiny_stack.path(), "--images", "mine", "--data", "folder", "--path", "mine"]
    seen = {}
    for name in ("none", "one", "all"):
        if name != "none":
            for k in range(1 if name == "one" else 6):
                (tmp_path / f"mine/{k}.txt").write_text("a red circle")
        assert run(*argv, "--metrics", "cmmd", "--out", f"{name}.json", "--work", "kept")[0] == 0
        seen[name] = json.loads((tmp_path / f"{name}.json").read_text())["points"][0]["rows"]
    assert seen["none"] == seen["one"] == seen["all"] and seen["one"][0]["n"] == 6
    (tmp_path / "mine/0.txt").unlink()
    with pytest.warns(UserWarning, match="1 pictures in .* have no caption, left out: 0.png"):
        assert len(pictures.PictureFolder("mine", asked=True)) == 5


def test_pictures_of_no_prompt_are_those_of_variations_without_what_was_given(tmp_path):
    folder(tmp_path / "varied", captions=False, count=3)
    entries = [{"file": "0.png", "role": "input", "image": "a"}]
    entries += [{"file": f"{k}.png", "role": "variation", "image": "a"} for k in (1, 2)]
    (tmp_path / "varied/pictures.json").write_text(json.dumps({"pictures": entries}))
    own = pictures.PictureFolder(str(tmp_path / "varied"))
    assert own.files == ["1.png", "2.png"] and own.captions is None


@pytest.mark.parametrize(
    ("change", "told"),
    [({"prompt": "\ud800"}, "half of a surrogate pair"), ({"file": f"{'1' * 400}.png"}, "1 are missing: 111")],
)
def test_an_index_of_odd_texts_is_refused(tmp_path, change, told):
    index(tmp_path / "odd", ["0.png"])
    entry = {"file": "0.png", "prompt": "x", **change}
    (tmp_path / "odd/pictures.json").write_text(json.dumps({"pictures": [entry]}))
    with pytest.raises(UserError, match=told):
        pictures.PictureFolder(str(tmp_path / "odd"))


def spoilt(path: Path):
    folder(path)
    (path / "3.png").write_bytes((path / "3.png").read_bytes()[:60])


def index(path: Path, files):
    folder(path, captions=False)
    entries = [{"file": file, "prompt": "a red circle"} for file in files]
    (path / "pictures.json").write_text(json.dumps({"pictures": entries}))


BAD = {
    "metric": (["--metrics", "fdi"], "did you mean 'fid'"),
    "no real ones": (["--metrics", "fid", "--images", "good"], "--data"),
    "no captions to draw": (["--metrics", "clip_score"], "--data"),
    "reference missing": (["--metrics", "fid", "--images", "good", "--reference", "no.npz"], "does not exist"),
    "reference is none": (["--metrics", "fid", "--images", "good", "--reference", "x.txt", "--num", 6], "no .npz"),
    "no sigma": (["--metrics", "fid", "--images", "good", "--reference", "mu.npz", "--num", 6], "'sigma'"),
    "one picture": (["--metrics", "clip_score", "--images", "good", "--num", 1], "too few"),
    "more than there are": (["--metrics", "clip_score", "--images", "good", "--num", 7], "more than the 6"),
    "more than the data": (["--metrics", "fid", "--data", "shapes", "--num", 10001], "more than the 10000"),
    "mixed sizes": (["--metrics", "clip_score", "--images", "mixed", "--num", 6], "several sizes"),
    "empty folder": (["--metrics", "clip_score", "--images", "empty"], "is empty"),
    "no pictures": (["--metrics", "clip_score", "--images", "texts"], "holds no pictures"),
    "no folder": (["--metrics", "clip_score", "--images", "nowhere"], "is not a folder"),
    "damaged picture": (["--metrics", "clip_score", "--images", "spoilt", "--num", 6], "cannot be read"),
    "listed twice": (["--metrics", "clip_score", "--images", "twice", "--num", 2], "more than once"),
    "listed and missing": (["--metrics", "clip_score", "--images", "gone", "--num", 2], "are missing: 9.png"),
    "listed outside": (["--metrics", "clip_score", "--images", "outside", "--num", 2], "outside the folder"),
    "no captions": (["--metrics", "clip_score", "--images", "bare", "--num", 6], "needs captions"),
    "captions of no shapes": (["--metrics", "shapes_oracle", "--images", "cats", "--num", 6], "cannot judge"),
    "inception missing": (["--metrics", "fid", "--data", "shapes", "--inception", "no.pth"], "does not exist"),
    "is without inception": (["--metrics", "is", "--data", "shapes"], "--inception"),
    "neighbours": (["--metrics", "precision_recall", "--data", "shapes", "--images", "good", "--num", 3], "k=3"),
    "data": (["--metrics", "fid", "--data", "shape"], "did you mean 'shapes'"),
    "split": (["--metrics", "fid", "--data", "shapes:tset"], "did you mean 'test'"),
    "out": (["--metrics", "fid", "--data", "shapes", "--out", "r.txt"], ".json"),
    "out exists": (["--metrics", "fid", "--data", "shapes", "--out", "old.json"], "exists"),
    "page exists": (["--metrics", "fid", "--data", "shapes", "--out", "page.json"], "page.html"),
    "work": (["--metrics", "clip_score", "--images", "good", "--num", 6, "--work", "/proc/w"], "not writable"),
    "sweep name": (["--metrics", "fid", "--data", "shapes", "--sweep", "guidanc=1"], "did you mean 'guidance'"),
    "sweep form": (["--metrics", "fid", "--data", "shapes", "--sweep", "guidance"], "NAME=VALUE"),
    "sweep value": (["--metrics", "fid", "--data", "shapes", "--sweep", "steps=2,x"], "'x'"),
    "sweep empty": (["--metrics", "fid", "--data", "shapes", "--sweep", "steps="], "steps=''"),
    "sweep twice": (["--metrics", "fid", "--data", "shapes", "--sweep", "steps=2,2"], "twice"),
    "sweep range": (["--metrics", "fid", "--data", "shapes", "--sweep", "guidance=-1"], "guidance=-1"),
    "sweep sampler": (["--metrics", "fid", "--data", "shapes", "--sweep", "sampler=dimm"], "did you mean 'ddim'"),
    "sweep beyond training": (["--metrics", "fid", "--data", "shapes", "--sweep", "steps=21"], "21 steps"),
    "sweep over a flag": (["--metrics", "fid", "--data", "shapes", "--sweep", "steps=2", "--steps", 3], "set the same"),
    "sweep of images": (["--images", "good", "--sweep", "steps=2"], "--sweep is for pictures drawn for --data"),
    "bootstrap": (["--metrics", "fid", "--data", "shapes", "--bootstrap", "-1"], "--bootstrap"),
    "num 0": (["--metrics", "fid", "--data", "shapes", "--num", 0], "--num"),
    "batch 0": (["--metrics", "fid", "--data", "shapes", "--batch-size", 0], "--batch-size"),
    "sheet": (["--metrics", "fid", "--data", "shapes", "--sheet", "s.png"], "--sheet is for"),
    "two tasks": (["--images", "good", "--checkpoint", "w"], "different tasks"),
    "step of no run": (["--step", 3], "--step is for --checkpoint"),
    "step of a stack": (["--stage", "clip", "--step", 3], "--step is for --checkpoint"),
    "two sorts of stage": (["--stage", "clip", "--checkpoint", "w"], "different tasks"),
    "classes of no stage": (["--classes", "c"], "--classes is for --checkpoint or --stage"),
    "compare the same": (["--compare", "old.json", "./old.json"], "both reports"),
    "compare with none": (["--compare", "old.json", "no.json"], "no.json is missing"),
    "compare others": (["--compare", "old.json", "list.json"], "no report of pictures"),
    "compare text": (["--compare", "old.json", "x.txt"], "not readable JSON"),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with everything that the mistakes below are about."""
    root = tmp_path_factory.mktemp("things")
    folder(root / "good"), folder(root / "mixed", sizes=(32, 24)), folder(root / "bare", captions=False)
    cats = folder(root / "cats")
    for file in cats.glob("*.txt"):
        file.write_text("a photo of a cat")
    spoilt(root / "spoilt")
    index(root / "twice", ["1.png", "1.png"]), index(root / "gone", ["1.png", "9.png"])
    index(root / "outside", ["../good/1.png", "1.png"])
    for name in ("empty", "texts"):
        (root / name).mkdir()
    (root / "texts" / "a.txt").write_text("a text")
    for name, text in {"old.json": "{}", "list.json": "{}", "x.txt": "x", "page.html": ""}.items():
        (root / name).write_text(text)
    np.savez(root / "mu.npz", mu=np.zeros(8))
    return root


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(case, run, things, monkeypatch):
    argv, words = BAD[case]
    monkeypatch.chdir(things)
    before = sorted(things.rglob("*"))
    model = [] if "--compare" in argv else ["--model", tiny_stack.path()]
    code, out, err = run(*model, *argv)
    assert code == 2 and out == "" and len(err) == 1, err
    assert err[0].startswith("error: ") and words in err[0] and err[0].isprintable()
    assert sorted(things.rglob("*")) == before


PROCESS = """
import sys
from pathlib import Path
from unclip_jax import distributed
distributed.initialize()
from tests.evaluation import test_protocol as here
here.work.BLOCK = 16
found = here.two(Path(sys.argv[1]))
if found:
    print("VALUES", *[row["value"] for row in found.facts["points"][0]["rows"]])
"""


def two(folder):
    """The report of 40 pictures; None in other processes than the main one."""
    own, shared = plan("kid,cmmd,clip_score"), work.Work(folder)
    real = pictures.RealPictures(shapes.Shapes("test", 32, 2), 40, {"data": "shapes", "size": 32})
    known = reference.of_series(own.look("real", real, shared), own.networks, "clip")
    return sweep.run(own, [sweep.Point("", {}, World(40, 1))], known, shared, {})


@pytest.mark.multihost
def test_two_processes_give_the_same_numbers(tmp_path, blocks_of_16):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"UNCLIP_COORDINATOR": address, "UNCLIP_PROCESSES": "2"}
    env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "shared")]
    workers = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"UNCLIP_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0] and "VALUES" not in outs[1]
    values = [float(v) for v in next(line for line in outs[0].splitlines() if line.startswith("VALUES")).split()[1:]]
    rows = two(tmp_path / "alone").facts["points"][0]["rows"]
    np.testing.assert_allclose(values, [row["value"] for row in rows], rtol=1e-6)
