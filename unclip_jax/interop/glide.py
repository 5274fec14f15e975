"""GLIDE's released weights (Nichol et al. 2021, arXiv 2112.10741; github.com/openai/glide-text2im), read.

    base.pt       text → 64 px       our `Decoder` without a CLIP
    upsample.pt   64 px → 256 px     the same over six channels, as the network of an upsampler

base_inpaint.pt and upsample_inpaint.pt are the same, which also see a picture and where it is known. Each is of one
size, so their configs are written here. Each reads the caption by a Transformer of its own. Both files of the tokenizer
of glide-text2im, encoder.json.gz and vocab.bpe.gz, are needed too: a byte-level BPE of GPT-2's form, whose captions are
lower case and have no mark at either end; its last piece pads.
"""

import functools
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, normalizers, pre_tokenizers

from unclip_jax.errors import UserError
from unclip_jax.interop import stages
from unclip_jax.interop.files import TORCH, Source, Weights, open_weights
from unclip_jax.interop.layout import (
    CONV,
    DENSE,
    DENSE_CONV,
    DENSE_OUT_CONV,
    FLAT,
    SAME,
    Entry,
    Turn,
    UNetPart,
    blocks,
    interleaved,
    layer,
    norm,
    prefixed,
    unet_levels,
    unet_part,
)  # fmt: skip
from unclip_jax.tasks.pictures import KNOWN_CHANNELS
from unclip_jax.tokenizer import MAX_JSON_BYTES, Tokenizer

FILES = {"decoder": "base", "upsampler": "upsample"}
CHANNELS = {"decoder": 3, "upsampler": 6}  # that each network sees, those for inpainting `KNOWN_CHANNELS` more
TOKENIZER = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # glide-text2im's names, transformers'
LICENCE = "mit"  # of glide-text2im, code and weights
TEXT = dict(text=dict(layers=16, heads=8), context_width=512, embed_dim=0)
UNET = dict(channels=192, attention=(32, 16, 8), head_channels=64, dropout=0.1)
# Sampling is that of glide-text2im's notebooks; the share of dropped captions that of its tuning for guidance.
STAGES = {
    "decoder": dict(
        model=dict(unet=dict(UNET, multipliers=(1, 2, 3, 4), blocks=3), **TEXT),
        diffusion=dict(name="cosine", num_steps=1000),
        objective=dict(target="eps", vlb_weight=0.001, text_drop=0.2),
        sampler=dict(name="ddpm", steps=100, guidance=3.0),
        data=dict(size=64),
    ),
    "upsampler": dict(
        model=dict(unet=dict(UNET, multipliers=(1, 1, 2, 2, 4, 4), blocks=2), **TEXT),
        diffusion=dict(name="linear", num_steps=1000),
        objective=dict(target="eps", vlb_weight=0.001, factor=4, enlarge="linear"),
        sampler=dict(name="ddim", steps="fast27", temperature=0.997),
        data=dict(size=256),
    ),
}
INPAINTING = {"decoder": dict(guidance=5.0), "upsampler": dict(name="ddpm")}  # how their sampling differs
EMBEDDINGS = {
    "embed/embedding": "token_embedding.weight",
    "position": "positional_embedding",
    "padding": "padding_embedding",
}
BLOCK = dict(
    dict.fromkeys(("query", "key", "value"), "attn.c_qkv"),
    **dict(norm1="ln_1", norm2="ln_2", out="attn.c_proj", fc1="mlp.c_fc", fc2="mlp.c_proj"),
)
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
# Layer of an attention → the fused array that it is a part of, which part, of how many.
FUSED = {
    **{name: ("qkv", k, 3) for k, name in enumerate(("query", "key", "value"))},
    **{name: ("encoder_kv", k, 2) for k, name in enumerate(("context_key", "context_value"))},
}
# [O, 10, H, W] there: the noised picture, the known one and where it is known, the small one; here the known is last.
KNOWN_FIRST = Turn(
    lambda a, shape: CONV.here(a[:, [0, 1, 2, 7, 8, 9, 3, 4, 5, 6]], shape),
    lambda a: CONV.there(a)[:, [0, 1, 2, 6, 7, 8, 9, 3, 4, 5]],
)


def read_stack(source: Source, tokenizer: str | None = None) -> stages.Converted:
    """A stack of GLIDE's base network and, where it is there, its upsampler, for `convert`.

    Args:
      source: of `files.locate`: a directory with base.pt and perhaps upsample.pt, or those for inpainting, or
        safetensors of the same names; where there are both kinds, base.pt and then the upsampler of its kind.
      tokenizer: a folder with GLIDE's tokenizer, where the directory has none.

    Raises:
      UserError: something is missing, damaged or of another network, in one line.
    """
    folder = source.path
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a directory with base.pt", "give the whole directory")
    found = {"decoder": _first(folder, "decoder", (False, True))}
    if found["decoder"] is None:
        what = f"{folder} has no base.pt and no base_inpaint.pt"
        raise UserError(what, "give a directory with one of glide-text2im's")
    inpaint = found["decoder"][1]
    if upsampler := _first(folder, "upsampler", (inpaint, not inpaint)):
        found["upsampler"] = upsampler
    words = load_tokenizer(Path(tokenizer).expanduser() if tokenizer else folder)
    facts = stages.provenance(source.name, "glide", stages.stated_licence(folder, {}) or LICENCE)

    def read():
        for name, (file, inpaint) in found.items():
            with open_weights(file) as weights:
                config = stage_config(name, words, inpaint)
                yield name, (read_stage(name, config, weights), config, 0, facts)

    return stages.Converted(read(), words.to_json())


def stage_config(name: str, words: Tokenizer, inpaint: bool = False) -> ConfigDict:
    """The config of the stage "decoder" or "upsampler", for captions of that tokenizer."""
    captions = dict(path="", vocab_size=words.vocab_size, max_len=words.max_len)
    config = ConfigDict(dict(task=name, clip="", clip_identity="", tokenizer=captions, **STAGES[name]))
    if inpaint:
        config.objective.inpaint = True
        config.sampler.update(INPAINTING[name])
    return config


def read_stage(name: str, config: ConfigDict, weights: Weights) -> dict:
    """The parameters of a stage, every array checked by name and shape."""
    shape = weights.shapes.get("input_blocks.0.0.weight", ())
    inpaint = config.objective.get("inpaint", False)
    wanted = CHANNELS[name] + KNOWN_CHANNELS * inpaint
    if len(shape) == 4 and shape[1] != wanted and shape[1] - CHANNELS[name] in (0, KNOWN_CHANNELS):
        what = f"{_stem(name, inpaint)} sees {shape[1]} channels and not {wanted}"
        what += f"; networks for inpainting see {KNOWN_CHANNELS} more"
        raise UserError(what, "call each file what glide-text2im calls it")
    return stages.read_params(config, functools.partial(table, depth=config.model.unet.blocks), weights)


def table(shapes: Mapping[str, tuple[int, ...]], depth: int) -> list[Entry]:
    """Of the parameters of a `Decoder` without CLIP, with `depth` blocks a level, and of GLIDE's Text2ImUNet."""
    caption = [Entry(ours, theirs, SAME) for ours, theirs in EMBEDDINGS.items()]
    caption += blocks("transformer/blocks", "transformer.resblocks.{}", BLOCK, interleaved)
    caption += norm("final_norm/norm", "final_ln")
    stem = KNOWN_FIRST if shapes["net/stem/kernel"][2] == CHANNELS["upsampler"] + KNOWN_CHANNELS else CONV
    net = layer("stem", "input_blocks.0.0", stem) + norm("out_norm", "out.0") + layer("out", "out.2", CONV)
    net += layer("time/fc1", "time_embed.0") + layer("time/fc2", "time_embed.2")
    layers = dict.fromkeys(path.removeprefix("net/").rpartition("/")[0] for path in shapes if path.startswith("net/"))
    levels = unet_levels(layers)
    for name in layers:
        if part := unet_part(name):
            net += _unet_layer(name, part, depth, levels, f"{part.way}{part.level}_attn0/norm" in layers)
    return prefixed("caption/", "", caption) + layer("caption_to_time", "transformer_proj") + prefixed("net/", "", net)


def _unet_layer(path: str, part: UNetPart, depth: int, levels: int, attends: bool) -> list[Entry]:
    """Of one layer in a part of the UNet; `attends` tells of the part's level."""
    (way, level, kind, index), inner = part, path.rpartition("/")[2]
    if way == "mid":
        place = f"middle_block.{1 if kind == 'attn' else 2 * index}"
    elif way == "down":  # behind the stem, and each level ends with what pools
        number = 1 + level * (depth + 1) + (depth if kind == "pool" else index)
        place = f"input_blocks.{number}.{int(kind == 'attn')}"
    else:  # counted from the lowest level; what repeats pixels is the last module beside a level's last block
        number = (levels - 1 - level) * (depth + 1) + (depth if kind == "repeat" else index)
        place = f"output_blocks.{number}.{ {'block': 0, 'attn': 1, 'repeat': 1 + attends}[kind]}"
    if kind != "attn":
        is_norm, name = inner.startswith("norm"), f"{place}.{RES_BLOCK[inner]}"
        return norm(path, name) if is_norm else layer(path, name, DENSE if inner == "emb" else CONV)
    if inner == "norm":
        return norm(path, f"{place}.norm")
    if inner == "out":
        return layer(path, f"{place}.proj_out", DENSE_OUT_CONV)
    fused, *which = FUSED[inner]
    return layer(path, f"{place}.{fused}", interleaved(DENSE_CONV, *which), interleaved(FLAT, *which))


def load_tokenizer(folder: Path, max_len: int = 128) -> Tokenizer:
    """GLIDE's tokenizer from its two files in a folder, compressed or not, for captions of `max_len` pieces.

    Raises:
      UserError: they are not there, or make no tokenizer.
    """
    for vocab, merges in TOKENIZER:
        found = [_find_text(folder, name) for name in (vocab, merges)]
        if all(found):
            break
    else:
        what = f"{folder} has no encoder.json.gz and vocab.bpe.gz, the tokenizer of glide-text2im"
        raise UserError(what, "put them there, or give their folder with --tokenizer DIR")
    try:
        pieces = json.loads(_text(found[0]))
        pairs = [tuple(line.split()) for line in _text(found[1]).splitlines()[1:] if line]  # the first is a version
        if sorted(pieces.values()) != list(range(len(pieces))):
            raise ValueError("the pieces' numbers are not 0, 1, 2, …")
        bpe = tokenizers.Tokenizer(models.BPE(pieces, pairs))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        what = f"{found[0]} and {found[1].name} do not make a tokenizer ({type(error).__name__}: {error})"
        raise UserError(what, "give the two of glide-text2im") from error
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return Tokenizer(bpe, max_len, pad=len(pieces) - 1, bos=None, eos=None)


def _stem(name: str, inpaint: bool) -> str:
    """What glide-text2im calls a stage's file."""
    return FILES[name] + "_inpaint" * inpaint


def _first(folder: Path, name: str, kinds: Iterable[bool]) -> tuple[Path, bool] | None:
    """A stage's (file of weights, whether it is for inpainting), the first kind that is there."""
    files = ((_find(folder, _stem(name, inpaint)), inpaint) for inpaint in kinds)
    return next((pair for pair in files if pair[0]), None)


def _find(folder: Path, stem: str) -> Path | None:
    """The file of weights of that name."""
    files = (folder / f"{stem}{suffix}" for suffix in (".safetensors", *TORCH))
    return next((file for file in files if file.is_file()), None)


def _find_text(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)


def _text(file: Path) -> str:
    """The text of a file that may be compressed, read no further than a tokenizer is long."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{file} holds more than {MAX_JSON_BYTES} bytes, which no tokenizer needs")
    return content.decode("utf-8")
