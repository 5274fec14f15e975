"""Curves as SVG, written by hand: no package is needed, and a page can hold them."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32", "#7b3fa0", "#8a6d00", "#00796b", "#ad1457", "#455a64")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 420, 70, 16, 16, 52


class Mark(NamedTuple):
    """A place with intervals (low, high) along both axes, and a label."""

    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    label: str = ""


def curves(series: Sequence[tuple[str, Sequence[Mark]]], x_name: str, y_name: str) -> str:
    """Named curves through their points, in order, with intervals as thin bars."""
    points = [p for _, own in series for p in own]
    xs = [v for p in points for v in (p.x, *(p.x_range or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_range or ()))]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    (x0, x1), (y0, y1) = _span(xs, x_ticks), _span(ys, y_ticks)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x, y):
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18 * len(series)}" width="{WIDTH}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT + 18 * len(series)}" fill="white"/>',
    ]
    for tick in x_ticks:
        x, _ = at(tick, y0)
        parts.append(_line(x, TOP, x, bottom, "#ddd") + _text(x, bottom + 16, _short(tick), "middle"))
    for tick in y_ticks:
        _, y = at(x0, tick)
        parts.append(_line(LEFT, y, right, y, "#ddd") + _text(LEFT - 6, y + 4, _short(tick), "end"))
    parts.append(_text((LEFT + right) / 2, bottom + 36, x_name, "middle"))
    parts.append(f'<g transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)">{_text(0, 0, y_name, "middle")}</g>')
    for k, (name, own) in enumerate(series):
        colour = COLOURS[k % len(COLOURS)]
        places = [at(p.x, p.y) for p in own]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for p, (x, y) in zip(own, places, strict=True):
            if p.x_range:
                parts.append(_line(at(p.x_range[0], p.y)[0], y, at(p.x_range[1], p.y)[0], y, colour, 0.5))
            if p.y_range:
                parts.append(_line(x, at(p.x, p.y_range[0])[1], x, at(p.x, p.y_range[1])[1], colour, 0.5))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(_text(x + 6, y - 6, p.label, "start", colour))
        row = HEIGHT + 18 * k + 4
        parts.append(_line(LEFT, row, LEFT + 24, row, colour, 1, 2) + _text(LEFT + 32, row + 4, name, "start"))
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within low … high, about `most` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values, marks):
    low, high = min(*values, *marks, values[0]), max(*values, *marks, values[0])
    pad = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return low - pad, high + pad


def _line(x1, y1, x2, y2, colour, opacity=1.0, width=1):
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-opacity="{opacity}" stroke-width="{width}"/>'
    )


def _text(x, y, text, anchor, colour="#333"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(str(text))}</text>'


def _short(value: float) -> str:
    return f"{value:.6g}"
