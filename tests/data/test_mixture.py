"""Mixtures keep their shares, lose no record, and loaders give each reading one of several captions."""

import itertools

import numpy as np
import pytest

from unclip_jax import data
from unclip_jax.data import loader
from unclip_jax.data.source import Source
from unclip_jax.errors import UserError
from unclip_jax.tokenizer import Tokenizer


class Numbered(Source):
    """Record i is a picture full of `value`, with captions "value i a" and "value i b"."""

    name = "numbered"

    def __init__(self, split="train", size=2, seed=0, *, value=0, length=10, licence="none", max_bad=0.1):
        self.value, self.length, self.licence, self.max_bad = value, length, licence, max_bad
        self.split, self.size, self.seed = split, size, seed

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        captions = [f"{self.value} {i} {end}" for end in "ab"]
        image = np.full((self.size, self.size, 3), self.value, np.uint8)
        return {"image": image, "caption": captions[0], "captions": captions, "number": i}

    def digest(self, num):
        return f"{self.value} {num}"


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "numbered", f"{__name__}:Numbered")


def mixture(*parts, **kw):
    return data.make("mixture", size=2, parts=tuple({"source": "numbered", **part} for part in parts), **kw)


def test_shares_and_epoch():
    source = mixture(dict(value=1, length=1500, weight=3), dict(value=2, length=70, weight=1))
    records = [source[i] for i in range(len(source))]
    values = [int(r["image"][0, 0, 0]) for r in records]
    assert len(source) == 2000 and values.count(1) == 1500 and values.count(2) == 500
    for part, length in ((1, 1500), (2, 70)):
        numbers = [r["number"] for r, v in zip(records, values, strict=True) if v == part]
        assert numbers == [k % length for k in range(len(numbers))]
    assert 180 < values[:250].count(1) < 196  # shares hold in stretches too
    for outside in (-1, 2000):
        with pytest.raises(IndexError):
            source[outside]


def test_parts_are_made_as_the_mixture_and_it_is_told_of_by_all_of_them():
    parts = (
        dict(value=1, licence="a", max_bad=0.3, size=5, split="train"),
        dict(value=2, licence="b", max_bad=0.2, seed=9, weight=1),
        dict(value=3, licence="a", weight=2.0),
    )
    source = mixture(*parts, split="test", seed=4)
    assert [(part.split, part.size, part.seed) for part in source.parts] == [("test", 2, seed) for seed in (4, 9, 4)]
    assert (source.split, source.size, source.licence, source.max_bad) == ("test", 2, "a; b", 0.3)
    assert source.counts.tolist() == [250, 250, 500]
    again, other = (mixture(*parts, split="test", seed=seed).pattern for seed in (4, 5))
    assert (again == source.pattern).all() and (other != source.pattern).any()
    of = ((1, 2, 9), (1, 3, 9), (2, 2, 9), (1, 2, 8))
    assert len({mixture({"value": a}, {"value": b}).digest(num) for a, b, num in of}) == 4


@pytest.mark.parametrize("weights", [(1, 1e-9, 5), (1, 2, 4), (0.3, 0.3, 0.4), (1,) * 7])
def test_shares_are_whole_and_add_up(weights):
    counts = mixture(*({"value": k, "weight": w} for k, w in enumerate(weights))).counts
    exact = np.array(weights) / sum(weights) * 1000
    assert counts.sum() == 1000 and (counts >= 1).all() and (np.abs(counts - exact) <= 1.001).all()
    near = [np.floor(exact) + more for more in itertools.product((0, 1), repeat=len(exact))]
    least = min(np.abs(n - exact).sum() for n in near if n.sum() == 1000 and (n >= 1).all())
    assert np.abs(counts - exact).sum() == pytest.approx(least)  # by largest remainders


def test_parts_of_hardly_any_weight_take_their_record_from_the_largest():
    assert mixture({"weight": 1e-9}, {"weight": 1}, {"weight": 1e-9}).counts.tolist() == [1, 998, 1]


def test_each_reading_takes_one_of_several_captions():
    tokenizer = Tokenizer.train([f"0 {i} {end}" for i in range(10) for end in "ab"], 300, max_len=8)
    source = Numbered(length=10)
    stream = loader.batches(source, tokenizer, 10, seed=1, shuffle=False)
    epochs = [tokenizer.decode(next(stream)["tokens"]) for _ in range(20)]
    assert all([text[:-2] for text in epoch] == [f"0 {i}" for i in range(10)] for epoch in epochs)
    ends = "".join(text[-1] for epoch in epochs for text in epoch)
    assert 70 < ends.count("a") < 130
    again = loader.batches(source, tokenizer, 10, seed=1, shuffle=False, start_step=7)
    assert tokenizer.decode(next(again)["tokens"]) == epochs[7]


class Embedded(Numbered):
    """As if its records were embeddings of a CLIP."""

    def __init__(self, *args, clip="one", **kw):
        super().__init__(*args, **kw)
        self.clip_identity = clip


def test_parts_are_of_one_kind(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "embedded", f"{__name__}:Embedded")
    one, other = {"source": "embedded"}, {"source": "embedded", "clip": "other"}
    assert mixture(one, one).clip_identity == "one" and mixture({}).clip_identity is None
    with pytest.raises(UserError, match="mix embeddings of several CLIPs"):
        mixture(one, other)
    with pytest.raises(UserError, match="mix pictures and embeddings"):
        mixture({}, one)


def test_captions_are_those_of_the_records():
    source = mixture(dict(value=1, length=30), dict(value=2, length=7))
    assert all(source.caption(i) == source[i]["caption"] for i in range(100))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((), "needs data.parts"),
        (({"source": "numbered"},) * 1001, "data.parts are 1001, and each needs a place among 1000 records"),
        (("shapes",), "must be a dict"),
        (({"weight": 1},), "must be a dict with 'source'"),
        (({"source": "numbered", "weight": 0},), "weight=0 must be a number above 0"),
        (({"source": "mixture", "parts": ()},), "is a mixture itself"),
        (({"source": "shaps"},), "did you mean 'shapes'"),
    ],
)
def test_mistakes(parts, match):
    with pytest.raises(UserError, match=match):
        data.make("mixture", size=2, parts=parts)
