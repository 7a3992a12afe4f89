"""Tokenizers: round trips, and bytes that add up."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.errors import DataError
from training.tokens import ByteTokenizer, load_tokenizer

TEXTS = ["def f(x):\n    return x  # naïve café 漢字\n", "for i in range(10):\n\tprint(i)\n", " "]


@pytest.fixture(scope="module", params=["byte level", "words"])
def tokenizer_file(request, tmp_path_factory):
    if request.param == "byte level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path, request.param


def test_bytes():
    tokenizer = ByteTokenizer()
    (encoded,) = tokenizer.encode([b"a\xc3\xa4"])
    np.testing.assert_array_equal(encoded.tokens, [97, 195, 164])
    assert tokenizer.decode([*encoded.tokens, tokenizer.end]) == "aä"
    assert tokenizer.decode([195]) == "\ufffd"


def test_file(tokenizer_file):
    path, kind = tokenizer_file
    tokenizer = load_tokenizer(str(path))
    texts = [text.encode() for text in TEXTS]
    for text, encoded in zip(texts, tokenizer.encode(texts), strict=True):
        assert len(encoded.tokens) == len(encoded.byte_counts)
        assert np.all(encoded.byte_counts >= 0)
        if len(encoded.tokens):
            assert encoded.byte_counts.sum() == len(text)
            assert max(encoded.tokens) < tokenizer.vocab_size
        if kind == "byte level":
            assert tokenizer.decode(encoded.tokens.tolist()) == text.decode()
    assert tokenizer.end == (0 if kind == "byte level" else tokenizer.vocab_size - 1)


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_bad_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizers JSON file"):
        load_tokenizer(str(path))
