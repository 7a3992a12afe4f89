"""What a Hopper program computes: tiles of 64 rows for each computing warpgroup, and the columns that they visit."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_flash_jax.kernels.config import HELD_TILES, HopperBlocks
from sparse_flash_jax.kernels.tiles import TileRange, tile_range
from sparse_flash_jax.kernels.walks import Bounds, Listed, limit_at, tile_at

WARPGROUP_ROWS = 64  # of one wgmma
NARROW = 64  # columns: wider blocks leave few registers beside sums and scores


class Shapes(NamedTuple):
    """What is static of a launch. Its grid is (batch, head of the rows, program)."""

    block: HopperBlocks
    length: int
    """Slots of the rows, a multiple of 64."""
    column_tiles: int
    heads: int
    """N."""
    group: int
    """N / K."""
    members: int
    """Query heads that a program's rows meet: the group for rows of keys, else 1."""
    last_first: bool
    """Whether programs start from the last tile of rows: the longest of a causal head."""
    beside: int = 1
    """Heads whose programs are numbered by turns, not one head's after another's."""
    listed: Listed = Listed()
    in_place: bool = False
    """Whether rows and columns lie by position, [B L A H], and so do outputs."""


class Program:
    """The tiles of this program, and the part of each that this warpgroup computes."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.block = shapes, shapes.block
        self.batch, self.warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
        program, beside = lax.axis_index("program"), jnp.int32(shapes.beside)
        self.head = lax.axis_index("head") * beside + lax.rem(program, beside)
        self._first = lax.div(program, beside) * self.block.tiles
        self.row_tiles = pl.cdiv(shapes.length, self.block.rows)
        walks = self.block.walks
        self.walk = 0 if walks == 1 else lax.div(self.warpgroup, jnp.int32(self.block.warpgroups // walks))
        self.count = lax.min(jnp.int32(self.block.tiles), self.row_tiles - self._first)

    def rows(self, r: Any) -> Any:
        """Returns the rows of this warpgroup in the program's r-th tile; the last ones where it would be past them."""
        return pl.ds(lax.min(self._row(r), jnp.int32(self.shapes.length - WARPGROUP_ROWS)), WARPGROUP_ROWS)

    def part(self, ref: Any, head: Any, rows: Any) -> Any:
        """Returns rows of a head of this program's batch entry, of [B A L ...] or what lies by position."""
        by_position = self.shapes.in_place and len(ref.shape) == 4
        return ref.at[self.batch, rows, head] if by_position else ref.at[self.batch, head, rows]

    def past_the_end(self, r: Any) -> Any:
        """Returns whether this warpgroup has no rows of its own in the program's r-th tile."""
        return self._row(r) >= self.shapes.length

    def own(self, r: Any) -> Any:
        """Returns the buffer of this warpgroup's rows in the r-th tile, and then of its output."""
        place = 0 if self.block.tiles == 1 else lax.rem(r, jnp.int32(HELD_TILES))
        return place * self.block.warpgroups + self.warpgroup

    def bounds(self, ref: Any, member: Any) -> tuple[Any, Any]:
        """Returns the row of a bounds array [B|1 A L] that holds for this program and a query head of its group."""
        shapes = self.shapes
        n = self.head * shapes.members + member
        return (self.batch if ref.shape[0] > 1 else 0, lax.div(n, jnp.int32(shapes.heads // ref.shape[1])))

    def on_walk(self, walk: int) -> "Program":
        """Returns the program as the warpgroups of a walk see its columns."""
        program = copy.copy(self)
        program.walk = walk
        return program

    def columns(self, r: Any, bounds: Bounds, member: Any = 0) -> TileRange:
        """Returns the tiles of columns that the program's r-th tile visits, at least one; or the steps of its walk."""
        return self.columns_of(self._walked(r), bounds, member)

    def columns_of(self, tile: Any, bounds: Bounds, member: Any) -> TileRange:
        """Returns the same for a tile of rows by its number."""
        if bounds.steps is not None:
            row = self.bounds(bounds.steps, member)
            begin, *full, stop = (bounds.steps[*row, tile, x] for x in range(4))
            end = lax.max(stop, begin + 1)
            # A walk of no steps takes one, masked.
            first, last = (jnp.where(stop > begin, x, end) for x in full)
            return TileRange(begin, first, last, end)
        first = tile * self.block.rows
        last = lax.min(first + self.block.rows, jnp.int32(self.shapes.length)) - 1
        return self._seen(first, last, bounds.start, bounds.stop, member)

    def tile_at(self, r: Any, bounds: Bounds, member: Any = 0) -> Callable[[Any], Any]:
        """Returns which tile of columns the program's r-th tile of rows is at in a step of its walk."""
        if bounds.steps is None:
            return lambda step: step
        row, index, tile = self.bounds(bounds.steps, member), None, self._walked(r)
        if bounds.lists is not None:
            of_index, block = self.bounds(bounds.lists, member), self.shapes.listed.row(tile, bounds.lists)
            index = lambda x: bounds.lists[*of_index, block, x]
        steps = lambda x: bounds.steps[*row, tile, x]
        return lambda step: tile_at(step, steps, index, self.shapes.listed.columns)

    def limit(self, bounds: Bounds, tile: Any, member: Any = 0) -> Any:
        """Returns past which column of a tile nothing is visible to any row; None where that is not so of any."""
        if bounds.limit is None:
            return None
        of_block = lambda block: bounds.limit[*self.bounds(bounds.limit, member), block]
        return limit_at(tile, of_block, self.shapes.listed.columns, self.block.columns)

    def visit(self, r: Any, bounds: Bounds, member: Any = 0, *, together: bool = False) -> "Visit":
        """Returns the same, and those among them that this warpgroup computes with: all if they go `together`."""
        whole = self.columns(r, bounds, member)
        # Wide blocks are for runs longer than the tile.
        if together or bounds.steps is not None or self.block.warpgroups == 1 or self.block.columns > NARROW:
            return Visit(whole.start, whole.stop, whole)
        first = self.rows(r).start
        own = self._seen(first, first + WARPGROUP_ROWS - 1, bounds.start, bounds.stop, member)
        # Rows that see nothing may be given a tile beyond those of the others.
        begin = lax.min(own.start, whole.stop - 1)
        end = lax.max(lax.min(own.stop, whole.stop), begin + 1)
        full = lax.clamp(begin, own.full_start, end)
        return Visit(whole.start, whole.stop, TileRange(begin, full, lax.clamp(full, own.full_stop, end), end))

    def _seen(self, first: Any, last: Any, start: Any, stop: Any, member: Any) -> TileRange:
        """Returns the tiles that rows see; one, masked, where they see nothing, so that none is special."""
        row = self.bounds(start, member)
        seen = tile_range(
            start[*row, first], stop[*row, first], start[*row, last], stop[*row, last], self.block.columns
        )
        begin = lax.min(seen.start, jnp.int32(self.shapes.column_tiles - 1))
        end = lax.max(seen.stop, begin + 1)
        full = lax.clamp(begin, jnp.where(seen.stop > seen.start, seen.full_start, end), end)
        return TileRange(begin, full, lax.clamp(full, seen.full_stop, end), end)

    def over_tiles(self, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Runs carry = visit(r, carry) over the program's tiles."""
        if self.block.tiles == 1:
            return visit(0, carry)
        return lax.fori_loop(0, self.count, visit, jax.tree.map(jnp.int32, carry))

    def slot(self, n: Any) -> Any:
        """Returns the buffer of the walk's ring that holds the columns of its n-th step."""
        slot = lax.rem(n, jnp.int32(self.block.num_stages))
        return slot if self.block.walks == 1 else slot + self.walk * self.block.num_stages

    def tile(self, r: Any) -> Any:
        """Returns the number of the program's r-th tile of rows."""
        tile = self._first + r
        return self.row_tiles - 1 - tile if self.shapes.last_first else tile

    def _walked(self, r: Any) -> Any:
        """The number of the tile of rows that the walk of the r-th tile is of."""
        walks = self.block.walks
        if walks == 1:
            return self.tile(r)
        last = pl.cdiv(self.shapes.length * walks, self.block.rows) - 1
        return lax.min(self.tile(r) * walks + self.walk, jnp.int32(last))

    def _row(self, r: Any) -> Any:
        return self.tile(r) * self.block.rows + self.warpgroup * WARPGROUP_ROWS


class Visit(NamedTuple):
    """Tiles of columns on a warpgroup's way."""

    start: Any
    stop: Any
    """It passes [start, stop) by, as they are loaded for all warpgroups of the program ..."""
    own: TileRange
    """... and computes with these."""

    def run(self, compute: Callable[[TileRange], Any], pass_by: Callable[[Any], None]) -> Any:
        """Runs `pass_by(j)` for tiles that are not this warpgroup's own, and `compute` for those that are."""
        pl.loop(self.start, self.own.start)(pass_by)
        result = compute(self.own)
        pl.loop(self.own.stop, self.stop)(pass_by)
        return result


def after_first(visited: TileRange) -> TileRange:
    """Returns a range without its first tile."""
    second = visited.start + 1
    return TileRange(second, lax.max(visited.full_start, second), lax.max(visited.full_stop, second), visited.stop)
