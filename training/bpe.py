"""Trains a byte-level BPE tokenizer on the training text, for `train.py --tokenizer`: `python -m training.bpe FILE`."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.config import DataConfig
from training.data import read_split
from training.errors import ConfigError, DataError
from training.tokens import END_NAMES

_LEAST = 256 + 1  # bytes, and the end of a document


@dataclasses.dataclass(frozen=True)
class BpeConfig:
    """Train a byte-level BPE tokenizer on the training part of a text; it knows nothing of what is held out."""

    out: tyro.conf.Positional[Path]
    """JSON file to write; name it to train.py by --tokenizer."""
    vocab_size: int = 8192
    """Tokens, with the 256 bytes and the end of a document among them."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """A tokenizer that can write any text: its tokens are bytes and frequent sequences of them within words.

    Args:
        texts: UTF-8.
        vocab_size: most tokens; a short text may give fewer.

    Raises:
        ConfigError: fewer tokens than bytes and an end.
    """
    if vocab_size < _LEAST:
        raise ConfigError(f"--vocab-size must be at least {_LEAST}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode(errors="replace") for text in texts), trainer)
    return tokenizer


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(BpeConfig, args=arguments, prog="python -m training.bpe")
    try:
        train, _ = read_split(config.data)
        tokenizer = train_bpe((document.text for document in train), config.vocab_size)
        config.out.write_text(tokenizer.to_str(pretty=True), "utf-8")
    except (ConfigError, DataError) as error:
        print(f"training.bpe: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"training.bpe: {config.out}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{config.out}: {tokenizer.get_vocab_size():,} tokens, from {len(train):,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
