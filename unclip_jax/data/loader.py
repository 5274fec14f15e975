"""Batches from a source, by Grain: a global batch depends on (seed, step) alone.

    0…n-1 → shuffle, anew each epoch → repeat → batch of numbers → this host's part → read, tokenise, stack

It is the numbers that are batched, while the data set still has random access: so the batches are the same
for any count of hosts, workers and threads, no host reads another's pictures, and the place is one number.
"""

import functools
import signal
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from unclip_jax.data.degrade import degrade as degrade_picture
from unclip_jax.data.degrade import settings
from unclip_jax.data.images import BadImage, random_crop, to_float
from unclip_jax.errors import UserError, is_whole

CAPTION, DEGRADE = 1, 2  # what is drawn for the example at a position, beside its crop
WARN_AT_MOST = 10
LEAST_READ = 1000
MOST = {"num_workers": 512, "num_threads": 4096, "prefetch": 4096}


def batches(
    source,
    tokenizer=None,
    batch_size: int = 32,
    *,
    seed: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
    crop: int | None = None,
    degrade: str | None = None,
    factor: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches for this host: image f32[b, H, W, 3], tokens i32[b, L], mask bool[b, L].

    Of a source of encoded records (`data/embeddings.py`): its own arrays, [b, …] each.

    Args:
      source: see data/source.py.
      tokenizer: None leaves tokens and mask out.
      batch_size: of all hosts together; b is the number of `rows`.
      seed: in [0, 2**32); decides the order and the crops.
      start_step: the first batch is the one an uninterrupted run gets at this step.
      num_workers: processes that read; 0 reads in this one. Workers import the main script again.
      num_threads: threads that read, in each process; each makes a whole batch.
      prefetch: batches held ready, in each process.
      rows: which of a batch's rows to read, as of `sharding.own_rows`; None: all.
      shuffle: False keeps the source's order.
      crop: side of a random window of each picture, decided by (seed, position).
      degrade: "bsr" or "bsr_light" (data/degrade.py): batches hold small pictures made so too, "low" f32[b, H / factor,
        W / factor, 3], decided by (seed, position).
    Returns:
      An iterator with `close()`, which ends its workers.
    """
    import grain
    from absl import flags

    _check(source, batch_size, seed)
    check_pictures(getattr(source, "size", None), crop, degrade, factor)
    make_low = None
    if degrade is not None:
        make_low = functools.partial(_degraded, factor=factor, name=degrade, seed=seed)
    check_settings(num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)
    if start_step < 0:
        raise UserError(f"start_step={start_step} must not be negative")
    # One number apart in `seed` must not be one epoch apart in the shuffle, whose seeds are seed + epoch.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    ds = grain.MapDataset.range(len(source))
    if shuffle:
        ds = ds.shuffle(seed=order_seed)
    ds = ds.repeat().map_with_index(_position_and_record).batch(batch_size, drop_remainder=True)[start_step:]
    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    ds = ds.map(_Read(source, tokenizer, own, seed, crop, make_low))
    ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads them to start workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        ds = ds.mp_prefetch(options, worker_init_fn=_left_to_the_loop)
    return iter(ds)


def _left_to_the_loop(*_) -> None:
    """Makes a reader pass over the signals that ask for a stop: sent to a whole group, they would end it before the
    loop has saved what it has, and it ends with the loop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _check(source, batch_size, seed):
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be in 0 … 2**32 - 1")
    if len(source) == 0:
        raise UserError(f"the data source '{source.name}' is empty")


def check_pictures(size: int | None, crop: int | None = None, degrade: str | None = None, factor: int = 4) -> None:
    """Raises UserError where pictures of side `size`, None where it is not known, cannot be cropped or degraded so."""
    if crop is not None and not 1 <= crop <= (size or crop):
        raise UserError(f"crop={crop} must be in 1 … {size}, the side of the source's pictures")
    if degrade is not None:
        settings(degrade)
        side = crop or size
        if factor < 1 or (side and side % factor):
            raise UserError(f"loader.factor={factor} must divide the {side} pixels of a picture's or a crop's side")


def check_settings(**numbers: int) -> None:
    """Raises UserError unless those of MOST that are given are whole numbers within bounds."""
    for name, value in numbers.items():
        if not is_whole(value, 0, MOST[name]):
            raise UserError(f"loader.{name}={value!r} must be a whole number in 0 … {MOST[name]}")


def _degraded(image: np.ndarray, position: int, *, factor: int, name: str, seed: int) -> np.ndarray:
    return degrade_picture(image, factor, np.random.default_rng([seed, position, DEGRADE]), name)


def _position_and_record(position: int, record: int) -> tuple[int, int]:
    return position, record


class _Read:
    """(positions, records) of one global batch → this host's arrays. Picklable, for the workers."""

    def __init__(self, source, tokenizer, own: np.ndarray, seed: int, crop: int | None, make_low=None):
        self.source, self.tokenizer, self.own, self.seed, self.crop = source, tokenizer, own, seed, crop
        self.make_low = make_low
        self.max_bad = source.max_bad
        self.bad: dict[int, str] = {}
        self.read = 0

    def __call__(self, batch: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        images, captions, small, encoded = [], [], [], []
        for position, record in zip(*(x[self.own].tolist() for x in batch), strict=True):
            example = self._good_record(record)
            if "image" not in example:  # arrays that go to the network as they are
                encoded.append(example)
                continue
            image = example["image"]
            if self.crop is not None:
                image = random_crop(image, self.crop, np.random.default_rng([self.seed, position]))
            images.append(image)
            if self.make_low is not None:
                small.append(self.make_low(image, position))
            captions.append(self._caption(example, position))
        if encoded:
            return {name: np.stack([example[name] for example in encoded]) for name in encoded[0]}
        out = {"image": to_float(np.stack(images))}
        if small:
            out["low"] = to_float(np.stack(small))
        if self.tokenizer is not None:
            out["tokens"], out["mask"] = self.tokenizer.encode(captions, warn=False)
        return out

    def _caption(self, example: dict, position: int) -> str:
        """The caption, or of several one that (seed, position) decides: another in another epoch."""
        several = example.get("captions", ())
        if len(several) < 2:
            return example["caption"]
        return several[np.random.default_rng([self.seed, position, CAPTION]).integers(len(several))]

    def _good_record(self, record: int) -> dict:
        """The record, or the next readable one after it: the same replacement in every run."""
        n = len(self.source)
        for i in range(record, record + n):
            i %= n
            if i not in self.bad:
                self.read += 1
                try:
                    return self.source[i]
                except BadImage as e:
                    self._note(i, str(e))
        raise UserError(f"none of {n} pictures of '{self.source.name}' can be read; one: {self.bad[record]}")

    def _note(self, i: int, why: str):
        self.bad[i] = why
        # Each worker counts its own. Of few pictures a few may be bad by chance, so they count as LEAST_READ.
        seen = min(len(self.source), max(self.read, LEAST_READ))
        if len(self.bad) > self.max_bad * seen:
            raise UserError(
                f"{len(self.bad)} of {seen} pictures of '{self.source.name}' cannot be read, "
                f"more than max_bad={self.max_bad:g} allows; the last: {why}",
                "remove them, or raise data.max_bad",
            )
        if len(self.bad) <= WARN_AT_MOST:
            more = "; further ones are passed over without a word" if len(self.bad) == WARN_AT_MOST else ""
            warnings.warn(f"picture passed over ({len(self.bad)} so far): {why}{more}", stacklevel=2)
