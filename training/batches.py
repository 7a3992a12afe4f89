"""Which tokens a step sees: a pure function of (seed, step), so that resuming needs no loader state.

`windows.py`, `packing.py` and `single_rows.py` say what the rows are. Here `grain` gives them to steps and processes,
and reads ahead of the steps while the device works.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, cast

import grain
import numpy as np

from training.config import BatchConfig, Packing
from training.data import Stream
from training.errors import ConfigError
from training.packing import PackedRows
from training.single_rows import SingleRows
from training.windows import ENDLESS, Windows

# Rows lie in memory: a thread has the next batch long before a step is done, and a few make up for a slow moment.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of each global batch that a process reads.

    Attributes:
        index: of the part, from 0.
        count: of parts.
    """

    index: int = 0
    count: int = 1


_ALL = Shard()


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run.

    Attributes:
        tokens: the training stream [L].
        shape: accumulation, sequences and tokens of a global batch.
        seed: decides the order.
        shard: rows to read of each global batch, which is the same whatever the number of processes; default all.
        packing: "stream" for rows of `Windows`, "documents" for those of `PackedRows`, "single" for `SingleRows`.

    Raises:
        ConfigError: the processes cannot have equal parts of a batch.
    """

    tokens: np.ndarray
    shape: BatchConfig
    seed: int
    shard: Shard = _ALL
    packing: Packing = "stream"

    def __post_init__(self):
        index, count = self.shard.index, self.shard.count
        if not 0 <= index < count:
            raise ConfigError(f"the part's index must lie in [0, {count}), got {index}")
        if self.shape.size % count:
            raise ConfigError(
                f"--batch-size {self.shape.size} must be a multiple of the parts that processes read, {count}"
            )

    def at(self, step: int) -> np.ndarray:
        """The batch of a step: int32 [accumulation, size // shard.count, length + 1], inputs and targets overlapping.

        Its rows are `shard.index * size // shard.count` and those that follow of the global batch.
        """
        return cast(np.ndarray, self._steps[step])

    def from_step(self, step: int) -> grain.DatasetIterator[np.ndarray]:
        """The batches from a step on, without end, read ahead in the background until the iterator is closed."""
        return iter(self._steps[step:].to_iter_dataset(_READ_AHEAD))

    @functools.cached_property
    def packed(self) -> PackedRows | SingleRows | None:
        """The rows that documents are packed into, of every epoch; None for windows of the stream."""
        return _packed(self.tokens, self.shape.length, self.packing)

    @functools.cached_property
    def _steps(self) -> grain.MapDataset[np.ndarray]:
        if self.packed is None:
            # Windows come in an order of their own: a new phase each epoch.
            rows = grain.MapDataset.source(Windows(self.tokens, self.shape.length, self.seed))
        else:
            # An epoch's own seed is this one and its number: those of neighbouring runs must be far apart.
            seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
            rows = grain.MapDataset.source(self.packed).shuffle(seed).repeat(ENDLESS // len(self.packed))
        parts = self.shard.count
        return rows.batch(self.shape.size // parts)[self.shard.index :: parts].batch(self.shape.accumulation)


def _packed(tokens: np.ndarray, length: int, packing: Packing) -> PackedRows | SingleRows | None:
    match packing:
        case "stream":
            return None
        case "documents":
            return PackedRows.of(tokens, length)
        case "single":
            return SingleRows.of(tokens, length)


class EvaluationBatch(NamedTuple):
    """Held-out sequences, each of their targets counted once.

    Attributes:
        tokens: int32 [size, length + 1]; rows of `PackedRows` have negative ones.
        weights: float32 [size, length]; 0 where a target is only padding, or begins a piece.
        num_bytes: bytes of text in all the targets.
    """

    tokens: np.ndarray
    weights: np.ndarray
    num_bytes: int


def evenly(count: int, available: int) -> np.ndarray:
    """Numbers of so many rows, or of all if there are fewer, spread evenly over those that there are."""
    return np.linspace(0, available - 1, min(count, available)).round().astype(int)


def evaluation_batches(
    stream: Stream, size: int, length: int, windows: int, packing: Packing = "stream"
) -> Iterator[EvaluationBatch]:
    """Rows spread evenly over the held-out stream: windows of it, or documents.

    Args:
        stream: held-out text.
        size: rows of a batch.
        length: tokens of a row.
        windows: most rows to take; 0 takes all.
        packing: as in `Batches`.
    """
    packed = _packed(stream.tokens, length, packing)
    available = -(-(len(stream.tokens) - 1) // length) if packed is None else len(packed)
    count = min(windows, available) if windows else available
    chosen = evenly(count, available)
    for first in range(0, len(chosen), size):
        tokens = np.zeros((size, length + 1), np.int32)
        weights = np.zeros((size, length), np.float32)
        num_bytes = 0
        for row, number in enumerate(chosen[first : first + size]):
            if packed is None:
                targets = slice(number * length + 1, (number + 1) * length + 1)
                piece = stream.tokens[number * length : targets.stop]
                tokens[row, : len(piece)] = piece
                weights[row, : len(piece) - 1] = 1.0
            else:
                tokens[row] = packed[number]
                weights[row] = tokens[row, 1:] >= 0
                targets = packed.targets(number)
            num_bytes += int(stream.byte_counts[targets].sum())
        yield EvaluationBatch(tokens, weights, num_bytes)
