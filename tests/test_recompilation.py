"""A run compiles what it needs in its first steps, and nothing after them."""

import pytest

from tests import tiny_runs, toy
from tests.compiling import compiled
from tests.tiny_runs import one_device  # noqa: F401 (fixture)
from unclip_jax import logs, train


@pytest.mark.parametrize("stage", ["toy", "upsampler"])
@pytest.mark.usefixtures("one_device")
def test_nothing_is_compiled_after_the_second_step(stage, tmp_path, monkeypatch):
    """Nor by the saves that come again, nor, of the toy, by previews and measurements."""
    settings = {"every__save": 2, "num_steps": 6}
    if stage == "toy":
        toy.add(monkeypatch)
        config = toy.config(every__preview=2, every__eval=2, **settings)
    else:
        config = tiny_runs.config(stage, **settings)
    after, add = [], logs.Logs.add
    with compiled() as names:

        def note(self, metrics):
            after.append(len(names))
            add(self, metrics)

        monkeypatch.setattr(logs.Logs, "add", note)
        assert train.train(config, tmp_path / "run") == 0
    assert len(after) == 6 and "jit(step)" in names[: after[0]]
    assert "jit(step)" not in names[after[0] : after[1]] and names[after[2] :] == []
