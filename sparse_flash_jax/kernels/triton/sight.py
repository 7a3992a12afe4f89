"""What the rows of a Triton program see: the tiles to visit, which columns of one are visible, and from how far."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from sparse_flash_jax.kernels import walks
from sparse_flash_jax.kernels.alibi import Distances, penalty_by_distance
from sparse_flash_jax.kernels.config import Blocks
from sparse_flash_jax.kernels.repeats import Repeats, repeated
from sparse_flash_jax.kernels.tiles import LOG2E, TileRange, sweep, tile_range
from sparse_flash_jax.kernels.walks import Bounds, Listed


class Sight:
    """What the rows of tile i of a head see.

    Args:
        sides: refs of the side, of distances or None, and of repeats.
        listed: of its blocks.
        b: batch entry.
        n: query head, one of `heads`.
        heads: N.
        i: tile of rows.
        rows: slice of the rows.
        block: the tile.
    """

    def __init__(
        self,
        sides: tuple[Bounds, Distances | None, Repeats],
        listed: Listed,
        b: Any,
        n: Any,
        heads: int,
        i: Any,
        rows: Any,
        block: Blocks,
    ):
        refs, self._distances, self._repeats = sides
        self._refs, self._listed, self._place, self._i, self._block = refs, listed, (b, n, heads), i, block
        row = self._row(refs.start)
        self._row_of_start, self._first = row, i * block.rows
        self._bounds = [(refs.start[*row, rows], refs.stop[*row, rows])]  # [rows] each
        if refs.second is not None:
            row = self._row(refs.second[0])
            self._bounds.append((refs.second[0][*row, rows], refs.second[1][*row, rows]))
        if self._distances is not None:
            slopes, of_rows, _ = self._distances
            self._slope, self._position = slopes[n] * LOG2E, of_rows[*self._row(of_rows), rows]  # [rows]
        self._ids = [ref[*self._row(ref), rows] for ref in self._repeats.rows]  # [rows] each

    def sweep(self, step: Callable[..., Any], carry: Any) -> Any:
        """Runs `carry = step(tile, carry, masked=...)` over the tiles of columns that the rows touch."""
        refs, block = self._refs, self._block
        if refs.steps is None:
            row, first, last = self._row_of_start, self._first, self._first + block.rows - 1
            start, stop = refs.start, refs.stop
            bounds = start[*row, first], stop[*row, first], start[*row, last], stop[*row, last]
            return sweep(step, tile_range(*bounds, block.columns), carry)
        row = self._row(refs.steps)
        steps = [refs.steps[*row, self._i, x] for x in range(6)]
        index = None
        if refs.lists is not None:
            of_index = self._row(refs.lists)
            listed_row = self._listed.row(self._i, refs.lists)
            index = lambda x: refs.lists[*of_index, listed_row, x]
        tile_at = functools.partial(walks.tile_at, steps=lambda x: steps[x], index=index, split=self._listed.columns)
        return sweep(lambda i, carry, masked: step(tile_at(i), carry, masked=masked), TileRange(*steps[:4]), carry)

    def visible(self, tile: Array, masked: Any) -> Array | None:
        """Returns which columns of a tile each row sees: bool [rows, columns]; None where it sees all."""
        seen = self._inside(tile) if masked else None
        for of_rows, ref in zip(self._ids, self._repeats.columns, strict=True):
            of_columns = ref[*self._row(ref), pl.ds(tile * self._block.columns, self._block.columns)]
            new = ~repeated(of_rows, of_columns)
            seen = new if seen is None else seen & new
        return seen

    def _inside(self, tile: Array) -> Array:
        """Which columns of a tile are in the runs of each row."""
        columns = self._block.columns
        column = tile * columns + lax.broadcasted_iota(jnp.int32, (self._block.rows, columns), 1)
        seen = [(start[:, None] <= column) & (column < stop[:, None]) for start, stop in self._bounds]
        visible = functools.reduce(jnp.logical_or, seen)
        limit = self._refs.limit
        if limit is None:
            return visible
        of_block = lambda block: limit[*self._row(limit), block]
        return visible & (column < walks.limit_at(tile, of_block, self._listed.columns, columns))

    def penalty(self, tile: Array) -> Array | None:
        """Returns what the scores of a tile lose by distance, in base 2: [rows, columns]; None of no slopes."""
        if self._distances is None:
            return None
        of_columns, columns = self._distances.columns, self._block.columns
        position = of_columns[*self._row(of_columns), pl.ds(tile * columns, columns)]
        return penalty_by_distance(self._slope, self._position, position)

    def _row(self, ref: Any) -> tuple[Any, Any]:
        """The row of an array [B|1 A ...] that holds for this batch entry and head."""
        b, n, heads = self._place
        return (b if ref.shape[0] > 1 else 0, lax.div(n, jnp.int32(heads // ref.shape[1])))
