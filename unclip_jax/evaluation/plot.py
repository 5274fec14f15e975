"""Curves with intervals, as matplotlib draws them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Mark(NamedTuple):
    """A place with intervals (low, high) along both axes, and a label."""

    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    label: str = ""


def curves(series: Sequence[tuple[str, Sequence[Mark]]], x_name: str, y_name: str) -> Figure:
    """Named curves through their points, in order, with intervals as thin bars."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # names are shown as they are, dollars too
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        for name, marks in series:
            (line,) = axes.plot([m.x for m in marks], [m.y for m in marks], "o-", markersize=4)
            line.set_label(name)
            bars = dict(colors=line.get_color(), alpha=0.5, linewidth=1)
            for m in marks:
                if m.x_range:
                    axes.hlines(m.y, *m.x_range, **bars)
                if m.y_range:
                    axes.vlines(m.x, *m.y_range, **bars)
                axes.annotate(m.label, (m.x, m.y), (5, 5), textcoords="offset points", fontsize="small")
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.grid(color="#ddd")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", frameon=False)
    return figure


def address(figure: Figure) -> str:
    """Of an SVG that is in itself, for a page; the same bytes for the same figure."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "unclip"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
