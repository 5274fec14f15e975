"""How often pictures show what their prompts say, in the shapes world.

`alignment` draws pictures from prompts of the shapes world and has each judged by `metrics.shapes_oracle`,
apart for one and two objects, and for (shape, colour) pairs seen in training and held out of it: the held-out
ones tell whether the model composes or remembers.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from unclip_jax.errors import UserError, suggest
from unclip_jax.evaluation.report import Report, Samples, Table
from unclip_jax.metrics.intervals import wilson

OBJECTS = ("one", "two")
PAIRS = {"seen": False, "heldout": True}
KEYS = ("count", "shape", "colour", "size", "position", "relation", "background")


def alignment(
    draw: Callable[[list[str]], np.ndarray],
    num: int = 200,
    seed: int = 0,
    objects: Sequence[str] = OBJECTS,
) -> tuple[list[dict], dict[str, tuple]]:
    """How often pictures show what their prompts say.

    Args:
      draw: prompts -> u8[N, S, S, 3], one picture each.
      num: prompts of each kind; there are len(objects) * 2 kinds.
      seed: of the prompts.
      objects: of "one", "two".

    Returns:
      Rows {objects, pairs, n, right, low, high, attributes: {name: {n, right}}} with shares in [0, 1] and a
      95% interval, the last row over all; and {"one seen": (prompts, images, verdicts), …}.
    """
    from unclip_jax.data.shapes import prompts

    if num < 1:
        raise UserError(f"num={num} must be at least 1")
    check_objects(objects)
    kinds = list(itertools.product(objects, PAIRS))
    texts = {kind: prompts(kind[0], PAIRS[kind[1]], num, seed) for kind in kinds}
    images = draw(list(itertools.chain.from_iterable(texts.values())))
    rows, seen, everything = [], {}, []
    for k, kind in enumerate(kinds):
        own = images[k * num : (k + 1) * num]
        verdicts = judge(own, texts[kind])
        everything += verdicts
        rows.append({"objects": kind[0], "pairs": kind[1], **tally(verdicts)})
        seen[" ".join(kind)] = (texts[kind], own, verdicts)
    rows.append({"objects": "all", "pairs": "all", **tally(everything)})
    return rows, seen


def check_objects(objects: Iterable[str]) -> None:
    """Raises UserError unless all are of `OBJECTS`."""
    for name in objects:
        if name not in OBJECTS:
            raise UserError(f"num-objects={name!r} is unknown", suggest(name, OBJECTS))


def judge(images: np.ndarray, prompts: Sequence[str]) -> list[dict[str, bool]]:
    """The oracle's verdict of each picture u8[S, S, 3] on its prompt: {"right": all of it, "shape": …}."""
    from unclip_jax.metrics.shapes_oracle import score

    return [score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def tally(verdicts: Sequence[dict[str, bool]]) -> dict:
    """Verdicts as shares; an attribute counts where a prompt mentions it.

    Attributes are of the objects that fit the prompt best, so stray objects flatter them; they lower "count"
    and "right".
    """
    n, k = len(verdicts), sum(bool(v["right"]) for v in verdicts)
    low, high = wilson(k, n)
    attributes = {}
    for key in KEYS:
        right = [bool(v[key]) for v in verdicts if key in v]
        if right:
            attributes[key] = {"n": len(right), "right": round(sum(right) / len(right), 6)}
    shares = {"right": round(k / n, 6), "low": round(low, 6), "high": round(high, 6)}
    return {"n": n, **shares, "attributes": attributes}


def table(rows: Iterable[dict]) -> Table:
    """The rows of `alignment`, in percent to one decimal."""
    columns = ["objects", "pairs", "n", "right %", "95% from", "to", *(f"{key} %" for key in KEYS)]
    lines = []
    for row in rows:
        shares = [row["attributes"].get(key, {}).get("right") for key in KEYS]
        percent = [s if s is None else round(100 * s, 1) for s in (row["right"], row["low"], row["high"], *shares)]
        lines.append([row["objects"], row["pairs"], row["n"], *percent])
    return Table("Share of pictures", columns, lines)


def sheet(seen: dict[str, tuple], each: int = 16) -> np.ndarray:
    """A contact sheet u8[H, W, 3] of the first pictures of each kind, with prompt and verdict under them."""
    from unclip_jax.data.images import grid

    images, labels = [], []
    for prompts, pictures, verdicts in seen.values():
        images.append(pictures[:each])
        labels += _labels(prompts[:each], verdicts[:each])
    images = np.concatenate(images)
    return grid(images, 8, labels=labels, scale=max(1, -(-160 // images.shape[2])), pad=4)


def as_report(facts: dict, seen: dict[str, tuple], each: int = 8) -> Report:
    """What `alignment` gave, for `report.write`. facts: with its rows as "results"."""
    samples = [
        Samples(kind, pictures[:each], _labels(prompts[:each], verdicts[:each]))
        for kind, (prompts, pictures, verdicts) in seen.items()
    ]
    title = f"Alignment of {facts['model']}: {facts['num']} prompts of each kind"
    return Report(title, facts, [table(facts["results"])], samples=samples)


def _labels(prompts: Sequence[str], verdicts: Sequence[dict[str, bool]]) -> list[str]:
    """Each prompt behind its verdict, as "[wrong shape, colour] a red circle"."""
    wrong = [", ".join(key for key in KEYS if not verdict.get(key, True)) for verdict in verdicts]
    return [f"[{'wrong ' + keys if keys else 'right'}] {prompt}" for keys, prompt in zip(wrong, prompts, strict=True)]
