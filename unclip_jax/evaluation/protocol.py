"""Drawn pictures against real ones: features of both, block by block, and the metrics over them.

    metric             of                                    says
    fid                real, drawn features                  FID with Inception, FD-CLIP without
    kid                the same                              without FID's bias at small numbers
    precision_recall   the same                              good pictures; all kinds of pictures
    cmmd               real, drawn CLIP embeddings
    clip_score         drawn pictures, their captions        fit to the caption
    is                 Inception's logits of drawn pictures
    shapes_oracle      drawn pictures, their captions        whether a picture is right, in the shapes world
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.errors import UserError, suggest
from unclip_jax.evaluation.alignment import KEYS
from unclip_jax.evaluation.features import Network, extractor
from unclip_jax.evaluation.pictures import MAX_BAD, Pictures
from unclip_jax.evaluation.reference import Reference
from unclip_jax.evaluation.work import Series, Work
from unclip_jax.metrics import distances, intervals, manifold, scores

SAMPLES = 32  # pictures kept for the report
SAMPLE_SIDE = 128
NEIGHBOURS = 3


class Row(NamedTuple):
    """One number: its name says of what network it is; low and high are a 95% interval, None where there is none."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    note: str = ""


class Measured(NamedTuple):
    """What one set of drawn pictures came to: rows, warnings, and some of the pictures with captions."""

    rows: list[Row]
    warnings: list[str]
    samples: np.ndarray
    captions: list[str]


class Metric(NamedTuple):
    """What computes a metric, and what it needs.

    Attributes:
      rows: (protocol, features of the drawn pictures, the real ones, list of warnings) → rows.
      network: "inception", "clip", "main" (`Protocol.main`) or None.
      real, captions: whether it compares with real pictures; whether it asks what a picture should show.
    """

    rows: Callable[..., list[Row]]
    network: str | None = None
    real: bool = False
    captions: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What to measure, and with what.

    Attributes:
      metrics: of `METRICS`.
      networks: by name, "clip" and, where there are its weights, "inception".
      embed: captions → f32[N, D] of the network "clip"; for clip_score.
      replicates: resamples of the bootstrap for fid; below 2 for no interval.
      seed: of subsets and resamples.
      devices: that share the batches; None: all of this host.
    """

    metrics: Sequence[str]
    networks: Mapping[str, Network]
    embed: Callable[[Sequence[str]], np.ndarray] | None = None
    replicates: int = 50
    seed: int = 0
    devices: Sequence | None = None
    _extractors: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        needs = {metric.network for metric in self.wanted.values()}
        if "inception" in needs and "inception" not in self.networks:
            raise UserError("metric 'is' needs the Inception weights", "give --inception FILE, or leave it out")
        if needs - {None} and not self.networks:
            raise UserError(f"metrics {', '.join(self.metrics)} need a network to look with")

    @property
    def wanted(self) -> dict[str, Metric]:
        """The metrics by name."""
        return wanted(self.metrics)

    @property
    def main(self) -> Network:
        """The network of fid, kid and precision_recall."""
        return self.networks.get("inception") or self.networks["clip"]

    @property
    def needs_real(self) -> bool:
        """Whether any metric compares with real pictures."""
        return any(metric.real for metric in self.wanted.values())

    @property
    def needs_captions(self) -> bool:
        """Whether any metric asks what a picture should show."""
        return any(metric.captions for metric in self.wanted.values())

    def look(self, name: str, pictures: Pictures, work: Work) -> Series:
        """Features of all pictures, and for drawn ones what the captions ask; computed where not yet there."""
        total = len(pictures)
        if total < 2:
            raise UserError(f"{total} picture is too few to measure", "give at least 2")
        drawn = name == "drawn"
        seen_by = {key: network.identity for key, network in self.networks.items()}
        decides = {"pictures": pictures.about, "networks": seen_by}
        if drawn:
            texts, oracle = (metric in self.metrics for metric in ("clip_score", "shapes_oracle"))
            decides |= {"captions": self.needs_captions, "texts": texts, "oracle": oracle}
        series = work.series(name, decides, total)
        series.fill(lambda start, stop: self._block(pictures, start, stop, drawn))
        return series

    def _block(self, pictures: Pictures, start: int, stop: int, drawn: bool) -> dict[str, np.ndarray]:
        images, captions, bad = pictures.block(start, stop)
        arrays = {"bad": np.array([bad])}
        for key in self.networks:
            for name, array in self._extractor(key)(images).items():
                _finite(array, f"{key} {name}", start)
                arrays[f"{key}_{name}"] = array
        if not drawn:
            return arrays
        if self.needs_captions and captions is None:
            asking = ", ".join(sorted(name for name, metric in self.wanted.items() if metric.captions))
            raise UserError(f"{asking} needs captions, and these pictures have none", "put captions.jsonl beside them")
        if "clip_score" in self.metrics:
            arrays["texts"] = self.embed(captions)
        if "shapes_oracle" in self.metrics:
            arrays["verdicts"] = _verdicts(images, captions)
        if start == 0:
            arrays["samples"] = _small(images[:SAMPLES])
            arrays["sample_captions"] = np.array(captions[:SAMPLES] if captions else [], dtype=np.str_)
        return arrays

    def _extractor(self, key: str):
        if key not in self._extractors:
            self._extractors[key] = extractor(self.networks[key], self.devices)
        return self._extractors[key]

    def measure(self, drawn: Series, real: Reference | None) -> Measured:
        """The metrics over features that are there. real: None where no metric needs it."""
        rows, notes = [], []
        bad = int(drawn.whole("bad").sum())
        if bad > MAX_BAD * drawn.total:
            raise UserError(f"{bad} of {drawn.total} pictures cannot be read, more than {MAX_BAD:.0%}", "mend them")
        if bad:
            notes.append(f"{bad} of {drawn.total} drawn pictures could not be read and were left out")
        for metric in self.wanted.values():
            rows += metric.rows(self, drawn, real, notes)
        first = next(drawn.blocks())
        for text in notes:
            warnings.warn(text, stacklevel=2)
        return Measured(rows, notes, first["samples"], first["sample_captions"].tolist())

    def _named(self, name: str, by_clip: str) -> str:
        return name if self.main.name == "inception" else by_clip

    def _fid(self, drawn, real, notes):
        features = drawn.whole(f"{self.main.name}_features").astype(np.float64)
        n, name = len(features), self._named("FID", "FD-CLIP")
        mine, theirs = distances.Moments.of(features), real.moments
        if n <= self.main.dim:
            notes.append(
                f"{name} of {n} pictures with {self.main.dim} features: their covariance has not full rank, and the "
                "value is far too high; compare it with none of another number of pictures, and prefer kid and cmmd"
            )
        if real.n and real.n != n:
            notes.append(f"{name}: {n} drawn and {real.n} real pictures; its bias depends on both numbers")
        value = distances.frechet(mine.mean, mine.covariance, theirs.mean, theirs.covariance)
        if self.replicates < 2:
            return [Row(name, value, None, None, n)]
        own = intervals.counts(n, self.replicates, self.seed)
        other = None if real.features is None else intervals.counts(real.n, self.replicates, self.seed + 1)

        def again(r):
            a = distances.Moments.weighted(features, own[r])
            b = theirs if other is None else distances.Moments.weighted(real.features, other[r])
            return distances.frechet(a.mean, a.covariance, b.mean, b.covariance)

        note = "" if other is not None else "interval: of the drawn pictures alone"
        return [Row(name, value, *intervals.bootstrap(again, value, self.replicates), n, note)]

    def _kid(self, drawn, real, notes):
        features = drawn.whole(f"{self.main.name}_features")
        mean, std = distances.kid(real.need("kid"), features, seed=self.seed)
        size = min(1000, real.n, len(features))
        note = f"x 1000; subsets of {size}, standard deviation {1000 * std:.4g}"
        return [Row(self._named("KID", "KID-CLIP"), 1000 * mean, None, None, len(features), note)]

    def _precision_recall(self, drawn, real, notes):
        features, theirs = drawn.whole(f"{self.main.name}_features"), real.need("precision_recall")
        n = len(features)
        if not 0.5 <= n / real.n <= 2:
            what = f"precision and recall of {n} drawn and {real.n} real pictures would mislead: the numbers differ"
            raise UserError(f"{what} by more than a factor of 2", "measure as many drawn as real pictures")
        values = manifold.precision_recall(theirs, features, NEIGHBOURS)
        rows = []
        for name, value, count in zip(("precision", "recall"), values, (n, real.n), strict=True):
            named = self._named(name, f"{name} (CLIP)")
            note = f"k = {NEIGHBOURS}; interval: given the other set"
            rows.append(Row(named, value, *intervals.wilson(round(value * count), count), count, note))
        return rows

    def _cmmd(self, drawn, real, notes):
        features = drawn.whole("clip_features")
        return [Row("CMMD", distances.cmmd(real.need("cmmd", "clip"), features), None, None, len(features))]

    def _clip_score(self, drawn, real, notes):
        found = scores.clip_score(drawn.whole("clip_features"), drawn.whole("texts"))
        names = {"clip_score": "CLIP score (100 cos)", "clip_s": "CLIP-S (2.5 max(cos, 0))"}
        return [
            Row(names[key], float(values.mean()), *intervals.mean_interval(values), len(values))
            for key, values in found.items()
        ]

    def _is(self, drawn, real, notes):
        logits = drawn.whole("inception_logits")
        splits = min(10, len(logits))
        mean, std = scores.inception_score(logits, splits, self.seed)
        note = f"{splits} parts, standard deviation {std:.4g}"
        return [Row("Inception score", mean, None, None, len(logits), note)]

    def _shapes_oracle(self, drawn, real, notes):
        found, rows = drawn.whole("verdicts"), []
        for k, key in enumerate(("right", *KEYS)):
            asked = found[:, k] >= 0
            right, n = int((found[asked, k] == 1).sum()), int(asked.sum())
            if n:
                name = "oracle: right" if key == "right" else f"oracle: {key}"
                rows.append(Row(name, right / n, *intervals.wilson(right, n), n))
        return rows


METRICS = {
    "fid": Metric(Protocol._fid, "main", real=True),
    "kid": Metric(Protocol._kid, "main", real=True),
    "precision_recall": Metric(Protocol._precision_recall, "main", real=True),
    "cmmd": Metric(Protocol._cmmd, "clip", real=True),
    "clip_score": Metric(Protocol._clip_score, "clip", captions=True),
    "is": Metric(Protocol._is, "inception"),
    "shapes_oracle": Metric(Protocol._shapes_oracle, captions=True),
}


def wanted(names: Sequence[str]) -> dict[str, Metric]:
    """Those of `METRICS`; UserError for an unknown name."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics={name!r} is unknown", suggest(name, METRICS))
    return {name: METRICS[name] for name in names}


def _verdicts(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The oracle's of each picture, i8[N, 1 + len(KEYS)]: right, then each key; -1 not asked, 0 wrong, 1 right."""
    from unclip_jax.metrics.shapes_oracle import score

    rows = []
    for image, caption in zip(images, captions, strict=True):
        try:
            found: dict[str, Any] = score(image, caption)
        except ValueError as error:
            what = f"shapes_oracle cannot judge {caption[:60]!r} ({str(error)[:100]})"
            raise UserError(what, "it knows captions of the shapes world alone") from None
        rows.append([int(found[key]) if key in found else -1 for key in ("right", *KEYS)])
    return np.array(rows, np.int8).reshape(-1, 1 + len(KEYS))


def _finite(array: np.ndarray, what: str, start: int) -> None:
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise UserError(f"{what} of picture {start + bad[0]} hold NaN or infinite values", "look at that picture")


def _small(images: np.ndarray) -> np.ndarray:
    """Every other, third, … pixel where a picture is larger than a report wants it."""
    step = -(-images.shape[1] // SAMPLE_SIDE)
    return images[:, ::step, ::step]
