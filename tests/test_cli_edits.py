"""vary, blend, edit, probe: what is written; picture files are read, or refused in one line; pages run nothing."""

import html.parser
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import HOSTILE, files, run, stack  # noqa: F401 (fixtures)
from unclip_jax import __version__, gallery, pipeline
from unclip_jax.cli.pictures import read_picture
from unclip_jax.edits import LEAST
from unclip_jax.errors import UserError
from unclip_jax.gallery import Picture
from unclip_jax.pipeline import UnCLIP


@pytest.fixture
def quick(monkeypatch):
    """Stages that answer at once, by their rows; no network is compiled."""

    def answer(self, stage, given, options, batch_size, progress, method="sample"):
        rows = given[0]
        total = len(next(iter(rows.values())))
        numbers = np.arange(total, dtype=np.float32)
        if method == "invert":
            return np.broadcast_to(numbers[:, None, None, None], (total, 16, 16, 3)) + rows["image"]
        if stage == "clip":
            told = {"z_txt": np.eye(8, dtype=np.float32)[rows["tokens"].sum(1) % 8]}
            return told | ({"z_img": np.eye(8, dtype=np.float32)[:total]} if "image" in rows else {})
        if stage == "prior":
            return np.eye(8, dtype=np.float32)[-total:]
        side = 16 if stage == "decoder" else 32
        return np.broadcast_to((numbers / 100)[:, None, None, None], (total, side, side, 3)).astype(np.float32)

    monkeypatch.setattr(UnCLIP, "run", answer)


@pytest.fixture
def photos(tmp_path, run):  # noqa: F811
    """Two picture files in the current folder."""
    for name, seed in (("a.png", 1), ("b.jpg", 2)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / name)
    return ["a.png", "b.jpg"]


COMMANDS = {
    "vary": (["vary", "a.png", "b.jpg", "--num", 2], 2 * 3),
    "white noise": (["vary", "a.png", "--white-noise", "--num", 3], 4),
    "blend": (["blend", "a.png", "a blue ring", "b.jpg", "--frames", 3], 5),
    "prompts": (["blend", "a red circle", "prompt:b.jpg", "--frames", 4], 4),
    "edit": (["edit", "b.jpg", "--from", "red", "--to", "green", "--theta", 0.4, "--frames", 3], 4),
    "probe": (["probe", "a.png", "--labels", "a ring,a star", "--num", 2], 3),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_writes_a_labelled_folder(name, run, stack, quick, photos, tmp_path):  # noqa: F811
    argv, count = COMMANDS[name]
    code, out, err = run(*argv, "--model", stack, "--seed", 3, "--html", "--out", "made")
    assert (code, err) == (0, []) and f"{count} pictures of 32 x 32 pixels in made" in out
    index = json.loads((tmp_path / "made" / "pictures.json").read_text())
    assert len(index["pictures"]) == count and index["seed"] == 3 and index["settings"]["decoder"]["steps"] >= 4
    names = {picture["file"] for picture in index["pictures"]}
    moving = set(gallery.ANIMATIONS) if argv[0] == "blend" else set()
    assert set(files(tmp_path / "made")) == names | moving | {"grid.png", "pictures.json", "index.html"}
    for picture in index["pictures"]:
        with Image.open(tmp_path / "made" / picture["file"]) as image:
            assert image.text["unclip_jax"] == __version__ and json.loads(image.text["settings"]) == index["settings"]
            for key, value in picture.items():
                if key != "file":
                    assert image.text[key] == (value if isinstance(value, str) else json.dumps(value, sort_keys=True))


def test_edits_steps_are_evenly_spaced_and_named(run, stack, quick, photos, tmp_path):  # noqa: F811
    argv, _ = COMMANDS["edit"]
    run(*argv, "--model", stack, "--out", "made")
    told = json.loads((tmp_path / "made" / "pictures.json").read_text())
    assert [p.get("theta") for p in told["pictures"]] == [None, 0, 0.2, 0.4]
    assert {(p["image"], p["from"], p["to"]) for p in told["pictures"]} == {("b.jpg", "red", "green")}
    expected = {"name": "ddim", "steps": 20, "guidance": 2.0, "caption": False, "least": LEAST}
    assert told["settings"]["decoder"] == expected


def test_probe_prints_the_odds(run, stack, quick, photos):  # noqa: F811
    argv, _ = COMMANDS["probe"]
    _, out, _ = run(*argv, "--model", stack, "--out", "made")
    name, odds = out.splitlines()[0].split(": ")
    shares = [float(part.rsplit(" ", 2)[1]) for part in odds.split(", ")]
    assert name == "a.png" and sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares)[::-1]


def test_of_an_animation_cut_off_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), np.uint8)) for k in range(3)]
    for name in ("a.gif", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        whole = (tmp_path / name).read_bytes()
        for at in range(len(whole) // 3, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:at])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert read_picture(tmp_path / name).shape == (16, 16, 3)
                except UserError as error:
                    assert "damaged" in str(error) or "not a picture" in str(error)


def test_animations_go_there_and_back_in_the_order_of_the_frames(tmp_path):
    images = [np.full((20, 20, 3), value, np.uint8) for value in (0, 100, 200)]
    gallery.write(tmp_path / "made", [("way", [Picture(image, "frame") for image in images])], {}, animated=True)
    for name in gallery.ANIMATIONS:
        with Image.open(tmp_path / "made" / name) as moving:
            assert moving.n_frames == 4 and moving.width == 160
            shown = []
            for k in range(4):
                moving.seek(k)
                shown.append(int(np.asarray(moving.convert("RGB"))[5, 5, 0]))
        np.testing.assert_allclose(shown, [0, 100, 200, 100], atol=3)


def drawn(words):
    return [(words, [Picture(np.zeros((8, 8, 3), np.uint8), words, {})])]


def test_a_folder_filled_by_others_meanwhile_is_left_to_them(tmp_path):
    gallery.write(tmp_path / "out", drawn("theirs"), {})
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for number in (2, 3):
        with pytest.warns(UserWarning, match=f"out was filled meanwhile; the pictures are in .*out-{number}"):
            made = gallery.write(tmp_path / "out", drawn("mine"), {}, overwrite=False)
        assert {file.parent for file in made} == {tmp_path / f"out-{number}"} and all(map(Path.is_file, made))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_folder_by_the_name_of_a_file_loses_no_picture(tmp_path):
    (tmp_path / "out" / gallery.GRID).mkdir(parents=True)
    with pytest.warns(UserWarning, match="out holds a folder named grid.png; the pictures are in .*out-2"):
        made = gallery.write(tmp_path / "out", drawn("mine"), {})
    assert {file.parent for file in made} == {tmp_path / "out-2"} and all(map(Path.is_file, made))
    assert [*(tmp_path / "out").rglob("*")] == [tmp_path / "out" / gallery.GRID]


def test_an_earlier_index_of_a_thousand_brackets_loses_no_picture(tmp_path):
    (tmp_path / "pictures.json").write_text("[" * 100_000)
    assert all(map(Path.is_file, gallery.write(tmp_path, drawn("a"), {})))


def test_names_that_are_no_text_are_written_and_come_back(tmp_path):
    gallery.write(tmp_path / "out", drawn("a"), {"model": "st\udcff"}, page=True)
    assert json.loads((tmp_path / "out/pictures.json").read_text())["model"] == "st\udcff"


def test_overwriting_takes_away_an_earlier_page_and_animation(tmp_path):
    rows = [("way", [Picture(np.zeros((20, 20, 3), np.uint8), "frame")] * 2)]
    gallery.write(tmp_path / "made", rows, {}, page=True, animated=True)
    (tmp_path / "made" / "mine.html").write_text("mine")
    gallery.write(tmp_path / "made", rows, {})
    assert set(files(tmp_path / "made")) == {
        "mine.html", "grid.png", "pictures.json", *(gallery.file_name("way", 0, i) for i in (0, 1))
    }  # fmt: skip


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt(), UserError("stage 'decoder' gave NaN")])
@pytest.mark.parametrize("finished", [0, 1, 4, 5])
def test_what_was_finished_before_a_stop_is_kept(tmp_path, error, finished):
    """Pictures of rows of two: the last row may have one."""

    def row(k):
        for i in range(2):
            if 2 * k + i == finished:
                raise error
            yield Picture(np.full((20, 20, 3), k, np.uint8), "a")

    with warnings.catch_warnings(record=True) as told, pytest.raises(type(error)):
        warnings.simplefilter("always")
        gallery.write(tmp_path / "made", ((f"row {k}", row(k)) for k in range(3)), {"seed": 1}, page=True)
    if not finished:
        assert not list(tmp_path.iterdir()) and not told
        return
    index = json.loads((tmp_path / "made" / "pictures.json").read_text())
    names = [gallery.file_name(f"row {n // 2}", n // 2, n % 2) for n in range(finished)]
    assert [picture["file"] for picture in index["pictures"]] == names and "finished before" in str(told[0].message)
    assert set(files(tmp_path / "made")) == {*names, "grid.png", "index.html", "pictures.json"}
    text = (tmp_path / "made" / "index.html").read_text()
    assert text.endswith(gallery.ROW_END + gallery.PAGE_END) and text.count("<figure>") == finished
    assert text.count("<section>") == text.count("</section>") == -(-finished // 2)


@pytest.mark.parametrize(("rows", "columns", "shown"), [(4, 3, 6), (1, 30, 8), (12, 1, 8), (1, 7, 7), (3, 4, 8)])
def test_a_grid_shows_whole_rows_while_it_can(tmp_path, monkeypatch, rows, columns, shown):
    monkeypatch.setattr(gallery, "GRID_PIXELS", 8 * 160**2)
    drawn = [("a", [Picture(np.full((160, 160, 3), 9, np.uint8), "")] * columns)] * rows
    gallery.write(tmp_path / "made", drawn, {})
    sheet = np.asarray(Image.open(tmp_path / "made" / "grid.png"))
    assert (sheet == 9).all(-1).sum() == shown * 160**2


@pytest.mark.parametrize("prompts", [["a red circle", "a blue ring", "two stars"], ["a red circle"]])
def test_many_pictures_are_drawn_some_at_a_time_to_the_same(run, stack, tmp_path, monkeypatch, prompts):  # noqa: F811
    argv = ["sample", *prompts, "--num", 6 // len(prompts), "--model", stack, "--steps", 3, "--html", "--batch-size", 4]
    drawn, draw, write = [], UnCLIP._draw, gallery.write_image
    monkeypatch.setattr(UnCLIP, "_draw", lambda *args: drawn.append("block") or draw(*args))
    monkeypatch.setattr(gallery, "write_image", lambda *args: drawn.append("file") or write(*args))
    run(*argv, "--out", "once")
    assert drawn == ["block", *["file"] * 7]
    monkeypatch.setattr(pipeline, "HELD", 5 * 32**2)
    drawn.clear()
    run(*argv, "--out", "parts")
    assert drawn == ["block", *["file"] * 4, "block", *["file"] * 3]  # the last is the grid
    once, parts = (json.loads((tmp_path / name / "pictures.json").read_text()) for name in ("once", "parts"))
    assert once == parts and len(once["pictures"]) == 6 and len(files(tmp_path / "parts")) == 9
    for picture in once["pictures"]:
        a, b = (np.asarray(Image.open(tmp_path / name / picture["file"]), int) for name in ("once", "parts"))
        assert np.abs(a - b).max() <= 1


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser takes them apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "href"]
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_shows_hostile_texts_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "write_image", lambda path, *_: path.touch())  # a PNG's keys are of few letters
    hostile = [*HOSTILE, '"><img src=x onerror=alert(1)>', "</figcaption><script>", "</style><b>", "&lt;"]
    image = np.zeros((4, 4, 3), np.uint8)
    rows = [("hostile", [Picture(image, text, {"prompt": text, text: 1}) for text in hostile])]
    gallery.write(tmp_path / "made", rows, {"seed": 3, "settings": {"decoder": {"name": "<i>"}}}, page=True)
    text = (tmp_path / "made" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags <= set("html head meta title style body section figure img figcaption bdi dl dt dd".split())
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert len(page.sources) == len(hostile) and all(s.startswith("data:image/png;base64,") for s in page.sources)
    for prompt in hostile:
        assert prompt.replace("\u202e", "\\u202e") in page.texts
    assert "\u202e" not in text and '{"decoder": {"name": "<i>"}}' in page.texts


def test_sample_writes_a_page_on_request(run, stack, quick, tmp_path):  # noqa: F811
    argv = ["sample", "--model", stack, "--num", 1, "--html", "--out", "made", "--", "<script>alert(1)</script>"]
    assert run(*argv)[0] == 0
    page = Page((tmp_path / "made" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.texts and __version__ in page.texts


# Picture files.

RED, GREEN = (200, 30, 40), (20, 180, 60)


def test_of_an_animation_the_first_frame_is_taken_with_a_warning(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, GREEN)]
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match="has 2 frames"):
            image = read_picture(tmp_path / name)
        np.testing.assert_allclose(image[1, 1].astype(int), RED, atol=6)


def bomb(path):
    """A PNG whose header alone says 50,000 x 50,000."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def large(path):
    """More than we take, not yet more than Pillow takes: it would only warn."""
    path.write_bytes(b"")
    bomb(path)
    path.write_bytes(path.read_bytes().replace(struct.pack(">II", 50_000, 50_000), struct.pack(">II", 10_000, 10_000)))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


REFUSED = {
    "empty.png": (lambda p: p.write_bytes(b""), "is empty"),
    "text.png": (lambda p: p.write_text("a red circle"), "not a picture"),
    "vector.svg": (lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a picture"),
    "cut.jpg": (lambda p: (Image.new("RGB", (600, 400), RED).save(p), p.write_bytes(p.read_bytes()[:900])), "damaged"),
    "bomb.png": (bomb, "bomb.png"),
    "large.png": (large, "10000x10000 pixels"),
    "missing.png": (lambda p: None, "exist"),
    "folder.png": (lambda p: p.mkdir(), "directory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_line(name, run, stack, tmp_path):  # noqa: F811
    make, words = REFUSED[name]
    make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    for argv in (["vary", name], ["blend", name, "a red circle"], ["edit", name, "--from", "red", "--to", "green"],
                 ["probe", name, "--labels", "a,b"]):  # fmt: skip
        code, out, err = run(*argv, "--model", stack, "--out", "made")
        assert code == 2 and out == "" and len(err) == 1 and err[0].startswith("error: "), err
        assert words in err[0].replace("No such file", "does not exist") and name in err[0]
    assert sorted(tmp_path.iterdir()) == before


def test_a_path_that_is_none_is_refused():
    for path in ("", "a\0b"):
        with pytest.raises(UserError, match="must be the path"):
            read_picture(path)


BAD = {
    "no picture": (["vary"], "image"),
    "eta and white noise": (["vary", "a.png", "--eta", "0.5", "--white-noise"], "not allowed"),
    "eta": (["vary", "a.png", "--eta", "1.5"], "--eta"),
    "eta NaN": (["vary", "a.png", "--eta", "nan"], "--eta"),
    "eta's sampler": (["vary", "a.png", "--sampler", "heun"], "'heun' has no eta"),
    "too many": (["vary", "a.png", "--num", "10001"], "more than 10000"),
    "steps": (["vary", "a.png", "--steps", "21"], "21 steps"),
    "one input": (["blend", "a.png"], "at least two"),
    "frames 1": (["blend", "a.png", "b.jpg", "--frames", "1"], "--frames"),
    "frames huge": (["blend", "a.png", "b.jpg", "--frames", "1001"], "--frames"),
    "noise": (["blend", "a.png", "b.jpg", "--noise", "slrp"], "did you mean 'slerp'"),
    "mistyped file": (["blend", "a.png", "c.png"], "prompt:c.png"),
    "empty prompt": (["blend", "a.png", ""], "must not be empty"),
    "empty forced prompt": (["blend", "a.png", "prompt:"], "must not be empty"),
    "control character": (["blend", "a.png", "a\x1bb"], r"'\x1b'"),
    "no from": (["edit", "a.png", "--to", "green"], "--from"),
    "empty from": (["edit", "a.png", "--from", " ", "--to", "green"], "--from"),
    "theta": (["edit", "a.png", "--from", "red", "--to", "green", "--theta", "2"], "--theta"),
    "the same": (["edit", "a.png", "--from", "red", "--to", "red"], "mean the same"),
    "no labels": (["probe", "a.png"], "--labels"),
    "one label": (["probe", "a.png", "--labels", "a ring"], "two are needed"),
    "template": (["probe", "a.png", "--labels", "a,b", "--template", "a picture"], "one {}"),
    "template twice": (["probe", "a.png", "--labels", "a,b", "--template", "{} {}"], "one {}"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(case, run, stack, quick, photos, tmp_path):  # noqa: F811
    argv, words = BAD[case]
    before = files(tmp_path)
    code, out, err = run(*argv, "--model", stack, "--out", "made")
    assert code == 2 and out == "" and len(err) == 1 and words in err[0] and err[0].isprintable(), err
    assert files(tmp_path) == before
