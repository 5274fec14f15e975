"""A checkpoint comes back bit for bit on any mesh, or its damage is named; the unfinished does not count."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax import checkpoint, checkpoint_read, config, sharding
from unclip_jax.checkpoint import Checkpoints
from unclip_jax.checkpoint_read import load_params, peek, sealed
from unclip_jax.errors import UserError

CONFIG = {"task": "clip", "rules": [[".*", "fsdp"]], "optim": {"lr": 0.1, "clip_norm": None}, "empty": {}}
META = {"config": json.dumps(CONFIG), "tokenizer": '{"vocab": []}', "position": 7}
RULES = ((".*", "fsdp"),)


class TrainState(NamedTuple):
    step: object
    params: object
    ema: object
    opt: object


def _state(seed=0, width=64, ema=True):
    rng = np.random.default_rng(seed)
    params = {
        "block": {
            "kernel": jnp.asarray(rng.normal(size=(width, 4 * width)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4 * width), jnp.bfloat16),
        },
        "mean": jnp.asarray([0.0, -0.0, np.nan, np.inf, 1e-37], jnp.float32),
        "flags": jnp.asarray([True, False, True]),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    averaged = jax.tree.map(lambda x: x if x.dtype == bool else x * 2, params) if ema else None
    return TrainState(jnp.int32(seed), params, averaged, opt)


def _abstract(state, devices=1, fsdp=1):
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
    return sharding.abstract(state, sharding.infer(state, RULES, mesh, min_size=1))


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def _flip(step: Path, count=64) -> None:
    """Flips bytes in the middle of the largest file of the arrays."""
    file = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + count] = bytes(b ^ 0xFF for b in data[middle : middle + count])
    file.write_bytes(data)


@pytest.fixture
def run(tmp_path):
    """A workdir with steps 1, 2 and 3; the state of step n is _state(n)."""
    with Checkpoints(tmp_path / "run", keep=3, async_=False) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step), META)
    return tmp_path / "run"


@pytest.mark.parametrize("devices, fsdp", [(8, 4), (4, 2), (1, 1)])
def test_saved_on_eight_devices_restores_bit_equal_anywhere(tmp_path, devices, fsdp):
    state = _state()
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, _abstract(state, 8, 8))
    assert len(placed.params["block"]["kernel"].sharding.device_set) == 8
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, placed, META)
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta, step = checkpoints.restore(_abstract(state, devices, fsdp))
    assert step == 5 and {k: meta[k] for k in META} == META
    assert jax.tree.structure(restored) == jax.tree.structure(state) and _bits(restored) == _bits(state)
    shard = restored.params["block"]["kernel"].addressable_shards[0].data
    assert shard.size == state.params["block"]["kernel"].size // fsdp


def test_only_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not checkpoints.steps() and checkpoints.restore(_abstract(_state())) is None
        assert "steps there: none" in _refused(checkpoints.restore, _abstract(_state()), step=3)
        assert all(checkpoints.save(step, _state(step), META) for step in (0, 10, 20))
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]
        assert not checkpoints.save(20, _state(99), META)
        state, _, step = checkpoints.restore(_abstract(_state()), step=10)
        assert step == 10 and _bits(state) == _bits(_state(10))
        assert "steps there: 10, 20" in _refused(checkpoints.restore, _abstract(_state()), step=15)


def test_flipped_bytes_are_named_and_the_step_before_is_used(run):
    _flip(run / "checkpoints" / "3")
    with Checkpoints(run, keep=3) as checkpoints:
        told = _refused(checkpoints.restore, _abstract(_state()), step=3)
        assert "checkpoints/3 is damaged" in told and told.endswith("use another step: 1, 2")
        with pytest.warns(UserWarning, match="step 3: .*step 2 is used"):
            state, _, step = checkpoints.restore(_abstract(_state()))
        assert step == 2 and _bits(state) == _bits(_state(2))
        # The number is free again, and nothing was thrown away.
        assert checkpoints.steps() == [1, 2] and (run / "damaged" / "3.1" / "state").is_dir()
        assert checkpoints.save(3, _state(33), META)
        checkpoints.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state, _, step = checkpoints.restore(_abstract(_state()))
        assert step == 3 and _bits(state) == _bits(_state(33))
        _flip(run / "checkpoints" / "3")
        with pytest.warns(UserWarning, match="step 2 is used"):
            checkpoints.restore(_abstract(_state()))
        assert (run / "damaged" / "3.1").is_dir() and (run / "damaged" / "3.2" / "state").is_dir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own clean-up
@pytest.mark.parametrize("broken", ["manifest", "metadata", "meta", "arrays", "config byte"])
def test_other_damage_is_survived_too(run, broken):
    step = run / "checkpoints" / "3"
    meta = step / "meta" / "metadata"
    if broken == "manifest":
        (step / "state" / "manifest.ocdbt").unlink()
    elif broken == "metadata":
        (step / "state" / "_METADATA").write_bytes(b"\0" * 10)
    elif broken == "meta":
        meta.write_text(meta.read_text()[:-20])
    elif broken == "arrays":
        for file in (step / "state").rglob("d/*"):
            file.write_bytes(b"")
    else:
        meta.write_text(meta.read_text().replace("0.1", "0.9"))
    with pytest.warns(UserWarning, match="step 3: .*step 2 is used"):
        assert load_params(run)[2] == 2
    assert step.exists()  # reading moves nothing
    with Checkpoints(run) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 is used"):
            state, _, found = checkpoints.restore(_abstract(_state()))
        assert found == 2 and _bits(state) == _bits(_state(2))
        assert checkpoints.save(4, _state(4), META)


def test_all_damaged_is_an_error_and_moves_nothing(run):
    for step in (1, 2, 3):
        _flip(run / "checkpoints" / str(step))
    with Checkpoints(run, keep=3) as checkpoints:
        assert "every checkpoint" in _refused(checkpoints.restore, _abstract(_state()))
        assert checkpoints.steps() == [1, 2, 3]
    for file in (run / "checkpoints").glob("*/meta/metadata"):
        file.write_text("{}")
    assert "every checkpoint" in _refused(load_params, run)
    assert "every checkpoint" in _refused(peek, run)


def test_a_killed_write_is_no_step(tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        import jax.numpy as jnp
        from unclip_jax.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        state = {"params": {"w": jnp.arange(20_000_000, dtype=jnp.float32)}}
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {"config": "{}"})
        checkpoints.wait()
        checkpoints.save(2, state, {"config": "{}"})
        while not any("tmp" in path.name for path in Path(sys.argv[1], "checkpoints").iterdir()):
            pass  # until it has begun
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=root, env=os.environ, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in (tmp_path / "checkpoints").iterdir())
    params, _, step, _ = load_params(tmp_path, "params")
    assert step == 1 and params["w"].shape == (3,) and peek(tmp_path)[1] == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, {"params": {"w": jnp.ones(3)}}, {"config": "{}"})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_another_state_is_refused_by_name(run):
    with Checkpoints(run, keep=3) as checkpoints:
        told = _refused(checkpoints.restore, _abstract(_state(width=32)))
        assert "params/block/kernel" in told or "ema/block/bias" in told
        assert "bfloat16[256] there, bfloat16[128] here" in told and "more" in told
        assert checkpoints.steps() == [1, 2, 3]


def test_an_average_that_is_no_longer_kept_is_left_unread_and_one_that_is_must_be_there(run, tmp_path):
    with Checkpoints(run, keep=3) as checkpoints:
        state, _, step = checkpoints.restore(_abstract(_state(ema=False)))
        assert step == 3 and state.ema is None and _bits(state) == _bits(_state(3, ema=False))
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(1, _state(ema=False), META)
        told = _refused(checkpoints.restore, _abstract(_state()))
        assert "ema/block/bias is absent there, bfloat16[256] here" in told


@pytest.mark.parametrize("which", ["ema", "params"])
def test_weights_load_without_the_config(run, which):
    for path in (run, str(run), run / "checkpoints"):
        params, loaded, step, tokenizer = load_params(path, which)
        assert _bits(params) == _bits(getattr(_state(3), which)) and step == 3
        assert jax.tree.structure(params) == jax.tree.structure(_state().params)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
        assert tokenizer == META["tokenizer"]
        assert loaded == config.from_json(META["config"]) and loaded.is_locked
        assert loaded.rules == ((".*", "fsdp"),)
    assert load_params(run, which, step=1)[2] == 1
    assert peek(run)[0] == loaded and peek(run)[1] == 3


def test_where_no_average_is_kept_the_last_weights_are_given(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(ema=False), {"config": "{}"})
    for which in ("ema", "params"):
        params, *_, tokenizer = load_params(tmp_path, which)
        assert _bits(params) == _bits(_state().params) and tokenizer is None
    assert "'ema' or 'params'" in _refused(load_params, tmp_path, "opt")


def test_a_checkpoint_of_other_things_is_told(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"numbers": jnp.ones(3)}, {"config": "{}"})
    assert "holds no weights" in _refused(load_params, tmp_path)


@pytest.mark.parametrize("change", [{"arrays": None}, {"arrays": ["ema/a"]}, {"config": None}])
def test_sealed_metadata_of_another_make_is_damage(tmp_path, change):
    step = tmp_path / "checkpoints/1"
    (step / "meta").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    meta = {"format_version": 1, "arrays": {}, "config": "{}", **change}
    (step / "meta/metadata").write_text(json.dumps(sealed(meta)))
    for read in (load_params, peek):
        assert "is not what is written here" in _refused(read, tmp_path)


def test_what_is_no_checkpoint_is_told(tmp_path, run):
    assert "does not exist; expected the workdir" in _refused(load_params, tmp_path / "none")
    assert "no checkpoints/ folder; expected" in _refused(load_params, tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(peek, tmp_path / "file")
    (tmp_path / "stack.json").write_text("{}")
    assert "stack of exported weights" in _refused(load_params, tmp_path)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty" / "checkpoints" / "7").write_text("no folder")
    assert "no finished checkpoint" in _refused(load_params, tmp_path / "empty")
    assert "steps there: 1, 2, 3" in _refused(load_params, run, step=9)


def test_a_newer_format_is_refused(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        with Checkpoints(run, keep=4, async_=False) as checkpoints:
            checkpoints.save(4, _state(4), META)
    for read in (load_params, peek, lambda path: Checkpoints(path).restore(_abstract(_state()))):
        told = _refused(read, run)
        assert "format version 2" in told and "update unclip_jax" in told


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "must be writable" in _refused(Checkpoints, tmp_path / "file")
    assert "keep=0" in _refused(Checkpoints, tmp_path, keep=0)


@pytest.mark.parametrize("error", [MemoryError, jax.errors.JaxRuntimeError])
def test_a_want_of_memory_is_no_fault_of_the_disk(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error("out of memory")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "check_for_errors", fail)
        with pytest.raises(error, match="out of memory"):
            checkpoints.check()
    monkeypatch.setattr(checkpoint_read.ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(error, match="out of memory"):
        checkpoint_read.read_arrays(checkpoints.directory / "1", {}, {})


def test_a_stored_config_is_data(tmp_path):
    for text in (
        "{\"a\": \"__import__('os').system('touch canary')\"}",
        "__import__('os')",
        '{"__class__": 1}',
    ):
        with Checkpoints(tmp_path / text[:4], async_=False) as checkpoints:
            checkpoints.save(1, _state(), {"config": text})
    assert peek(tmp_path / '{"a"')[0].a.startswith("__import__")
    assert "the config in" in _refused(peek, tmp_path / "__im")
    assert "does not make a config" in _refused(peek, tmp_path / '{"__')
