"""Two processes of four devices train as one process of eight."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from tests import tiny_runs, toy
from unclip_jax import checkpoint, train
from unclip_jax import config as configs

# `unclip train CONFIG.json WORKDIR` of the toy stage.
UNCLIP = """\
    #!{python}
    import sys
    sys.path.insert(0, {root!r})
    from tests import toy
    from unclip_jax import config, tasks, train

    task = toy.Toy([])
    tasks.TASKS["toy"] = type("Maker", (), {{"from_config": staticmethod(lambda *_: task)}})
    made = config.from_json(open(sys.argv[2]).read())
    sys.exit(train.train(made, sys.argv[3]))
"""
PROCESSES = ["--processes", "2", "--devices", "4"]


@pytest.mark.multihost
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, monkeypatch):
    """By launch/local.sh: the same losses, the same parameters, one log; and one goes on from what two saved."""
    toy.add(monkeypatch)
    config = toy.config(mesh__data=2, mesh__fsdp=4, num_steps=5, every__save=5)
    assert train.train(config, tmp_path / "one") == 0
    (tmp_path / "config.json").write_text(configs.to_json(config))
    unclip = tmp_path / "unclip"
    unclip.write_text(textwrap.dedent(UNCLIP).format(python=sys.executable, root=str(tiny_runs.ROOT)))
    unclip.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | {"UNCLIP": str(unclip)}
    script = str(tiny_runs.ROOT / "launch/local.sh")
    command = ["bash", script, *PROCESSES, str(tmp_path / "config.json"), str(tmp_path / "two")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5]
    for one, two in zip(*logs, strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    one, two = (checkpoint.load_params(tmp_path / name, "params")[0] for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
    assert train.train(toy.config(num_steps=6), tmp_path / "two") == 0
