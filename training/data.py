"""The corpus: documents split into training and held-out text, as two streams of tokens.

The split never depends on a seed: directories named train, valid and test decide it where there are any, and so do a
Hugging Face data set's own splits; else a stable hash of each document's name; a single document keeps its tail for the
held-out part.
"""

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from training.config import DataConfig
from training.data_folder import named_file
from training.errors import DataError
from training.hugging_face import PREFIX, read_hugging_face
from training.mnist import read_mnist
from training.python_source import python_documents, stable_hash
from training.single_rows import SingleRows
from training.sources import Document, read_bytes, read_documents
from training.tokens import Tokenizer

_ENWIK8_PARTS = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}
_HELD_OUT_PERCENT = 5
# Documents are encoded some megabytes at a time: a tokenizer's own bookkeeping is far larger than the text.
_ENCODED_AT_ONCE = 4_000_000


class Stream(NamedTuple):
    """Documents as one row of tokens, each ended by the end token.

    Attributes:
        tokens: uint16 or int32 [L].
        byte_counts: bytes of text that each token stands for, int32 [L]; an end token stands for none.
        documents: number of documents.
    """

    tokens: np.ndarray
    byte_counts: np.ndarray
    documents: int


class Corpus(NamedTuple):
    """Training and held-out text.

    Attributes:
        train: the stream to learn from.
        held_out: the stream to evaluate on.
        fingerprint: hash of both streams and of the tokenizer.
        image_shape: rows and columns of an image, where each document is one, pixel after pixel; else None.
    """

    train: Stream
    held_out: Stream
    fingerprint: str
    image_shape: tuple[int, int] | None = None


def load_corpus(config: DataConfig, tokenizer: Tokenizer, length: int) -> Corpus:
    """Read, split and encode the text.

    Args:
        config: the source.
        tokenizer: for both parts.
        length: tokens of a training sequence.

    Raises:
        DataError: the text is missing, unreadable, or shorter than one sequence; or sequences are to be single
            documents, and one is longer or shorter.
    """
    images = read_mnist(config) if config.images else None
    train_documents, held_out_documents = read_split(config) if images is None else images.documents()
    train = _stream(train_documents, tokenizer)
    held_out = _stream(held_out_documents, tokenizer)
    if config.packing == "single":
        for stream in (train, held_out):
            SingleRows.of(stream.tokens, length)
    if len(train.tokens) < length + 1:
        raise DataError(
            f"{config.source}: the training text has {len(train.tokens):,} tokens, too few for a sequence of"
            f" {length:,} and the token after it; take more text or a smaller --length"
        )
    if len(held_out.tokens) < 2:
        raise DataError(f"{config.source}: the held-out text has only {len(held_out.tokens)} tokens; take more text")
    hashed = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=8)
    hashed.update(train.tokens.data)
    hashed.update(held_out.tokens.data)
    image_shape = None if images is None else (images.train.shape[1], images.train.shape[2])
    return Corpus(train, held_out, hashed.hexdigest(), image_shape)


def split_documents(documents: Sequence[Document], held_out: str) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    Args:
        documents: at least one.
        held_out: "valid" or "test": the directory that is held out, where the documents have such directories.

    Raises:
        DataError: there is a directory train but not the one to hold out.
    """
    folders = [set(PurePosixPath(document.name).parts[:-1]) for document in documents]
    if any("train" in names for names in folders):
        _require_held_out(set().union(*folders), held_out)
        pick = lambda part: [document for document, names in zip(documents, folders, strict=True) if part in names]
        return pick("train"), pick(held_out)
    return _split_by_hash(documents)


def _require_held_out(folders: set[str], held_out: str) -> None:
    """Raises where documents meant to be held out, under another name, would be trained on."""
    if held_out not in folders:
        other = "test" if held_out == "valid" else "valid"
        way_out = f"--data.held-out {other}" if other in folders else "it, or name train/ itself as --data"
        raise DataError(f"the text has train/ but no {held_out}/; add {way_out}")


def _split_by_hash(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    if len(documents) == 1:
        name, text = documents[0]
        cut = _character_start(text, len(text) - len(text) * _HELD_OUT_PERCENT // 100)
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    hashes = [stable_hash(document.name) for document in documents]
    # The smallest hash is always held out and the largest never: neither part can be empty.
    smallest, largest = min(hashes), max(hashes)
    out = [(value % 100 < _HELD_OUT_PERCENT or value == smallest) and value != largest for value in hashes]
    train = [document for document, is_out in zip(documents, out, strict=True) if not is_out]
    return train, [document for document, is_out in zip(documents, out, strict=True) if is_out]


def _character_start(text: bytes, index: int) -> int:
    """The start of the UTF-8 character that holds byte `index`."""
    while 0 < index < len(text) and text[index] & 0xC0 == 0x80:
        index -= 1
    return index


def read_split(config: DataConfig) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a source of text.

    Raises:
        DataError: the text is missing or unreadable, or the source is no text.
    """
    if config.images:
        raise DataError(f"{config.source}: its documents are images, and no text")
    if config.source == "python":
        # A package's folder named train means nothing here.
        return _split_by_hash(python_documents(round(config.max_megabytes * 1e6)))
    if config.source == "enwik8":
        text = read_bytes(named_file(config, "enwik8", ("enwik8.xz", "enwik8.gz", "enwik8")))
        expected = _ENWIK8_PARTS["test"][1]
        if len(text) != expected:
            raise DataError(f"enwik8 has {expected:,} bytes, the file found has {len(text):,}")
        train, held_out = (slice(*_ENWIK8_PARTS[part]) for part in ("train", config.held_out))
        return [Document("enwik8", text[train])], [Document("enwik8", text[held_out])]
    if config.source == "eltec":
        path = named_file(config, "eltec", ("eltec_eng.tar.xz", "eltec_eng.tar.gz", "eltec_eng"))
        return split_documents(read_documents(str(path), config.encoding), config.held_out)
    if config.source.startswith(PREFIX):
        train, held_out = read_hugging_face(config)
        return (train, held_out) if held_out is not None else _split_by_hash(train)
    return split_documents(read_documents(config.source, config.encoding), config.held_out)


def _stream(documents: Sequence[Document], tokenizer: Tokenizer) -> Stream:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens, byte_counts = [], []
    for chunk in _chunks(documents):
        for encoded in tokenizer.encode([document.text for document in chunk]):
            tokens += [encoded.tokens.astype(dtype), np.array([tokenizer.end], dtype)]
            byte_counts += [encoded.byte_counts, np.zeros(1, np.int32)]
    return Stream(np.concatenate(tokens), np.concatenate(byte_counts), len(documents))


def _chunks(documents: Sequence[Document]) -> list[list[Document]]:
    chunks: list[list[Document]] = []
    size = _ENCODED_AT_ONCE
    for document in documents:
        if size >= _ENCODED_AT_ONCE:
            chunks.append([])
            size = 0
        chunks[-1].append(document)
        size += len(document.text)
    return chunks
