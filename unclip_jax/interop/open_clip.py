"""OpenCLIP's and OpenAI's CLIP, read: open_clip_config.json with its weights, or OpenAI's names in one file.

Both use one layout: query, key and value in one array, projections as [width, D] and resblocks by number.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from unclip_jax.errors import UserError
from unclip_jax.interop import stages
from unclip_jax.interop.files import Source, Weights, open_weights
from unclip_jax.interop.layout import CONV, SAME, Entry, blocks, norm, part, prefixed
from unclip_jax.storage import read_json

# Arrays of one number in OpenAI's files.
NUMBERS = ("input_resolution", "context_length", "vocab_size")
# What our CLIP can express of a tower's settings in open_clip_config.json; the value a setting left out has.
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
VISION = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0}
# Settings with no influence on what a trained network computes.
NO_MATTER = {"patch_dropout", "proj_bias", "hf_model_pretrained", "timm_model_pretrained", "output_tokens", "pad_id"}
_ONLY = "only CLIPs with a Vision Transformer and CLIP's own text tower can be read"
DEFAULTS = {"pool_type": ("tok", "argmax"), "final_ln_after_pool": (False,), "proj_type": ("linear",)}
BLOCK = dict(
    dict.fromkeys(("query", "key", "value"), "attn.in_proj_"),
    **dict(norm1="ln_1", norm2="ln_2", out="attn.out_proj", fc1="mlp.c_fc", fc2="mlp.c_proj"),
)
TABLE = [
    *prefixed("visual/", "visual.", [
        Entry("patches/kernel", "conv1.weight", CONV),
        Entry("class", "class_embedding", SAME),
        Entry("position", "positional_embedding", SAME),
        *norm("first_norm/norm", "ln_pre"),
        *blocks("transformer/blocks", "transformer.resblocks.{}", BLOCK, part),
        *norm("final_norm/norm", "ln_post"),
    ]),
    *prefixed("textual/", "", [
        Entry("embed/embedding", "token_embedding.weight", SAME),
        Entry("position", "positional_embedding", SAME),
        *blocks("transformer/blocks", "transformer.resblocks.{}", BLOCK, part),
        *norm("final_norm/norm", "ln_final"),
    ]),
    Entry("image_projection/kernel", "visual.proj", SAME),
    Entry("text_projection/kernel", "text_projection", SAME),
    Entry("logit_scale", "logit_scale", SAME),
]  # fmt: skip


def read(source: Source, tokenizer: str | None = None) -> stages.Converted:
    """Our CLIP of OpenCLIP's directory, or of a file of OpenAI's, whose sizes its arrays tell.

    Args:
      source: of `files.locate`: a directory with open_clip_config.json, or a file beside one, or OpenAI's weights.
      tokenizer: a folder with CLIP's tokenizer, where there is none beside the weights.

    Raises:
      UserError: something is missing or damaged, or our CLIP cannot express the network; in one line.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    about = _config(folder)
    with open_weights(source.path) as arrays:
        model, max_len, vocab_size = _from_config(about) if about else _from_arrays(arrays, source.path)
        words = stages.load_tokenizer(folder, tokenizer, max_len)
        config = stages.clip_config(model, words, vocab_size)
        if words.eos != words.vocab_size - 1:
            what = f"OpenCLIP reads captions at the largest token, the tokenizer ends them with {words.eos}"
            raise UserError(what, "give CLIP's tokenizer with --tokenizer DIR")
        params = stages.read_params(config, TABLE, arrays, set(NUMBERS) | {"attn_mask"})
    licence = stages.stated_licence(folder, about)
    stage = stages.clip_stage(params, config, source.name, "open-clip", licence)
    return stages.Converted([("clip", stage)], words.to_json())


def _config(folder: Path) -> dict:
    file = folder / "open_clip_config.json"
    if file.is_file():
        return read_json(file)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") == "clip":
        raise UserError(f"{folder} is in transformers' format", "give --from hf-clip")
    return {}


def _from_config(about: Mapping) -> tuple[dict, int, int]:
    """(keywords of `models.CLIP`, caption length, vocabulary) of an open_clip_config.json."""
    model = about.get("model_cfg")
    if not isinstance(model, dict):
        raise UserError("open_clip_config.json has no model_cfg", "give the file that belongs to these weights")
    text, vision = (_tower(model, *of) for of in (("text_cfg", TEXT), ("vision_cfg", VISION)))
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    unknown = set(model) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
    if unknown or model.get("custom_text"):
        raise UserError(f"model_cfg: {min(unknown, default='custom_text')} is none of CLIP's settings", _ONLY)
    seen = about.get("preprocess_cfg") or {}
    if not isinstance(seen, dict):
        raise UserError(f"preprocess_cfg={seen!r} must be an object", "give the file that belongs to these weights")
    pixels = {
        name: stages.numbers(seen.get(name), 3, value, f"preprocess_cfg.{name}")
        for name, value in (("mean", stages.OPENAI_MEAN), ("std", stages.OPENAI_STD))
    }
    side, patch, width, head, depth = (
        stages.whole(vision, key, "vision_cfg") for key in ("image_size", "patch_size", "width", "head_width", "layers")
    )
    sees = {"image_size": side, "patch": patch, "width": width, "layers": depth, "heads": width // head, **pixels}
    reads = {key: stages.whole(text, key, "text_cfg") for key in ("width", "layers", "heads")}
    towers = {"vision": {**sees, "activation": act}, "text": {**reads, "activation": act}}
    max_len, vocab_size = (stages.whole(text, key, "text_cfg") for key in ("context_length", "vocab_size"))
    return {"embed_dim": stages.whole(model, "embed_dim", "model_cfg"), **towers}, max_len, vocab_size


def _tower(model: Mapping, name: str, known: Mapping) -> dict:
    given = model.get(name)
    if not isinstance(given, dict):
        raise UserError(f"model_cfg: {name}={given!r} must be an object")
    for key, value in given.items():
        if key not in known and key not in NO_MATTER and value not in (*DEFAULTS.get(key, ()), None, False):
            raise UserError(f"{name}: {key}={value!r} is none of the settings our CLIP has", _ONLY)
    tower = {**known, **given}
    if tower["mlp_ratio"] != 4:
        raise UserError(f"{name}: mlp_ratio={tower['mlp_ratio']} must be 4", _ONLY)
    return tower


def _from_arrays(arrays: Weights, path: Path) -> tuple[dict, int, int]:
    """The same for OpenAI's files, by the rules of their loader: heads are 64 wide, activations QuickGELU."""
    shapes = arrays.shapes
    if not set(NUMBERS) <= set(shapes):
        raise UserError(f"{path} has no open_clip_config.json beside it", "put the model's own there")
    if "visual.layer1.0.conv1.weight" in shapes:
        raise UserError(f"{path} is a CLIP with a ResNet", _ONLY)

    def layers(prefix: str) -> int:
        found = (re.match(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.ln_1\.weight$", n) for n in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    try:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        places = shapes["visual.positional_embedding"][0] - 1
        (vocab_size, text_width), embed_dim = shapes["token_embedding.weight"], shapes["text_projection"][1]
        max_len = shapes["positional_embedding"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no CLIP of OpenAI's ({error})", _ONLY) from None
    act = {"activation": "quick_gelu"}
    vision = {"image_size": patch * round(places**0.5), "patch": patch, "width": width, "layers": layers("visual.")}
    vision |= {"heads": width // 64, "mean": stages.OPENAI_MEAN, "std": stages.OPENAI_STD, **act}
    text = {"width": text_width, "layers": layers(""), "heads": text_width // 64, **act}
    return {"embed_dim": embed_dim, "vision": vision, "text": text}, max_len, vocab_size
