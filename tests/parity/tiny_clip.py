"""A CLIP of transformers in miniature: real structure, random weights, and a tokenizer learned on the spot."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Bpe
from tokenizers import models, pre_tokenizers, trainers

LENGTH = 12
TEXTS = ["the cat and the hat", "a red cat on a red mat", "the mat and the red hat", "it's 2 cats, ok?"] * 3


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Pieces and merges in CLIP's form: bytes, bytes that end a word, merges, and the two marks as the last numbers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Bpe(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=80, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges


def save_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt, as OpenAI's models have them; returns how many pieces there are."""
    pieces, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return len(pieces)


def config(size: int, act: str = "quick_gelu", eos: int | None = None) -> dict:
    """A config.json with `size` pieces; `eos` None is the last of them."""
    tower = {"num_hidden_layers": 2, "hidden_act": act, "layer_norm_eps": 1e-5}
    text = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": size}
    text |= {"max_position_embeddings": LENGTH, "bos_token_id": size - 2, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    return {
        "model_type": "clip",
        "projection_dim": 8,
        "text_config": {**tower, **text, "eos_token_id": size - 1 if eos is None else eos},
        "vision_config": {**tower, **vision},
    }


def save(folder: Path, act: str = "quick_gelu", eos: int | None = None):
    """A CLIPModel with random weights, none of them at its initial value; and all of it in `folder`."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    about = config(save_tokenizer(folder), act, eos)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**about)).eval()
    with torch.no_grad():
        for name, array in model.named_parameters():
            if name.endswith("norm.weight") or ".layer_norm" in name and name.endswith("weight"):
                array.add_(0.1 * torch.randn_like(array))
            elif array.ndim == 1:
                array.normal_(0, 0.1)
            elif array.ndim == 2 and "embedding" not in name:
                array.normal_(0, array.shape[1] ** -0.5)
            elif array.ndim > 1:
                array.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model
