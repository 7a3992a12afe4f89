"""Runs of visible slots, and the ranges of tiles that they touch.

Decides which tiles a kernel visits and which of those need a mask. Knows nothing of where the runs come from.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

LOG2E = 1.4426950408889634
"""exp2 is one instruction on a GPU, exp two: scores are scaled by log2(e) there."""

LOWEST = -1e30
"""Score of a hidden pair: finite, so that a row of such has no NaN in it; visible scores must lie above FLOOR."""

FLOOR = LOWEST / 2
"""Where the running maximum of a row may start: hidden scores lie so far below it that exp2 of the difference is 0."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Slots of a listed block; static."""

    queries: int
    keys: int


class BlockLists(NamedTuple):
    """Which blocks of keys each block of queries sees something of, said twice; pairs outside of them are hidden.

    Queries that have no listed block have empty runs, and so have keys. Axes are those of `Runs`.
    """

    key_index: Int32[Array, "#B #N queries listed"]
    """Blocks of keys that each block of queries sees, in increasing order; what follows does not count."""
    key_count: Int32[Array, "#B #N queries"]
    """How many those are."""
    query_index: Int32[Array, "#B #N keys listing"]
    """Blocks of queries that see each block of keys, likewise."""
    query_count: Int32[Array, "#B #N keys"]
    kept_keys: Int32[Array, "#B #N keys"] | None
    """Keys of each block that are kept, in its first slots; None where all are."""
    sizes: BlockSizes


def listed(
    index: Int32[Array, "b a blocks listed"], count: Int32[Array, "b a blocks"]
) -> Bool[Array, "_b _a _blocks _l"]:
    """Returns which entries of block lists count."""
    return jnp.arange(index.shape[3], dtype=jnp.int32)[None, None, None] < count[..., None]


class Runs(NamedTuple):
    """The visible pairs of slots, said twice: by query and by key.

    The first four arrays are int32; no start is past its stop, and an empty run has `start == stop`. The batch axis is
    B or 1. The head axis may be any divisor A of the number of query heads N: query head n reads row n // (N // A).
    Bounds are non-decreasing along their last axis, unless there is a second run or are block lists.
    """

    k_start: Int32[Array, "B N T"]
    """First key slot that the query in each slot sees."""
    k_stop: Int32[Array, "B N T"]
    """One past the last key slot that the query in each slot sees."""
    q_start: Int32[Array, "B N S"]
    """First query slot that sees the key in each slot."""
    q_stop: Int32[Array, "B N S"]
    """One past the last query slot that sees the key in each slot."""
    second: "Runs | None" = None
    """Further pairs, none of which is among those of the first runs."""
    blocks: BlockLists | None = None
    """Blocks outside of which nothing is visible, not together with second runs."""

    @property
    def plain(self) -> bool:
        """Whether these four arrays say it all."""
        return self.second is None and self.blocks is None


class TileRange(NamedTuple):
    """Tiles [start, stop) are visited; of these, [full_start, full_stop) are wholly visible and need no mask."""

    start: Int32[Array, "*tiles"]
    full_start: Int32[Array, "*tiles"]
    full_stop: Int32[Array, "*tiles"]
    stop: Int32[Array, "*tiles"]


def tile_range(
    first_start: Int32[Array, "*tiles"],
    first_stop: Int32[Array, "*tiles"],
    last_start: Int32[Array, "*tiles"],
    last_stop: Int32[Array, "*tiles"],
    block: int,
) -> TileRange:
    """Returns the tiles of `block` slots that the runs of some consecutive rows touch.

    Bounds are monotone, so those of the first and the last row say it all: every run lies in
    [first_start, last_stop), and every row sees all of [last_start, first_stop).

    Args:
        first_start: start of the first row's run.
        first_stop: stop of the first row's run.
        last_start: start of the last row's run.
        last_stop: stop of the last row's run.
        block: slots in a tile.

    Returns:
        The range, with start <= full_start <= full_stop <= stop.
    """
    start = first_start // block
    stop = jnp.where(last_stop > first_start, (last_stop + block - 1) // block, start)
    full_start = lax.clamp(start, (last_start + block - 1) // block, stop)
    full_stop = lax.clamp(full_start, first_stop // block, stop)
    return TileRange(start, full_start, full_stop, stop)


def scores_of(
    products: Any, scale: float, soft_cap: float | None, penalty: Any = None, *, unit: float = 1.0
) -> tuple[Any, Any]:
    """Returns scores in so many units of the natural exponent, and the slope of the soft cap there: None of no cap.

    A penalty, in the same units, is taken off after the cap, and leaves that slope as it is.
    """
    if soft_cap is None:
        scores, slope = products * (scale * unit), None
    else:
        bent = jnp.tanh(products * (scale / soft_cap))
        scores, slope = bent * (soft_cap * unit), 1.0 - bent * bent
    return scores if penalty is None else scores - penalty, slope


Masked = Literal["both", "stop"] | None
"""Which bounds hide pairs of a tile: both, none, or in tiles past all starts those where runs stop."""


def sweep(step: Callable[..., Any], tiles: TileRange, carry: Any) -> Any:
    """Runs `carry = step(tile, carry, masked=...)` over a range: masked by "both" bounds, by None, by "stop"."""
    carry = lax.fori_loop(tiles.start, tiles.full_start, functools.partial(step, masked="both"), carry)
    carry = lax.fori_loop(tiles.full_start, tiles.full_stop, functools.partial(step, masked=None), carry)
    return lax.fori_loop(tiles.full_stop, tiles.stop, functools.partial(step, masked="stop"), carry)
