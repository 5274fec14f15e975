"""W&B as a mirror of a run: what it is sent, that a run goes on as the same one there, and that it stops no training.

W&B is a fake module here, but in the last test, which has the real one write to disk where it is installed.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from tests import toy
from unclip_jax import run, track, train
from unclip_jax.errors import UserError


@pytest.fixture
def task(monkeypatch):
    return toy.add(monkeypatch)


class Wandb(SimpleNamespace):
    """As much of the package as is used. `broken` holds the names of functions that raise."""

    def __init__(self):
        super().__init__(runs=[], broken=set(), key=True, mode="online")
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=self.mode))
        self.login = lambda prompt: self.key
        self.Settings = lambda **settings: settings
        self.Image = lambda path: ("image", path)

    def init(self, **given):
        self.fail("init")
        made = SimpleNamespace(given=given, sent=[], steps=[], codes=[])
        made.define_metric = lambda name, step_metric: made.steps.append((name, step_metric))
        made.log = lambda values: (self.fail("log"), made.sent.append(values))
        made.finish = lambda exit_code: (self.fail("finish"), made.codes.append(exit_code))
        self.runs.append(made)
        return made

    def fail(self, name):
        if name in self.broken:
            raise ConnectionError(f"{name} failed\nat length")


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def test_it_is_sent_what_metrics_and_previews_hold(task, wandb, tmp_path):
    assert train.train(toy.config(track="mine", every__preview=5, every__eval=4), tmp_path / "a") == 0
    (sent,) = wandb.runs
    assert sent.given["project"] == "mine" and sent.given["entity"] is None and sent.given["name"] == "a"
    assert sent.given["config"]["optim"]["lr"] == 0.05
    assert sent.steps == [("*", "step")] and sent.codes == [0]
    assert [row for row in sent.sent if "preview" not in row] == lines(tmp_path / "a")
    pictures = [(row["step"], row["preview"][1]) for row in sent.sent if "preview" in row]
    assert pictures == [(n, str(tmp_path / "a" / "previews" / f"step_000000{n}.png")) for n in (5, 8)]


def test_a_run_that_goes_on_is_the_same_one_there(task, wandb, tmp_path):
    """Also one that began without, as those of older versions did, whose stored config has no such key."""
    train.train(toy.config(num_steps=2), tmp_path)
    stored = tmp_path / "config.json"
    old = json.loads(stored.read_text())
    assert old.pop("track") == "" and not wandb.runs
    stored.write_text(json.dumps(old))
    for steps in (4, 6):
        assert train.train(toy.config(num_steps=steps, track="we/mine"), tmp_path) == 0
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] == (tmp_path / "wandb_id").read_text()
    assert first.given["entity"] == "we" and first.given["resume"] == "allow"
    assert [row["step"] for row in first.sent + second.sent] == [3, 4, 5, 6]


@pytest.mark.parametrize("broken", ["init", "log", "finish", "key"])
def test_a_failure_is_one_warning(broken, wandb, tmp_path):
    wandb.broken, wandb.key = {broken}, broken != "key"
    with pytest.warns(UserWarning, match="training goes on") as told:
        mirror = track.Mirror("mine", tmp_path, {})
        for step in (1, 2):
            mirror.scalars(step, {"loss": 1.0})
            mirror.preview(step, tmp_path / "none.png")
        mirror.close(failed=False)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert sum(len(made.sent) for made in wandb.runs) == (4 if broken == "finish" else 0)


def test_it_stops_no_training(task, wandb, tmp_path):
    wandb.broken = {"log"}
    with pytest.warns(UserWarning, match="training goes on") as told:
        assert train.train(toy.config(track="mine", every__preview=4), tmp_path) == 0
    assert len([w for w in told if "Biases" in str(w.message)]) == 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_nobody_logs_in_to_keep_it_on_disk(task, wandb, tmp_path):
    wandb.key, wandb.mode = False, "offline"
    assert train.train(toy.config(track="mine", num_steps=1), tmp_path) == 0
    assert len(wandb.runs) == 1


def test_a_run_that_breaks_off_is_no_finished_one(task, wandb, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no more")

    monkeypatch.setattr(train.Checks, "due", broken)
    with pytest.raises(OSError):
        train.train(toy.config(track="mine"), tmp_path)
    assert wandb.runs[0].codes == [1]


def test_other_processes_send_nothing(task, wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(run.distributed, "is_main", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run.make_run(toy.config(track="mine"), tmp_path)
    logs = train.Logs(toy.config(track="mine"), tmp_path, 0, None)
    logs.record(1, {"loss": 1.0})
    logs.picture(1, tmp_path)
    logs.close()
    assert not wandb.runs and not list(tmp_path.iterdir())


def test_without_the_package_nothing_is_begun(task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'the package wandb. Fix: pip install "unclip_jax\[track\]"'):
        train.train(toy.config(track="mine"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train.train(toy.config(num_steps=1), tmp_path / "run") == 0


@pytest.mark.parametrize("name", ["a/b/c", "/mine", "what?", "x" * 129, 7, ("mine",)])
def test_what_names_no_project(name, wandb):
    with pytest.raises(UserError, match="must name a project"):
        track.check(name)


def test_the_real_one_keeps_it_on_disk(task, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        assert train.train(toy.config(track="mine", num_steps=steps, every__preview=2), tmp_path) == 0
    name = (tmp_path / "wandb_id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2
    assert len(list((tmp_path / "wandb").rglob("preview_*.png"))) == 2
