"""One trained stage, of a run (its averaged weights) or of a stack, by its own metrics on what its config holds out.

    CLIP                  retrieval both ways, zero-shot classification with prompt ensembling, a linear probe
    prior                 cosine with the true embedding beside baselines, by guidance and steps
    decoder, upsampler    error by time, and bits/dim where the variance is learned
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import checkpoint_read, tasks, weights
from unclip_jax.diffusion.loss import prior_bpd
from unclip_jax.errors import UserError
from unclip_jax.evaluation import clip
from unclip_jax.evaluation import sweep as sweeps
from unclip_jax.evaluation.report import Report, Table, versions
from unclip_jax.evaluation.trained import TrainedStage, load
from unclip_jax.metrics import probes
from unclip_jax.settings import check_numbers
from unclip_jax.storage import read_text

BUCKETS = 10
MAX_LINES = 100_000
SWEPT = {"guidance": float, "steps": int, "candidates": int}


def measure(
    where: str,
    num: int = 200,
    seed: int = 0,
    *,
    stage: str | None = None,
    step: int | None = None,
    source: str | None = None,
    path: str | None = None,
    sweep: Sequence[str] | None = None,
    classes: str | None = None,
    templates: str | None = None,
) -> Report:
    """The report of a run, or of one stage of a stack.

    Args:
      where: workdir of a training run; with `stage`, a stack or the name of a bundled one.
      num: examples, rounded up to whole batches of the size trained with.
      seed: of the order of the examples and of whatever is drawn.
      stage: its name in the stack.
      step: of the run's checkpoint; None: the newest.
      source, path: "NAME" or "NAME:SPLIT" and its folder, in place of what the config holds out.
      sweep: for the prior, "guidance=1,2" and "steps=5,25".
      classes, templates: files for CLIP's zero-shot classification, one a line.
    """
    check_numbers(seed, num)
    task, points, lines = _asked(where, stage, sweep, {"classes": classes, "templates": templates})
    own = load(where, step, stage, source, path)
    count = -(-num // own.batch_size)
    n, split = count * own.batch_size, own.source.split
    metrics = tasks.measurer(own.task, seed)(own.frozen, own.params, own.batches(seed), count)
    _check_finite(metrics, where)
    if task == "clip":
        more = clip.tables(own, n, seed, **lines)
    elif task.startswith("prior"):
        more = prior(own, count, seed, points)
    else:
        more = by_time(own, count, seed) if hasattr(own.task, "schedule") else []
    facts = {"kind": "stage", "run": Path(where).resolve().name, "task": task, "step": own.step}
    facts |= {"data": own.source.name, "split": split, "n": n, "seed": seed, "versions": versions(), "metrics": metrics}
    facts["results"] = [{"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]} for t in more]
    first = Table("Metrics", ["metric", "value"], [[name, float(v)] for name, v in metrics.items()])
    few = f", which has {len(own.source)} pictures: they come several times" if n > len(own.source) else ""
    few += " in a batch, and recall takes the copies for other pictures" * (task == "clip" and bool(few))
    return Report(f"{task} at step {own.step}, {n} examples of '{split}'{few}", facts, [first, *more])


def _asked(where: str, stage: str | None, sweep, files: dict) -> tuple[str | None, list[dict], dict[str, list[str]]]:
    """(the stage's task, points of the sweep, {"classes", "templates": lines}), checked before weights are read.

    The task is None where there is no such stage, which `load` tells.
    """
    lines = {name: _lines(file, name) for name, file in files.items() if file is not None}
    if "templates" in lines:
        probes.class_prompts(["x"], lines["templates"])
    if "classes" in lines:
        probes.class_prompts(lines["classes"], clip.TEMPLATES)
    points = sweeps.parse(sweep or [], SWEPT)
    if stage is None:
        task = checkpoint_read.peek(where)[0].get("task")
    else:
        task = weights.tasks_of(where).get(stage)
    given = {"sweep": "prior_diffusion"} if sweep else {}
    for flag, wanted in (given | dict.fromkeys(lines, "clip")).items():
        if task not in (None, wanted):
            what = where if stage is None else f"the stage {stage}"
            raise UserError(f"--{flag} is for a run of '{wanted}', and {what} is one of '{task}'", "leave it out")
    return task, points, lines


def prior(own: TrainedStage, count: int, seed: int, points: Sequence[dict]) -> list[Table]:
    """Cosines of drawn and true embeddings for each of `points`, settings of the sampler."""
    rows, settings = [], [name for name in SWEPT if name in own.task.sampler]  # the autoregressive one takes no steps
    for point in points:
        task = dataclasses.replace(own.task, sampler={**own.task.sampler, **point})
        tasks.check_task(task)
        found = tasks.measurer(task, seed)(own.frozen, own.params, own.batches(seed), count)
        _check_finite(found, f"the prior at {point}")
        used = [task.sampler[name] for name in settings]
        names = ("cosine", "cosine_of_text_embedding", "cosine_of_mean", "cosine_of_others")
        rows.append([*used, *(float(found[name]) for name in names)])
    columns = [*settings, "drawn", "text embedding", "mean", "another picture's"]
    return [Table("Cosine with the true z_img", columns, rows)]


def by_time(own: TrainedStage, count: int, seed: int) -> list[Table]:
    """Mean squared error in each tenth of the times, nothing dropped; its part of the bits/dim, and their sum."""
    schedule = own.task.schedule
    names = [name for name in ("clip_drop", "text_drop", "blur_share") if hasattr(own.task, name)]
    task = dataclasses.replace(own.task, **{name: 0.0 for name in names})
    edges = np.linspace(0, schedule.num_steps, min(BUCKETS, schedule.num_steps) + 1).astype(int)

    @jax.jit
    def errors(frozen, params, batch, index, low, high):
        t_rng, rng = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), low))
        batch = task.encode(frozen, batch)
        u = jax.random.uniform(t_rng, (batch["image"].shape[0],))
        t = jnp.minimum((low + u * (high - low)).astype(jnp.int32), high - 1)
        return task.loss(params, batch, rng, t)[1] | {"end": prior_bpd(schedule, batch["image"]).mean()}

    totals: list[dict] = [{} for _ in edges[1:]]
    stream = own.batches(seed)
    for index in range(count):
        batch = next(stream)
        for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            for name, value in jax.device_get(errors(own.frozen, own.params, batch, index, low, high)).items():
                totals[k][name] = totals[k].get(name, 0.0) + float(value) / count
    snr = np.log(schedule.snr)
    learned, rows = "vlb" in totals[0], []
    for total, low, high in zip(totals, edges, edges[1:], strict=False):
        share = (high - low) / schedule.num_steps
        row = [f"{low} – {high - 1}", float(snr[low]), float(snr[high - 1]), total["mse"]]
        rows.append([*row, *([total["vlb"] * share] if learned else [])])
    columns = ["t", "log SNR from", "to", f"mse of {task.target}", *(["bits/dim"] if learned else [])]
    tables = [Table("Error by time", columns, rows)]
    if learned:
        end = totals[0]["end"]
        whole = end + sum(row[-1] for row in rows)
        tables.append(Table("Bits/dim", ["all", "of which the end of the schedule"], [[whole, end]]))
    return tables


def _check_finite(metrics: dict, what: str) -> None:
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise UserError(f"{bad[0]} of {what} is not a finite number", "use an earlier checkpoint")


def _lines(file: str, what: str) -> list[str]:
    text = read_text(Path(file), f"a file of {what}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"the list of {what} in {file!r} is empty", "write one a line")
    if len(lines) > MAX_LINES:
        raise UserError(f"{what} file {file!r} has {len(lines)} lines, at most {MAX_LINES}")
    return lines
