"""Text to tokens and back: bytes, or a `tokenizers` file.

Both know how many bytes of text each token stands for, so that bits per byte is exact whatever the vocabulary.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer

from training.errors import DataError

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Encoded(NamedTuple):
    """The tokens of one document, without the end of document.

    Attributes:
        tokens: int32 [L].
        byte_counts: int32 [L]; the bytes of text that each token stands for, which add up to the document's.
    """

    tokens: np.ndarray
    byte_counts: np.ndarray


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    vocab_size: int
    end: int
    fingerprint: str

    def encode(self, texts: Sequence[bytes]) -> list[Encoded]:
        """The tokens of each text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        ...


class ByteTokenizer:
    """A token is a byte; 256 ends a document."""

    vocab_size = 257
    end = 256
    fingerprint = "bytes"

    def encode(self, texts: Sequence[bytes]) -> list[Encoded]:
        """The bytes of each text."""
        arrays = [np.frombuffer(text, np.uint8) for text in texts]
        return [Encoded(array.astype(np.int32), np.ones(len(array), np.int32)) for array in arrays]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some bytes; what is no UTF-8 becomes a replacement character."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer in the JSON format of the `tokenizers` library.

    The end of a document is the tokenizer's own end token where it has one of the usual names, else a new one.
    """

    def __init__(self, path: Path):
        try:
            text = path.read_text("utf-8")
            self._tokenizer = HuggingFaceTokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise DataError(f"{path}: not a readable tokenizers JSON file: {' '.join(str(error).split())}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = [self._tokenizer.token_to_id(name) for name in END_NAMES]
        known = next((token for token in ids if token is not None), None)
        largest = max(self._tokenizer.get_vocab().values(), default=-1)
        self.end = largest + 1 if known is None else known
        self.vocab_size = max(largest, self.end) + 1
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[Encoded]:
        """The tokens of each text."""
        decoded = [text.decode(errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch(decoded, add_special_tokens=False)
        return [
            Encoded(np.asarray(encoding.ids, np.int32), _byte_counts(text, encoding.offsets))
            for text, encoding in zip(decoded, encodings, strict=True)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return self._tokenizer.decode([token for token in tokens if token != self.end])


def _byte_counts(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes for each token out of character offsets; skipped characters count for the token that follows them."""
    if not offsets:
        return np.zeros(0, np.int32)
    sizes = np.fromiter((len(character.encode()) for character in text), np.int32, len(text))
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    stops = np.maximum.accumulate(np.asarray([stop for _, stop in offsets]))
    stops[-1] = len(text)
    return np.diff(ends[stops], prepend=0).astype(np.int32)


def load_tokenizer(name: str) -> Tokenizer:
    """The byte tokenizer for 'bytes', else the one in the file of that name.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name).expanduser())
