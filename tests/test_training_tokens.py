"""Tokenizers: round trips, and bytes that add up."""

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.batches import evaluation_batches
from training.bpe import main
from training.config import DataConfig
from training.data import load_corpus
from training.errors import DataError
from training.evaluation import evaluate
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


def test_bits_per_byte_of_a_tokenizer_that_was_trained_on_the_text(tmp_path, capsys):
    """The whole path: from text by a trained tokenizer to a corpus, and bytes that its tokens share exactly."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        text = f"def f{number}(x):\n    return x  # naïve café {chr(0x6F22 + number)}\n" * 3
        (tmp_path / "text" / str(number)).write_text(text, "utf-8")
    path = tmp_path / "tokenizer.json"
    options = [str(path), "--vocab-size", "350", "--data", str(tmp_path / "text")]
    assert main(options) == 0
    assert "350 tokens" in capsys.readouterr().out
    assert main([*options, "--vocab-size", "256"]) == 2
    assert "--vocab-size must be at least 257, got 256" in capsys.readouterr().err

    tokenizer = load_tokenizer(str(path))
    config = DataConfig(source=str(tmp_path / "text"), tokenizer=str(path))
    corpus, in_bytes = load_corpus(config, tokenizer, 32), load_corpus(config, ByteTokenizer(), 32)
    for part, as_bytes in zip(corpus[:2], in_bytes[:2], strict=True):
        assert part.byte_counts.sum() == as_bytes.byte_counts.sum()
        assert len(part.tokens) < len(as_bytes.tokens) / 2
        assert part.documents == np.count_nonzero(part.tokens == tokenizer.end)
        # Bytes of rare characters are tokens of their own: the first of them stands for the character.
        assert np.any(part.byte_counts[part.tokens != tokenizer.end] == 0)
        assert tokenizer.decode(part.tokens.tolist()) == ByteTokenizer().decode(as_bytes.tokens.tolist())

    batches = list(evaluation_batches(corpus.held_out, 2, 32, 0))
    uniform = lambda _, tokens, weights: weights.sum() * np.log(tokenizer.vocab_size)
    quality = evaluate(uniform, nnx.State({}), batches)
    # All but the first token, which nothing predicts.
    predicted = len(corpus.held_out.tokens) - 1, corpus.held_out.byte_counts[1:].sum()
    assert quality.bits_per_byte == pytest.approx(predicted[0] * np.log2(350) / predicted[1], rel=1e-6)


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_bad_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizers JSON file"):
        load_tokenizer(str(path))
