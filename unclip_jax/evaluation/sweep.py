"""The protocol at one setting of sampling or at many: tables, and the frontier of fit and fidelity.

Figures 9 to 11 of Ramesh et al. 2022 are such frontiers: with more guidance pictures fit their captions better, and
are less like real ones.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unclip_jax import distributed
from unclip_jax.errors import UserError, suggest
from unclip_jax.evaluation import plot
from unclip_jax.evaluation.pictures import Pictures
from unclip_jax.evaluation.protocol import Measured, Protocol
from unclip_jax.evaluation.reference import Reference
from unclip_jax.evaluation.report import Report, Samples, Table, versions
from unclip_jax.evaluation.work import Work
from unclip_jax.storage import digest

MAX_POINTS = 200
FIDELITY = ("FID", "FD-CLIP", "CMMD")
FIT = ("CLIP score (100 cos)", "oracle: right")


class Point(NamedTuple):
    """Pictures to measure: a name for them, the settings they are drawn with, and where they come from."""

    label: str
    settings: Mapping[str, Any]
    pictures: Pictures


def parse(texts: Sequence[str], known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """["guidance=1,2", "steps=10,30"] → every combination, the last name turning fastest.

    Args:
      known: {setting: one of `KINDS`}.

    Raises:
      UserError: an unknown name, one given twice, a value of another kind or given twice, or too many combinations.
    """
    axes: dict[str, list] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"sweep {text!r} must be NAME=VALUE,VALUE", "such as guidance=1,2,4")
        if name not in known:
            raise UserError(f"sweep over {name!r} is unknown", suggest(name, known))
        if name in axes:
            raise UserError(f"sweep over {name!r} is given twice", "list its values once")
        axes[name] = [_value(name, value.strip(), known[name]) for value in values.split(",")]
        if len(set(axes[name])) < len(axes[name]):
            raise UserError(f"sweep {text!r} has a value twice", "list each once")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(combinations) > MAX_POINTS:
        raise UserError(f"the sweep has {len(combinations)} points, at most {MAX_POINTS} are allowed")
    return combinations


def _pair(text: str) -> tuple[float, float]:
    low, high = text.split(":")
    return float(low), float(high)


# {kind of values: (how one is read, what it must be)}
KINDS = {
    int: (int, "a whole number"), float: (float, "a number"), str: (str, "a name"),
    tuple[float, float]: (_pair, "two numbers with a colon between them, such as 0.2:0.8"),
}  # fmt: skip


def _value(name: str, text: str, kind: Any):
    read, wanted = KINDS[kind]
    try:
        if not text:
            raise ValueError
        return read(text)
    except ValueError:
        raise UserError(f"sweep: {name}={text!r} must be {wanted}") from None


def text_of(value: Any) -> str:
    """A value as `parse` reads it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(
    protocol: Protocol, points: Sequence[Point], real: Reference | None, work: Work, facts: Mapping
) -> Report | None:
    """Measures every point, and reports all; None but in the main process, where there are several.

    facts: JSON values that decide the rest: data, numbers, seed.
    """
    seen = [protocol.look("drawn", point.pictures, work) for point in points]
    if not distributed.is_main():
        return None
    measured = [protocol.measure(series, real) for series in seen]
    warnings = list(dict.fromkeys(text for each in measured for text in each.warnings))
    found = [_facts(point, each) for point, each in zip(points, measured, strict=True)]
    networks = {key: network.identity for key, network in protocol.networks.items()}
    decides = {"metrics": list(protocol.metrics), "networks": networks, "bootstrap": protocol.replicates, **facts}
    decided = digest({**decides, "points": [point["pictures"] for point in found]})
    facts = {"kind": "pictures", "hash": decided, "versions": versions(), **decides}
    facts |= {"warnings": warnings, "points": found}
    tables = [_one(measured[0])] if len(points) == 1 else [_many(points, measured)]
    frontier = _frontier(points, measured)
    samples = [
        Samples(f"Drawn: {point.label}", each.samples, each.captions)
        for point, each in zip(points, measured, strict=True)
    ]
    title = f"{points[0].label}: {len(points[0].pictures)} pictures" if len(points) == 1 else f"{len(points)} settings"
    plots = [("Fit and fidelity", frontier)] if frontier else []
    return Report(f"Evaluation of {title}", facts, tables, plots, samples, warnings)


def _facts(point: Point, measured: Measured) -> dict:
    rows = [row._asdict() for row in measured.rows]
    return {"label": point.label, "settings": dict(point.settings), "pictures": point.pictures.about, "rows": rows}


def _one(measured: Measured) -> Table:
    rows = [[r.name, r.value, r.low, r.high, r.n, r.note] for r in measured.rows]
    return Table("Metrics", ["metric", "value", "95% from", "to", "n", "note"], rows)


def _many(points: Sequence[Point], measured: Sequence[Measured]) -> Table:
    names = [row.name for row in measured[0].rows]
    rows = []
    for point, each in zip(points, measured, strict=True):
        by_name = {row.name: row for row in each.rows}
        rows.append([point.label, *(_spelled(by_name.get(name)) for name in names)])
    return Table("Metrics by setting", ["setting", *names], rows)


def _spelled(row) -> str:
    if row is None:
        return "–"
    return f"{row.value:.4g}" + ("" if row.low is None else f" ± {(row.high - row.low) / 2:.2g}")


def _frontier(points: Sequence[Point], measured: Sequence[Measured]) -> str | None:
    """A plot of fidelity over fit, by its address: a curve for each setting of all but the first name swept over."""
    if len(points) < 2:
        return None
    tables = [{row.name: row for row in each.rows} for each in measured]
    x_name = next((name for name in FIT if name in tables[0]), None)
    y_name = next((name for name in FIDELITY if name in tables[0]), None)
    if x_name is None or y_name is None:
        return None
    swept = list(points[0].settings)
    along = next((name for name in swept if name.endswith("guidance")), swept[0])
    curves: dict[str, list[plot.Mark]] = {}
    for point, rows in zip(points, tables, strict=True):
        others = [f"{k}={text_of(v)}" for k, v in point.settings.items() if k != along]
        rest = ", ".join(others) or f"by {along}"
        x, y = rows[x_name], rows[y_name]
        mark = plot.Mark(x.value, y.value, _range(x), _range(y), text_of(point.settings[along]))
        curves.setdefault(rest, []).append(mark)
    return plot.address(plot.curves(list(curves.items()), f"{x_name}, more is better", f"{y_name}, less is better"))


def _range(row):
    return None if row.low is None else (row.low, row.high)
