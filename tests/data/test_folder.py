"""A user's folder: the three ways to give captions, stable splits, and every mistake told in one line."""

import json
import os
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import loader, make
from unclip_jax.data.folder import Folder, held_out
from unclip_jax.data.images import BadImage
from unclip_jax.data.show import contact_sheet
from unclip_jax.errors import UserError


def picture(path, colour="red", size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def root(tmp_path):
    for name in ("b.png", "sub/a.JPG", "sub/c.d.webp", ".hidden/x.png", ".thumb.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def captions(source):
    return {r["file"]: r["caption"] for r in (source[i] for i in range(len(source)))}


def test_sidecars(root):
    (root / "b.txt").write_text("  a red\n box ", encoding="utf-8")
    (root / "sub/a.txt").write_bytes("\ufeffrot ü 红".encode())
    (root / "sub/c.d.txt").write_text("dots")
    source = Folder(str(root), "all", 4)
    assert captions(source) == {"b.png": "a red box", "sub/a.JPG": "rot ü 红", "sub/c.d.webp": "dots"}
    assert source[0]["image"].shape == (4, 4, 3) and (np.abs(source[0]["image"] - [255, 0, 0]) < 3).all()
    assert captions(pickle.loads(pickle.dumps(source))) == captions(source)
    with pytest.raises(IndexError):
        source[3]


def test_pictures_without_a_sidecar_are_left_out_and_named(root):
    (root / "b.txt").write_text("a box")
    (root / "sub/a.txt").write_text(" \n")
    with pytest.warns(UserWarning, match="2 pictures .* no caption, left out: sub/a.JPG, sub/c.d.webp"):
        assert captions(Folder(str(root), "all", 4)) == {"b.png": "a box"}


def test_jsonl_may_give_several_captions_of_one_file(root):
    lines = [{"file": "b.png", "caption": "one"}, {"file": "sub/a.JPG", "caption": "x\u2028y"}]
    lines += [{"file": "b.png", "caption": "two", "other": 1}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (root / "captions.jsonl").write_text(text, encoding="utf-8")
    source = Folder(str(root), "all", 4)
    assert [(r["file"], r["caption"]) for r in map(source.__getitem__, range(3))] == [
        ("b.png", "one"),
        ("b.png", "two"),
        ("sub/a.JPG", "x y"),
    ]


def test_csv_with_quotes_and_unknown_files(root):
    (root / "captions.csv").write_bytes(
        b'\xef\xbb\xbfid,caption,file\r\n1,"red, ""flat""\nbox",b.png\r\n2,lost,z.png\r\n'
    )
    with pytest.warns(UserWarning, match="names 1 files that do not exist: z.png"):
        assert captions(Folder(str(root), "all", 4)) == {"b.png": 'red, "flat" box'}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_tables_of_hugging_face_are_read(root, name):
    line = '{"file_name": "b.png", "text": "a box", "label": 3}\n'
    (root / name).write_text(line if name.endswith("l") else 'label,file_name,text\n3,b.png,"a box"\n')
    assert captions(Folder(str(root), "all", 4)) == {"b.png": "a box"}
    (root / "sub/a.txt").write_text("beside")
    with pytest.warns(UserWarning, match=f"2 pictures .* no caption, .*; {name} is not read where there are .txt"):
        assert captions(Folder(str(root), "all", 4)) == {"sub/a.JPG": "beside"}
    (root / "captions.jsonl").write_text(GOOD)
    assert captions(Folder(str(root), "all", 4)) == {"b.png": "x"}


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_empty_captions_are_left_out_and_named(root, name):
    rows = [("b.png", " "), ("sub/a.JPG", "x")] + [("b.png", "")] * 11
    if name.endswith("l"):
        text, first = "\n".join(json.dumps({"file": f, "caption": c}) for f, c in rows), 1
    else:
        text, first = "file,caption\n" + "\n".join(f"{f},{c}" for f, c in rows) + "\n\n ,\n", 2
    (root / name).write_text(text)
    where = f"{name}:{first}, {name}:{first + 2}, .*{name}:{first + 10}$"
    with pytest.warns(UserWarning, match=f"12 lines of .* have an empty caption, left out: {where}") as told:
        assert captions(Folder(str(root), "all", 4)) == {"sub/a.JPG": "x"}
    assert len(told) == 1


def test_a_comma_at_the_end_of_a_row_takes_nothing_away(root):
    (root / "captions.csv").write_text("file,caption\nb.png,a box,, \n")
    assert captions(Folder(str(root), "all", 4)) == {"b.png": "a box"}


def test_files_with_backslashes_are_told_how_to_be_written(root):
    (root / "captions.csv").write_text("file,caption\nsub\\a.JPG,x\nb.png,y\n")
    with pytest.warns(UserWarning, match=r"do not exist: sub\\a.JPG; write / between folder and file"):
        assert captions(Folder(str(root), "all", 4)) == {"b.png": "y"}


def test_the_home_folder_may_be_a_tilde(root, monkeypatch):
    (root / "b.txt").write_text("a box")
    monkeypatch.setenv("HOME", str(root.parent))
    with pytest.warns(UserWarning, match="no caption"):
        assert captions(Folder(f"~/{root.name}", "all", 4)) == {"b.png": "a box"}


def test_without_captions_every_picture_counts(root):
    assert captions(Folder(str(root), "all", 4, captions=False)) == dict.fromkeys(
        ["b.png", "sub/a.JPG", "sub/c.d.webp"], ""
    )
    (root / "sub/a.txt").write_text("x")
    every = captions(Folder(str(root), "all", 4, uncaptioned=True))
    assert list(every.items()) == [("b.png", ""), ("sub/a.JPG", "x"), ("sub/c.d.webp", "")]
    (root / "sub/a.txt").unlink(), (root / "metadata.csv").write_text("file_name,text\nb.png,a box\n")
    assert captions(Folder(str(root), "all", 4, uncaptioned=True)) == {"b.png": "a box"}


def test_splits_are_disjoint_complete_and_do_not_move(tmp_path):
    names = [f"{i}.png" for i in range(300)]
    for name in names:
        (tmp_path / name).touch()
    lines = [json.dumps({"file": n, "caption": f"{n} {k}"}) for n in names for k in "ab"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    names_of = ("train", "test", "heldout", "all")
    split = {s: {r[0] for r in Folder(str(tmp_path), s, 4).records} for s in names_of}
    assert split["train"] | split["test"] == split["all"] == set(names)
    assert not split["train"] & split["test"] and split["test"] == split["heldout"]
    assert len(split["test"]) == sum(map(held_out, names)) and 1 <= len(split["test"]) <= 15
    for name in names[:150]:
        (tmp_path / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {r[0] for r in Folder(str(tmp_path), "test", 4).records} == split["test"] & set(names[150:])
    assert abs(np.mean([held_out(f"sub/{i}.jpg") for i in range(20_000)]) - 0.02) < 0.004


def test_damaged_pictures_are_passed_over_in_training(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i:02}.png", (i, 0, 0))
        (tmp_path / f"{i:02}.txt").write_text(f"number {i}")
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:40])
    source = make("folder", "all", size=4, path=str(tmp_path))
    with pytest.raises(BadImage, match="07.png"):
        source[7]
    with pytest.warns(UserWarning, match=r"passed over \(1 so far\): .*07\.png is not a"):
        batch = next(loader.batches(source, None, 20, seed=0))
    reds = sorted(np.round(batch["image"][:, 0, 0, 0] * 127.5 + 127.5).astype(int).tolist())
    assert reds == sorted([i for i in range(20) if i != 7] + [8])
    contact_sheet(source, 20, 5, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(json.loads(sheet.text["captions"])) == 19 and sheet.text["licence"] == source.licence


GOOD = '{"file": "b.png", "caption": "x"}'
BAD = {
    "not a folder": ("is not a folder", lambda r: r / "nothing"),
    "a file": ("is not a folder", lambda r: r / "b.png"),
    "no pictures": (r"no pictures in .*Fix: .* files that end in \.png", lambda r: _new(r / "empty")),
    "no captions": (r"none of the 3 pictures .*write b\.txt for b\.png", lambda r: r),
    "latin sidecar": (r"b\.txt is not UTF-8 text", lambda r: _write(r, "b.txt", b"caf\xe9")),
    "endless sidecar": (r"b\.txt is too large", lambda r: _write(r, "b.txt", b"x" * 70_000)),
    "latin table": (r"csv is not UTF-8", lambda r: _write(r, "captions.csv", b"file,caption\nb.png,\xe9")),
    "csv header": (r"columns \['a', 'b'\]", lambda r: _write(r, "captions.csv", b"a,b\n1,2\n")),
    "csv semicolons": (r"separate the columns by commas, not by ';'", lambda r: _csv(r, "file;caption\nb.png;x, y\n")),
    "csv tabs": (r"columns by commas, not by '\\t'", lambda r: _csv(r, "id\tcaption\tfile\n1\tx\tb.png\n")),
    "csv commas": (
        r"csv:3 has 3 fields, and there are 2 columns.* put captions with commas in quotes",
        lambda r: _csv(r, "file,caption\nb.png,x\nb.png,a dog, and a cat\n"),
    ),
    "csv short": ("csv:2 has fewer fields than the 2 columns", lambda r: _csv(r, "file,caption\nb.png\n")),
    "csv quote": (
        "csv:2 is not a line of a table .*close every quote",
        lambda r: _csv(r, 'file,caption\nb.png,"x\nsub/a.JPG,y\n'),
    ),
    "backslashes": ("first: sub.a.JPG. Fix: write /", lambda r: _csv(r, "file,caption\nsub\\a.JPG,x\n")),
    "foreign columns": (
        "needed are file_name and text",
        lambda r: _write(r, "metadata.csv", b"file_name,label\nb.png,3\n"),
    ),
    "empty table": ("names no picture", lambda r: _write(r, "captions.csv", b"file,caption\n")),
    "json syntax": (r"captions\.jsonl:2 is not", lambda r: _jsonl(r, GOOD + '\n{"file"')),
    "json list": (r"captions\.jsonl:1 is not", lambda r: _jsonl(r, "[1]")),
    "json deep": (r"captions\.jsonl:1 is not", lambda r: _jsonl(r, "[" * 100_000)),
    "json key": (r"captions\.jsonl:1 is not .*caption", lambda r: _jsonl(r, '{"file": "b.png"}')),
    "json type": ("must be texts", lambda r: _jsonl(r, '{"file": "b.png", "caption": 3}')),
    "surrogate": ("half of a surrogate", lambda r: _jsonl(r, '{"file": "b.png", "caption": "\\ud800"}')),
    "empty caption": ("an empty caption", lambda r: _jsonl(r, '{"file": "b.png", "caption": " "}')),
    "missing files": ("exists; the first: q.png", lambda r: _jsonl(r, GOOD.replace("b.", "q."))),
    "outside": ("is outside the folder", lambda r: _jsonl(r, '{"file": "../b.png", "caption": "x"}')),
    "absolute": ("is outside the folder", lambda r: _jsonl(r, '{"file": "/etc/passwd", "caption": "x"}')),
    "NUL": ("is outside the folder", lambda r: _jsonl(r, '{"file": "b\\u0000.png", "caption": "x"}')),
}


def _new(path):
    path.mkdir()
    return path


def _write(root, name, data):
    (root / name).write_bytes(data)
    return root


def _csv(root, text):
    return _write(root, "captions.csv", text.encode())


def _jsonl(root, text):
    return _write(root, "captions.jsonl", text.encode())


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_user_errors(root, case):
    match, arrange = BAD[case]
    with pytest.raises(UserError, match=match) as error:
        Folder(str(arrange(root)), "all", 4)
    assert "\n" not in str(error.value)


def test_names_too_long_for_a_file_are_missing_files(root):
    _jsonl(root, f'{GOOD}\n{GOOD.replace("b.png", "b" * 400)}')
    with pytest.warns(UserWarning, match="names 1 files that do not exist: bbbb"):
        assert Folder(str(root), "all", 4).records == [("b.png", "x")]


def test_pipes_and_devices_are_told_of_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    source = Folder(str(tmp_path), "all", 4, captions=False)
    for number in range(2):
        with pytest.raises(BadImage, match="it is no file"):
            source[number]
    assert len(source.digest(2)) == 16


def test_other_mistakes(root):
    (root / "b.txt").write_text("box")
    with pytest.raises(UserError, match="data.path"):
        make("folder", size=4)
    with pytest.raises(UserError, match="data.split='tests'.*did you mean 'test'"):
        Folder(str(root), "tests", 4)
    with pytest.raises(UserError, match="max_bad=2"):
        Folder(str(root), "all", 4, max_bad=2)
    assert not held_out("b.png")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="the split 'test' of .* is empty"):
        Folder(str(root), "test", 4)
