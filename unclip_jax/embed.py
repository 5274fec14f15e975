"""Embeds a data source by a trained CLIP, once, so that priors train without pictures (`data/embeddings.py`).

Records are written in shards, each whole or not at all; the same call goes on with an unfinished folder.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unclip_jax import data, sharding, tasks
from unclip_jax.data import loader
from unclip_jax.data.embeddings import META, VERSION, pack
from unclip_jax.data.source import EmptySplit, Source
from unclip_jax.errors import UserError
from unclip_jax.fetch import fetched
from unclip_jax.storage import read_json, write_text
from unclip_jax.tasks.teacher import ask
from unclip_jax.tokenizer import Tokenizer

SHARD_BATCHES = 64
UNFINISHED = "unfinished.json"


def _split(source: Mapping, split: str, splits: Sequence[str]) -> Source:
    """The source of one split; UserError where it is empty."""
    try:
        return data.make(**{**source, "split": split})
    except EmptySplit as error:
        rest = ",".join(name for name in splits if name != split)
        raise UserError(str(error).partition(". Fix:")[0], f"leave it out: --splits {rest or 'all'}") from None


def embed(
    out: str | os.PathLike,
    clip: str | os.PathLike,
    source: Mapping,
    splits: Sequence[str] = ("train", "test"),
    batch_size: int = 64,
    states: bool = False,
) -> Path:
    """Writes the folder `out`; returns its path.

    A record that cannot be read is replaced by the next one that can, as in training.

    Args:
      clip: workdir or stack with the CLIP.
      source: keywords of `data.make`, without split; `size` is that of the pictures the CLIP sees unless given.
      batch_size: pictures embedded at once, a multiple of the devices; part of the result's layout.
      states: keep the caption states f32[L, W] too, for priors that take those (`model.caption="states"`).

    Raises:
      UserError: no such CLIP or source, or `out` holds embeddings made otherwise.
    """
    frozen = tasks.load_clip(clip)
    source = {"size": (frozen.model.vision or {}).get("image_size", 0), **source}
    tasks.check_sees(frozen, clip, source["size"])
    sources = {split: _split(source, split, splits) for split in splits}
    if any(own.clip_identity for own in sources.values()):
        raise UserError("these are embeddings already, of the CLIP that made them", "give a source of pictures")
    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, mesh)
    names = ("z_img", "z_txt", "tokens", "mask", *["states"] * states)
    meta = {
        "version": VERSION, "clip_identity": frozen.identity, "source": {**source}, "batch_size": batch_size,
        "splits": {split: len(own) for split, own in sources.items()}, "names": names,
    }  # fmt: skip
    out = Path(out).expanduser()
    _begin(out, json.loads(json.dumps(meta)))
    tokenizer, place = Tokenizer.from_json(frozen.tokenizer_json), sharding.batch_sharding(mesh)
    encode = _encoder(frozen, names)
    batches = functools.partial(loader.batches, tokenizer=tokenizer, batch_size=batch_size, shuffle=False)

    def shard(own, first: int, count: int) -> list[bytes]:
        """The records of `count` batches from number `first` on; the last batch of an epoch is cut to its length."""
        records = []
        with contextlib.closing(batches(own, start_step=first)) as stream:
            given = (sharding.put_batch(next(stream), place, batch_size) for _ in range(count))
            encoded = (encode(frozen.params, batch) for batch in given)
            for number, arrays in enumerate(fetched(encoded), first):
                rows = min(batch_size, len(own) - number * batch_size)
                records += [pack({name: arrays[name][k] for name in names}) for k in range(rows)]
        return records

    for split, own in sources.items():
        total = -(-len(own) // batch_size)
        for first in tqdm(range(0, total, SHARD_BATCHES), desc=split, unit="shard", disable=None):
            file = out / f"{split}-{first // SHARD_BATCHES:05d}.arrayrecord"
            if not file.exists():
                _write_records(file, shard(own, first, min(SHARD_BATCHES, total - first)))
    with contextlib.closing(batches(next(iter(sources.values())))) as stream:
        shapes = jax.eval_shape(encode, frozen.params, next(stream))
    fields = {name: (shapes[name].dtype.str, list(shapes[name].shape[1:])) for name in names}
    meta |= {"fields": fields, "z_img": _moments(out, splits[0], *fields["z_img"])}
    write_text(out / META, json.dumps(meta, indent=2) + "\n")
    (out / UNFINISHED).unlink()
    return out


def _encoder(frozen: tasks.FrozenCLIP, names: Sequence[str]) -> Callable[[Any, Mapping], dict]:
    """(CLIP's parameters, a batch) -> what it says of it by `names`, floating numbers as f32."""
    wide = lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731

    @jax.jit
    def encode(params, batch):
        encoded = ask(frozen.model, params, batch)
        return {name: wide(encoded[name]) for name in names}

    return encode


def _begin(out: Path, meta: dict) -> None:
    """Makes the folder, or checks that what is in it is of the same call."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / META).is_file():
            raise UserError(f"out={str(out)!r} holds finished embeddings", "give another --out")
        if not (out / UNFINISHED).is_file():
            if any(out.iterdir()):
                raise UserError(f"out={str(out)!r} is not empty", "give another --out")
            write_text(out / UNFINISHED, json.dumps(meta))
        if read_json(out / UNFINISHED, "settings of embeddings") != meta:
            raise UserError(f"out={str(out)!r} was begun with another CLIP, source or layout", "give another --out")
    except (OSError, ValueError) as e:
        raise UserError(f"out={str(out)!r} cannot be used ({e})", "give another --out") from e


def _write_records(file: Path, records: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = file.with_name(f".{file.name}.tmp")
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        partial.replace(file)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{file} cannot be written ({e})", "the same command goes on when there is room") from e


def _moments(out: Path, split: str, dtype: str, shape: Sequence[int]) -> dict[str, list[float]]:
    """Mean and standard deviation of every component of z_img, a record's first field, over a split, in f64."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    records = ArrayRecordDataSource(sorted(map(str, out.glob(f"{split}-*.arrayrecord"))))
    total = square = 0.0
    for i in range(len(records)):
        z = np.frombuffer(records[i], dtype, shape[0]).astype(np.float64)
        total, square = total + z, square + z * z
    mean = total / len(records)
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square / len(records) - mean**2, 0)).tolist()}
