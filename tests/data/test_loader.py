"""Batches: equal for any hosts, workers and threads; exact on resume; each record once an epoch."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import warnings

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import SOURCES, images, loader, make
from unclip_jax.data.images import BadImage
from unclip_jax.data.source import Source
from unclip_jax.errors import UserError
from unclip_jax.tokenizer import Tokenizer

N, SIZE = 37, 8


class Numbered(Source):
    """Record i is a picture full of i, with i in its caption."""

    name, licence, size = "numbered", "none", SIZE

    def __init__(self, n=N, bad=(), max_bad=0.1):
        self.n, self.bad, self.max_bad = n, bad, max_bad

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise BadImage(f"{i}.png is damaged")
        image = np.full((SIZE, SIZE, 3), i % 256, np.uint8)
        image[..., 1] = np.arange(SIZE)[:, None]
        image[..., 2] = np.arange(SIZE)
        return {"image": image, "caption": f"number {i}"}


TOKENIZER = Tokenizer.train([f"number {i}" for i in range(N)], 300, max_len=8)


def take(count, source=None, tokenizer=TOKENIZER, batch_size=8, **kw):
    iterator = loader.batches(
        Numbered() if source is None else source, tokenizer, batch_size, **{"seed": 3, **kw}
    )
    out = [{k: np.array(v) for k, v in next(iterator).items()} for _ in range(count)]
    iterator.close()
    return out


def numbers(batches):
    return np.concatenate([images.to_uint8(b["image"])[:, 0, 0, 0] for b in batches]).tolist()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_holds_pictures_and_their_own_captions():
    (batch,) = take(1)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.float32, (8, SIZE, SIZE, 3)),
        "tokens": (np.int32, (8, 8)),
        "mask": (bool, (8, 8)),
    }
    assert TOKENIZER.decode(batch["tokens"]) == [f"number {i}" for i in numbers([batch])]
    assert list(take(1, tokenizer=None)[0]) == ["image"]


def test_every_epoch_holds_every_record_once_in_a_new_order():
    stream = numbers(take(14))
    epochs = [stream[i * N : (i + 1) * N] for i in range(3)]
    assert all(sorted(e) == list(range(N)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(N))
    assert numbers(take(5, shuffle=False)) == [i % N for i in range(40)]


def test_neighbouring_seeds_do_not_share_epochs():
    def first_epochs(seed):
        stream = numbers(take(14, seed=seed))
        return {tuple(stream[i * N : (i + 1) * N]) for i in range(3)}

    assert first_epochs(3) == first_epochs(3)
    assert not first_epochs(3) & first_epochs(4)


@pytest.mark.parametrize("kw", [{"num_threads": 0}, {"num_threads": 4, "prefetch": 8}, {"prefetch": 0}])
def test_threads_change_nothing(kw):
    assert_same(take(10, crop=4, **kw), take(10, crop=4))


def test_workers_change_nothing_also_on_resume():
    whole = take(9, crop=4)
    assert_same(take(5, crop=4, num_workers=2, start_step=4), whole[4:])


def test_workers_outlive_the_signals_that_ask_the_loop_to_stop():
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach a whole group; the loop still needs its batches."""
    whole = take(30, crop=4)
    stream = loader.batches(Numbered(), TOKENIZER, 8, seed=3, crop=4, num_workers=1)
    with contextlib.closing(stream):
        got = [next(stream)]
        (worker,) = [child for child in multiprocessing.active_children() if child.is_alive()]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        got += [next(stream) for _ in range(29)]
    assert_same(got, whole)


@pytest.mark.parametrize("start", [1, 4, 5, 11])
def test_resuming_at_a_step_is_exact(start):
    assert_same(take(12 - start, crop=4, start_step=start), take(12, crop=4)[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_split_the_same_global_batch(hosts):
    own = [np.arange(8)[h::hosts] for h in range(hosts)]  # not side by side, as on a slice
    parts, whole = [take(7, crop=4, rows=rows) for rows in own], take(7, crop=4)
    for rows, part in zip(own, parts, strict=True):
        assert_same(part, [{k: a[rows] for k, a in batch.items()} for batch in whole])


def test_a_host_reads_only_its_own_part():
    read = []

    class Counting(Numbered):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    got = take(3, Counting(), num_threads=0, rows=(2, 3))
    assert read == numbers(got) and len(read) == 3 * 2


def test_crops_are_windows_that_differ_between_epochs():
    places = {}
    for batch in take(20, Numbered(4), crop=3):
        for image in images.to_uint8(batch["image"]):
            top, left = image[0, 0, 1:].tolist()
            np.testing.assert_array_equal(image[:, 0, 1], np.arange(top, top + 3))
            np.testing.assert_array_equal(image[0, :, 2], np.arange(left, left + 3))
            places.setdefault(int(image[0, 0, 0]), set()).add((top, left))
    assert all(len(p) > 10 for p in places.values()) and len(places) == 4
    assert not np.array_equal(take(1, crop=3)[0]["image"], take(1, crop=3, seed=4)[0]["image"])


def test_fewer_records_than_a_batch_are_repeated():
    assert sorted(numbers(take(1, Numbered(3), batch_size=6))) == [0, 0, 1, 1, 2, 2]
    assert numbers(take(1, Numbered(1), batch_size=2)) == [0, 0]


def test_bad_records_are_replaced_by_the_next_good_one_and_named():
    with pytest.warns(UserWarning, match=r"passed over \(\d so far\): \d+\.png is damaged") as told:
        got = numbers(take(14, Numbered(bad=(5, 6, 36))))
    assert len([w for w in told if "passed over" in str(w.message)]) == 3  # once each, not once an epoch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = numbers(take(14))
    assert got == [{5: 7, 6: 7, 36: 0}.get(i, i) for i in want]


def test_too_many_bad_records_end_the_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            UserError, match="4 of 37 pictures of 'numbered' cannot be read, more than max_bad=0.1"
        ):
            take(14, Numbered(bad=(5, 6, 7, 36)))
        with pytest.raises(UserError, match="none of 3 pictures"):
            take(1, Numbered(3, bad=(0, 1, 2), max_bad=1))


def test_a_reader_of_a_large_source_need_not_read_it_all_to_give_up():
    """Each of many readers sees a part: half of it bad is too much before half of all is."""
    source = Numbered(10**6, bad=range(0, 10**6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="101 of 1000 pictures of 'numbered' cannot be read"):
            take(200, source, num_threads=0)


def test_a_share_of_bad_records_is_of_all_that_were_read_and_ten_are_named():
    with pytest.warns(UserWarning, match="passed over") as told:
        got = numbers(take(40, Numbered(4000, bad=range(0, 4000, 20)), None, 100, shuffle=False, num_threads=0))
    assert len(got) == 4000  # 200 bad ones, where a thousand records may hold 100
    told = [str(w.message) for w in told]
    assert len(told) == 10 and ["further ones" in words for words in told] == [False] * 9 + [True]


def test_only_bad_pictures_are_passed_over():
    class Broken(Numbered):
        def __getitem__(self, i):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        take(1, Broken())


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"start_step": -1}, "start_step=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"prefetch": -2}, "prefetch=-2"),
        ({"crop": 9}, r"crop=9 must be in 1 … 8"),
        ({"crop": 0}, "crop=0"),
        ({"source": Numbered(0)}, "'numbered' is empty"),
    ],
)
def test_impossible_settings_are_user_errors(kw, match):
    with pytest.raises(UserError, match=match):
        take(1, **kw)


def test_make_finds_sources_by_name():
    source = make("shapes", "test", size=32, seed=5)
    assert source[0]["image"].shape == (32, 32, 3) and source.name == "shapes"
    assert pickle.loads(pickle.dumps(source))[7]["caption"] == source[7]["caption"]
    assert set(SOURCES) == {"shapes", "icons", "folder", "webdataset", "tfds", "mixture", "embeddings"}


@pytest.mark.parametrize(
    ("args", "kw", "match"),
    [
        (("shape",), {"size": 32}, "did you mean 'shapes'"),
        (("shapes",), {"size": 0}, "data.size=0"),
        (("shapes",), {"size": "32"}, "data.size=32"),
        (("shapes",), {"size": 32, "pth": "x"}, "data.pth is not an argument of the source 'shapes'"),
        (("folder",), {"size": 32, "pth": "x"}, "did you mean 'path'"),
        (("shapes", "tset"), {"size": 32}, "did you mean 'test'"),
        ((["shapes"],), {"size": 32}, "not a known source"),
        (("shapes",), {"size": 4097}, r"data.size=4097 must be a whole number of pixels in 1 … 4096"),
        (("icons",), {"size": 32, "seed": -1}, "data.seed=-1 must be a whole number from 0 on"),
        (("shapes", ["test"]), {"size": 32}, r"data.split=.'test'. must be a text"),
        (("shapes",), {"size": 32, "length": "many"}, "data.length='many' must be a whole number"),
        (("shapes",), {"size": 32, "length": 2.5}, "data.length=2.5 must be a whole number"),
        (("shapes",), {"size": 32, "length": True}, "data.length=True must be a whole number"),
        (("folder",), {"size": 32, "path": ".", "captions": "no"}, "data.captions='no' must be true or false"),
        (("folder",), {"size": 32, "path": ".", "captions": 0}, "data.captions=0 must be true or false"),
        (("folder",), {"size": 32, "path": ".", "captions": None}, "data.captions=None must be true or false"),
        (("folder",), {"size": 32, "path": 1.1}, "data.path=1.1 must be a text.*quotes of its own"),
        (("folder",), {"size": 32, "path": True}, "data.path=True must be a text"),
        (("folder",), {"size": 32, "path": ".", "max_bad": "0.1"}, "data.max_bad='0.1' must be a number"),
        (("webdataset",), {"size": 32, "path": ".", "index": None}, "data.index=None must be a text"),
        (("mixture",), {"size": 32, "parts": 5}, "data.parts=5 must be a list of dicts"),
        (("mixture",), {"size": 32, "parts": {"source": "shapes"}}, "data.parts=.* must be a list of dicts"),
        (("mixture",), {"size": 32, "parts": "shapes"}, "data.parts='shapes' must be a list of dicts"),
        (("mixture",), {"size": 32, "parts": [{"source": 3}]}, "data.source='3' is not a known source"),
    ],
)
def test_make_explains_mistakes(args, kw, match):
    with pytest.raises(UserError, match=match):
        make(*args, **kw)


def test_make_converts_what_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "2014"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    words = {"size": 8, "captions": "False", "max_bad": 1}
    for path in (2014, np.int64(2014), tmp_path / "2014"):
        assert make("folder", "all", path=path, **words).caption(0) == ""
    assert len(make("shapes", size=32, length=1e2)) == 100 and make("shapes", size=32, length=None).length > 100
    assert len(make("mixture", size=32, parts=[{"source": "shapes", "length": 10}])) == 1000
