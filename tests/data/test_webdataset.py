"""Tar shards: every record found and read as another reader finds it, whatever else lies in the tar."""

import gzip
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import loader, make, tar_index
from unclip_jax.data.images import BadImage
from unclip_jax.errors import UserError


def png(value, size=(6, 4)):
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar(members) -> bytes:
    """(name or TarInfo, bytes) pairs as a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as stream:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))
    return out.getvalue()


def shard(first, count):
    """Records as img2dataset writes them: picture, caption, metadata."""
    members = []
    for k in range(first, first + count):
        members += [(f"{k:09d}.png", png(k)), (f"{k:09d}.txt", f"number {k}".encode())]
        members += [(f"{k:09d}.json", json.dumps({"caption": "other", "sha": "0"}).encode())]
    return tar(members)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n:05d}.tar").write_bytes(shard(50 * n, 50))
    return folder


def open_all(path, **kw):
    return make("webdataset", "all", size=4, path=str(path), **kw)


def content(source):
    return {source[i]["caption"]: int(source[i]["image"][0, 0, 0]) for i in range(len(source))}


def test_every_record_is_found_with_its_own_caption(root):
    expected = {f"number {k}": k for k in range(150)}
    assert content(open_all(root)) == expected
    assert content(open_all(f"{root}/{{00000..00002}}.tar")) == expected
    assert content(open_all(f"{root}/*.tar")) == expected
    one = open_all(root / "00001.tar")
    assert content(one) == {f"number {k}": k for k in range(50, 100)}
    assert one[0]["pixels"] == (6, 4) and "00001.tar at byte" in one[0]["file"]
    with pytest.raises(IndexError):
        one[50]
    assert [one.caption(i) for i in range(50)] == [one[i]["caption"] for i in range(50)]


def test_splits_are_disjoint_complete_and_the_same_in_any_order_of_opening(root):
    train, test, both = (content(make("webdataset", s, size=4, path=str(root))) for s in ("train", "test", "all"))
    assert train | test == both and not train.keys() & test.keys() and 0 < len(test) < 15


def test_object_storage_is_read_as_disks_are(root):
    memory = fsspec.filesystem("memory")
    for file in root.iterdir():
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
    source = pickle.loads(pickle.dumps(open_all("memory://bucket/{00000..00002}.tar")))
    assert content(source) == content(open_all(root))


def test_the_index_is_kept_found_again_and_made_anew_for_other_shards(root, tmp_path, monkeypatch):
    index = tmp_path / "index"
    content(open_all(root, index=str(index)))
    monkeypatch.setattr(tar_index, "scan", lambda *_: pytest.fail("read the headers again"))
    assert len(open_all(root, index=str(index))) == 150
    monkeypatch.undo()
    (root / "00002.tar").write_bytes(shard(100, 60))
    assert len(open_all(root, index=str(index))) == 160
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        open_all(root, index=str(tmp_path / "full"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_a_shard_written_anew_is_read_anew_though_it_is_as_large(root, tmp_path):
    index, file = tmp_path / "index", root / "00002.tar"
    content(open_all(root, index=str(index)))
    size = file.stat().st_size
    file.write_bytes(shard(200, 50))
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == size
    assert content(open_all(root, index=str(index))) == {f"number {k}": k for k in (*range(100), *range(200, 250))}
    assert len(list(index.glob("*.npy"))) == 2  # and the arrays of before are gone


OURS = '{"version": 1, "shards": 3, "passed_over": {}}'


@pytest.mark.parametrize("theirs", ['{"version": 3}', "[1]", "no json", OURS])
def test_a_folder_of_others_keeps_all_that_it_holds(root, theirs):
    (root / "index.json").write_text(theirs)
    if theirs == OURS:
        open_all(root, index=str(root))  # damaged
    else:
        with pytest.raises(UserError, match="holds another index.json"):
            open_all(root, index=str(root))
        assert (root / "index.json").read_text() == theirs
    assert content(open_all(root, index=str(root.parent / "own"))) == {f"number {k}": k for k in range(150)}


def test_a_damaged_index_in_the_cache_is_made_anew(root, tmp_path):
    content(open_all(root))
    (kept,) = (tmp_path / "cache" / "unclip_jax").iterdir()
    for damage in ("", '{"version": 2}', "[" * 100_000):
        (kept / "index.json").write_text(damage)
        assert len(open_all(root)) == 150
    (kept / "index.json").unlink()
    for damage in (b"no array", b""):
        next(kept.glob("train-*.npy")).write_bytes(damage)
        assert len(open_all(root)) == 150


def test_many_may_make_the_same_index_at_once(root, tmp_path):
    index = tmp_path / "index"
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: content(open_all(root, index=str(index))), range(24)):
            assert found == {f"number {k}": k for k in range(150)}
    assert sorted(p.name.partition("-")[0] for p in index.iterdir()) == ["index.json", "test", "train"]


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_odd_members_do_no_harm_and_are_counted(tmp_path):
    odd = [
        ("../up.png", png(1)), ("../up.txt", b"up"),
        ("/abs.png", png(2)), ("/abs.txt", b"abs"),
        ("sub/a.png", png(3)), ("sub/a.json", b'{"caption": "three"}'),
        ("a" * 150 + ".png", png(4)), ("a" * 150 + ".txt", b"long"),
        ("b.b.png", png(5)), ("b.b.txt", b"dots"),
        (link("s.png", tarfile.SYMTYPE, "/etc/passwd"), b""), ("s.txt", b"link"),
        (link("h.png", tarfile.LNKTYPE, "../up.png"), b""), ("h.txt", b"hard"),
        (link("d.png", tarfile.CHRTYPE, ""), b""), ("d.txt", b"device"),
        ("lone.png", png(6)), ("text.txt", b"no picture"),
        ("empty.png", b""), ("empty.txt", b"x"),
        ("p.pkl", b"cos\nsystem\n(S'touch /tmp/x'\ntR."), ("p.pyd", b"x"), ("p.pt", b"x"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar(odd))
    with pytest.warns(UserWarning, match="1 with a second dot in the name, such as .*x.tar: b.b.png; a record"):
        source = open_all(tmp_path / "x.tar", index=str(tmp_path / "i"))
    assert content(source) == {"up": 1, "abs": 2, "three": 3, "long": 4}
    assert source.index.passed_over == {
        "with a second dot in the name": 1, "not plain files": 3, "without a caption": 1, "without a picture": 1,
        "empty or too large": 1,
    }  # fmt: skip
    told = {(where.rpartition(": ")[2], why) for where, why in source.index.listed}
    assert told == {
        ("b.b.png", "with a second dot in the name"), ("s", "not plain files"), ("h", "not plain files"),
        ("d", "not plain files"), ("lone", "without a caption"), ("text", "without a picture"),
        ("empty", "empty or too large"),
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "x.tar"]


def test_the_kind_is_all_that_follows_the_first_dot(tmp_path):
    members = [
        ("000.depth.png", png(9)), ("000.JPG", png(1)), ("000.txt", b"one"), ("000.seg.json", b"{}"),
        ("._001.png", b"of macOS"), ("001.png", png(2)), ("._001.txt", b"of macOS"), ("001.txt", b"two"),
        ("v1.0/002.png", png(3)), ("v1.0/002.cls", b"7"), ("v1.0/002.txt", b"three"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar(members))
    source = open_all(tmp_path / "x.tar", index=str(tmp_path / "i"))
    assert content(source) == {"one": 1, "two": 2, "three": 3} and source.index.passed_over == {}


def test_records_of_one_key_are_counted_and_named(tmp_path):
    dotted = [(f"photo.{k}.{kind}", data) for k in range(3) for kind, data in (("jpg", png(k)), ("txt", b"x"))]
    again = [("a.png", png(7)), ("a.txt", b"seven"), ("a.png", png(8)), ("a.txt", b"eight"), ("a.jpg", png(9))]
    (tmp_path / "x.tar").write_bytes(tar(dotted + again))
    for _ in range(2):  # the second time from the index
        with pytest.warns(UserWarning) as told:
            source = open_all(tmp_path / "x.tar", index=str(tmp_path / "i"))
        seen, dots = (str(one.message) for one in told)
        assert "2 of a key seen before, such as" in seen and "x.tar: a; a record's key is its name up to" in seen
        assert "3 with a second dot in the name, such as" in dots and "x.tar: photo.0.jpg; a record's" in dots
        assert content(source) == {"seven": 7}
        assert source.index.passed_over == {"with a second dot in the name": 3, "of a key seen before": 2}


def test_an_index_names_a_hundred_records_of_all_reasons(tmp_path):
    for n in range(2):
        members = [(f"{n}{k:03}.png", png(k)) for k in range(80)] + [("good.png", png(1)), ("good.txt", b"x")]
        (tmp_path / f"{n}.tar").write_bytes(tar([*members, (f"{n}.txt", b"")]))
    listed = open_all(tmp_path, index=str(tmp_path / "i")).index.listed
    reasons = [why for _, why in listed]
    assert reasons.count("without a caption") == 98 and reasons.count("empty or too large") == 2
    assert listed[0][0].endswith("0.tar: 0000") and len({where for where, _ in listed}) == 100
    assert open_all(tmp_path, index=str(tmp_path / "i")).index.listed == listed


def test_an_index_of_an_earlier_version_is_made_anew(root, tmp_path):
    index = tmp_path / "index"
    content(open_all(root, index=str(index)))
    kept = json.loads((index / "index.json").read_text())
    assert kept.pop("listed") == []
    (index / "index.json").write_text(json.dumps({**kept, "version": 2}))
    for array in index.glob("*.npy"):
        np.save(array, np.load(array)[:1])
    assert content(open_all(root, index=str(index))) == {f"number {k}": k for k in range(150)}


def test_shards_that_are_no_tars_are_named(root, tmp_path):
    (root / "00001.tar").write_bytes(gzip.compress(shard(50, 50)))
    (root / "00003.tar.gz").write_bytes(gzip.compress(shard(50, 50)))
    for _ in range(2):
        with pytest.warns(UserWarning) as told:
            source = open_all(root)
        packed, unread = (str(one.message) for one in told)
        assert "1 compressed files in" in packed and "are not read: 00003.tar.gz; unpack them" in packed
        assert "1 of 3 shards cannot be read: " in unread and unread.endswith("00001.tar is compressed; gunzip it")
        assert len(source) == 100


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    data = bytearray(shard(0, 10))
    at = 5 * 6 * tarfile.BLOCKSIZE
    data[at : at + tarfile.BLOCKSIZE] = b"x" * tarfile.BLOCKSIZE
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.warns(UserWarning, match=f"1 of 1 shards end too early: .*bad header at byte {at}"):
        assert content(open_all(tmp_path / "a.tar", index=str(tmp_path / "i"))) == {f"number {k}": k for k in range(5)}


def _header(kind, size=0) -> bytes:
    info = tarfile.TarInfo("q.png")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "headers",
    [
        _header(tarfile.XHDTYPE, 10**13), _header(tarfile.XHDTYPE, -1024), _header(tarfile.GNUTYPE_LONGNAME, 2**70),
        _header(tarfile.REGTYPE, 2**80) + bytes(512),
        (_header(tarfile.GNUTYPE_LONGNAME, 2) + b"n\0".ljust(512, b"\0")) * 3000,
        _header(tarfile.XHDTYPE, 31) + b"31 GNU.sparse.map=1,2,3,a,b,c,d\n".ljust(512, b"\0") + _header(b"0"),
    ],
    ids=["huge pax", "negative pax", "huge name", "huge file", "names of names", "sparse"],
)  # fmt: skip
def test_a_hostile_header_ends_its_own_shard_alone(tmp_path, headers):
    (tmp_path / "a.tar").write_bytes(shard(0, 5)[: 5 * 6 * tarfile.BLOCKSIZE] + headers + bytes(1024))
    (tmp_path / "b.tar").write_bytes(shard(5, 5))
    with pytest.warns(UserWarning, match="1 of 2 shards end too early: cut off in .*a.tar"):
        source = open_all(tmp_path, index=str(tmp_path / "i"))
    assert content(source) == {f"number {k}": k for k in range(10)}


def test_the_home_folder_may_be_a_tilde(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    for path in ("~/shards", "~/shards/*.tar", "~/shards/{00000..00002}.tar"):
        assert content(open_all(path)) == {f"number {k}": k for k in range(150)}


def test_a_shard_that_cannot_be_opened_is_a_user_error(root):
    (root / "00003.tar").mkdir()
    with pytest.raises(UserError, match="00003.tar cannot be read"):
        open_all(root)
    (root / "00003.tar").rmdir()
    os.mkfifo(root / "00003.tar")
    with pytest.raises(UserError, match="00003.tar cannot be read .it is no file"):
        open_all(root)
    (root / "00003.tar").unlink()
    (root / "00003.tar").symlink_to("nothing")
    with pytest.raises(UserError, match="a shard cannot be read .*00003.tar"):
        open_all(root)


def test_a_shard_cut_off_keeps_what_is_whole(tmp_path):
    record = 6 * tarfile.BLOCKSIZE  # three members of a header and a block each
    (tmp_path / "a.tar").write_bytes(shard(0, 10)[: 5 * record + tarfile.BLOCKSIZE + 30])
    with pytest.warns(UserWarning, match="1 of 1 shards end too early: cut off in .*a.tar"):
        source = open_all(tmp_path / "a.tar", index=str(tmp_path / "i"))
    assert content(source) == {f"number {k}": k for k in range(5)}
    assert any("cut off in" in reason for reason in source.index.passed_over)


def test_bad_records_are_named_and_passed_over_in_training(tmp_path):
    members = [(f"{k}.png", png(k)) for k in range(12)]
    members = [m for k, m in enumerate(members) for m in (m, (f"{k}.txt", f"n {k}".encode()))]
    members[6] = ("3.png", png(3)[:30])
    members[11] = ("5.txt", b"\xff\xfe caption")
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = make("webdataset", "all", size=4, path=str(tmp_path / "a.tar"), index=str(tmp_path / "i"), max_bad=0.5)
    for number, why in ((3, "a.tar at byte .* is (damaged|not a picture)"), (5, "is no caption")):
        with pytest.raises(BadImage, match=why):
            source[number]
    with pytest.warns(UserWarning, match="passed over"):
        batch = next(loader.batches(source, None, 12, shuffle=False))
    reds = np.round(batch["image"][:, 0, 0, 0] * 127.5 + 127.5).astype(int).tolist()
    assert reds == [0, 1, 2, 4, 4, 6, 6, 7, 8, 9, 10, 11]


BAD = {
    "no path": ("", "needs data.path"),
    "command": ("pipe:cat x.tar", "asks for a command"),
    "chain": ("simplecache::https://x/y.tar", "asks for a command or a chain"),
    "nothing": ("{root}/none.tar", "names no tar file"),
    "some missing": ("{root}/{00001..00004}.tar", "names 4 shards, and 2 are not there: .*00003.tar"),
    "braces": ("{root}/{a,b}.tar", "braces without a range"),
    "endless digits": (f"{{root}}/{{0..{'9' * 5000}}}.tar", "braces without a range"),
    "endless braces": ("{root}/{000..999}{000..999}{000..999}.tar", "more than a million shards"),
    "no tar": ("{root}/text.tar", "no captioned pictures .*1 shard unread: .*text.tar is no tar file$"),
    "short": ("{root}/short.tar", "short.tar is no tar file$"),
    "web page": ("{root}/page.tar", "page.tar is a web page, not the file itself"),
    "empty": ("{root}/empty.tar", "empty.tar is empty$"),
    "no members": ("{root}/none_in.tar", "no captioned pictures in 1 shards .*: they are empty"),
    "compressed": ("{root}/zip.tar", "zip.tar is compressed; gunzip it$"),
    "compressed by name": ("{root}/packed/a.tar.gz", "a.tar.gz is compressed; gunzip it$"),
    "all compressed": ("{root}/packed", "names no tar file, but 2 compressed: a.tar.gz; unpack them"),
    "dots": ("{root}/dots.tar", "no captioned pictures .*: 2 with a second dot in the name.* ends at its first dot"),
    "only text": ("{root}/lone.tar", "no captioned pictures in 1 shards .*1 without a picture"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_user_errors(root, case):
    path, match = BAD[case]
    (root / "text.tar").write_text("no tar " * 200)
    (root / "lone.tar").write_bytes(tar([("a.txt", b"alone")]))
    (root / "short.tar").write_text("no tar")
    (root / "page.tar").write_text("<!DOCTYPE html>" + " " * 2000)
    (root / "empty.tar").touch()
    (root / "none_in.tar").write_bytes(tar([]))
    (root / "zip.tar").write_bytes(gzip.compress(shard(0, 2)))
    (root / "packed").mkdir()
    for name in ("a.tar.gz", "b.tgz"):
        (root / "packed" / name).write_bytes(gzip.compress(shard(0, 2)))
    dotted = [(f"photo.{k}.{kind}", data) for k in range(2) for kind, data in (("jpg", png(k)), ("txt", b"x"))]
    (root / "dots.tar").write_bytes(tar(dotted))
    with pytest.raises(UserError, match=match) as error:
        open_all(path.replace("{root}", str(root)))
    assert "\n" not in str(error.value)
