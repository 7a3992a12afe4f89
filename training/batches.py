"""Which tokens a step sees: a pure function of (seed, step), so that resuming needs no loader state.

An epoch cuts the stream into windows at a random phase and takes each of them once, in random order.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from training.config import BatchConfig
from training.data import Stream


class Batches(NamedTuple):
    """The batches of a run.

    Attributes:
        tokens: the training stream [L].
        shape: accumulation, sequences and tokens of a batch.
        seed: decides the order.
    """

    tokens: np.ndarray
    shape: BatchConfig
    seed: int

    def at(self, step: int) -> np.ndarray:
        """The batch of a step: int32 [accumulation, size, length + 1], inputs and targets overlapping."""
        count = self.shape.accumulation * self.shape.size
        starts = [self._start(index) for index in range(step * count, (step + 1) * count)]
        rows = [self.tokens[start : start + self.shape.length + 1] for start in starts]
        return np.stack(rows).astype(np.int32).reshape(self.shape.accumulation, self.shape.size, -1)

    def _start(self, index: int) -> int:
        length = self.shape.length
        windows = max((len(self.tokens) - length) // length, 1)
        epoch, place = divmod(index, windows)
        room = len(self.tokens) - 1 - windows * length
        phase, order = _epoch(self.seed, epoch, windows, room)
        return phase + int(order[place]) * length


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, largest_phase: int) -> tuple[int, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(generator.integers(largest_phase + 1)), generator.permutation(windows)


class EvaluationBatch(NamedTuple):
    """Held-out sequences, each of their targets counted once.

    Attributes:
        tokens: int32 [size, length + 1].
        weights: float32 [size, length]; 0 where a target is only padding.
        num_bytes: bytes of text in all the targets.
    """

    tokens: np.ndarray
    weights: np.ndarray
    num_bytes: int


def evaluation_batches(stream: Stream, size: int, length: int, windows: int) -> Iterator[EvaluationBatch]:
    """Windows spread evenly over the held-out stream.

    Args:
        stream: held-out text.
        size: windows of a batch.
        length: tokens of a window.
        windows: most windows to take; 0 takes all.
    """
    available = -(-(len(stream.tokens) - 1) // length)
    count = min(windows, available) if windows else available
    chosen = np.linspace(0, available - 1, count).round().astype(int) if count > 1 else np.zeros(1, int)
    for first in range(0, len(chosen), size):
        tokens = np.zeros((size, length + 1), np.int32)
        weights = np.zeros((size, length), np.float32)
        num_bytes = 0
        for row, window in enumerate(chosen[first : first + size]):
            piece = stream.tokens[window * length : (window + 1) * length + 1]
            tokens[row, : len(piece)] = piece
            weights[row, : len(piece) - 1] = 1.0
            num_bytes += int(stream.byte_counts[window * length + 1 : (window + 1) * length + 1].sum())
        yield EvaluationBatch(tokens, weights, num_bytes)
