"""From arrays of others to a stage of a stack: parameters, config, and where they came from; and parameters back."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax import tasks
from unclip_jax.errors import UserError, is_number, is_whole, said_of
from unclip_jax.interop import layout
from unclip_jax.interop.files import Weights
from unclip_jax.models.clip import CLIP
from unclip_jax.tokenizer import Tokenizer

# What pixels in [0, 1] are normalised with for the CLIPs of OpenAI, OpenCLIP and Karlo, where nothing else is said.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_CARD_BYTES = 4 * 2**20


class Converted(NamedTuple):
    """What `weights.save_stack` takes: pairs (stage's name, (params, config, step, extra)), and the tokenizer.

    The pairs may be made one by one, so that one stage at a time is in memory.
    """

    stages: Iterable[tuple[str, tuple]]
    tokenizer_json: str


def clip_config(model: Mapping, tokenizer: Tokenizer, vocab_size: int) -> ConfigDict:
    """The config of a CLIP stage with the given keywords of `models.CLIP`.

    Embeddings leave as projected, as everything made for a public CLIP expects them.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the CLIP an embedding of {vocab_size}",
            "give the tokenizer that belongs to these weights",
        )
    return ConfigDict(
        {
            "task": "clip",
            "clip": "",
            "clip_identity": "",
            "model": {"norm": None, **model, "dtype": "float32"},
            "tokenizer": {"path": "", "vocab_size": vocab_size, "max_len": tokenizer.max_len},
            "data": {"size": (model["vision"] or {}).get("image_size")},
        }
    )


def read_params(
    config: ConfigDict,
    table: Iterable[layout.Entry] | Callable[[Mapping], Iterable[layout.Entry]],
    weights: Weights,
    ignored: Iterable[str] = (),
) -> dict:
    """The parameters of the stage without a CLIP that `config` describes, f32, read along `table`; a nested dict.

    Args:
      table: of the network, or a function that makes it of {path: shape}.

    Raises:
      UserError: missing, unknown, misshapen or non-finite arrays, or keywords that make no network.
    """
    shapes = network_shapes(config)
    table = table(shapes) if callable(table) else table
    with tqdm(total=len(weights.names), desc=f"reading {config.task}", disable=None, leave=False) as bar:

        def take(name: str) -> np.ndarray:
            bar.update()
            array = weights.take(name)
            if array.dtype.kind in "biu":
                what = f"array {name} is {array.dtype}, and weights are floating-point numbers"
                raise UserError(what, "give weights that are not quantized")
            return array.astype(np.float32, copy=False)

        flat = layout.read(table, shapes, weights.names, take, ignored)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def network_shapes(config: ConfigDict, clip: CLIP | None = None) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters of the stage that `config` describes; nothing is computed.

    Args:
      clip: that the stage learns against, where there is one.
    """
    with said_of("the config makes no network", "give the config that belongs to these weights"):
        shapes = jax.eval_shape(tasks.make(config, clip=clip).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def clip_stage(params: dict, config: ConfigDict, source: str, origin: str, licence: str = "") -> tuple:
    """(params, config, step, extra) of a CLIP, for `weights.save_stack`.

    Args:
      source: the name it was published under, no path.
      origin: the format it was in, a name of `convert.READERS`.
      licence: as its card states it.
    """
    scale = float(params["logit_scale"])
    if scale > math.log(100) + 0.01:
        warnings.warn(f"logit_scale={scale:.4g} counts as ln 100 = 4.605 here, as in CLIP's training", stacklevel=2)
    extra = {"clip_identity": tasks.clip_identity(params), **provenance(source, origin, licence)}
    return params, config, 0, extra


def provenance(source: str, origin: str, licence: str = "") -> dict:
    """What a stage's `extra` says of where its weights are from."""
    return {"source": source, "format": origin, **({"licence": licence} if licence else {})}


def stated_licence(folder: Path, config: Mapping) -> str:
    """The licence that a config, or the head of the model card README.md, names; "" where none does."""
    stated = config.get("license")
    card = folder / "README.md"
    if not stated and card.is_file() and card.stat().st_size <= MAX_CARD_BYTES:
        head = re.match(r"---[ \t\r]*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        line = re.search(r"^license:\s*([\w.+-]+)\s*$", head[1], re.MULTILINE) if head else None
        stated = line[1] if line else ""
    return stated if isinstance(stated, str) else ""


def load_tokenizer(folder: Path | None, given: str | None, max_len: int) -> Tokenizer:
    """CLIP's tokenizer from `given`, or from the `folder` of the weights, for captions of `max_len` tokens."""
    try:
        tokenizer = Tokenizer.load(Path(given).expanduser() if given else folder)
    except UserError as error:
        if given or (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            raise
        raise UserError(str(error).split(". Fix:")[0], "give CLIP's with --tokenizer DIR") from None
    tokenizer.max_len = max_len
    return tokenizer


def numbers(value, count: int, default: tuple, what: str) -> tuple[float, ...]:
    """`value` as a tuple of `count` finite numbers, or `default` where there is none."""
    if value is None:
        return default
    sound = isinstance(value, (list, tuple)) and len(value) == count
    if not sound or not all(is_number(v, -sys.float_info.max) for v in value):
        raise UserError(f"{what}={value!r} must be {count} numbers")
    return tuple(map(float, value))


def whole(block: Mapping, key: str, where: str) -> int:
    """block[key], a whole number of at least 1."""
    value = block.get(key)
    if not is_whole(value, 1):
        raise UserError(f"{where}: {key}={value!r} must be a whole number of at least 1")
    return value


def at(params: Mapping, path: str):
    """The array at "block/kernel" of a nested dict."""
    for name in path.split("/"):
        params = params[name]
    return params
