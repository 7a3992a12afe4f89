"""Whole documents packed into rows, which do not see each other there.

    document   d1 d2 d3 END                a document longer than a row is cut into pieces
    piece      END | d1 d2 d3 END          the token before it, which is only an input, and its targets
    row        ~END d1 d2 d3 END ~END e1 e2 END ~END ~END

A token that begins a piece is stored as its complement ~token, which is negative: it is no target, and what follows it
sees nothing before it. Padding is pieces of one token. So a row needs no segment ids or weights beside it, and every
token of every document is a target once an epoch. `unpack` reads rows where a step is traced; which rows make a batch
is left to `batches.py`.
"""

import bisect
import dataclasses
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32


class Unpacked(NamedTuple):
    """Packed rows as the model takes them.

    Attributes:
        tokens: int32 [B length+1], none of them negative.
        segment_ids: of the inputs, int32 [B length]; tokens see only their own piece.
        weights: of the targets' losses, float32 [B length]; 0 where a piece begins.
    """

    tokens: Int32[Array, "B T1"]
    segment_ids: Int32[Array, "B T"]
    weights: Float32[Array, "B T"]


def unpack(rows: Int32[Array | np.ndarray, "B T1"]) -> Unpacked:
    """Reads packed rows, inside or outside jit."""
    rows = jnp.asarray(rows)
    begins = rows < 0
    segment_ids = jnp.cumsum(begins.astype(jnp.int32), axis=1)[:, :-1]
    return Unpacked(jnp.where(begins, ~rows, rows), segment_ids, counted(rows))


def counted(rows: Int32[Array | np.ndarray, "*batches T1"]) -> Float32[Array, "*batches T"]:
    """1 for each target that is learned from, else 0."""
    return (jnp.asarray(rows)[..., 1:] >= 0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """The rows of an epoch.

    Attributes:
        tokens: the stream [L]; each document ends with its last token.
        length: targets of a row.
        starts: the first target of each piece, a place in the stream, int64 [pieces]; row after row.
        counts: targets of each piece, int64 [pieces].
        first: number of the first piece of each row, and of all pieces, int64 [rows + 1].
    """

    tokens: np.ndarray
    length: int
    starts: np.ndarray
    counts: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, length: int) -> Self:
        """Packs the documents of a stream, whose last token ends a document wherever it stands."""
        starts, counts = _pieces(tokens, length)
        row, offset = best_fit(counts + 1, length + 1)
        order = np.lexsort((offset, row))
        first = np.searchsorted(row[order], np.arange(row.max() + 2))
        return cls(tokens, length, starts[order], counts[order], first)

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """A row: int32 [length + 1]."""
        places, begins = self._places(index)
        row = np.full(self.length + 1, ~int(self.tokens[-1]), np.int32)
        row[: len(places)] = self.tokens[places]
        row[begins] = ~row[begins]
        return row

    def targets(self, index: int) -> np.ndarray:
        """Where the targets of a row stand in the stream: int64 [targets]."""
        return np.delete(*self._places(index))

    def _places(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of a row stand in the stream, and which of them begin a piece: two arrays of int64."""
        pieces = slice(self.first[index], self.first[index + 1])
        sizes = self.counts[pieces] + 1
        begins = np.cumsum(sizes) - sizes
        # The token before the first document is the stream's last, another end: -1 is its place too.
        return np.repeat(self.starts[pieces] - 1 - begins, sizes) + np.arange(sizes.sum()), begins

    @property
    def filled(self) -> float:
        """The share of all the rows' targets that are tokens of documents."""
        return int(self.counts.sum()) / (len(self) * self.length)


def _pieces(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First target and number of targets of each piece: whole documents, or as much of one as fills a row."""
    stops = np.flatnonzero(tokens == tokens[-1]) + 1
    starts = np.concatenate([[0], stops[:-1]])
    pieces = -(-(stops - starts) // length)
    document = np.repeat(np.arange(len(stops)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = starts[document] + number * length
    return starts, np.minimum(stops[document] - starts, length)


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the largest piece first, each into the fullest row that has room for it.

    Pieces of a size are placed at once, and so are rows with the same room, so that the work grows with the number of
    sizes, and hardly with the number of pieces.

    Args:
        sizes: int [pieces], each from 1 to capacity.
        capacity: size of a row.

    Returns:
        The row of each piece and its offset there, int64 [pieces] each. Rows have no gaps but at their ends.
    """
    order = np.argsort(-sizes, kind="stable")
    row, offset = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    rows_with: dict[int, np.ndarray] = {}
    rooms: list[int] = []  # the keys of rows_with, sorted
    count = done = stop = 0
    for size, alike in zip(*(x[::-1].tolist() for x in np.unique(sizes, return_counts=True)), strict=True):
        stop += alike
        while done < stop:
            place = bisect.bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms.pop(place)
                rows = rows_with.pop(room)
            else:
                room = capacity
                rows = np.arange(count, count - (-(stop - done) // (capacity // size)))
                count += len(rows)
            each = room // size
            number = np.arange(min(stop - done, each * len(rows)))
            pieces = order[done : done + len(number)]
            row[pieces] = rows[number // each]
            offset[pieces] = capacity - room + size * (number % each)
            done += len(number)
            full, rest = divmod(len(number), each)
            for left, some in (
                (room - each * size, rows[:full]),
                (room - rest * size, rows[full : full + 1]),
                (room, rows[full + 1 :]),
            ):
                if left and len(some):
                    if left not in rows_with:
                        bisect.insort(rooms, left)
                        rows_with[left] = some
                    else:
                        rows_with[left] = np.concatenate([rows_with[left], some])
    return row, offset
