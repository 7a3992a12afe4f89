"""Rows cut out of the stream of all documents, whatever their ends.

An epoch cuts the stream into windows at a random phase and takes each of them once, in random order. Which rows make a
batch is left to `batches.py`.
"""

import dataclasses
import functools

import numpy as np

ENDLESS = 1 << 52
"""Rows that no run comes to the end of; `grain` computes lengths in float64, where this is exact."""


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows without end: index divided by the windows of an epoch is the epoch.

    Attributes:
        tokens: the stream [L], at least length + 1.
        length: targets of a row.
        seed: decides phases and orders.
    """

    tokens: np.ndarray
    length: int
    seed: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        """A row: int32 [length + 1], inputs and targets overlapping."""
        count = max((len(self.tokens) - self.length) // self.length, 1)
        epoch, place = divmod(index, count)
        phase, order = _epoch(self.seed, epoch, count, len(self.tokens) - 1 - count * self.length)
        start = phase + int(order[place]) * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, largest_phase: int) -> tuple[int, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(generator.integers(largest_phase + 1)), generator.permutation(windows)
