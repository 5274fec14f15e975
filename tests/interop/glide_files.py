"""GLIDE's settings made small, and a tokenizer of its form, for tests."""

import gzip
import json

import pytest
from ml_collections import ConfigDict
from tokenizers.pre_tokenizers import ByteLevel

from unclip_jax.interop import glide, stages

MERGES = ("r e", "re d", "Ġ red", "c a", "ca t", "Ġ cat", "Ġ a", "t h", "th e", "Ġ the")
LENGTH = 12  # of captions
SIDES = {"decoder": 8, "upsampler": 16}
UNET = dict(channels=16, attention=(8,), head_channels=8, groups=8, dropout=0.1)
TEXT = dict(text=dict(layers=2, heads=2), context_width=24, embed_dim=0)
MODELS = {
    "decoder": dict(unet=dict(UNET, multipliers=(1, 2), blocks=2), **TEXT),
    "upsampler": dict(unet=dict(UNET, multipliers=(1, 1, 2), blocks=1), **TEXT),
}
STAGES = {
    name: {**stage, "model": MODELS[name], "data": dict(size=SIDES[name])} for name, stage in glide.STAGES.items()
}
STAGES["upsampler"]["objective"] = {**STAGES["upsampler"]["objective"], "factor": 2}


def save_tokenizer(folder, packed: bool = True) -> int:
    """Writes GLIDE's two files, or GPT-2's by transformers' names; returns how many pieces there are."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    files = {
        "encoder.json" if packed else "vocab.json": json.dumps({piece: number for number, piece in enumerate(pieces)}),
        "vocab.bpe" if packed else "merges.txt": "\n".join(["#version: 0.2", *MERGES, ""]),
    }
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return len(pieces)


@pytest.fixture(scope="module")
def small():
    """GLIDE's stages small, while a module's tests run, and each network traced once."""
    known, traced = {}, stages.network_shapes

    def network_shapes(config, clip=None):
        key = config.to_json()
        known[key] = known.get(key) or traced(config, clip)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glide, "STAGES", STAGES)
        patch.setattr(stages, "network_shapes", network_shapes)
        patch.setattr(glide.load_tokenizer, "__defaults__", (LENGTH,))
        yield STAGES


def config(name: str, vocab: int, **model) -> ConfigDict:
    """The config of a stage for captions of so many pieces, with changes to its network's keywords."""
    words = dict(path="", vocab_size=vocab, max_len=LENGTH)
    stage = {**STAGES[name], "model": {**MODELS[name], **model}}
    return ConfigDict(dict(task=name, clip="", clip_identity="", tokenizer=words, **stage))
