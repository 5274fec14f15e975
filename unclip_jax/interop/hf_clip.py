"""transformers' CLIPModel, read, and its two halves with projections, as diffusers' pipelines carry them.

The half of captions may also come alone, a CLIP of captions only. `hf_clip_write` writes both.

`eos_token_id` = 2 in a config makes transformers read a caption at its largest token number, which is EOS in CLIP's
vocabulary; any other number is looked for. Here a caption is read at the last True of its mask, its EOS: the same.
Under the causal mask nothing after EOS reaches it, so the number that pads does not matter.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.errors import UserError, is_number, suggest
from unclip_jax.interop import stages
from unclip_jax.interop.files import Source, joined, open_weights
from unclip_jax.interop.layout import CONV, DENSE, SAME, Entry, blocks, norm, prefixed
from unclip_jax.storage import read_json
from unclip_jax.tokenizer import Tokenizer

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What a config means by leaving a key out (transformers' CLIPTextConfig and CLIPVisionConfig).
TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
TEXT_DEFAULTS = {
    **{**TOWER, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    **{"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
}
VISION_DEFAULTS = {
    **{**TOWER, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    **{"image_size": 224, "patch_size": 32, "num_channels": 3},
}
BLOCK = dict(
    {name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")},
    **dict(norm1="layer_norm1", norm2="layer_norm2", out="self_attn.out_proj", fc1="mlp.fc1", fc2="mlp.fc2"),
)
# CLIPTextModelWithProjection and CLIPVisionModelWithProjection; together, with the temperature, CLIPModel.
TEXT = prefixed("textual/", "text_model.", [
    Entry("embed/embedding", "embeddings.token_embedding.weight", SAME),
    Entry("position", "embeddings.position_embedding.weight", SAME),
    *blocks("transformer/blocks", "encoder.layers.{}", BLOCK),
    *norm("final_norm/norm", "final_layer_norm"),
]) + [Entry("text_projection/kernel", "text_projection.weight", DENSE)]  # fmt: skip
VISION = prefixed("visual/", "vision_model.", [
    Entry("patches/kernel", "embeddings.patch_embedding.weight", CONV),
    Entry("class", "embeddings.class_embedding", SAME),
    Entry("position", "embeddings.position_embedding.weight", SAME),
    *norm("first_norm/norm", "pre_layrnorm"),
    *blocks("transformer/blocks", "encoder.layers.{}", BLOCK),
    *norm("final_norm/norm", "post_layernorm"),
]) + [Entry("image_projection/kernel", "visual_projection.weight", DENSE)]  # fmt: skip
TEMPERATURE = Entry("logit_scale", "logit_scale", SAME)
TABLE = [*TEXT, *VISION, TEMPERATURE]
BIAS = Entry("logit_bias", "logit_bias", SAME)  # of the sigmoid loss; kept in config.json, as a CLIPModel has none
TEXT_HALF = "clip_text_model"
KINDS = ("clip", TEXT_HALF)  # the model types that are read
OWN = "unclip_jax"  # the key of a config.json for what transformers has no name for
_LARGEST = float(np.finfo(np.float32).max)
IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def read(source: Source, tokenizer: str | None = None) -> stages.Converted:
    """Our CLIP of a directory with a CLIPModel: config.json, weights, tokenizer files, preprocessor_config.json.

    Or of one with a CLIPTextModelWithProjection.

    Args:
      source: of `files.locate`.
      tokenizer: a folder with CLIP's tokenizer, where the directory has none.

    Raises:
      UserError: something is missing or damaged, or our CLIP cannot express the network; in one line.
    """
    folder = source.path
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a directory with config.json", "give the whole directory")
    about = _config(folder)
    if about["model_type"] == TEXT_HALF:
        params, config, words = read_halves(folder, None, Path(tokenizer or folder).expanduser(), folder)
    else:
        params, config, words = _read_whole(folder, about, tokenizer)
    licence = stages.stated_licence(folder, about)
    stage = stages.clip_stage(params, config, source.name, "hf-clip", licence)
    return stages.Converted([("clip", stage)], words.to_json())


def _read_whole(folder: Path, about: Mapping, tokenizer: str | None) -> tuple[dict, ConfigDict, Tokenizer]:
    text, vision = (block(about, *of) for of in (("text_config", TEXT_DEFAULTS), ("vision_config", VISION_DEFAULTS)))
    width = stages.whole({"projection_dim": 512, **about}, "projection_dim", "config.json")
    config, words = _clip(text, vision, width, pixels(folder), folder, tokenizer, norm=_kept(about, "norm"))
    bias, table, more = _kept(about, BIAS.name), TABLE, {}
    if bias is not None:
        config.objective = {"loss": "sigmoid"}
        table, more = [*TABLE, BIAS], {BIAS.name: np.array(bias, np.float32)}
    with open_weights(folder) as arrays:
        return stages.read_params(config, table, joined(arrays, **more), IGNORED), config, words


def read_halves(
    text: Path, image: Path | None, tokenizer: Path, preprocessor: Path
) -> tuple[dict, ConfigDict, Tokenizer]:
    """Our CLIP of the two halves in a pipeline of diffusers: (params, config, tokenizer), for `stages.clip_stage`.

    The halves come without CLIP's temperature; it is set to where its training ends, 1/100.

    Args:
      text, image: directories of a CLIPTextModelWithProjection and a CLIPVisionModelWithProjection, or None: a CLIP
        of captions only.
      tokenizer, preprocessor: directories with the tokenizer and with preprocessor_config.json.

    Raises:
      UserError: as `read`, or the halves are of two CLIPs.
    """
    about = {}
    for folder, kind, defaults in ((text, "text", TEXT_DEFAULTS), (image, "vision", VISION_DEFAULTS)):
        if folder is not None:
            config = read_json(folder / "config.json", f"the config of the CLIP's {kind} half")
            if config.get("model_type") != f"clip_{kind}_model":
                raise UserError(f"{folder} holds {config.get('model_type')!r}; expected 'clip_{kind}_model'")
            about[kind] = {**defaults, **config}
    widths = [stages.whole(half, "projection_dim", "config.json") for half in about.values()]
    if widths[0] != widths[-1]:
        raise UserError(f"projection_dim={widths[0]} in {text} and {widths[1]} in {image}", "give halves of one CLIP")
    config, words = _clip(about["text"], about.get("vision"), widths[0], pixels(preprocessor), tokenizer, None)
    table = TABLE if image else [*TEXT, TEMPERATURE]
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(open_weights(half)) for half in (text, image) if half is not None]
        arrays = joined(*halves, logit_scale=np.array(math.log(100), np.float32))
        return stages.read_params(config, table, arrays, IGNORED), config, words


def _clip(
    text: Mapping, vision: Mapping | None, width: int, normalised: Mapping, folder: Path, given: str | None, **own
) -> tuple[ConfigDict, Tokenizer]:
    """(config, tokenizer) of a CLIP with these towers and the tokenizer in a folder, or the one that was given."""
    words = stages.load_tokenizer(folder, given, stages.whole(text, "max_position_embeddings", "text_config"))
    model = {**model_block(text, vision, width, normalised), **own}
    config = stages.clip_config(model, words, stages.whole(text, "vocab_size", "text_config"))
    check_eos(text, words)
    return config, words


def block(config: Mapping, name: str, defaults: Mapping) -> dict:
    """A tower's numbers in a CLIPModel's config; where the older "…_config_dict" is given too, it counts."""
    given = config.get(f"{name}_dict")
    given = config.get(name) if given is None else given
    if not isinstance(given, (dict, type(None))):
        raise UserError(f"config.json: {name} must be an object, not {type(given).__name__}")
    return {**defaults, **(given or {})}


def model_block(text: Mapping, vision: Mapping | None, width: int, normalised: Mapping) -> dict[str, Any]:
    """The keywords of `models.CLIP` for two towers' numbers by transformers' names.

    Args:
      text, vision: with nothing left out; no vision is a CLIP of captions only.
      width: of the space both project to.
      normalised: {"mean", "std"} of pixels.

    Raises:
      UserError: a number that our CLIP does not have as an option.
    """
    if vision is None:
        return {"embed_dim": width, "vision": None, "text": _tower(text, "text_config")}
    if vision.get("num_channels") != 3:
        raise UserError(f"vision_config: num_channels={vision.get('num_channels')!r} must be 3")
    side, patch = (stages.whole(vision, key, "vision_config") for key in ("image_size", "patch_size"))
    sees = {"image_size": side, "patch": patch, **_tower(vision, "vision_config"), **normalised}
    return {"embed_dim": width, "vision": sees, "text": _tower(text, "text_config")}


def _tower(numbers: Mapping, where: str) -> dict[str, Any]:
    names = (("width", "hidden_size"), ("layers", "num_hidden_layers"), ("heads", "num_attention_heads"))
    tower = {ours: stages.whole(numbers, key, where) for ours, key in names}
    for key, wanted in (("layer_norm_eps", 1e-5), ("intermediate_size", 4 * tower["width"])):
        if numbers.get(key) != wanted:
            raise UserError(f"{where}: {key}={numbers.get(key)!r} must be {wanted}, as in every CLIP of OpenAI's kind")
    if tower["width"] % tower["heads"]:
        raise UserError(f"{where}: hidden_size={tower['width']} must be a multiple of its {tower['heads']} heads")
    act = numbers.get("hidden_act")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act={act!r} is unknown", suggest(str(act), ACTIVATIONS))
    return {**tower, "activation": ACTIVATIONS[act]}


def check_eos(text: Mapping, tokenizer: Tokenizer) -> None:
    """Raises UserError where transformers would read captions at another token than the tokenizer's EOS."""
    eos = text.get("eos_token_id")
    largest = tokenizer.vocab_size - 1
    if tokenizer.eos != (largest if eos == 2 else eos):
        what = f"eos_token_id={eos} reads captions at token {largest if eos == 2 else eos}"
        raise UserError(f"{what}, the tokenizer ends them with {tokenizer.eos}", "give the tokenizer of these weights")


def pixels(folder: Path) -> dict[str, tuple[float, ...]]:
    """{"mean", "std"} of the preprocessor_config.json in a folder; OpenAI's numbers where there is none."""
    file = folder / "preprocessor_config.json"
    given = read_json(file) if file.is_file() else {}
    if given.get("do_normalize", True) is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    defaults = (("mean", stages.OPENAI_MEAN), ("std", stages.OPENAI_STD))
    return {name: stages.numbers(given.get(f"image_{name}"), 3, value, f"image_{name}") for name, value in defaults}


def _config(folder: Path) -> dict:
    config = read_json(folder / "config.json", "the config of a CLIPModel")
    kind = config.get("model_type")
    if kind not in KINDS:
        what = f"{folder} holds a model of the type {kind!r}; expected {' or '.join(map(repr, KINDS))}"
        raise UserError(what, "give the directory of a CLIPModel or a CLIPTextModelWithProjection")
    return config


def _kept(config: Mapping, name: str) -> float | None:
    """A number that `hf_clip_write` kept in a config for the way back; None where it kept none."""
    own = config.get(OWN)
    value = own.get(name) if isinstance(own, dict) else None
    return float(value) if is_number(value, -_LARGEST, _LARGEST) else None
