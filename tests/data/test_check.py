"""`unclip data check` and `embed`: what they say is what is there."""

import json

import pytest
from PIL import Image

from tests import tiny_stack
from tests.data.test_webdataset import png, tar
from unclip_jax import cli


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for k in range(20):
        Image.new("RGB", (10 + k, 40), "red").save(root / f"{k:02}.png")
        (root / f"{k:02}.txt").write_text("a red box" if k % 2 else f"box number {k} is red")
    return root


def test_names_steer_no_terminal(pictures, capsys):
    (pictures / "a\x1b]0;owned\a\udcff.png").write_bytes(b"no picture")
    command = ["data", "check", "folder", "--path", str(pictures), "--split", "all", "--size", "8"]
    assert cli.main([*command, "--data.captions=False"]) == 0
    out = capsys.readouterr().out
    assert "a ]0;owned  .png is not a picture" in out and "\x1b" not in out


def test_check_reports_what_is_there(pictures, tmp_path, capsys):
    (pictures / "07.png").write_bytes(b"no picture")
    report, sheet = tmp_path / "r.json", tmp_path / "s.png"
    command = ["data", "check", "folder", "--path", str(pictures), "--split", "all", "--all", "--size", "8"]
    assert cli.main([*command, "--out", str(report), "--sheet", str(sheet)]) == 0
    said = json.loads(report.read_text())
    assert said["records"] == said["read"] == 20 and said["readable"] == 19
    assert [number for number, _ in said["bad"]] == [7] and "07.png is not a picture" in said["bad"][0][1]
    assert said["caption_words"] == {"least": 3, "median": 5, "most": 5} and said["distinct_captions"] == 11
    assert said["pixels"] == {"least": 10, "median": 20, "most": 29}
    out = capsys.readouterr().out
    assert "07.png" in out and "3 … 5" in out
    with Image.open(sheet) as image:
        assert len(json.loads(image.text["captions"])) == 19
    for k in range(3):
        (pictures / f"{k:02}.png").write_bytes(b"")
    assert cli.main(command) == 1  # more than max_bad
    assert cli.main([*command, "--data.max_bad=0.5"]) == 0


def test_check_names_what_an_index_of_tars_left_out(tmp_path, capsys):
    members = [("0.png", b""), ("0.txt", b"x"), ("1.txt", b"x"), ("2.png", png(1)), ("2.txt", b"a box")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    command = ["data", "check", "webdataset", "--path", str(tmp_path / "a.tar"), "--split", "all", "--size", "8"]
    assert cli.main([*command, f"--data.index={tmp_path / 'i'}", "--out", str(tmp_path / "r.json")]) == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["passed_over"] == {"empty or too large": 1, "without a picture": 1}
    where = f"{tmp_path / 'a.tar'}: "
    assert said["passed_over_records"] == [[where + "0", "empty or too large"], [where + "1", "without a picture"]]
    assert f"1 without a picture, such as {where}1" in capsys.readouterr().out


def test_check_reads_records_evenly(capsys):
    assert cli.main(["data", "check", "shapes", "--size", "16", "--num", "7", "--data.length=1000"]) == 0
    out = capsys.readouterr().out
    assert "records            1000 of the split 'train'" in out and "read               7" in out
    assert "not known" in out


BAD = {
    "unknown source": (["check", "shaps"], "did you mean 'shapes'"),
    "unknown argument": (["check", "shapes", "--data.lenght=3"], "did you mean 'length'"),
    "no value": (["check", "shapes", "--data.length"], "write it as --data.key=value"),
    "own flag": (["check", "shapes", "--data.size=3"], "write --size"),
    "no boolean": (["check", "folder", "--path", ".", "--data.captions=no"], "='no' must be true or false"),
    "a list for a text": (["check", "webdataset", "--path", ".", "--data.index=[5]"], "data.index=[5] must be a text"),
    "no list": (["check", "mixture", "--data.parts=5"], "data.parts=5 must be a list of dicts"),
    "a vast size": (["check", "shapes", "--size", "1000000"], "data.size=1000000 must be"),
    "stray word": (["check", "shapes", "3", "--data.length=3"], "write it as --data.key=value"),
    "no clip": (["embed", "shapes", "--clip", "none", "--out", "o"], "none"),
    "no CLIP flag": (["embed", "shapes", "--out", "o"], "--clip"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, match = BAD[case]
    assert cli.main(["data", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and match in err[0] and not list(tmp_path.iterdir())


def test_embed_and_what_refuses_it(tmp_path, capsys):
    from tests import tiny_runs
    from unclip_jax.errors import UserError
    from unclip_jax.run import make_run

    out = tmp_path / "e"
    clip = str(tiny_stack.path())
    argv = ["data", "embed", "shapes", "--clip", clip, "--out", str(out), "--splits", "train"]
    assert cli.main([*argv, "--batch-size", "8", "--data.length=20"]) == 0
    assert "data.source=embeddings" in capsys.readouterr().out
    assert json.loads((out / "embeddings.json").read_text())["source"]["size"] == 16  # as the CLIP sees
    assert cli.main(argv) == 2 and "finished" in capsys.readouterr().err
    config = tiny_runs.config("prior_diffusion")  # trains against another CLIP
    with config.unlocked():
        config.data = {"source": "embeddings", "path": str(out), "split": "train", "size": 16}
    with pytest.raises(UserError, match="are of the CLIP a, and clip='.*' is [0-9a-f]{16}. Fix: set --config.clip"):
        make_run(config, tmp_path / "w")
    with config.unlocked():
        config.every.eval = 1
    with pytest.raises(UserError, match="nothing to measure on, eval.split='test'.*was not embedded.*Fix: set --con"):
        make_run(config, tmp_path / "w")
