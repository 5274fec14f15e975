"""One trained stage, of a run (its averaged weights) or of a stack, by its own metrics on what its config holds out.

    CLIP                  retrieval both ways, zero-shot classification with prompt ensembling, a linear probe
    prior                 cosine with the true embedding beside baselines, by guidance and steps
    decoder, upsampler    error by time, and bits/dim where the variance is learned
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import checkpoint_read, data, tasks, weights
from unclip_jax.data import loader
from unclip_jax.data.images import BadImage, to_float
from unclip_jax.diffusion.loss import prior_bpd
from unclip_jax.errors import UserError
from unclip_jax.evaluation import pictures
from unclip_jax.evaluation import sweep as sweeps
from unclip_jax.evaluation.features import chunks
from unclip_jax.evaluation.report import Report, Table, versions
from unclip_jax.metrics import intervals, probes
from unclip_jax.stack import located
from unclip_jax.tokenizer import Tokenizer

BUCKETS = 10
CONVERTED_BATCH = 64
TEMPLATES = ("{}", "a {}", "one {}", "a picture of a {}", "there is a {}")
MAX_LINES = 100_000
SWEPT = {"guidance": float, "steps": int, "candidates": int}


class Stage(NamedTuple):
    """A trained stage with what it is measured on."""

    task: Any
    params: Any
    frozen: dict
    config: Any
    step: int
    source: Any
    tokenizer: Tokenizer | None

    @property
    def batch_size(self) -> int:
        """That it was trained with; of a converted one it is not known."""
        return self.config.get("batch_size", CONVERTED_BATCH)

    def batches(self, seed: int):
        """Of the held-out split, in an order that the seed decides."""
        settings = {**self.config.get("loader", {}), "num_workers": 0}
        return loader.batches(self.source, self.tokenizer, self.batch_size, seed=seed, **settings)


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
    names = {"classes": classes, "templates": templates}
    lines = {name: _lines(file, name) for name, file in names.items() if file is not None}
    if "templates" in lines:
        probes.class_prompts(["x"], lines["templates"])
    if "classes" in lines:
        probes.class_prompts(lines["classes"], TEMPLATES)
    points = sweeps.parse(sweep, SWEPT) if sweep else [{}]
    if stage is None:
        task = checkpoint_read.peek(where)[0].get("task")
    else:
        task = weights.tasks_of(located(where)).get(stage)  # None: no such stage, which `load` tells
    what = where if stage is None else f"the stage {stage}"
    for flag, value, wanted in (("sweep", sweep, "prior_diffusion"), *((n, lines.get(n), "clip") for n in names)):
        if value and task not in (None, wanted):
            raise UserError(f"--{flag} is for a run of '{wanted}', and {what} is one of '{task}'", "leave it out")
    own = load(where, step, stage, source, path)
    count = -(-num // own.batch_size)
    metrics = tasks.measure(own.task, own.frozen, own.params, own.batches(seed), count, seed)
    _check_finite(metrics, where)
    tables = [Table("Metrics", ["metric", "value"], [[name, float(v)] for name, v in metrics.items()])]
    n, split = count * own.batch_size, own.source.split
    facts = {"kind": "stage", "run": Path(where).resolve().name, "task": task, "step": own.step}
    facts |= {"data": own.source.name, "split": split, "n": n, "seed": seed, "versions": versions(), "metrics": metrics}
    if task == "clip":
        more = clip(own, n, seed, lines.get("classes"), lines.get("templates", TEMPLATES))
    elif task.startswith("prior"):
        more = prior(own, count, seed, points)
    else:
        more = by_time(own, count, seed) if hasattr(own.task, "schedule") else []
    tables += more
    facts["results"] = [{"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]} for t in more]
    title = f"{task} at step {own.step}, {n} examples of '{split}'"
    return Report(title, facts, tables)


def load(
    where: str, step: int | None = None, stage: str | None = None, source: str | None = None, path: str | None = None
) -> Stage:
    """Reads a run's averaged weights, or a stage of a stack, and opens what it is measured on; as `measure`."""
    if path is not None and source is None:
        raise UserError(f"path={path!r} is of a source, and none is given", "give --data SOURCE as well")
    if stage is None:
        params, config, step, text = checkpoint_read.load_params(where, step=step)
        clip = config.clip
    else:
        stack = weights.load_stack(located(where), [stage], "float32")
        (params, config, step, _), text = stack.stages[stage], stack.tokenizer_json
        clip = str(located(where)) if tasks.needs_clip(config) else ""
    frozen = tasks.load_clip(clip) if clip else None
    if frozen and frozen.identity != config.clip_identity:
        raise UserError(
            f"{where} was trained with another CLIP than the one now in {clip}",
            "put the CLIP that it was trained with back in that place",
        )
    task = tasks.make(config, frozen.model if frozen else None)
    if source is not None:
        size = config.data.get("size") or (frozen and (frozen.model.vision or {}).get("image_size"))
        if not size:
            raise UserError(f"{stage or where} sees no pictures: its CLIP has no image tower", "measure a whole CLIP's")
        opened = pictures.source(source, size, config.data.get("seed", 0), path)[0]
    elif "eval" in config:
        opened = data.make(**{**config.data, "split": config.eval.split})
    else:
        what = f"the stage {stage} was converted, and knows of no data to be measured on"
        raise UserError(what, "give --data SOURCE, and --path where it lies")
    tokenizer = Tokenizer.from_json(text) if text else None
    return Stage(task, params, {"clip": frozen.params} if frozen else {}, config, step, opened, tokenizer)


def prior(own: Stage, count: int, seed: int, points: Sequence[dict]) -> list[Table]:
    """Cosines of drawn and true embeddings for each of `points`, settings of the sampler."""
    rows, settings = [], [name for name in SWEPT if name in own.task.sampler]  # the autoregressive one takes no steps
    for point in points:
        task = dataclasses.replace(own.task, sampler={**own.task.sampler, **point})
        tasks.check_task(task)
        found = tasks.measure(task, own.frozen, own.params, own.batches(seed), count, seed)
        _check_finite(found, f"the prior at {point}")
        used = [task.sampler[name] for name in settings]
        names = ("cosine", "cosine_of_text_embedding", "cosine_of_mean", "cosine_of_others")
        rows.append([*used, *(float(found[name]) for name in names)])
    columns = [*settings, "drawn", "text embedding", "mean", "another picture's"]
    return [Table("Cosine with the true z_img", columns, rows)]


def by_time(own: Stage, count: int, seed: int) -> list[Table]:
    """Mean squared error in each tenth of the times, nothing dropped; its part of the bits/dim, and their sum."""
    schedule = own.task.schedule
    names = [name for name in ("clip_drop", "text_drop", "blur_share") if hasattr(own.task, name)]
    task = dataclasses.replace(own.task, **{name: 0.0 for name in names})
    edges = np.linspace(0, schedule.num_steps, min(BUCKETS, schedule.num_steps) + 1).astype(int)

    @jax.jit
    def errors(frozen, params, batch, index, low, high):
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), low)
        batch = task.encode(frozen, batch)
        u = jax.random.uniform(jax.random.fold_in(rng, 1), (batch["image"].shape[0],))
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


def clip(own: Stage, num: int, seed: int, classes: Sequence[str] | None, templates: Sequence[str]) -> list[Table]:
    """Retrieval over `num` examples; where examples have a class, zero-shot and, if trained here, a linear probe."""
    see = _embedder(own)
    examples = [own.source[i] for i in _readable(own.source, num, seed)]
    z_img = see.images([e["image"] for e in examples])
    z_txt = see.texts([e["caption"] for e in examples])
    ks = [k for k in (1, 5, 10) if k <= len(examples)]
    rows = []
    for way, shares in probes.recall(z_img, z_txt, ks=ks).items():
        for k, share in shares.items():
            rows.append([f"{way.replace('_', ' ')} recall@{k}", share, *_interval(share, len(examples))])
    tables = [Table(f"Retrieval among {len(examples)}", ["metric", "share", "95% from", "to"], rows)]
    labels = labeller(own.source, classes)
    if labels is None:
        return tables
    names, label = labels
    test_x, test_y = _labelled(own.source, label, len(names), num, seed)
    z_test = see.images(test_x)
    z_class = probes.class_embeddings(see.texts(probes.class_prompts(names, templates)), len(names))
    scores = {f"zero-shot, {len(templates)} templates": probes.unit(z_test) @ z_class.T}
    if "source" in own.config.data:  # of a converted one it is not known what it was trained on
        train_source = data.make(**{**own.config.data, "split": "train"})
        train_x, train_y = _labelled(train_source, label, len(names), 4 * num, seed)
        probe = probes.linear_probe(see.images(train_x), train_y, len(names))
        scores[f"linear probe on {len(train_y)} of 'train'"] = probe(z_test)
    rows = []
    for name, score in scores.items():
        for k in [k for k in (1, 5) if k < len(names)]:
            share = float(probes.top_k(score, test_y, k).mean())
            rows.append([f"{name}, top-{k}", share, *_interval(share, len(test_y))])
    title = f"Classification of {len(test_y)} into {len(names)} classes"
    return [*tables, Table(title, ["metric", "share", "95% from", "to"], rows)]


def labeller(source, classes: Sequence[str] | None) -> tuple[list[str], Callable] | None:
    """(names of classes, a function (source, i, record) → class or None), or None where nothing tells classes.

    With `classes`, an example's class is the one that its caption names; in the shapes world, colour and shape of a
    lone object; in a folder with subfolders, the subfolder.
    """
    if classes is not None:
        words = [f" {' '.join(name.lower().split())} " for name in classes]

        def by_caption(_, i, record):
            text = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in record['caption'].lower()).split())} "
            named = [k for k, word in enumerate(words) if word in text]
            return named[0] if len(named) == 1 else None

        return list(classes), by_caption
    if hasattr(source, "scene"):
        from unclip_jax.data.shapes_world import COLOURS, SHAPES

        names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

        def by_scene(own, i, _):
            objects = own.scene(i).objects
            return names.index(f"{objects[0].colour} {objects[0].shape}") if len(objects) == 1 else None

        return names, by_scene
    folders = sorted({file.split("/")[0] for file, _ in getattr(source, "records", ()) if "/" in file})
    if len(folders) < 2:
        return None
    return folders, lambda _, i, record: folders.index(record["file"].split("/")[0]) if "/" in record["file"] else None


def _labelled(source, label, classes: int, num: int, seed: int):
    """The first `num` pictures that have a class, in an order that the seed decides: (pictures, classes)."""
    images, labels = [], []
    for i in np.random.default_rng(seed).permutation(len(source))[: 20 * num].tolist():
        try:
            record = source[i]
        except BadImage:
            continue
        found = label(source, i, record)
        if found is not None:
            images.append(record["image"])
            labels.append(found)
        if len(labels) == num:
            break
    if not labels:
        raise UserError(f"no example of '{source.name}' has any of the classes", "compare them with the captions")
    labels = np.array(labels)
    probes.check_labels(labels, classes)
    return images, labels


class _embedder:
    """The CLIP of a stage over pictures u8 and texts, in batches of one shape."""

    def __init__(self, own: Stage):
        self.own, self.size = own, own.batch_size
        apply = lambda method: jax.jit(lambda p, *x: own.task.model.apply({"params": p}, *x, method=method))  # noqa: E731
        self._image, self._text = apply("embed_image"), apply("embed_text")

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        parts = [self._image(self.own.params, to_float(np.stack([images[i] for i in c]))) for c in self._of(images)]
        return np.concatenate(jax.device_get(parts))[: len(images)]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        tokens, mask = self.own.tokenizer.encode(list(texts), warn=False)
        parts = [self._text(self.own.params, tokens[c], mask[c])[0] for c in self._of(texts)]
        return np.concatenate(jax.device_get(parts))[: len(texts)]

    def _of(self, rows):
        return chunks(len(rows), self.size)


def _readable(source, num: int, seed: int) -> list[int]:
    """`num` examples in an order that the seed decides, without damaged ones."""
    found = []
    for i in np.random.default_rng(seed).permutation(len(source)).tolist():
        try:
            source[i]
        except BadImage:
            continue
        found.append(i)
        if len(found) == num:
            break
    return found


def _interval(share: float, n: int) -> tuple[float, float]:
    return intervals.wilson(round(share * n), n)


def _check_finite(metrics: dict, what: str) -> None:
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise UserError(f"{bad[0]} of {what} is not a finite number", "use an earlier checkpoint")


def _lines(file: str, what: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what} file {file!r} is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} file {file!r} cannot be read ({getattr(error, 'strerror', error)})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"the list of {what} in {file!r} is empty", "write one a line")
    if len(lines) > MAX_LINES:
        raise UserError(f"{what} file {file!r} has {len(lines)} lines, at most {MAX_LINES}")
    return lines
