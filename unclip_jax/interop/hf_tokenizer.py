"""A tokenizer as transformers reads it, whether CLIP's or one of our own."""

import json

import numpy as np
import tokenizers
from tokenizers import processors

from unclip_jax.tokenizer import CLIP_BOS, CLIP_EOS, Tokenizer

TAKEN = 2  # as eos_token_id it makes transformers read a caption at its largest number instead


def renumbered(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer with CLIP's names for its marks, and EOS not `TAKEN`; and the old number at each new one.

    Our own tokenizers have EOS there; it changes places with the last row of the embedding.

    Args:
      vocab_size: rows of the embedding.

    Returns:
      (tokenizer, i64[vocab_size]): `embedding[order]` is the one for it.
    """
    order = np.arange(vocab_size)
    if tokenizer.eos == TAKEN:
        order[[TAKEN, -1]] = order[[-1, TAKEN]]
    new = {int(old): number for number, old in enumerate(order)}
    names = {tokenizer.bos: CLIP_BOS, tokenizer.eos: CLIP_EOS}
    content = json.loads(tokenizer.to_json())
    bpe = content["tokenizer"]
    pieces = bpe["model"]["vocab"].items()
    bpe["model"]["vocab"] = {names.get(number, piece): new[number] for piece, number in pieces}
    added = [{**token, "content": names.get(token["id"], token["content"]), "id": new[token["id"]]}
             for token in bpe["added_tokens"]]  # fmt: skip
    bpe["added_tokens"] = sorted(added, key=lambda token: token["id"])
    content |= {mark: new[content[mark]] for mark in ("pad", "bos", "eos")}
    return Tokenizer.from_json(json.dumps(content)), order


def files(tokenizer: Tokenizer) -> dict[str, dict]:
    """{name: content} of the JSON files that `transformers.AutoTokenizer.from_pretrained` reads.

    Args:
      tokenizer: with CLIP's names for its marks, as `renumbered` gives it.
    """
    bpe = tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_json())["tokenizer"]))
    bpe.post_processor = processors.RobertaProcessing(
        (CLIP_EOS, tokenizer.eos), (CLIP_BOS, tokenizer.bos), trim_offsets=False, add_prefix_space=False
    )
    own = bpe.model.end_of_word_suffix is None  # CLIP's ends words by "</w>", and its class cuts words in one way only
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast" if own else "CLIPTokenizer",
        "model_max_length": tokenizer.max_len,
        "bos_token": CLIP_BOS,
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), CLIP_EOS),
    }
    return {"tokenizer.json": json.loads(bpe.to_str()), "tokenizer_config.json": about}
