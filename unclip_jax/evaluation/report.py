"""A report as JSON for programs, Markdown for notes, and one page for people; and two reports side by side.

The page is whole in itself: pictures and plots are inside, no script, nothing is fetched. Whatever comes from outside
(captions, names of files) is escaped.
"""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import unclip_jax
from unclip_jax import gallery
from unclip_jax.errors import UserError, is_number, printable
from unclip_jax.storage import read_json, write_text

MAX_REPORT_BYTES = 64 << 20
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;
max-width:1100px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}
h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse;margin:.6em 0}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}
.warn{background:#fff4e0;border-left:4px solid #c77700;padding:.4em .8em;margin:.4em 0}
.grid{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0;width:132px;font-size:12px;line-height:1.3;
overflow-wrap:anywhere}figure img{width:128px;height:128px;image-rendering:pixelated;border:1px solid #ccc}
pre{background:#f6f6f6;padding:.7em;overflow:auto;font-size:12px}img{max-width:100%}"""


class Table(NamedTuple):
    """Cells by row; numbers are set to the right. In Markdown and on the page alike."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Samples(NamedTuple):
    """Some pictures u8[N, S, S, 3] and a caption for each, or none."""

    title: str
    images: np.ndarray
    captions: Sequence[str]


class Report(NamedTuple):
    """What was measured.

    Attributes:
      title: of it all.
      facts: JSON values, what `--out` stores: settings, versions, hashes, every number.
      tables, plots (title, address as of `plot.address`), samples, warnings: for people.
    """

    title: str
    facts: dict
    tables: Sequence[Table] = ()
    plots: Sequence[tuple[str, str]] = ()
    samples: Sequence[Samples] = ()
    warnings: Sequence[str] = ()


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    import jax
    import scipy

    return {
        "unclip_jax": unclip_jax.__version__, "python": platform.python_version(), "jax": jax.__version__,
        "numpy": np.__version__, "scipy": scipy.__version__,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }  # fmt: skip


def check_files(out: str, overwrite: bool) -> Path:
    """The .json file, beside which .md and .html are written; UserError for what is there or cannot be written."""
    file = gallery.check_file(out, ".json", overwrite)
    for suffix in (".md", ".html"):
        gallery.check_file(str(file.with_suffix(suffix)), suffix, overwrite)
    return file


def write(file: Path, report: Report) -> None:
    """Writes FILE.json, FILE.md and FILE.html, each whole or not at all."""
    write_text(file, json.dumps(report.facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(file.with_suffix(".md"), markdown(report))
    write_text(file.with_suffix(".html"), page(report))


def read(file: str) -> dict:
    """The facts of a report; UserError where that file is none."""
    return read_json(Path(file), "a report", MAX_REPORT_BYTES)


def plain(table: Table) -> str:
    """For the terminal."""
    cells = [list(map(printable, table.columns)), *([printable(_cell(c)) for c in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = zip(table.columns, *table.rows, strict=True)
    sides = ["rjust" if any(isinstance(c, (int, float)) for c in column) else "ljust" for column in columns]
    lines = [
        "  ".join(getattr(c, side)(w) for c, side, w in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """Tables and settings; pictures and plots are on the page."""
    parts = [f"# {_md(report.title)}", *(f"> {_md(text)}" for text in report.warnings)]
    for title, columns, rows in report.tables:
        lines = [f"## {_md(title)}", "", "| " + " | ".join(map(_md, columns)) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_md(_cell(cell)) for cell in row) + " |" for row in rows]
        parts.append("\n".join(lines))
    parts.append("## Settings\n\n```json\n" + json.dumps(_settings(report), indent=2).replace("`", "'") + "\n```")
    return "\n\n".join(parts) + "\n"


def page(report: Report) -> str:
    """One HTML file."""
    parts = [f"<h1>{escape(report.title)}</h1>", *(f'<p class="warn">{escape(text)}</p>' for text in report.warnings)]
    for title, address in report.plots:
        parts.append(f'<h2>{escape(title)}</h2><img alt="" src="{address}">')
    parts += [f"<h2>{escape(table.title)}</h2>{_html_table(table)}" for table in report.tables]
    for title, images, captions in report.samples:
        captions = list(captions) or [""] * len(images)
        cells = [
            f'<figure><img alt="" src="{gallery.data_uri(image)}"><figcaption>{escape(text)}</figcaption></figure>'
            for image, text in zip(images, captions, strict=False)
        ]
        parts.append(f'<h2>{escape(title)}</h2><div class="grid">{"".join(cells)}</div>')
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(_settings(report), indent=2, ensure_ascii=False))}</pre>")
    return html(report.title, "\n".join(parts), POLICY)


def _settings(report: Report) -> dict:
    """What was measured and how, without the numbers."""
    return {k: v for k, v in report.facts.items() if k not in ("points", "results")}


def html(title: str, body: str, policy: str, style: str = STYLE) -> str:
    """A whole document under a content security policy."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    def line(cells, tag):
        made = [
            f"<{tag}{' class=n' if isinstance(value, (int, float)) else ''}>{escape(_cell(value))}</{tag}>"
            for value in cells
        ]
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{line(table.columns, 'th')}{''.join(line(row, 'td') for row in table.rows)}</table>"


def _cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _md(text) -> str:
    """Text that Markdown leaves as it is: no HTML, no table bars, one line."""
    text = " ".join(str(text).split())
    for mark in "\\`*_[]|":
        text = text.replace(mark, "\\" + mark)
    return escape(text, quote=False)


def _points(facts: Mapping) -> list[dict]:
    """[{"label", "rows"}] of a report of pictures, of the shapes world's prompts or of a stage."""
    bare = {"low": None, "high": None}
    if facts.get("kind") == "stage":
        return [{"label": "", "rows": [bare | {"name": k, "value": v} for k, v in facts["metrics"].items()]}]
    if facts.get("kind") != "alignment":
        return facts["points"]
    points = []
    for found in facts["results"]:
        rows = [{"name": "oracle: right", "value": found["right"], "low": found["low"], "high": found["high"]}]
        rows += [bare | {"name": f"oracle: {k}", "value": own["right"]} for k, own in found["attributes"].items()]
        points.append({"label": f"{found['objects']}, {found['pairs']}", "rows": rows})
    return points


def _rows_of(facts: Mapping, file: str) -> dict[tuple[str, str], dict]:
    """{(point, metric): row} of a report."""
    try:
        found = {(p["label"], row["name"]): row for p in _points(facts) for row in p["rows"]}
        for row in found.values():
            ends = () if row["low"] is None is row["high"] else (row["low"], row["high"])
            if not all(is_number(number, -sys.float_info.max) for number in (row["value"], *ends)):
                raise ValueError(row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{file} is no report of pictures or of a stage ({type(error).__name__})"
        raise UserError(what, "give what `unclip evaluate … --out` wrote") from None
    if not found:
        raise UserError(f"{file} holds no numbers")
    return found


def compare(first: str, second: str) -> Report:
    """Two reports of one kind side by side: every number that both have, and what makes them not comparable."""
    if Path(first).resolve() == Path(second).resolve():
        raise UserError(f"both reports are {first!r}", "give two")
    sides = [read(file) for file in (first, second)]
    found = [_rows_of(facts, file) for facts, file in zip(sides, (first, second), strict=True)]
    single = all(len({label for label, _ in rows}) == 1 for rows in found)
    if single:  # two runs of one setting each compare whatever the settings are
        found = [{("", name): row for (_, name), row in rows.items()} for rows in found]
    both = [key for key in found[0] if key in found[1]]
    if not both:
        raise UserError(f"{first} and {second} have no metric and setting in common")
    warnings = []
    for key in ("task", "data", "split", "networks", "num", "n", "reference"):
        if sides[0].get(key) != sides[1].get(key):
            warnings.append(f"{key} differs: these numbers are not comparable, unless that is what you compare")
    rows, numbers = [], []
    for label, name in both:
        a, b = (side[label, name] for side in found)
        apart = _apart(a, b)
        change = b["value"] - a["value"]
        rows.append([label or "–", name, _with_range(a), _with_range(b), float(change), apart])
        numbers.append({"point": label, "name": name, "first": a, "second": b, "change": change, "intervals": apart})
    facts = {"kind": "comparison", "files": [Path(f).name for f in (first, second)], "results": numbers}
    facts |= {"versions": [side.get("versions") for side in sides], "warnings": warnings}
    columns = ["setting", "metric", Path(first).name, Path(second).name, "change", "95% intervals"]
    title = f"{Path(first).name} and {Path(second).name}"
    return Report(title, facts, [Table("Numbers", columns, rows)], warnings=warnings)


def _apart(a: Mapping, b: Mapping) -> str:
    if None in (a["low"], a["high"], b["low"], b["high"]):
        return "none"
    return "apart" if a["high"] < b["low"] or b["high"] < a["low"] else "overlap"


def _with_range(row: Mapping) -> str:
    low, high = row["low"], row["high"]
    return _cell(float(row["value"])) + ("" if low is None else f" [{_cell(float(low))}, {_cell(float(high))}]")
