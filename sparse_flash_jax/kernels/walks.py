"""The tiles that a pass visits where a row sees more than one run: two of them, or listed blocks within one.

A kernel then loops over steps of a walk, [start, stop), and asks which tile of columns a step is at. Of one run alone
steps are tiles, and nothing of this is in a kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.padding import pad_bounds
from sparse_flash_jax.kernels.tiles import Runs, TileRange, listed

_NONE = 1 << 30  # where a run that sees nothing begins


class Side(NamedTuple):
    """What a pass knows of its rows: queries, or keys and then the transpose. Arrays as in `Runs` and `BlockLists`."""

    start: Int32[Array, "b a L"]
    stop: Int32[Array, "b a L"]
    second: tuple[Int32[Array, "b a L"], Int32[Array, "b a L"]] | None = None
    lists: Int32[Array, "b a blocks listed"] | None = None
    lengths: Int32[Array, "b a blocks"] | None = None
    limit: Int32[Array, "b a columns"] | None = None
    """Slots of each block of columns that are visible at all, the first ones; None: all."""
    blocks: tuple[int, int] = (0, 0)
    """Rows and columns of a listed block."""

    @property
    def plain(self) -> bool:
        """Whether there is one run, and nothing else."""
        return self.second is None and self.lists is None


def of_queries(runs: Runs) -> Side:
    """Returns the keys that queries see."""
    second = None if runs.second is None else (runs.second.k_start, runs.second.k_stop)
    side = Side(runs.k_start, runs.k_stop, second)
    lists = runs.blocks
    if lists is None:
        return side
    sizes = lists.sizes.queries, lists.sizes.keys
    return side._replace(lists=lists.key_index, lengths=lists.key_count, limit=lists.kept_keys, blocks=sizes)


def of_keys(runs: Runs) -> Side:
    """Returns the queries that see keys."""
    second = None if runs.second is None else (runs.second.q_start, runs.second.q_stop)
    side = Side(runs.q_start, runs.q_stop, second)
    lists = runs.blocks
    if lists is None:
        return side
    sizes = lists.sizes.keys, lists.sizes.queries
    return side._replace(lists=lists.query_index, lengths=lists.query_count, blocks=sizes)


@jax.jit
def keys_of_queries(runs: Runs) -> Int32[Array, "b a T"]:
    """Returns how many keys each query sees."""
    if runs.blocks is None:
        keys = runs.k_stop - runs.k_start
        return keys if runs.second is None else keys + keys_of_queries(runs.second)
    lists, query = runs.blocks, jnp.arange(runs.k_start.shape[2], dtype=jnp.int32)
    block = query // lists.sizes.queries
    index = lists.key_index[:, :, block]  # [b a T listed]
    first, size = index * lists.sizes.keys, jnp.int32(lists.sizes.keys)
    if lists.kept_keys is not None:
        size = jnp.take_along_axis(lists.kept_keys[:, :, None], index, axis=3)
    start, stop = (x[..., None] for x in (runs.k_start, runs.k_stop))
    pairs = jnp.maximum(jnp.minimum(first + size, stop) - jnp.maximum(first, start), 0)
    return jnp.sum(jnp.where(listed(index, lists.key_count[:, :, block]), pairs, 0), axis=3)


class Walk(NamedTuple):
    """The walk of each tile of rows.

    Attributes:
        steps: [b a tiles 6]: the four of a `TileRange`, in steps; then the step from which on a second run is visited,
            and how many tiles lie between it and the first.
        lists: of listed blocks of columns, by block of rows: [b a blocks listed]; None of two runs.
    """

    steps: Int32[Array, "b a tiles 6"]
    lists: Int32[Array, "b a blocks listed"] | None


def walk_of(side: Side, rows: int, columns: int) -> Walk:
    """Returns the walks of tiles of so many rows over tiles of so many columns, which divide listed blocks."""
    if side.lists is None:
        assert side.second is not None
        return Walk(_over_two_runs(side, side.second, rows, columns), None)
    return Walk(_over_blocks(side, rows, columns), side.lists)


class Bounds(NamedTuple):
    """A side of the runs, for tiles of rows and columns; in a kernel, refs of it. None of what the plan has not."""

    start: Any
    stop: Any
    second: tuple[Any, Any] | None = None
    steps: Any = None
    """These and those below as in `Walk` and `Side`."""
    lists: Any = None
    limit: Any = None


class Listed(NamedTuple):
    """Of listed blocks; static."""

    rows: int = 1
    """Tiles of rows in a block."""
    columns: int = 1
    """Tiles of columns in a block."""

    def row(self, tile: Any, lists: Any) -> Any:
        """Returns the row of lists [b a blocks listed] that holds for a tile of rows, which may be past the last."""
        return lax.min(lax.div(tile, jnp.int32(self.rows)), jnp.int32(lists.shape[2] - 1))


def bounds_of(side: Side, rows: int, columns: int, whole: int) -> tuple[Bounds, Listed]:
    """Returns a side of the runs for such tiles, its bounds padded to a multiple of `whole`; and what is static."""
    start, stop = (pad_bounds(x, whole) for x in (side.start, side.stop))
    if side.plain:
        return Bounds(start, stop), Listed()
    second = None if side.second is None else (pad_bounds(side.second[0], whole), pad_bounds(side.second[1], whole))
    steps, lists = walk_of(side, rows, columns)
    of_rows, of_columns = side.blocks
    tiles = Listed() if lists is None else Listed(of_rows // rows, of_columns // columns)
    return Bounds(start, stop, second, steps, lists, side.limit), tiles


def tile_at(step: Any, steps: Any, index: Any, split: int) -> Any:
    """Returns the tile of columns that a step is at.

    Args:
        step: int32.
        steps: what `Walk.steps` has of the tile of rows; `steps(i)` gives its i-th.
        index: `index(i)` gives the i-th listed block; None of two runs.
        split: tiles of a listed block.
    """
    if index is None:
        return step + jnp.where(step >= steps(4), steps(5), 0)
    if split == 1:
        return index(step)
    part = jnp.int32(split)
    return index(lax.div(step, part)) * split + lax.rem(step, part)


def limit_at(tile: Any, limit: Any, split: int, columns: int) -> Any:
    """Returns from which column on nothing of a tile is visible; `limit(i)` is of the i-th block, as `Side.limit`."""
    block = lax.div(tile, jnp.int32(split))
    return block * split * columns + limit(block)


def _over_two_runs(side: Side, second: tuple[Array, Array], rows: int, columns: int) -> Int32[Array, "b a tiles 6"]:
    runs = [_tiles(*bounds, rows, columns) for bounds in ((side.start, side.stop), second)]
    swap = runs[1].start < runs[0].start
    low, high = (TileRange(*(jnp.where(swap, y, x) for x, y in zip(*pair, strict=True))) for pair in (runs, runs[::-1]))
    apart = (high.start > low.stop) & (high.stop > high.start)
    jump = jnp.where(apart, high.start - low.stop, 0)
    stop = jnp.where(apart, high.stop - jump, jnp.where(high.stop > high.start, lax.max(low.stop, high.stop), low.stop))
    # Of the tiles that need no mask, those of one run.
    by_high = high.full_stop - high.full_start > low.full_stop - low.full_start
    full_start, full_stop = (
        jnp.where(by_high, x - jump, y) for x, y in ((high.full_start, low.full_start), (high.full_stop, low.full_stop))
    )
    full_start = lax.clamp(low.start, full_start, stop)
    full_stop = lax.clamp(full_start, full_stop, stop)
    start = jnp.where(stop > low.start, low.start, 0)
    stop, full_start, full_stop = (jnp.where(low.stop > low.start, x, 0) for x in (stop, full_start, full_stop))
    return jnp.stack([start, full_start, full_stop, stop, jnp.where(apart, low.stop, stop), jump], axis=-1)


def _over_blocks(side: Side, rows: int, columns: int) -> Int32[Array, "b a tiles 6"]:
    assert side.lists is not None
    assert side.lengths is not None
    of_rows, of_columns = side.blocks
    split, tiles = of_columns // columns, -(-side.start.shape[2] // rows)
    block = jnp.minimum(jnp.arange(tiles, dtype=jnp.int32) * rows // of_rows, side.lists.shape[2] - 1)
    part = jnp.arange(split, dtype=jnp.int32)[None, None, None, None]
    lists, lengths = side.lists[:, :, block], side.lengths[:, :, block]
    tile, counts = lists[..., None] * split + part, listed(lists, lengths)[..., None]  # [b a tiles listed split]
    edges = [x[..., None, None] for x in _edges(side.start, side.stop, rows)]
    lowest, highest, last_start, first_stop = edges
    count = lambda x: jnp.sum(x & counts, axis=(3, 4), dtype=jnp.int32)
    begin, end = count((tile + 1) * columns <= lowest), count(tile * columns < highest)
    # Where nothing is visited, the first step is still at a listed block, for kernels that visit one tile always.
    begin = jnp.where(end > begin, begin, jnp.clip(split * lengths - 1, 0, begin))
    end = lax.max(begin, end)
    if side.limit is None:
        full_start = lax.clamp(begin, count(tile * columns < last_start), end)
        full_stop = lax.clamp(full_start, count((tile + 1) * columns <= first_stop), end)
    else:
        full_start = full_stop = end
    return jnp.stack([begin, full_start, full_stop, end, end, jnp.zeros_like(end)], axis=-1)


def _tiles(start: Array, stop: Array, rows: int, columns: int) -> TileRange:
    """The tiles that a run of each row touches; the range of rows that see nothing begins past all others."""
    lowest, highest, last_start, first_stop = _edges(start, stop, rows)
    begin = jnp.where(highest > lowest, lowest // columns, _NONE)
    end = jnp.where(highest > lowest, -(-highest // columns), _NONE)
    full_start = lax.clamp(begin, -(-last_start // columns), end)
    return TileRange(begin, full_start, lax.clamp(full_start, first_stop // columns, end), end)


def _edges(start: Array, stop: Array, rows: int) -> tuple[Array, Array, Array, Array]:
    """Of each tile of rows: where the first run starts and the last stops, without empty ones; and the other way round.

    Bounds need not be monotone here.
    """
    pad = (0, 0), (0, 0), (0, -start.shape[2] % rows)
    start, stop = (jnp.pad(x, pad, mode="edge") for x in (start, stop))
    start, stop = (x.reshape(*x.shape[:2], -1, rows) for x in (start, stop))
    some = stop > start
    lowest, highest = jnp.where(some, start, _NONE).min(axis=3), jnp.where(some, stop, 0).max(axis=3)
    return lowest, highest, start.max(axis=3), stop.min(axis=3)
