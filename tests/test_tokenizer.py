"""Tokens: round trips, what truncation keeps, the mask, files, and CLIP's own numbers."""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tokenizers

from unclip_jax.errors import UserError
from unclip_jax.tokenizer import Tokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} {place}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square", "star")
    for place in ("on a white background", "above a yellow ring", "in the corner")
]


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(CAPTIONS, vocab_size=400, max_len=16)


@pytest.mark.parametrize(
    "text",
    ["a red circle", "unseen: Ünïcode 红色 🧸!", "<eos> <bos> <pad>", "tab\tand  spaces", "", "12,5 %"],
)
def test_decode_undoes_encode_up_to_case_and_spaces(own, text):
    roomy = Tokenizer.from_json(own.to_json().replace('"max_len": 16', '"max_len": 99'))
    assert roomy.max_len == 99
    tokens, _ = roomy.encode([text])
    assert roomy.decode(tokens) == [" ".join(text.lower().split())]


def test_rows_are_bos_pieces_eos_pad_and_the_mask_ends_at_eos(own):
    tokens, mask = own.encode([*CAPTIONS, ""])
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert tokens.shape == mask.shape == (len(CAPTIONS) + 1, 16)
    for row, seen in zip(tokens.tolist(), mask.tolist(), strict=True):
        end = row.index(own.eos)
        assert row[0] == own.bos and row.count(own.eos) == 1 and row.count(own.bos) == 1
        assert seen == [i <= end for i in range(16)]
        assert set(row[end + 1 :]) <= {own.pad} and own.pad not in row[: end + 1]
    assert tokens[-1, :3].tolist() == [own.bos, own.eos, own.pad]
    assert 0 <= tokens.min() and tokens.max() < own.vocab_size <= 400


def test_a_long_text_loses_its_end_and_says_so(own):
    text = "red circle " * 10
    with pytest.warns(UserWarning, match="20 tokens, 14 fit; left out: '(red circle ?){3}'"):
        tokens, mask = own.encode([text])
    assert tokens[0, 0] == own.bos and tokens[0, -1] == own.eos and mask.all()
    assert own.decode(tokens) == [("red circle " * 7).strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.encode([text], warn=False)


def test_training_is_deterministic_and_learns_whole_words(own):
    code = (
        "import sys, json; from unclip_jax.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), vocab_size=400, max_len=16).to_json())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        check=True,
        env={"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert again.stdout.strip() == own.to_json()
    assert own.encode(["a large green star above a yellow ring"])[1].sum() == 8 + 2


def test_pickle_and_files_keep_every_number(own, tmp_path):
    own.save(tmp_path)
    own.save(tmp_path / "other.json")
    copies = [
        pickle.loads(pickle.dumps(own)),
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "other.json"),
    ]
    for copy in copies:
        assert copy.max_len == 16 and copy.vocab_size == own.vocab_size
        np.testing.assert_array_equal(copy.encode(CAPTIONS)[0], own.encode(CAPTIONS)[0])
        assert copy.to_json() == own.to_json()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]  # no partial files


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """A small vocabulary in CLIP's form: pieces within and at the end of words, merges, the marks last."""
    model = tokenizers.models.BPE(end_of_word_suffix="</w>")
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = tokenizers.normalizers.Lowercase()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Whitespace(),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(trained["vocab"])
    for piece in [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(piece, len(vocab))
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(m) if isinstance(m, list) else m for m in trained["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder, vocab, [tuple(m.split()) for m in merges]


def test_clip_folder_gives_the_numbers_of_transformers(clip_files, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, vocab, merges = clip_files
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    texts = ["a Large  red circle!", "It's a star's, isn't it?", "", "x2 12 ünï 红 🧸", "ring-ring\n(blue)"]
    tokens, mask = Tokenizer.load(folder).encode(texts)
    assert tokens.shape == (5, 77)
    for text, row, seen in zip(texts, tokens, mask, strict=True):
        assert row[seen].tolist() == theirs(text).input_ids
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(Tokenizer.load(tmp_path).encode(texts)[0], tokens)


def test_clip_tokenizer_survives_our_own_json_and_decodes(clip_files):
    ours = Tokenizer.load(clip_files[0])
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.max_len == 77
    assert (copy.pad, copy.bos, copy.eos) == (0, ours.vocab_size - 2, ours.vocab_size - 1)
    assert copy.decode(copy.encode(["A red  star above"])[0]) == ["a red star above"]


def test_marks_typed_by_a_user_are_text(own, clip_files):
    for tokenizer, text in ((own, "a <eos> b"), (Tokenizer.load(clip_files[0]), "a <|endoftext|> b")):
        row = tokenizer.encode([text])[0][0].tolist()
        assert row.count(tokenizer.eos) == 1
        assert re.sub(" ", "", tokenizer.decode([row])[0]) == text.replace(" ", "")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not json", "not readable JSON"),
        (b"[1, 2]", "not readable JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": {"type": "nothing"}}', "damaged"),
        (b'{"format": "unclip_jax.tokenizer", "version": 99}', "format version 99"),
        (b'{"format": "unclip_jax.tokenizer", "version": 1}', "damaged"),
    ],
)
def test_damaged_files_are_user_errors(tmp_path, content, match):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=match):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"max_len": 2**40}, {"max_len": float("nan")}, {"pad": None}, {"eos": "x"}, {"bos": -1}]
)
def test_numbers_that_no_array_can_hold_are_damage(own, change):
    with pytest.raises(UserError, match=f"damaged .*{next(iter(change))}=.* must be a whole number"):
        Tokenizer.from_json(json.dumps({**json.loads(own.to_json()), **change}))


def test_other_mistakes_are_user_errors(own, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="at least 259"):
        Tokenizer.train(CAPTIONS, vocab_size=100)
    with pytest.raises(UserError, match="max_len=2"):
        Tokenizer.train(CAPTIONS, max_len=2)
    with pytest.raises(TypeError, match="list of texts"):
        own.encode("a red circle")
    not_clip = json.dumps(json.loads(own.to_json())["tokenizer"])
    with pytest.raises(UserError, match="not CLIP's"):
        Tokenizer.from_json(not_clip)
