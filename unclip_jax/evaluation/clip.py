"""What CLIP's embeddings know: retrieval both ways, zero-shot classification with prompt ensembling, a linear probe."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unclip_jax import data
from unclip_jax.data.images import BadImage
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.evaluation.report import Table
from unclip_jax.evaluation.trained import TrainedStage
from unclip_jax.metrics import intervals, probes

TEMPLATES = ("{}", "a {}", "one {}", "a picture of a {}", "there is a {}")
COLUMNS = ("metric", "share", "95% from", "to")


def tables(
    own: TrainedStage, num: int, seed: int, classes: Sequence[str] | None = None, templates: Sequence[str] = TEMPLATES
) -> list[Table]:
    """Retrieval over `num` examples; where examples have a class, zero-shot and, if trained here, a linear probe."""
    model, size = own.task.model, own.batch_size
    extract = features.extractor(features.clip(model, own.params, ""), batch=size)
    see = lambda images: extract(images)["features"]  # noqa: E731
    labels = labeller(own.source, classes)
    prompts = probes.class_prompts(labels[0], templates) if labels else []
    examples = [record for _, record in itertools.islice(_readable(own.source, seed), num)]
    captions = [example["caption"] for example in examples]
    z_txt = features.embed_texts(model, own.params, own.tokenizer, [*captions, *prompts], size)  # compiled once
    found = [_retrieval(see([example["image"] for example in examples]), z_txt[: len(captions)])]
    if labels:
        z_class = probes.class_embeddings(z_txt[len(captions) :], len(labels[0]))
        zero_shot = {f"zero-shot, {len(templates)} templates": z_class}
        found.append(_classification(own, see, labels, zero_shot, num, seed))
    return found


def _retrieval(z_img: np.ndarray, z_txt: np.ndarray) -> Table:
    n = len(z_img)
    rows = []
    for way, shares in probes.recall(z_img, z_txt, ks=[k for k in (1, 5, 10) if k <= n]).items():
        rows += [_row(f"{way.replace('_', ' ')} recall@{k}", share, n) for k, share in shares.items()]
    return Table(f"Retrieval among {n}", COLUMNS, rows)


def _classification(
    own: TrainedStage, see: Callable, labels: tuple, zero_shot: dict[str, np.ndarray], num: int, seed: int
) -> Table:
    """By the nearest of embeddings of classes, {name: f32[classes, D]}, and by a probe. labels: as `labeller` tells."""
    names, label = labels
    images, classes = _labelled(own.source, label, len(names), num, seed)
    z = see(images)
    scores = {name: probes.unit(z) @ z_class.T for name, z_class in zero_shot.items()}
    if "source" in own.config.data:  # of a converted one it is not known what it was trained on
        train_source = data.make(**{**own.config.data, "split": "train"})
        train_images, train_classes = _labelled(train_source, label, len(names), 4 * num, seed)
        probe = probes.linear_probe(see(train_images), train_classes, len(names))
        scores[f"linear probe on {len(train_classes)} of 'train'"] = probe(z)
    rows = [
        _row(f"{name}, top-{k}", float(probes.top_k(score, classes, k).mean()), len(classes))
        for name, score in scores.items()
        for k in (1, 5)
        if k < len(names)
    ]
    return Table(f"Classification of {len(classes)} into {len(names)} classes", COLUMNS, rows)


def _row(name: str, share: float, n: int) -> list:
    return [name, share, *intervals.wilson(round(share * n), n)]


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
    for i, record in _readable(source, seed, 20 * num):
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


def _readable(source, seed: int, tries: int | None = None) -> Iterator[tuple[int, dict]]:
    """(number, record) in an order that the seed decides, without damaged ones; of the first so many, None: of all."""
    for i in np.random.default_rng(seed).permutation(len(source))[:tries].tolist():
        try:
            record = source[i]
        except BadImage:
            continue
        yield i, record
