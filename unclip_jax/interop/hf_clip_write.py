"""transformers' CLIPModel, written, and its two halves with projections, as diffusers' pipelines carry them.

The tables and names are those of `hf_clip`, which reads both.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from unclip_jax import tasks
from unclip_jax.errors import UserError
from unclip_jax.interop import hf_tokenizer, layout, stages
from unclip_jax.interop.files import spare_others
from unclip_jax.interop.hf_clip import ACTIVATIONS, BIAS, OWN, TABLE, TEXT, VISION
from unclip_jax.models.clip import CLIP, VisionTransformer
from unclip_jax.models.text import TextEncoder
from unclip_jax.storage import new_directory
from unclip_jax.tensors import write_arrays
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import dtype_in

EMBEDDING = "textual/embed/embedding"


def write(stack: str | os.PathLike, out: str | os.PathLike, dtype: str = "float32", overwrite: bool = False) -> Path:
    """A directory that `transformers.CLIPModel.from_pretrained` loads, from the CLIP of a stack or of a training run.

    A tokenizer of our own has its EOS moved (see `hf_tokenizer`). Pixels are to be normalised as
    preprocessor_config.json says. transformers gives embeddings as projected and knows no bias; a `norm` of ours and
    the bias of a sigmoid loss are kept in config.json for the way back.

    Raises:
      UserError: no CLIP there, or `out` exists; what `write` did not make is never overwritten.
    """
    out = Path(out).expanduser().resolve()
    spare_others(out, "config.json", OWN, overwrite)
    stage = tasks.load_stage(stack, "clip")
    model = tasks.make(stage.config).model
    if model.vision is None:
        raise UserError(f"the CLIP of {stack} has no image tower", "convert the whole stack: --to karlo")
    words, order = _words(model, stage.tokenizer_json)
    files = {"config.json": _config(model, words, dtype), **hf_tokenizer.files(words)}
    if model.bias:
        files["config.json"][OWN][BIAS.name] = float(stage.params["logit_bias"])
    files["preprocessor_config.json"] = _preprocessor(model)
    with new_directory(out, "CLIP of transformers", "config.json", overwrite) as folder:
        _write_model(folder, TABLE, stage.params, order, dtype)
        _write_json(folder, files)
    return out


def write_halves(folder: Path, params: Mapping, config: ConfigDict, tokenizer_json: str, dtype: str) -> list[str]:
    """What `hf_clip.read_halves` reads, into a pipeline's folder; returns the names of the parts.

    Raises:
      UserError: a CLIP whose embeddings leave with a norm of their own, which diffusers' pipelines do not give them.
    """
    model = tasks.make(config).model
    if model.norm is not None:
        what = f"the CLIP's model.norm={model.norm} must be None, to be written for diffusers"
        raise UserError(what, "train with a CLIP of configs/karlo, whose embeddings leave as projected")
    words, order = _words(model, tokenizer_json)
    about = _config(model, words, dtype)
    halves = {"text_encoder": (TEXT, "CLIPTextModelWithProjection", about["text_config"])}
    jsons = {"tokenizer": hf_tokenizer.files(words)}
    if model.vision is not None:
        halves["image_encoder"] = (VISION, "CLIPVisionModelWithProjection", about["vision_config"])
        jsons["feature_extractor"] = {"preprocessor_config.json": _preprocessor(model)}
    for name in (*halves, *jsons):
        (folder / name).mkdir()
    for name, (table, cls, numbers) in halves.items():
        _write_model(folder / name, table, params, order, dtype)
        _write_json(folder / name, {"config.json": {"architectures": [cls], "dtype": dtype, **numbers}})
    for name, files in jsons.items():
        _write_json(folder / name, files)
    return [*halves, *jsons]


def _words(model: CLIP, tokenizer_json: str) -> tuple[Tokenizer, np.ndarray]:
    return hf_tokenizer.renumbered(Tokenizer.from_json(tokenizer_json), model.text["vocab_size"])


def _write_model(folder: Path, table: list[layout.Entry], params: Mapping, order: np.ndarray, dtype: str) -> None:
    """model.safetensors; arrays named in `weights.STATISTICS` are f32 in any dtype, as in a stack."""
    ours = {path: np.asarray(stages.at(params, path)) for path, _, _ in table}
    if EMBEDDING in ours:
        ours[EMBEDDING] = ours[EMBEDDING][order]
    arrays, kinds = {}, {}
    for entry in table:
        theirs = layout.views([entry], ours)
        arrays |= theirs
        kinds |= dict.fromkeys(theirs, dtype_in(entry.path.rpartition("/")[2], ours[entry.path].dtype, dtype))
    write_arrays(folder / "model.safetensors", arrays, kinds, {"format": "pt"})


def _write_json(folder: Path, files: Mapping[str, dict]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(model: CLIP, tokenizer: Tokenizer, dtype: str) -> dict:
    """config.json of the whole, with those of both halves in it."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

    def tower(own: TextEncoder | VisionTransformer, kind: str, **numbers) -> dict:
        return {
            "model_type": kind,
            "hidden_size": own.width,
            "intermediate_size": 4 * own.width,
            "num_hidden_layers": own.layers,
            "num_attention_heads": own.heads,
            "hidden_act": names[own.activation],
            "layer_norm_eps": 1e-5,
            "projection_dim": model.embed_dim,
            **numbers,
        }

    text, vision = TextEncoder(**model.text), {}
    marks = {f"{mark}_token_id": getattr(tokenizer, mark) for mark in ("bos", "eos", "pad")}
    sizes = {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_len}
    if model.vision is not None:
        own = VisionTransformer(**model.vision)
        vision = tower(own, "clip_vision_model", image_size=own.image_size, patch_size=own.patch, num_channels=3)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": model.embed_dim,
        "text_config": tower(text, "clip_text_model", **sizes, **marks),
        "vision_config": vision,
        OWN: {"norm": model.norm},
    }


def _preprocessor(model: CLIP) -> dict:
    vision = VisionTransformer(**model.vision)
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }
