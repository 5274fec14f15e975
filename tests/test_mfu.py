"""The MFU benchmark goes through with tiny networks, and what fails is one line of its table."""

import json
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import mfu
from tests import tiny_runs
from unclip_jax import tasks
from unclip_jax.cost import jaxpr_flops
from unclip_jax.plan.abstract import abstract

STAGES = {"upsampler_64_256": "upsampler", "upsampler_256_1024": "upsampler"}
SLOW = ("clip", "decoder")


def changes(stage: str) -> tuple[str, ...]:
    """What makes configs/shapes/STAGE.py:tiny tinier, as in `tiny_runs`."""
    settings = {**tiny_runs.RUN, **tiny_runs.NETWORK[stage]}
    del settings["batch_size"]
    if stage == "clip":
        settings["ema_decay"] = 0.0  # as in the paper's, of which no average is kept
    return tuple(f"{name}={value}" for name, value in settings.items())


@pytest.fixture
def tiny(monkeypatch):
    """The table with one tiny size for each stage, which suits any device."""

    def size(stage):
        task = STAGES.get(stage, stage)
        clip = "shapes/clip.py:tiny" if task not in ("clip", "upsampler") else ""
        return (mfu.Size(0, f"shapes/{task}.py:tiny", 2, "dots", clip, changes(task)),)

    monkeypatch.setattr(mfu, "STAGES", {stage: size(stage) for stage in mfu.STAGES})


def test_every_size_of_the_table_has_a_config_that_builds():
    for stage, sizes in mfu.STAGES.items():
        assert any(size.memory <= 60 for size in sizes), stage  # an H100 has one
        assert [size.memory for size in sizes] == sorted((size.memory for size in sizes), reverse=True)
        for size in sizes:
            config, clip = mfu.configured(size)
            assert config.task == STAGES.get(stage, stage) and config.batch_size == size.batch
            assert (clip is None) == (not tasks.needs_clip(config))


@pytest.mark.parametrize("stage", ["prior_diffusion", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)])
def test_a_tiny_stage_is_compiled_run_and_told(tiny, stage):
    row = mfu.measure(mfu.STAGES[stage], 0, steps=2, seconds=0, warm=False)
    assert "error" not in row
    assert row["batch"] == 2 and row["parameters"] > 0 and row["tflop"] > 0
    assert len(row["groups_ms"]) == 1 and row["ms"] == row["groups_ms"][0] > 0
    assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
    assert row["loss"] == row["loss"]
    told = mfu.line({"stage": stage, **json.loads(json.dumps(row))})
    assert stage in told and "fits" in told
    assert mfu.measure(mfu.STAGES[stage], 1, 2, 0, False) == {}


def test_warming_compiles_the_same_program_and_makes_no_arrays(tiny, monkeypatch):
    monkeypatch.setattr(mfu, "_put", lambda *_: pytest.fail("arrays were made"))
    row = mfu.measure(mfu.STAGES["prior_diffusion"], 0, steps=2, seconds=0, warm=True)
    assert row["compile_seconds"] > 0 and "ms" not in row and "error" not in row


def test_flops_are_without_recomputation_whatever_the_policy(tiny):
    (size,) = mfu.STAGES["prior_diffusion"]

    def flops(policy):
        run = abstract(mfu.configured(size._replace(remat=policy))[0], 1, mfu.configured(size)[1])
        args = (run.state, run.frozen, run.batch, jax.ShapeDtypeStruct((), np.int32))
        traced = jax.jit(run.step).trace(*args)
        return mfu._flops(run, traced, args), jaxpr_flops(traced.jaxpr)

    (counted, done), (counted_too, more) = flops("none"), flops("full")
    assert counted == counted_too == done < more


def run(monkeypatch, tmp_path, answers, *flags):
    """The rows that `main` writes where its processes answer so, one after another."""
    left = iter(answers)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: next(left))
    mfu.main([*flags, "--json", str(tmp_path / "mfu.json")])
    return json.loads((tmp_path / "mfu.json").read_text())["rows"]


def done(row: dict, code: int = 0, stderr: str = "") -> SimpleNamespace:
    return SimpleNamespace(returncode=code, stdout=f"noise\n{json.dumps(row)}\n", stderr=stderr)


def test_what_is_too_large_is_tried_smaller_and_what_fails_is_a_line(monkeypatch, tmp_path, capsys):
    full = {"error": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", "config": "a.py", "remat": "none"}
    good = {"config": "a.py", "remat": "none", "batch": 2, "ms": 1.0, "mfu": 0.5}
    answers = [done(full), done(good), done({}, code=-11, stderr="some\nSegmentation fault")]
    rows = run(monkeypatch, tmp_path, answers, "--only", "clip", "prior_ar")
    assert [row["stage"] for row in rows] == ["clip", "clip", "prior_ar"]
    assert rows[1]["ms"] == 1.0 and "exit code -11: Segmentation fault" in rows[2]["error"]
    told = capsys.readouterr().out.splitlines()
    assert "**50.0 %**" in told[-2] and "RESOURCE_EXHAUSTED" in told[-3]
    assert len({row.count("|") for row in told if row.startswith("|")}) == 1


def test_a_device_that_no_size_suits_is_said(monkeypatch, tmp_path):
    (row,) = run(monkeypatch, tmp_path, [done({})], "--only", "decoder", "--warm")
    assert "no size" in row["error"]


def test_a_group_is_waited_for_once_and_the_first_steps_do_not_count():
    calls = []

    def step(state, frozen, batch, index):
        calls.append(int(index))
        return state + 1, {"loss": jax.numpy.float32(state)}

    groups, loss = mfu._timed(step, 0, {}, {}, steps=3, seconds=0)
    assert calls == [0, 1, 2, 3, 4] and len(groups) == 1 and loss == 4
