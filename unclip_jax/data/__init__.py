"""Sources of captioned pictures by name, the images themselves, and the loader that makes batches of them."""

import functools
import importlib
import inspect
import math
import os
import types
from collections.abc import Callable, Sequence
from typing import get_args, get_origin

from unclip_jax.errors import UserError, is_number, is_whole, suggest

# Imported when asked for: icons needs an extra.
SOURCES = {
    "shapes": "unclip_jax.data.shapes:Shapes",
    "icons": "unclip_jax.data.icons:Icons",
    "folder": "unclip_jax.data.folder:Folder",
    "webdataset": "unclip_jax.data.webdataset:WebDataset",
    "tfds": "unclip_jax.data.tfds:Tfds",
    "mixture": "unclip_jax.data.mixture:Mixture",
    "embeddings": "unclip_jax.data.embeddings:Embeddings",
}
LARGEST = 4096  # pixels of a side
NEEDED = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", Sequence: "a list of dicts"}


def make(source: str, split: str = "train", *, size: int, seed: int = 0, **kw):
    """Opens a source by name; arguments and errors are those of `named`, and what the source itself finds wrong."""
    return named(source, split, size=size, seed=seed, **kw)()


def named(source: str, split: str = "train", *, size: int, seed: int = 0, **kw) -> Callable:
    """A source by name as a function that opens it, its arguments checked as far as they can be without data.

    Args:
      source: a name in SOURCES.
      split: "train", "heldout", …; each source names its own.
      size: side of its square pictures, in pixels, at most LARGEST.
      seed: for sources that draw pictures or captions by chance.
      **kw: the source's own arguments, such as `path` of "folder".

    Raises:
      UserError: an unknown source or argument, or a value of another type than the constructor's annotation names,
        unless nothing is lost by converting it: the number 2014 is a folder's name as well, and "True" is True.
    """
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"data.source='{source}' is not a known source", suggest(source, SOURCES))
    if not is_whole(size, 1, LARGEST):
        raise UserError(f"data.size={size} must be a whole number of pixels in 1 … {LARGEST}")
    if not is_whole(seed, 0):
        raise UserError(f"data.seed={seed!r} must be a whole number from 0 on")
    module, name = SOURCES[source].split(":")
    cls = getattr(importlib.import_module(module), name)
    kinds = {name: p.annotation for name, p in inspect.signature(cls, eval_str=True).parameters.items()}
    known = [k for k in kinds if k not in ("split", "size", "seed")]
    for key in kw:
        if key not in known:
            fix = suggest(key, known) if known else "leave it out"
            raise UserError(f"data.{key} is not an argument of the source '{source}'", fix)
    given = {"split": split, **kw}
    typed = {key: _typed(key, value, kinds.get(key)) for key, value in given.items()}
    return functools.partial(cls, size=size, seed=seed, **typed)


def _typed(key: str, value, annotation):
    """The value as what the annotation names: one of NEEDED or, with "| None", None; of others as it is."""
    kinds = set(get_args(annotation)) if isinstance(annotation, types.UnionType) else {annotation}
    if value is None and types.NoneType in kinds:
        return None
    (kind, *_) = kinds - {types.NoneType}
    kind = get_origin(kind) or kind
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is str and is_whole(value, -math.inf):
        return str(value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is int and is_number(value, -math.inf) and value == int(value):
        return int(value)
    fits = {float: is_number(value, -math.inf), Sequence: isinstance(value, list | tuple)}
    if kind not in NEEDED or fits.get(kind):
        return value
    fix = """a text that looks like something else takes quotes of its own: '"1.10"'""" if kind is str else ""
    raise UserError(f"data.{key}={value!r} must be {NEEDED[kind]}", fix)
