"""Rows of one document each, all of the same length: images of so many pixels.

    document   d1 d2 d3 END
    row        END d1 d2 d3      the end token begins it, as an input alone, and is never a target

So the targets are all the tokens of a document, the first included, and nothing else; a row needs neither segment ids
nor weights. Which rows make a batch is left to `batches.py`.
"""

import dataclasses
from typing import Self

import numpy as np

from training.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class SingleRows:
    """The rows of an epoch, one a document, in their order.

    Attributes:
        tokens: the stream [L]: documents of `length` tokens, an end token after each.
        length: targets of a row.
    """

    tokens: np.ndarray
    length: int

    @classmethod
    def of(cls, tokens: np.ndarray, length: int) -> Self:
        """The rows of a stream, whose last token ends a document wherever it stands.

        Raises:
            DataError: a document has more or fewer tokens.
        """
        lengths = np.diff(np.flatnonzero(tokens == tokens[-1]), prepend=-1) - 1
        if np.any(lengths != length):
            least, most = int(lengths.min()), int(lengths.max())
            found = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            way_out = f"take --length {least}" if least == most else "take --data.packing documents"
            raise DataError(
                f"--data.packing single takes documents of as many tokens as --length, {length:,}; they have {found}:"
                f" {way_out}"
            )
        return cls(tokens, length)

    def __len__(self) -> int:
        return len(self.tokens) // (self.length + 1)

    def __getitem__(self, index: int) -> np.ndarray:
        """A row: int32 [length + 1], inputs and targets overlapping."""
        return np.concatenate([self.tokens[-1:], self.tokens[self._places(index)]]).astype(np.int32)

    def targets(self, index: int) -> np.ndarray:
        """Where the targets of a row stand in the stream: int64 [length]."""
        places = self._places(index)
        return np.arange(places.start, places.stop)

    def _places(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * (self.length + 1)
        return slice(start, start + self.length)

    @property
    def filled(self) -> float:
        """The share of all the rows' targets that are tokens of documents: all."""
        return 1.0
