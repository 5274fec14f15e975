"""A stack directory holds what was put in, is written whole or not at all, and is refused when altered."""

import json
import os
import shutil
import struct
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unclip_jax import config, storage, tensors, weights
from unclip_jax.errors import UserError
from unclip_jax.weights import load_stack, save_stack

CONFIG = ConfigDict({"task": "prior", "rules": ((".*", "fsdp"),), "lr": 1.0, "none": None, "e": {}}).lock()
TOKENIZER = '{"caption": "ünïcode ☃"}'


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "block": {"kernel": rng.normal(size=(16, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
        "mean": rng.normal(size=8).astype(np.float32),
        "std": jnp.asarray(rng.uniform(1, 2, size=8), jnp.float32),
        "logit_scale": np.float32(2.6592),
        "table": np.arange(5, dtype=np.int32),
    }


def _stages():
    return {"clip": (_params(1), CONFIG, 10, {}), "prior_diffusion": (_params(2), CONFIG, 20, {"note": [1]})}


@pytest.fixture
def stack(tmp_path):
    return save_stack(tmp_path / "stack", _stages(), TOKENIZER)


def _refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def _edit(stack, change):
    index = json.loads((stack / "stack.json").read_text())
    change(index)
    (stack / "stack.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    save_stack(tmp_path / "a" / "stack", _stages(), TOKENIZER, dtype=dtype)
    loaded = load_stack(str(tmp_path / "a" / "stack"))
    assert list(loaded.stages) == ["clip", "prior_diffusion"] and loaded.tokenizer_json == TOKENIZER
    assert loaded.path == tmp_path / "a" / "stack"
    for name, (params, _, step, extra) in _stages().items():
        stage = loaded.stages[name]
        assert (stage.step, stage.extra) == (step, extra)
        assert stage.config == CONFIG == config.from_json(config.to_json(CONFIG)) and stage.config.is_locked
        assert jax.tree.structure(stage.params) == jax.tree.structure(params)
        for path, array in jax.tree_util.tree_leaves_with_path(params):
            kept = array.ndim < 2 and path[-1].key in ("mean", "std", "logit_scale", "table")
            got = stage.params
            for key in path:
                got = got[key.key]
            expected = np.asarray(array) if kept else np.asarray(array).astype(jnp.dtype(dtype))
            assert got.dtype == expected.dtype and np.asarray(got).tobytes() == expected.tobytes()


def test_stages_may_come_one_by_one(tmp_path):
    """As they do where all of them at once would not fit into memory."""
    save_stack(tmp_path / "s", iter(_stages().items()), TOKENIZER)
    assert list(load_stack(tmp_path / "s").stages) == list(_stages())
    assert "at least one stage" in _refused(save_stack, tmp_path / "none", iter(()), TOKENIZER)


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        out = save_stack(tmp_path / "s", _stages(), TOKENIZER)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}


def test_some_stages(stack):
    assert list(load_stack(stack, ["prior_diffusion"]).stages) == ["prior_diffusion"]
    (stack / "clip.safetensors").unlink()
    assert list(load_stack(stack, ["prior_diffusion"]).stages) == ["prior_diffusion"]
    assert "clip.safetensors is missing" in _refused(load_stack, stack)
    assert "did you mean 'prior_diffusion'" in _refused(load_stack, stack, ["prior_difusion"])


def test_one_flipped_bit_is_found(stack):
    file = stack / "clip.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    told = _refused(load_stack, stack)
    assert "clip.safetensors differs from its SHA-256" in told


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (struct.pack("<Q", 2**40) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (struct.pack("<Q", 20 * 2**20) + b" " * (20 * 2**20), "header of 20971520 bytes"),
    ],
)
def test_bad_headers_are_refused_first(stack, content, told):
    (stack / "clip.safetensors").write_bytes(content)
    assert told in _refused(load_stack, stack)


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"not json",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}',
        b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "a/b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
    ],
)
def test_malformed_safetensors_with_a_right_checksum(stack, header):
    file = stack / "clip.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    _edit(stack, lambda index: index["stages"]["clip"].update(sha256=storage.sha256(file)))
    told = _refused(load_stack, stack)
    assert "no valid safetensors file" in told
    assert b"F99" not in header or "a is of dtype F99, which must be one of F64, F32" in told


def test_what_scales_everything_else_is_never_rounded():
    half = weights.dtype_in("kernel", np.dtype(np.float32), "bfloat16")
    exact = {weights.dtype_in(name, half, "bfloat16") for name in weights.STATISTICS}
    assert (half.name, exact) == ("bfloat16", {np.dtype(np.float32)})
    assert weights.dtype_in("kernel", half, "float32") == np.float32
    assert weights.dtype_in("mean", np.dtype(np.int32), "bfloat16") == np.int32


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda i: i.update(format_version=2), "format version 2"),
        (lambda i: i.pop("format_version"), "malformed"),
        (lambda i: i.update(stages=[]), "malformed"),
        (lambda i: i["stages"]["clip"].pop("sha256"), "malformed"),
        (lambda i: i["stages"]["clip"].update(config=1), "malformed"),
        (lambda i: i["stages"]["clip"].update(config={"__class__": 1}), "config of clip does not make a config"),
        (lambda i: i["stages"].update({"../../etc/x": i["stages"]["clip"]}), "malformed"),
    ],
)
def test_bad_indices_are_refused(stack, change, told):
    _edit(stack, change)
    assert told in _refused(load_stack, stack)


def test_missing_parts(tmp_path, stack):
    assert "does not exist; expected a stack" in _refused(load_stack, tmp_path / "none")
    assert "has no stack.json; expected" in _refused(load_stack, tmp_path)
    assert "is a file" in _refused(load_stack, stack / "stack.json")
    (tmp_path / "checkpoints").mkdir()
    assert "workdir of one training run" in _refused(load_stack, tmp_path)
    (stack / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in _refused(load_stack, stack)
    (stack / "stack.json").write_text("{")
    assert "malformed" in _refused(load_stack, stack)
    (stack / "stack.json").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in _refused(load_stack, stack)


def test_overwriting(tmp_path, stack):
    assert "exists" in _refused(save_stack, stack, _stages(), TOKENIZER)
    save_stack(stack, {"clip": (_params(7), CONFIG, 99, {})}, "{}", overwrite=True)
    assert list(load_stack(stack).stages) == ["clip"] and not (stack / "prior_diffusion.safetensors").exists()
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    assert "not a stack" in _refused(save_stack, other, _stages(), "{}", overwrite=True)
    assert (other / "thesis.txt").read_text() == "all of it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "stack"]


def test_what_others_put_into_a_stack_is_not_overwritten_with_it(stack):
    (stack / ".git").mkdir()
    (stack / ".git/HEAD").write_text("precious")
    told = _refused(save_stack, stack, _stages(), TOKENIZER, overwrite=True)
    assert "holds .git/HEAD, which is no part of a stack" in told
    assert (stack / ".git/HEAD").read_text() == "precious" and len(load_stack(stack).stages) > 1


def test_a_signal_between_two_renames_leaves_what_was_there(stack, monkeypatch):
    before, rename = {p.name: p.read_bytes() for p in stack.iterdir()}, Path.rename

    def stopped(self, target):
        if ".tmp-" in self.name:
            raise SystemExit(130)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(SystemExit):
        save_stack(stack, _stages(), TOKENIZER, overwrite=True)
    assert {p.name: p.read_bytes() for p in stack.iterdir()} == before


def test_a_failed_write_leaves_what_was_there(tmp_path, stack, monkeypatch):
    before = {p.name: p.read_bytes() for p in stack.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_arrays", full)
    assert "No space left" in _refused(save_stack, stack, _stages(), "{}", overwrite=True)
    assert "No space left" in _refused(save_stack, tmp_path / "new", _stages(), "{}")
    assert {p.name: p.read_bytes() for p in stack.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["stack"]


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert "MB needed, 0.0 MB free" in _refused(save_stack, tmp_path / "new", _stages(), "{}")
    assert not list(tmp_path.iterdir())


def test_one_stage_at_a_time_is_in_memory(tmp_path):
    alive = []

    def stages():
        for name in ("first", "second"):
            assert not [array for array in alive if array() is not None], "an earlier stage is still held"
            array = np.ones(1000, np.float32)
            alive.append(weakref.ref(array))
            stage = ({"kernel": array}, CONFIG, 1, {})
            del array
            yield name, stage
            del stage

    assert set(load_stack(save_stack(tmp_path / "made", stages(), "{}")).stages) == {"first", "second"}


def test_large_arrays_are_written_by_rows_to_the_same_bytes(tmp_path, monkeypatch):
    array = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32).transpose(1, 0, 2)
    whole = tensors.write_arrays(tmp_path / "a.safetensors", {"a": array, "none": np.zeros((0, 3))})
    monkeypatch.setattr(tensors, "CHUNK", 20)
    assert tensors.write_arrays(tmp_path / "b.safetensors", {"a": array, "none": np.zeros((0, 3))}) == whole
    place = tensors.read_header(tmp_path / "b.safetensors")["a"]
    np.testing.assert_array_equal(tensors.read_array(tmp_path / "b.safetensors", place), array)
    array[2, 4, 3] = np.inf
    with pytest.raises(ValueError, match="a holds NaN or infinite"):
        tensors.write_arrays(tmp_path / "c.safetensors", {"a": array})


@pytest.mark.parametrize(
    "stages, kwargs, told",
    [
        ({}, {}, "at least one stage"),
        ({"a/b": (_params(), CONFIG, 1, {})}, {}, "stage name"),
        ({"..": (_params(), CONFIG, 1, {})}, {}, "stage name"),
        ({"clip": ({}, CONFIG, 1, {})}, {}, "no arrays"),
        ({"clip": ({"a/b": np.ones(2)}, CONFIG, 1, {})}, {}, "without '/'"),
        ({"clip": ({"w": np.array([1, np.nan], np.float32)}, CONFIG, 1, {})}, {}, "w holds NaN"),
        ({"clip": (_params(), CONFIG, 1, {})}, {"dtype": "bf16"}, "did you mean 'bfloat16'"),
    ],
)
def test_refuses_to_write(tmp_path, stages, kwargs, told):
    assert told in _refused(save_stack, tmp_path / "s", stages, "{}", **kwargs)
    assert not list(tmp_path.iterdir())
