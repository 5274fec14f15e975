"""Data sets of TensorFlow Datasets by name, read without TensorFlow if they were prepared as ArrayRecord."""

from unclip_jax.data.folder import held_out
from unclip_jax.data.images import BadImage, center_crop_resize, decode_image
from unclip_jax.data.source import EmptySplit, Source, check_arguments, hashed
from unclip_jax.errors import UserError

PREPARE = "prepare it with: tfds build NAME --data_dir=DIR --file_format=array_record"


class Tfds(Source):
    """A TFDS data set with pictures, such as "coco_captions/2014:1.1.0".

    Args:
      path: its name, with config and version if there are several.
      split: one of its own, or "train", "test" and "heldout": where it has a split "test" or "validation", that one is
        held out; else two in a hundred of "train", by the number of the record.
      size: side in pixels. seed: has no effect.
      data_dir: where it was prepared; "": TFDS's own place.
      image_key, caption_key: features; a caption may be a text, a list of texts, or {caption_key: {"text": [...]}}; of
        several one is taken for each reading. "": no caption, for stages without text.
    """

    name = "tfds"
    licence = "as the data set's page says"

    def __init__(
        self,
        path: str = "",
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        *,
        data_dir: str = "",
        image_key: str = "image",
        caption_key: str = "captions",
        max_bad: float = 0.1,
    ):
        check_arguments("tfds", "a name such as coco_captions/2014", path, split, (), max_bad)
        self.split, self.size, self.max_bad = split, size, max_bad
        self.image_key, self.caption_key = image_key, caption_key
        builder = _builder(path, data_dir)
        self.full_name = builder.info.full_name
        self.records, self.numbers = _records(builder, path, split, image_key, caption_key)
        if not len(self):
            raise EmptySplit(f"the split '{split}' of {path} is empty", "take another split")

    def __len__(self) -> int:
        return len(self.records) if self.numbers is None else len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        record, captions, where = self._read(i)
        image = decode_image(record[self.image_key], where)
        return {
            "image": center_crop_resize(image, self.size), "caption": captions[0], "captions": captions,
            "file": where, "pixels": image.size,
        }  # fmt: skip

    def caption(self, i: int) -> str:
        return self._read(i)[1][0]

    def _read(self, i: int) -> tuple[dict, list[str], str]:
        """(record i with its picture encoded, its captions, what to call it)."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = i if self.numbers is None else self.numbers[i]
        where = f"record {number} of '{self.split}'"
        try:
            record = self.records[number]
        except (OSError, ValueError, RuntimeError) as e:
            raise BadImage(f"{where} cannot be read ({type(e).__name__}: {str(e)[:120]})") from e
        captions = _texts(record[self.caption_key]) if self.caption_key else [""]
        if not captions:
            raise BadImage(f"{where} has no caption")
        return record, captions, where

    def digest(self, num: int) -> str:
        """Of the data set's name, configuration and version."""
        return hashed([self.full_name, self.image_key, self.caption_key])


def _builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except Exception as e:  # it raises its own kinds, some at import
        why = str(e).strip().splitlines()
        raise UserError(f"data.path={name!r} is no data set that TFDS opens ({why[0][:200] if why else e!r})",
                        PREPARE) from e  # fmt: skip


def _records(builder, name: str, split: str, image_key: str, caption_key: str):
    """(random access to the encoded records, their numbers or None for all) of a split."""
    import tensorflow_datasets as tfds

    own = list(builder.info.splits)
    for key, field in ((image_key, "image_key"), (caption_key, "caption_key")):
        if key and key not in builder.info.features:
            known = ", ".join(builder.info.features)
            raise UserError(f"data.{field}={key!r} is no feature of {name}", f"use one of {known}")
    kept = next((s for s in ("test", "validation", "val") if s in own), None)
    chosen = split if split in own else {"heldout": kept, "test": kept}.get(split)
    part = None
    if chosen is None and split in ("test", "heldout") and "train" in own:
        chosen, part = "train", True
    elif chosen == "train" and kept is None:
        part = False
    if chosen is None:
        raise UserError(f"data.split={split!r} is not a split of {name}", f"use one of {', '.join(own)}")
    raw = {image_key: tfds.decode.SkipDecoding()}
    try:
        records = builder.as_data_source(split=chosen, decoders=raw)
    except Exception as e:
        raise UserError(f"{name} cannot be read by number ({str(e).strip().splitlines()[0][:200]})", PREPARE) from e
    numbers = None if part is None else [n for n in range(len(records)) if held_out(str(n)) == part]
    return records, numbers


def _texts(value) -> list[str]:
    """All texts of a feature: bytes or text, a list of them, or {"text": …} of those."""
    if isinstance(value, dict):
        value = value.get("text", [])
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = " ".join(value.split())
        return [text] if text else []
    return [text for one in value for text in _texts(one)]
