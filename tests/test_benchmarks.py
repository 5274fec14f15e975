"""The benchmarks' own logic: how turns are taken, and what the table says; nothing is timed."""

import itertools

import pytest

from benchmarks import rows, run
from benchmarks.sizes import SIZES


def test_sides_take_turns_and_the_first_runs_do_not_count():
    calls, now = [], itertools.count()
    found = run.turns(lambda: calls.append("ours"), lambda: calls.append("peer"), 3, clock=lambda: next(now) ** 2)
    assert calls == ["ours", "peer"] * 4
    spans = [(2 * i + 1) ** 2 - (2 * i) ** 2 for i in range(8)]
    assert found == {"first": spans[0], "ours": spans[2::2], "peer": spans[3::2]}


def test_a_long_first_run_of_the_peer_counts():
    calls, now = [], itertools.count(step=run.LONG + 1)
    found = run.turns(lambda: None, lambda: calls.append("peer"), 2, clock=lambda: next(now))
    assert len(calls) == 2 and len(found["ours"]) == len(found["peer"]) == 2


def row(peer):
    return rows.Row("a-row", "a peer", "shapes", peer, lambda models: lambda: None, lambda models: lambda: None)


def test_a_missing_peer_is_said_and_nothing_is_measured():
    def peer():
        raise ImportError("no module of that name")

    found = run.measure(row(peer), 2)
    assert run.line(row(peer), found) == "| a-row | shapes | a peer | not measured: no module of that name |"


def test_a_line_has_the_columns_of_the_head():
    sides = {side: {"peak_gb": 1.0, "cold": 2.0} for side in run.SIDES}
    found = {"seconds": {"ours": 0.5, "peer": 2.0}, "ratio": 4.0, "compile": 1.0, **sides}
    made = run.line(row(tuple), found)
    assert made.count("|") == run.HEAD.splitlines()[0].count("|") == run.HEAD.splitlines()[1].count("|")
    assert "| 0.5 | 2 | **4.00** | 1.00 | 1.00 | 2.00 | 2.00 | 1 |" in made


@pytest.mark.parametrize("size", SIZES)
def test_rows_have_names_of_their_own(size):
    names = [row.name for row in rows.rows(size)]
    assert len(set(names)) == len(names) >= 10


def test_ours_runs_without_a_peer():
    """And without torch: the captions and the keys go through a prior of zeros, which says zero."""
    of = next(row for row in rows.rows("tiny") if row.name == "prior-2-steps-batch-2")
    z = of.ours(None)()
    assert z.shape == (2, SIZES["tiny"]["prior"]["embed_dim"])
