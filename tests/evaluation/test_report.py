"""evaluation.report, plot, sweep.parse, pairs: pages that are safe and whole, votes counted by hand."""

import base64
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.evaluation import alignment as alignments
from unclip_jax.evaluation import pairs, plot, report, sweep

HOSTILE = "<script>alert(1)</script> & \"quotes\" | `code` </style> '\u202e"
RNG = np.random.default_rng(0)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]


def made():
    images = RNG.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    drawn = plot.curves([(HOSTILE, [plot.Mark(1, 2, (0.5, 1.5), None, HOSTILE), plot.Mark(2, 3)])], HOSTILE, "$\\frac{")
    table = report.Table(HOSTILE, ["a", HOSTILE], [[1, HOSTILE], [0.123456789, None]])
    samples = [report.Samples(HOSTILE, images, [HOSTILE, "b"])]
    plots = [(HOSTILE, plot.address(drawn))]
    return report.Report(HOSTILE, {"x": HOSTILE}, [table], plots, samples, [HOSTILE])


def test_a_page_is_whole_in_itself_and_escapes_what_comes_from_outside():
    page = report.page(made())
    tags = Tags(page)
    assert "script" not in tags.tags and tags.tags.count("style") == 1 and tags.tags.count("img") == 3
    links = [value for _, name, value in tags.attributes if name in ("src", "href") or name.startswith("on")]
    kinds = [value.partition(",")[0] for value in links]
    assert kinds == ["data:image/svg+xml;base64", *["data:image/png;base64"] * 2]
    policy = next(value for _, name, value in tags.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert html.escape(HOSTILE) in page


def test_markdown_shows_hostile_text_as_text():
    text = report.markdown(made())
    body = text.split("## Settings")[0]
    assert "<script" not in body and "\\|" in body and "\\`code\\`" in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and "| 0.12346 | – |" in rows[-1]


def test_a_report_comes_back(tmp_path):
    report.write(tmp_path / "r.json", made())
    assert report.read(str(tmp_path / "r.json")) == {"x": HOSTILE}
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "r.md", "r.html"}


def test_a_plot_has_each_curve_its_intervals_and_its_labels():
    marks = [plot.Mark(1, 10, (0, 3), None, "$a"), plot.Mark(4, 20, None, (15, 40), "b")]
    first, again = (plot.curves([("c", marks), ("d", marks[::-1])], "x", "y") for _ in range(2))
    (axes,) = first.axes
    np.testing.assert_array_equal([line.get_xydata() for line in axes.lines], [[[1, 10], [4, 20]], [[4, 20], [1, 10]]])
    bars = [bar.get_segments()[0].tolist() for bar in axes.collections]
    assert bars[:2] == [[[0, 10], [3, 10]], [[4, 15], [4, 40]]] and len(bars) == 4
    assert [(text.get_text(), text.xy) for text in axes.texts[:2]] == [("$a", (1, 10)), ("b", (4, 20))]
    address = plot.address(first)
    assert address == plot.address(again)
    ET.fromstring(base64.b64decode(address.partition(",")[2]))


def test_a_sweep_is_every_combination():
    known = {"guidance": float, "steps": int, "sampler": str}
    assert sweep.parse(["guidance=1,2.5", "steps=3,4"], known) == [
        {"guidance": 1.0, "steps": 3}, {"guidance": 1.0, "steps": 4},
        {"guidance": 2.5, "steps": 3}, {"guidance": 2.5, "steps": 4},
    ]  # fmt: skip
    assert sweep.parse([], known) == [{}]
    many = ",".join(map(str, range(1, 202)))
    for bad, words in ((["steps=1", "steps=2"], "given twice"), ([f"steps={many}"], "at most 200"), (["=1"], "''")):
        with pytest.raises(UserError, match=words):
            sweep.parse(bad, known)


def facts(value, low=None, high=None, **more):
    row = {"name": "FD-CLIP", "value": value, "low": low, "high": high, "n": 5, "note": ""}
    return {"points": [{"label": "a", "rows": [row]}], "data": {"x": 1}, **more}


def test_reports_side_by_side_tell_what_makes_them_differ(tmp_path):
    for name, content in {"a": facts(10.0, 9, 11), "b": facts(13.0, 12, 14), "c": facts(11.0, num=3)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path = lambda name: str(tmp_path / f"{name}.json")  # noqa: E731
    same = report.compare(path("a"), path("b"))
    assert same.facts["results"][0]["change"] == 3 and same.facts["results"][0]["intervals"] == "apart"
    assert same.warnings == [] and "10 [9, 11]" in report.plain(same.tables[0])
    other = report.compare(path("a"), path("c"))
    assert other.facts["results"][0]["intervals"] == "none" and "num differs" in other.warnings[0]


def test_reports_of_prompts_and_of_stages_are_compared_too(tmp_path):
    def alignment(right):
        own = {"objects": "one", "pairs": "seen", **alignments.tally([{"right": r, "shape": True} for r in right])}
        return {"kind": "alignment", "results": [own, {**own, "objects": "two"}]}

    stage = lambda loss, n=8: {"kind": "stage", "n": n, "metrics": {"loss": loss}}  # noqa: E731
    sides = {"a": alignment([True] * 40), "b": alignment([False] * 39 + [True]), "c": stage(1.0), "d": stage(0.5, 16)}
    for name, content in sides.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path = lambda name: str(tmp_path / f"{name}.json")  # noqa: E731
    found = report.compare(path("a"), path("b")).tables[0].rows
    assert [row[:2] for row in found[:2]] == [["one, seen", "oracle: right"], ["one, seen", "oracle: shape"]]
    assert [row[4:] for row in found] == [[-0.975, "apart"], [0.0, "none"]] * 2
    other = report.compare(path("c"), path("d"))
    assert other.tables[0].rows == [["–", "loss", "1", "0.5", -0.5, "none"]] and "n differs" in other.warnings[0]
    with pytest.raises(UserError, match="no metric and setting in common"):
        report.compare(path("a"), path("c"))


@pytest.mark.parametrize("row", [facts(float("nan")), facts("1"), facts(10**400), facts(1.0, 0, "x"), facts(1.0, 0)])
def test_reports_of_no_numbers_are_refused(tmp_path, row):
    for name, content in {"a": facts(10.0, 9, 11), "b": row}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="b.json is no report of pictures"):
        report.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))


# People.


def drawn(path, prompts, num, colour):
    path.mkdir()
    entries = []
    for p, prompt in enumerate(prompts):
        for i in range(num):
            Image.new("RGB", (32, 32), (colour, p, i)).save(path / f"{p}-{i}.png")
            entries.append({"file": f"{p}-{i}.png", "prompt": prompt})
    (path / "pictures.json").write_text(json.dumps({"pictures": entries}))
    return str(path)


@pytest.fixture
def page(tmp_path):
    """(page, key as read, key's path) of two folders with 5 captions in common; A is dark red, B bright."""
    prompts = [f"{HOSTILE} {k}" for k in range(5)]
    a = drawn(tmp_path / "a", [*prompts, "only here"], 2, 10)
    b = drawn(tmp_path / "b", prompts[::-1], 3, 200)
    file, key, count = pairs.make(a, b, str(tmp_path / "p.html"), num=50, seed=4)
    assert count == 15
    return file.read_text(), json.loads(key.read_text()), str(key)


def content(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def red(uri):
    import io

    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    return image.getpixel((0, 0))[0], image.size


def test_the_key_alone_tells_which_side_is_which(page):
    text, key, _ = page
    trials = content(text)["trials"]
    assert [t["question"] for t in trials] == [t["question"] for t in key["trials"]]
    lefts = [t["left"] for t in key["trials"]]
    assert 3 < lefts.count("a") < 12
    for trial, left in zip(trials, lefts, strict=True):
        assert set(trial) == {"caption", "question", "sides"}
        expected = [10, 200] if left == "a" else [200, 10]
        assert [red(side[0])[0] for side in trial["sides"]] == expected
        assert {len(side) for side in trial["sides"]} == {2 if trial["question"] == "diversity" else 1}
        assert red(trial["sides"][0][0])[1] == (256, 256)
    assert "pictures.json" not in text and "only here" not in text


def test_the_page_runs_its_own_script_alone(page):
    text, _, _ = page
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = html.unescape(re.search(r'Policy" content="(.*?)"', text)[1])
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert Tags(text).tags.count("script") == 2 and "<script>alert" not in text and "innerHTML" not in text
    assert content(text)["trials"][0]["caption"].startswith(HOSTILE)


def votes(path, key, judge, choose):
    cast = [{"trial": i, "choice": choose(t)} for i, t in enumerate(key["trials"])]
    path.write_text(json.dumps({"page": key["page"], "judge": judge, "votes": cast}))
    return str(path)


def test_votes_are_counted_for_the_folder_not_the_side(page, tmp_path):
    _, key, file = page
    for_a = lambda t: "left" if t["left"] == "a" else "right"  # noqa: E731
    one = votes(tmp_path / "1.json", key, "x", for_a)
    two = votes(tmp_path / "2.json", key, "y", lambda t: "tie" if t["question"] == "caption" else "left")
    rows = {row["question"]: row for row in pairs.analyse([one, two], file).facts["results"]}
    assert (rows["caption"]["a"], rows["caption"]["b"], rows["caption"]["ties"]) == (5, 0, 5)
    lefts = [t["left"] for t in key["trials"] if t["question"] == "diversity"]
    assert rows["diversity"]["a"] == 5 + lefts.count("a") and rows["diversity"]["b"] == lefts.count("b")
    n = rows["diversity"]["a"] + rows["diversity"]["b"]
    assert rows["diversity"]["p"] == pytest.approx(binomtest(rows["diversity"]["a"], n).pvalue)
    assert rows["caption"]["share"] == 1 and rows["caption"]["low"] > 0.5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v: v.update(page="0"), "another page"),
        (lambda v: v["votes"].append({"trial": 99, "choice": "left"}), "trial 99"),
        (lambda v: v["votes"].append({"trial": 0, "choice": "left"}), "trial 0"),
        (lambda v: v["votes"][0].update(choice="a"), "choice 'a'"),
        (lambda v: v.update(votes=[]), "no votes"),
        (lambda v: v.pop("judge"), "not as the page gives"),
    ],
)
def test_votes_that_are_none_are_refused(page, tmp_path, spoil, words, capsys):
    _, key, file = page
    path = votes(tmp_path / "1.json", key, "x", lambda t: "left")
    cast = json.loads((tmp_path / "1.json").read_text())
    spoil(cast)
    (tmp_path / "1.json").write_text(json.dumps(cast))
    assert cli.main(["evaluate", "--votes", path, "--key", file]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and words in err[0]


def test_the_same_judge_counts_once(page, tmp_path):
    _, key, file = page
    same = [votes(tmp_path / name, key, "x", lambda t: "left") for name in ("1.json", "2.json")]
    with pytest.raises(UserError, match="counted already"):
        pairs.analyse(same, file)


def test_the_commands_of_people_say_what_is_wrong(page, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "c", ["another"], 1, 0)
    (tmp_path / "k.json").write_text("{}")
    cases = (
        (["--pairs", "a", "b"], "--pairs needs --out"),
        (["--pairs", "a", "a", "--out", "q.html"], "both folders"),
        (["--pairs", "a", "c", "--out", "q.html"], "no caption in common"),
        (["--pairs", "a", "no", "--out", "q.html"], "is not a folder"),
        (["--pairs", "a", "b", "--out", "p.html"], "exists"),
        (["--pairs", "a", "b", "--out", "q.htm"], ".html"),
        (["--votes", "v.json"], "--votes needs --key"),
        (["--votes", "v.json", "--key", "k.json"], "no key of a page"),
        (["--key", "k.json"], "--key is for --votes"),
    )
    for argv, words in cases:
        assert cli.main(["evaluate", *argv]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and words in err[0], (argv, err)
    assert not (tmp_path / "q.html").exists()
