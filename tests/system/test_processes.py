"""Two processes of four devices train as one process of eight, and stop as one."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from tests import tiny_runs, toy
from unclip_jax import checkpoint_read, train
from unclip_jax import config as configs

# `unclip train CONFIG.json WORKDIR` of the toy stage.
UNCLIP = """\
    #!{python}
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from tests import toy
    from unclip_jax import config, logs, tasks, train

    def evaluate(self, params, plain=logs.Checks.evaluate):
        if os.environ["UNCLIP_PROCESS_ID"] == os.environ.get("STOPPED_IN_EVALUATION"):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, params)

    logs.Checks.evaluate = evaluate
    task = toy.Toy([])
    tasks.TASKS["toy"] = type("Maker", (), {{"from_config": staticmethod(lambda *_: task)}})
    made = config.from_json(open(sys.argv[2]).read())
    sys.exit(train.train(made, sys.argv[3]))
"""
PROCESSES = ["--processes", "2", "--devices", "4"]




def launch(config, workdir, **env):
    """launch/local.sh with a run of the toy stage; its exit code, and what it said."""
    folder = workdir.parent
    (folder / "config.json").write_text(configs.to_json(config))
    unclip = folder / "unclip"
    unclip.write_text(textwrap.dedent(UNCLIP).format(python=sys.executable, root=str(tiny_runs.ROOT)))
    unclip.chmod(0o755)
    own = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    script = str(tiny_runs.ROOT / "launch/local.sh")
    command = ["bash", script, *PROCESSES, str(folder / "config.json"), str(workdir)]
    done = subprocess.run(command, env=own | {"UNCLIP": str(unclip)} | env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr[-2000:] + done.stdout[-2000:]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


@pytest.mark.multihost
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, monkeypatch):
    """By launch/local.sh: the same losses, the same parameters, one log; and one goes on from what two saved."""
    toy.add(monkeypatch)
    config = toy.config(mesh__data=2, mesh__fsdp=4, num_steps=5, every__save=5)
    assert train.train(config, tmp_path / "one") == 0
    code, said = launch(config, tmp_path / "two")
    assert code == 0, said
    logs = [lines(tmp_path / name) for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5]
    for one, two in zip(*logs, strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    one, two = (checkpoint_read.load_params(tmp_path / name, "params")[0] for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
    assert train.train(toy.config(num_steps=6), tmp_path / "two") == 0


@pytest.mark.slow
@pytest.mark.multihost
def test_a_signal_to_one_process_ends_the_evaluation_of_both(tmp_path):
    """At the same batch, or one would wait for the other for ever; the step before is saved.

    They agree in about a second, so the evaluation is a long one.
    """
    config = toy.config(mesh__data=2, mesh__fsdp=4, num_steps=5, every__save=5, every__eval=3, eval__batches=1000)
    code, said = launch(config, tmp_path / "two", STOPPED_IN_EVALUATION="1")
    assert code == train.PREEMPTED, said
    assert checkpoint_read.peek(tmp_path / "two")[1] == 3
    assert [line["step"] for line in lines(tmp_path / "two")] == [1, 2, 3]
