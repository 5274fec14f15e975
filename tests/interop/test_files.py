"""Weights of others: read as they are, and everything that is not what it should be refused in one line."""

import hashlib
import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip_jax.errors import UserError
from unclip_jax.interop import torch_files
from unclip_jax.interop.files import check_sha256, locate, open_weights
from unclip_jax.interop.stages import MAX_CARD_BYTES, stated_licence
from unclip_jax.storage import read_json
from unclip_jax.tensors import read_header, write_arrays

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([0.5, -2], np.float16),
    "double": np.array(1 / 3),
    "numbers": np.array([[1, 2]], np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def torch():
    return pytest.importorskip("torch", reason="torch files need the package torch")


def same(weights, arrays):
    assert set(weights.names) == set(arrays)
    assert weights.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        got = weights.take(name)
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "mine.safetensors"])
def test_safetensors_are_read_as_they_are(tmp_path, name):
    save_file(ARRAYS, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with open_weights(path) as weights:
            same(weights, ARRAYS)


def test_what_is_written_is_read_by_the_format_s_own_library(tmp_path):
    import safetensors

    arrays = {**ARRAYS, "brain": np.array([1.5, -3]).astype(jnp.bfloat16)}
    write_arrays(tmp_path / "a.safetensors", arrays, {"a.weight": np.float16}, {"format": "pt"})
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="flax") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("brain").dtype == jnp.bfloat16
        assert np.asarray(file.get_tensor("brain"), np.float32).tolist() == [1.5, -3]
        np.testing.assert_array_equal(file.get_tensor("a.weight"), ARRAYS["a.weight"])
        assert file.get_tensor("a.weight").dtype == jnp.float16
    places = read_header(tmp_path / "a.safetensors")
    assert all(place.begin % 8 == 0 for name, place in places.items() if place.dtype in ("F64", "I64"))


def test_torch_files_are_read_as_they_are(tmp_path):
    save = torch().save
    tensors = {name: torch().from_numpy(array.copy()) for name, array in ARRAYS.items()}
    tensors["turned"] = tensors["a.weight"].T
    tensors["brain"] = torch().tensor([1.5, -3.0], dtype=torch().bfloat16)
    want = {**ARRAYS, "turned": np.ascontiguousarray(ARRAYS["a.weight"].T)}
    want["brain"] = np.array([1.5, -3]).astype(jnp.bfloat16)
    save(tensors, tmp_path / "pytorch_model.bin")
    same(open_weights(tmp_path), want)
    save({"epoch": 3, "state_dict": tensors, "name": "x"}, tmp_path / "epoch_3.pt")
    same(open_weights(tmp_path / "epoch_3.pt"), want)
    save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "ddp.pt")
    with pytest.warns(UserWarning, match="module"):
        same(open_weights(tmp_path / "ddp.pt"), want)
    save({"model": tensors, "ema": tensors}, tmp_path / "both.pt")
    assert "several sets of weights: ema, model" in refused(open_weights, tmp_path / "both.pt")


def test_a_torch_file_is_mapped_anew_after_so_many_bytes(tmp_path, monkeypatch):
    torch().save({name: torch().from_numpy(array.copy()) for name, array in ARRAYS.items()}, tmp_path / "a.pt")
    mapped, times = torch_files._mapped, []
    monkeypatch.setattr(torch_files, "_mapped", lambda file: times.append(file) or mapped(file))
    for limit, at_least in ((2**28, 2), (0, 1 + len(ARRAYS))):
        times.clear()
        monkeypatch.setattr(torch_files._Taker, "LIMIT", limit)
        same(open_weights(tmp_path / "a.pt"), ARRAYS)
        assert at_least <= len(times) <= 1 + 2 * len(ARRAYS) and (len(times) == 2) == bool(limit)


def test_safetensors_come_first_and_those_without_a_variant(tmp_path):
    for number, name in enumerate(["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"]):
        save_file({"n": np.array([number], np.float32)}, tmp_path / name)
    assert open_weights(tmp_path).take("n") == 0
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    assert open_weights(tmp_path).take("n") == 1


@pytest.fixture
def shards(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "model-2.safetensors")
    return tmp_path


def index(folder, **table):
    text = json.dumps({"weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_read_by_their_index(shards):
    index(shards, a="model-1.safetensors", b="model-2.safetensors")
    same(open_weights(shards), {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"a": "../secret.safetensors"}, "outside its directory"),
        ({"a": "/etc/passwd"}, "outside its directory"),
        ({"a": ".."}, "outside its directory"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors is missing"),
        ({"c": "model-1.safetensors"}, "no such array"),
        ({}, "no weight_map"),
    ],
    ids=str,
)
def test_bad_indices_are_refused(shards, table, told):
    save_file({"a": np.ones(2, np.float32)}, shards.parent / "secret.safetensors")
    index(shards, **table)
    assert told in refused(open_weights, shards)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "truncated or no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"  <html lang='en'>", "web page"),
        (struct.pack("<Q", 2**40) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 17 * 2**20) + b" " * (17 * 2**20), "more than the"),
        (struct.pack("<Q", 8) + b"not json", "no valid safetensors"),
        (header({"a": entry()}, b"\0" * 4), "truncated: 4 of 8 bytes"),
        (header({"a": entry()}, b"\0" * 9), "overlap or leave gaps"),
        (header({"a": entry(), "b": entry()}, b"\0" * 8), "overlap or leave gaps"),
        (header({"a": entry(offsets=(8, 16))}, b"\0" * 16), "overlap or leave gaps"),
        (header({"a": entry(shape=(3,))}, b"\0" * 8), "8 bytes for the shape"),
        (header({"a": entry(shape=(-2,))}, b"\0" * 8), "impossible numbers"),
        (header({"a": entry(shape=(2**62, 4))}, b"\0" * 8), "a has an impossible shape"),
        (header({"a": entry(shape=(2**70, 0), offsets=(0, 0))}), "a has an impossible shape"),
        (header({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, b"\0" * 4), "a has an impossible shape"),
        (header({"a": entry(shape=(9,) * 10**6)}, b"\0" * 8), "a has an impossible shape"),
        (header({"a": entry("F8_E4M3", offsets=(0, 2))}, b"\0" * 2), "a is of dtype F8_E4M3"),
        (header({"a": entry("C64", offsets=(0, 16))}, b"\0" * 16), "a is of dtype C64"),
        (header({"a": 1}), "no valid safetensors"),
    ],
    ids=range(20),
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, told):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert told in refused(open_weights, tmp_path)


def test_a_file_cut_off_while_it_is_read_is_told(tmp_path):
    save_file({"a": np.arange(4.0)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 90)
    assert "has become shorter while it was read" in refused(weights.take, "a")


def test_unsound_numbers_are_refused(tmp_path):
    for kind in (np.float32, np.float16, jnp.bfloat16):
        array = np.array([1, np.nan, np.inf]).astype(kind)
        name = {4: "F32", 2: "F16" if kind is np.float16 else "BF16"}[array.itemsize]
        content = header({"w": entry(name, (3,), (0, array.nbytes))}, array.tobytes())
        (tmp_path / "model.safetensors").write_bytes(content)
        assert "array w holds NaN" in refused(open_weights(tmp_path).take, "w")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["config.json"], "holds no weights"),
        (["stack.json"], "is a stack of unclip_jax already"),
        (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "checkpoint of Orbax"),
        (["model_index.json"], "whole pipeline of diffusers"),
        (["a.safetensors", "b.safetensors"], "several files of weights: a.safetensors, b.safetensors"),
    ],
    ids=str,
)
def test_wrong_directories_are_named(tmp_path, files, told):
    for name in files:
        (tmp_path / name).touch()
    assert told in refused(open_weights, tmp_path)


def test_unknown_and_missing_files_are_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "unknown format" in refused(open_weights, tmp_path / "model.gguf")
    assert "does not exist" in refused(open_weights, tmp_path / "none")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    import pickle  # of the attacker

    canary = tmp_path / "canary"
    torch().save({"a": torch().zeros(1), "b": Canary(canary)}, tmp_path / "evil.pt")
    told = refused(open_weights, tmp_path / "evil.pt")
    assert "holds more than weights" in told and "mkdir" in told
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert "is a pickle, which could run code" in refused(open_weights, tmp_path / "pytorch_model.bin")
    torch().save({"b": Canary(canary)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "is a pickle, which could run code" in refused(open_weights, tmp_path / "old.pt")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have


def test_bad_torch_files_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    torch().save({"a": torch().zeros(1000)}, file)
    whole = file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:2000])
    assert "truncated or no torch file" in refused(open_weights, tmp_path / "cut.pt")
    np.savez(tmp_path / "b.npz", a=np.ones(3))
    assert "no torch file" in refused(open_weights, tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("bomb/data.pkl", bytes(10**6))
    assert "compressed" in refused(open_weights, tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        script.writestr("script/constants.pkl", b"")
    assert "TorchScript" in refused(open_weights, tmp_path / "script.pt")
    for kind in (torch().complex64, torch().float8_e4m3fn):
        torch().save({"a": torch().zeros(2).to(kind)}, file)
        assert f"a is of dtype {str(kind).split('.')[1]}" in refused(open_weights, file)
    odd = {0: torch().ones(2)}, {"a": torch().zeros(1).expand(10**11)}, {"a": torch().ones(2, device="meta")}
    for state in odd:
        torch().save(state, file)
        assert "is no array under a name" in refused(open_weights, file)
    torch().save([1, 2], file)
    assert "no dict of arrays" in refused(open_weights, file)
    torch().save({"a": torch().tensor([1.0, float("nan")])}, file)
    assert "a holds NaN" in refused(open_weights(file).take, "a")


def test_without_torch_or_with_an_old_one_torch_files_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "unclip_jax[torch]" in refused(open_weights, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    sys.modules["torch"].__version__ = "2.5.1+cpu"
    assert "torch 2.5.1+cpu reads torch files unsafely" in refused(open_weights, tmp_path / "a.pt")


def test_a_card_of_empty_lines_is_read_in_no_time(tmp_path):
    (tmp_path / "README.md").write_text("---" + "\n" * (MAX_CARD_BYTES - 3))
    assert stated_licence(tmp_path, {}) == ""
    (tmp_path / "README.md").write_text("--- \r\nlicense: mit\r\n---\n")
    assert stated_licence(tmp_path, {}) == "mit"


def test_json_is_read_up_to_a_size(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": "__import__"}')
    assert read_json(file) == {"a": "__import__"}
    for content, told in (
        ("[1]", "JSON object"),
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS"),
        ("é".encode("latin-1"), "not UTF-8 text"),
    ):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert told in refused(read_json, file)
    file.write_text('{"a": 1}')
    assert "at most 4" in refused(read_json, file, most=4)
    assert "is missing; expected a config" in refused(read_json, tmp_path / "none.json")


def test_a_checksum_that_fits_lets_the_file_pass(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    check_sha256(file, digest.upper())
    assert digest in refused(check_sha256, file, "0" * 64)


def test_the_hub_is_asked_for_what_is_not_here(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "some/secret":
            raise OSError("no network")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert locate("some/clip") == (tmp_path / "cache", "some/clip")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked[0][1])
    assert "the hub did not give it (OSError)" in refused(locate, "some/secret")
    (tmp_path / "runs/clip").mkdir(parents=True)
    assert locate("runs/clip") == (Path("runs/clip"), "clip")
    asked.clear()
    for wrong in ("runs/clpi", "no_such_file", "a/b/c", "../some/clip", "/some/clip"):
        assert "does not exist" in refused(locate, wrong)
    assert not asked
