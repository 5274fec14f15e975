"""A run that was stopped, by a signal or by kill -9, ends bit for bit as the run that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from tests import tiny_runs, toy
from tests.tiny_runs import one_device  # noqa: F401 (fixture)
from unclip_jax import checkpoint, checkpoint_read, logs, sharding, train
from unclip_jax.run import make_run

OF_TIME = {"images_per_second", "device_flops_per_second", "input_wait", "checkpoint_seconds", "goodput"}


def final(config, workdir):
    """Every array of the last checkpoint, by its path, and the lines of metrics.jsonl but for the times."""
    run = make_run(config, workdir)
    with checkpoint.Checkpoints(workdir, config.keep) as saved:
        state, meta, step = saved.restore(sharding.abstract(run.shapes, run.shardings))
    assert step == int(state.step) == config.num_steps
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    lines = [{name: value for name, value in line.items() if name not in OF_TIME} for line in lines]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, lines


def assert_same(first, second):
    assert first[0].keys() == second[0].keys() and any("ema" in path for path in first[0])
    differing = [path for path in first[0] if not np.array_equal(first[0][path], second[0][path])]
    assert not differing
    assert first[1] == second[1]


def count_steps(monkeypatch, stop_after: int = 0) -> list[int]:
    """Counts the steps that training takes; it is sent SIGTERM in step `stop_after`."""
    seen, add = [0], logs.Logs.add

    def counting(self, metrics):
        seen[0] += 1
        if seen[0] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, metrics)

    monkeypatch.setattr(logs.Logs, "add", counting)
    return seen


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("stage", tiny_runs.STAGES_SLOWLY)
def test_stopped_by_a_signal(stage, tmp_path, monkeypatch):
    config = tiny_runs.memorise(stage, every__log=1, num_steps=20, every__save=8)
    assert train.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        count_steps(patch, stop_after=11)
        assert train.train(config, tmp_path / "parts") == train.PREEMPTED
    assert checkpoint_read.peek(tmp_path / "parts")[1] == 11
    with monkeypatch.context() as patch:
        seen = count_steps(patch)
        assert train.train(config, tmp_path / "parts") == 0
    assert seen == [9]
    whole = final(config, tmp_path / "whole")
    assert_same(whole, final(config, tmp_path / "parts"))
    assert [line["step"] for line in whole[1]] == list(range(1, 21))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1)])
def test_stopped_twice_on_eight_devices(mesh, tmp_path, monkeypatch):
    toy.add(monkeypatch)
    config = toy.config(mesh__data=mesh[0], mesh__fsdp=mesh[1], mesh__tensor=mesh[2], num_steps=12, every__save=5)
    assert train.train(config, tmp_path / "whole") == 0
    for steps in (3, 4):
        with monkeypatch.context() as patch:
            count_steps(patch, stop_after=steps)
            assert train.train(config, tmp_path / "parts") == train.PREEMPTED
    assert train.train(config, tmp_path / "parts") == 0
    assert_same(final(config, tmp_path / "whole"), final(config, tmp_path / "parts"))


def test_a_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    """Nearly the same: sums are taken in another order."""
    toy.add(monkeypatch)
    changes = {"num_steps": 12, "every__save": 6}
    whole = toy.config(**changes)
    assert train.train(whole, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        count_steps(patch, stop_after=5)
        assert train.train(whole, tmp_path / "parts") == train.PREEMPTED
    other = toy.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **changes)
    assert train.train(other, tmp_path / "parts") == 0
    first, second = final(whole, tmp_path / "whole")[0], final(other, tmp_path / "parts")[0]
    for path, array in first.items():
        np.testing.assert_allclose(second[path], array, rtol=1e-5, atol=1e-6, err_msg=path)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import tests.conftest, jax
    from unclip_jax import config, logs, sharding, train

    add, seen = logs.Logs.add, []

    def counting(self, metrics):
        seen.append(0)
        if len(seen) == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, metrics)

    logs.Logs.add = counting
    make_mesh = sharding.make_mesh
    sharding.make_mesh = lambda data, fsdp, tensor: make_mesh(data, fsdp, tensor, devices=jax.devices()[:1])
    made = config.from_json(open(sys.argv[1]).read())
    train.train(made, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_killed(tmp_path, monkeypatch):
    """Every second step is saved; whatever step was being written when the process died, a finished one is used."""
    from unclip_jax import config as configs

    config = tiny_runs.memorise("upsampler", every__log=1, num_steps=20, every__save=2)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    script = textwrap.dedent(KILLED).format(root=str(tiny_runs.ROOT))
    command = [sys.executable, "-c", script, str(tmp_path / "config.json"), str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    # What a kill in the middle of writing leaves: a folder that Orbax has not renamed yet.
    newest = checkpoint_read.peek(tmp_path / "parts")[1]
    assert newest in (10, 12)
    steps = tmp_path / "parts" / "checkpoints"
    shutil.copytree(steps / str(newest), steps / f"{newest + 2}.orbax-checkpoint-tmp-1", dirs_exist_ok=True)
    seen = count_steps(monkeypatch)
    assert train.train(config, tmp_path / "parts") == 0
    assert seen == [20 - newest]
    assert train.train(config, tmp_path / "whole") == 0
    assert_same(final(config, tmp_path / "whole"), final(config, tmp_path / "parts"))
