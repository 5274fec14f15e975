"""The benchmarks' own logic: how turns are taken, and what the table says; nothing is timed.

What runs on a GPU runs here too, on the CPU: all of `device.GPU` but where the peer's tensors are.
"""

import importlib
import itertools
import json
import pkgutil

import jax
import numpy as np
import pytest

import benchmarks
from benchmarks import device as devices
from benchmarks import inpaint, loader, rows, run
from benchmarks.sides import our_task
from benchmarks.sizes import SIZES, doubled
from unclip_jax import gallery

HERE = devices.GPU._replace(torch="cpu", compiled=False)


def test_sides_take_turns_and_the_first_runs_do_not_count():
    calls, now = [], itertools.count()
    sides = {side: lambda side=side: calls.append(side) for side in run.SIDES}
    found = run.turns(sides, 3, clock=lambda: next(now) ** 2)
    assert calls == ["ours", "peer"] * 4
    spans = [(2 * i + 1) ** 2 - (2 * i) ** 2 for i in range(8)]
    assert found["first"] == {"ours": spans[0], "peer": spans[1]} and not found["failed"]
    assert found["ours"] == spans[2::2] and found["peer"] == spans[3::2]


def test_a_long_first_run_of_the_peer_counts():
    calls, now = [], itertools.count(step=run.LONG + 1)
    found = run.turns({"ours": lambda: None, "peer": lambda: calls.append("peer")}, 2, clock=lambda: next(now))
    assert len(calls) == 2 and len(found["ours"]) == len(found["peer"]) == 2


def test_a_side_that_fails_takes_no_turns_and_the_others_do():
    def compiled():
        raise RuntimeError("no | compiler\nand more")

    found = run.turns({"ours": lambda: None, "peer": lambda: None, run.COMPILED: compiled}, 2)
    assert found["failed"] == {run.COMPILED: "RuntimeError: no / compiler"}
    assert len(found["ours"]) == len(found["peer"]) == 2 and run.COMPILED not in found


def row(peer, name="a-row"):
    return rows.Row(name, "a peer", "shapes", peer, lambda models: lambda: None, lambda models: lambda: None)


def test_a_missing_peer_is_said_and_nothing_is_measured():
    def peer():
        raise ImportError("no module of that name")

    found = run.measure(row(peer), 2)
    assert run.line(row(peer), found) == "| a-row | shapes | a peer | not measured: no module of that name |"


def test_a_line_has_the_columns_of_the_head():
    both = lambda x: dict.fromkeys(run.SIDES, x)  # noqa: E731
    found = {"seconds": {"ours": 0.5, "peer": 2.0}, "ratio": {"peer": 4.0}, "compile": {"ours": 1.0}, "failed": {}}
    made, head = run.line(row(tuple), {**found, "peak_gb": both(1.0), "cold": both(2.0)}), run.head(devices.CPU)
    assert made.count("|") == head.splitlines()[0].count("|") == head.splitlines()[1].count("|")
    assert "| 0.5 | 2 | **4.00** | 1.00 | 1.00 | 2.00 | 2.00 | 1 |" in made


def test_a_gpus_line_has_what_ran_and_says_what_failed():
    found = {"seconds": {"ours": 0.5, "peer": 2.0}, "ratio": {"peer": 4.0}, "compile": {"ours": 1.0}, "flops": 1e12}
    found |= {"peak_gb": {"ours": 1.0, "peer": None}, "failed": {run.COMPILED: "it broke"}}
    made, head = run.line(row(tuple), found, devices.GPU, 1e13), run.head(devices.GPU)
    assert made.count("|") == head.splitlines()[0].count("|") == head.splitlines()[1].count("|")
    assert made.endswith("| 0.5 | 2 | – | **4.00** | – | 1.00 | – | – | 1 | – | 20 % | torch.compile failed: it broke")


@pytest.mark.parametrize("size", SIZES)
def test_rows_have_names_of_their_own(size):
    for device in devices.DEVICES.values():
        names = [row.name for row in rows.rows(size, device)]
        assert len(set(names)) == len(names) >= 10


def test_rows_come_in_the_order_they_are_wanted_in():
    made = [row(tuple, name) for name in ("a", "a-longer", "b-one", "b-two")]
    assert [one.name for one in rows.choose(made, ["b", "a", "b-one"])] == ["b-one", "b-two", "a"]
    assert rows.choose(made, None) == made


def test_a_larger_decoder_is_the_same_network():
    s = SIZES["tiny"]
    shapes = []
    for size in (s, doubled(s)):
        task = our_task(size, "decoder", devices.CPU)
        shapes.append(jax.tree.map(lambda a: a.shape, jax.eval_shape(task.init, jax.random.key(0))))
    assert shapes[0] == shapes[1]


def test_ours_runs_without_a_peer():
    """And without torch: the captions and the keys go through a prior of zeros, which says zero."""
    of = next(row for row in rows.rows("tiny") if row.name == "prior-2-steps-batch-2")
    z = of.ours(None)()
    assert z.shape == (2, SIZES["tiny"]["prior"]["embed_dim"])


def test_a_gpus_row_by_both_sides_in_bfloat16():
    pytest.importorskip("diffusers")
    of = next(row for row in rows.rows("tiny", HERE) if row.name == "prior-2-steps-batch-2")
    ours = of.ours(None)
    found = run.measure(of._replace(ours=lambda _: ours), 1, device=HERE)
    assert found["failed"] == {} and found["ratio"]["peer"] == found["seconds"]["peer"] / found["seconds"]["ours"]
    s = SIZES["tiny"]["prior"]
    blocks = 24 * 2 * (2 * 2) * s["layers"] * s["width"] ** 2 * 2  # rows x tokens of a step, in 2 steps
    assert found["flops"] > blocks and 0 < found["peak_gb"]["ours"] < 0.1 and found["peak_gb"]["peer"] is None
    (network,) = of.peer()
    assert {str(p.dtype) for p in network.parameters()} == {"torch.bfloat16"}
    z = ours()
    assert z.dtype == np.float32 and np.isfinite(z).all() and np.abs(z).max() > 0


def test_a_run_goes_on_after_a_row_that_fails_and_starts_none_too_late(monkeypatch, tmp_path, capsys):
    def full():
        raise MemoryError("the card is full")

    monkeypatch.setattr(rows, "rows", lambda size, device: [row(full), row(full, "another")])
    monkeypatch.setitem(devices.DEVICES, "gpu", HERE)
    for name in ("prepare", "set_up_torch"):
        monkeypatch.setattr(devices, name, lambda *_: None)
    monkeypatch.setattr(devices, "name_of", lambda device: "NVIDIA H100 80GB HBM3")
    out = tmp_path / "new" / "gpu.json"
    run.main(["--device", "gpu", "--json", str(out)])
    assert capsys.readouterr().out.count("failed: MemoryError: the card is full |") == 2
    assert list(json.loads(out.read_text())["rows"]) == ["a-row", "another"]
    run.main(["--device", "gpu", "--warm", "--seconds", "-1"])
    assert capsys.readouterr().out.endswith("s; skipped: a-row, another\n")


@pytest.fixture
def small_shards(monkeypatch):
    """Pictures of 16 px in batches of 4; the processor that the script would choose is left as it is."""
    monkeypatch.setattr(loader, "SIDE", 16)
    monkeypatch.setattr(loader, "BATCH", 4)
    monkeypatch.setattr(loader.os, "sched_setaffinity", lambda *_: None)


@pytest.mark.parametrize("part", ["speed", "memory", "index"])
def test_the_loader_is_measured(part, small_shards, tmp_path):
    if part == "speed":
        pytest.importorskip("webdataset")
    sizes = {"shards": 2, "count": 6, "batches": 2, "repeats": 1, "epochs": 2, "records": 300}
    given = [f"--{name}={size}" for name, size in {**sizes, "only": part, "work": tmp_path / "shards"}.items()]
    loader.main([*given, "--out", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text())[part]
    if part == "speed":
        assert all(told[side]["cpu"] > 0 and len(told[side]["all"]) == 1 for side in ("ours", "webdataset"))
    elif part == "memory":
        assert len(told) == 2 and min(told) > 0
    else:
        assert told["records"] == 300 and told["make"] > 0


def test_fillings_stand_beside_what_was_given():
    made = inpaint.cases(2, 32)
    sheet = inpaint.contact_sheet(made, 255 - np.stack([case["image"] for case in made]))
    scale = gallery.LEAST_CELL // 32
    row = sheet[4 : 4 + 32 * scale].astype(int)
    given, filled = row[:, 4 : 4 + 32 * scale], row[:, 12 + 32 * scale : 12 + 64 * scale]
    assert sheet.shape[1] == 2 * (32 * scale + 8) and (given + filled == 255).all()
    assert (given[::scale, ::scale] == made[0]["image"]).all()


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_script_still_finds_what_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")
