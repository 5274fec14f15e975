"""What a data source holds, and which of its records cannot be read."""

import statistics

import numpy as np
from tqdm import tqdm

from unclip_jax.data.images import BadImage
from unclip_jax.errors import printable

SHOWN = 10


def survey(source, num: int | None = None) -> dict:
    """Reads `num` records evenly over a source, or all (None).

    Returns: {source, licence, records, read, readable, bad: [[number, why], …], passed_over: {reason: count},
      passed_over_records: [[where, reason], …] of the first hundred, caption_words and pixels: {least, median, most},
      distinct_captions}; pixels are of the shorter sides of the files, where the source knows them.
    """
    total = len(source)
    few = num is not None and num < total
    numbers = np.linspace(0, total - 1, num).round().astype(int).tolist() if few else range(total)
    words, sides, captions, bad = [], [], set(), []
    for number in tqdm(numbers, desc="records", unit="", leave=False, disable=None):
        try:
            record = source[number]
        except BadImage as error:
            bad.append([number, str(error)])
            continue
        for caption in record.get("captions", [record["caption"]] if "caption" in record else []):
            words.append(len(caption.split()))
            captions.add(caption)
        if "pixels" in record:
            sides.append(min(record["pixels"]))
    index = getattr(source, "index", None)
    return {
        "source": source.name, "licence": source.licence, "split": source.split, "records": total, "read": len(numbers),
        "readable": len(numbers) - len(bad), "bad": bad,
        "passed_over": getattr(index, "passed_over", {}), "passed_over_records": getattr(index, "listed", []),
        "caption_words": _spread(words), "distinct_captions": len(captions), "pixels": _spread(sides),
    }  # fmt: skip


def table(report: dict) -> str:
    """The report for reading."""
    lines = [
        f"source             {report['source']} ({report['licence']})",
        f"records            {report['records']} of the split '{report['split']}'",
        f"read               {report['read']}, of them {len(report['bad'])} cannot be read",
        f"captions           {report['distinct_captions']} distinct; words {_told(report['caption_words'])}",
        f"shorter side       {_told(report['pixels'])}",
    ]
    first = {reason: where for where, reason in reversed(report["passed_over_records"])}
    for reason, count in report["passed_over"].items():
        lines.append(f"passed over        {count} {reason}" + (f", such as {first[reason]}" if reason in first else ""))
    lines += [f"cannot be read     record {number}: {why}" for number, why in report["bad"][:SHOWN]]
    if len(report["bad"]) > SHOWN:
        lines.append(f"                   and {len(report['bad']) - SHOWN} more")
    return "\n".join(map(printable, lines))


def _spread(values: list[int]) -> dict | None:
    if not values:
        return None
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def _told(spread: dict | None) -> str:
    return "not known" if spread is None else "{least} … {most}, median {median:g}".format(**spread)
