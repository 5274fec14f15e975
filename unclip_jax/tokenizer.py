"""Text to token numbers and back.

Two kinds share one class: a byte-level BPE of our own, trained on the captions of a data set, since CLIP's
49,408 pieces are far too many for a world of shapes; and CLIP's, which the paper uses, read from a Hugging
Face folder. A text becomes `BOS pieces EOS pad…`; the mask is True through EOS, so that no model needs to
know the pad number (OpenAI's code pads with 0, transformers with EOS). GLIDE's has neither mark (`interop.glide`).
"""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from unclip_jax.errors import UserError, is_whole
from unclip_jax.storage import read_text, write_text

FORMAT = "unclip_jax.tokenizer"
FORMAT_VERSION = 1
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_LEN = 77
MAX_JSON_BYTES = 64 << 20
MOST = 2**22  # tokens of a text, and numbers of pieces: far beyond every network's
# How CLIP cuts text into words: its two marks, contractions, runs of letters, single digits, other runs.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Encodes texts as `i32[B, L]` with a mask `bool[B, L]`. Made by `train`, `load` or `from_json`.

    Args:
      bpe: the pieces and how to cut words, without any padding, truncation or special tokens of its own.
      max_len: L, at least 3.
      pad, bos, eos: the numbers of the three marks; no `bos` or `eos` where texts have none (GLIDE).
    """

    def __init__(self, bpe: tokenizers.Tokenizer, max_len: int, *, pad: int, bos: int | None, eos: int | None):
        if max_len < 3:
            raise UserError(f"max_len={max_len} must be at least 3 (begin, one piece, end)")
        bpe.no_padding()
        bpe.no_truncation()
        bpe.encode_special_tokens = True  # "<eos>" typed by a user is text, not the mark
        self._bpe = bpe
        self.max_len = max_len
        self.pad, self.bos, self.eos = pad, bos, eos

    @property
    def vocab_size(self) -> int:
        """How many rows an embedding table needs: the largest number + 1."""
        return self._bpe.get_vocab_size(with_added_tokens=True)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 1024, max_len: int = 64) -> "Tokenizer":
        """Learns a lower-case byte-level BPE; the same captions give the same tokenizer.

        Args:
          captions: the texts to learn from; any text can be encoded afterwards, as all 256 bytes are pieces.
          vocab_size: upper limit, at least 259; few distinct captions give fewer pieces.
          max_len: L, at least 3.
        """
        if vocab_size < 259:
            raise UserError(f"vocab_size={vocab_size} must be at least 259 (256 bytes and three marks)")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = _tidy()
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, max_len, pad=0, bos=1, eos=2)

    def encode(self, texts: Sequence[str], warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Texts to `(tokens i32[B, L], mask bool[B, L])`; an empty text is BOS EOS, the null caption.

        A longer text is cut so that BOS and EOS still fit; `warn` says what was lost.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        first, last = ([] if mark is None else [mark] for mark in (self.bos, self.eos))
        room = self.max_len - len(first) - len(last)
        tokens = np.full((len(texts), self.max_len), self.pad, np.int32)
        mask = np.zeros((len(texts), self.max_len), bool)
        for row, text in enumerate(texts):
            ids = self._bpe.encode(text, add_special_tokens=False).ids
            if len(ids) > room and warn:
                lost = self._text(ids[room:]).strip()
                warnings.warn(
                    f"text has {len(ids)} tokens, {room} fit; left out: {lost[:200]!r}", stacklevel=2
                )
            ids = [*first, *ids[:room], *last]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask

    def decode(self, tokens) -> list[str]:
        """`i32[B, L]` to B texts, each read up to its first EOS, or padding where there is no such mark.

        Capitals and runs of spaces stay lost.
        """
        texts, end = [], self.pad if self.eos is None else self.eos
        for row in np.asarray(tokens).tolist():
            row = row[: row.index(end)] if end in row else row
            texts.append(self._text([i for i in row if i != self.bos]).strip())
        return texts

    def _text(self, ids: list[int]) -> str:
        pieces = [self._bpe.id_to_token(i) or "" for i in ids]
        return decoders.ByteLevel().decode(pieces).replace("</w>", " ")

    def to_json(self) -> str:
        """Everything in one JSON text; `from_json` reads it."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "max_len": self.max_len,
            "pad": self.pad,
            "bos": self.bos,
            "eos": self.eos,
            "tokenizer": json.loads(self._bpe.to_str()),
        }
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Reads `to_json`'s text, or the text of a CLIP tokenizer.json."""
        try:
            content = json.loads(text)
            own = content.get("format") == FORMAT
        except (ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"the tokenizer is not readable JSON ({e})") from e
        if own and content.get("version") != FORMAT_VERSION:
            raise UserError(
                f"the tokenizer has format version {content.get('version')}, not {FORMAT_VERSION}",
                "upgrade unclip_jax",
            )
        try:
            if not own:
                return cls._clip(tokenizers.Tokenizer.from_str(text))
            bpe = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
            numbers = {name: content[name] for name in ("max_len", "pad", "bos", "eos")}
            for name, value in numbers.items():
                if not is_whole(value, 0, MOST) and not (value is None and name in ("bos", "eos")):
                    raise ValueError(f"{name}={value!r} must be a whole number in 0 … {MOST}")
            return cls(bpe, **numbers)
        except UserError:
            raise
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"the tokenizer's content is damaged ({type(e).__name__}: {e})") from e

    @classmethod
    def _clip(cls, bpe: tokenizers.Tokenizer) -> "Tokenizer":
        bos, eos = bpe.token_to_id(CLIP_BOS), bpe.token_to_id(CLIP_EOS)
        if bos is None or eos is None:
            raise UserError(
                f"the tokenizer has no {CLIP_BOS} and {CLIP_EOS}, so it is not CLIP's",
                "give CLIP's tokenizer",
            )
        return cls(bpe, CLIP_LEN, pad=0, bos=bos, eos=eos)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a tokenizer.json (own or CLIP's), a folder with it, or with vocab.json and merges.txt."""
        path = Path(path)
        if path.is_file():
            return cls.from_json(_text_of(path))
        if (path / "tokenizer.json").is_file():
            return cls.from_json(_text_of(path / "tokenizer.json"))
        vocab, merges = path / "vocab.json", path / "merges.txt"
        if vocab.is_file() and merges.is_file():
            return cls._clip(_from_vocab_and_merges(vocab, merges))
        raise UserError(
            f"no tokenizer at {path}",
            "give a tokenizer.json, or a folder with it or with vocab.json and merges.txt",
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json (into `path` if that is a folder), by a temporary file and a rename."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        write_text(path, self.to_json())

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)


def _tidy() -> normalizers.Normalizer:
    """Composed Unicode, single spaces, lower case: CLIP's way, with the ends stripped as well."""
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase(), normalizers.Strip()])


def _text_of(path: Path) -> str:
    return read_text(path, "a tokenizer", MAX_JSON_BYTES)


def _from_vocab_and_merges(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """CLIP's older files: vocab.json {piece: number} and merges.txt (a version, then two pieces a line)."""
    try:
        pieces = json.loads(_text_of(vocab))
        lines = _text_of(merges).splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        model = models.BPE(
            pieces, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=CLIP_EOS
        )
    except UserError:
        raise
    except Exception as e:  # the tokenizers library raises bare Exception
        raise UserError(f"{vocab} and {merges} do not make a tokenizer ({type(e).__name__}: {e})") from e
    bpe = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe
