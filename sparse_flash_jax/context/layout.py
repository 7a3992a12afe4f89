"""Which positions of a sequence each device holds, where it is divided over several: in order, or in a zigzag.

In order, the last of D devices sees about twice the mean number of pairs under a causal rule, and the first next to
none. In a zigzag the sequence is cut into 2 D chunks, and device i holds chunks i and 2 D - 1 - i, which together see
as much as those of any other device. Either way a device's rows are in the order of their positions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from sparse_flash_jax.rule import Rule
from sparse_flash_jax.validation import positive_int

Index = int | np.ndarray | Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a sequence is divided into equal parts; static.

    Args:
        length: tokens of the whole sequence.
        parts: devices that it is divided over.
        zigzag: whether part i holds chunks i and 2 * parts - 1 - i of 2 * parts; else it holds the i-th of `parts`.

    Raises:
        ValueError: if the chunks are not of one size.
    """

    length: int
    parts: int = 1
    zigzag: bool = False

    def __post_init__(self):
        positive_int("parts", self.parts)
        chunks = self.parts * self.chunks_of_part
        if self.length % chunks:
            raise ValueError(
                f"a sequence over {self.parts} devices{' in a zigzag' if self.zigzag else ''} must be a multiple of "
                f"{chunks} long, got {self.length}; pad it with tokens that are dropped (query_keep, key_keep)."
            )

    @property
    def chunks_of_part(self) -> int:
        """Chunks that each part holds."""
        return 2 if self.zigzag else 1

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, at consecutive positions."""
        return self.length // (self.parts * self.chunks_of_part)

    @property
    def rows(self) -> int:
        """Tokens of a part."""
        return self.length // self.parts

    def starts(self, part: Index) -> tuple[Index, ...]:
        """Returns the first position of each chunk of a part."""
        chunks = (part, 2 * self.parts - 1 - part) if self.zigzag else (part,)
        return tuple(chunk * self.chunk for chunk in chunks)

    def positions(self) -> np.ndarray:
        """Returns the position of each row of the whole array, parts in turn: int32 [length]."""
        starts = [start for part in range(self.parts) for start in self.starts(part)]
        return np.concatenate([np.arange(self.chunk, dtype=np.int32) + start for start in starts], dtype=np.int32)


class Part(NamedTuple):
    """The rows of one device."""

    layout: Layout
    number: Index
    """Which of the layout's parts: an int, or a traced int32."""

    def position_of(self, row: Int32[Array, "*rows"]) -> Int32[Array, "*rows"]:
        """Returns the positions of rows of this part."""
        first, *second = self.layout.starts(self.number)
        position = row + first
        for start in second:
            position = jnp.where(row < self.layout.chunk, position, row - self.layout.chunk + start)
        return position

    def rows_before(self, position: Int32[Array, "*positions"]) -> Int32[Array, "*positions"]:
        """Returns how many rows of this part lie before a position, which may be outside of the sequence."""
        first, *second = (jnp.clip(position - x, 0, self.layout.chunk) for x in self.layout.starts(self.number))
        return sum(second, first)


def sees(rule: Rule, queries: Part, keys: Part) -> np.ndarray:
    """Returns whether any query of a part may see a key of another under the rule, or of many: numbers may be arrays.

    Where none may, nothing is to be computed. Whether one does, groups and dropping decide.
    """
    shown = np.zeros(np.broadcast_shapes(np.shape(queries.number), np.shape(keys.number)), bool)
    for query in queries.layout.starts(queries.number):
        for key in keys.layout.starts(keys.number):
            in_window = rule.window is None or query - (key + keys.layout.chunk - 1) < rule.window
            begun = not rule.causal or query + queries.layout.chunk - 1 - int(rule.exclude_self) >= key
            shown = shown | (in_window & begun)
    return np.asarray(shown)


def to_zigzag[Rows: (jax.Array, np.ndarray)](x: Rows, parts: int, axis: int = 1) -> Rows:
    """Returns an array of a whole sequence with its chunks as a zigzag has them, to be divided over devices in order.

    Of token ids that is cheap, and all that follows keeps their order. Rotary positions are then those of
    `zigzag_positions`; a table of learned ones [T D] goes through this function, too, with axis 0.

    Args:
        x: an array of JAX or numpy whose `axis` is the sequence, in order.
        parts: devices that it will be divided over.
        axis: the axis of positions.

    Raises:
        ValueError: if the sequence is not a multiple of 2 * parts long.
    """
    return _take_chunks(x, parts, axis, _chunks(parts))


def from_zigzag[Rows: (jax.Array, np.ndarray)](x: Rows, parts: int, axis: int = 1) -> Rows:
    """Returns the sequence in order again: the inverse of `to_zigzag`."""
    return _take_chunks(x, parts, axis, np.argsort(_chunks(parts)))


def zigzag_positions(length: int, parts: int) -> np.ndarray:
    """Returns the position of each row of a sequence that is laid out by `to_zigzag`: int32 [length]."""
    return Layout(length, parts, zigzag=True).positions()


def _chunks(parts: int) -> np.ndarray:
    """The chunk in each place of the zigzag."""
    first = np.arange(parts)
    return np.stack([first, 2 * parts - 1 - first], axis=1).reshape(-1)


def _take_chunks(x: Any, parts: int, axis: int, order: np.ndarray) -> Any:
    layout = Layout(x.shape[axis], parts, zigzag=True)
    cut = x.reshape(*x.shape[:axis], 2 * parts, layout.chunk, *x.shape[axis + 1 :])
    pieces = [cut[(slice(None),) * axis + (chunk,)] for chunk in order]
    return (np if isinstance(x, np.ndarray) else jnp).concatenate(pieces, axis=axis)
