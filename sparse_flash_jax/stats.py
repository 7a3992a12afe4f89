"""What a plan costs, counted on the host: visible pairs, tiles at given block sizes, rows that see nothing.

What that means in time on the default device is left to time_share.py.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparse_flash_jax.kernels.tiles import Runs, TileRange, tile_range
from sparse_flash_jax.kernels.walks import keys_of_queries, of_queries, walk_of
from sparse_flash_jax.time_share import Method, TimeShare, expected_time_share


@dataclasses.dataclass(frozen=True)
class PlanStats:
    """Counts over a plan's batch entries and heads; an axis of size 1 counts once. Printing gives a table."""

    heads: int
    """Batch entries times heads that the counts below sum over."""
    visible_pairs: int
    """Pairs of a query and a key that it sees."""
    density: float
    """Visible pairs over those of dense causal attention; nearly 2 for a bidirectional plan."""
    block_q: int
    block_k: int
    total_tiles: int
    """Tiles of block_q queries x block_k keys in all, before anything is dropped."""
    executed_tiles: int
    """Tiles that a kernel visits."""
    full_tiles: int
    """Visited tiles that are wholly visible, so that they need no mask."""
    empty_queries: int
    """Queries whose output is 0: dropped ones, and kept ones that see no key."""
    largest_group: int
    """Kept keys in the largest group of any head."""
    expected_time: TimeShare | None
    """Of buckets, or of dropping, at this length and density beside dense attention on the default device.

    None where no device like this was measured, nothing is visible, or T is not S; nor are there measurements of more
    visible pairs than in dense causal attention, or of runs cut by a window. A bidirectional plan of a density up to 1
    is taken for a causal one.
    """

    @property
    def tile_efficiency(self) -> float:
        """Visible pairs over the pairs in visited tiles; 1 where nothing is computed in vain."""
        pairs = self.executed_tiles * self.block_q * self.block_k
        return self.visible_pairs / pairs if pairs else 1.0

    def __str__(self) -> str:
        executed = self.executed_tiles / self.total_tiles
        rows = {
            "visible pairs": f"{self.visible_pairs:,}",
            "density": f"{self.density:.4f} of dense causal",
            "tiles": f"{self.executed_tiles:,} of {self.total_tiles:,} visited ({executed:.2%}), "
            f"{self.full_tiles:,} wholly visible ({self.block_q} x {self.block_k})",
            "tile efficiency": f"{self.tile_efficiency:.3f}",
            "empty queries": f"{self.empty_queries:,}",
            "largest group": f"{self.largest_group:,} keys",
            "expected time": str(self.expected_time or "not known on this device or for these lengths"),
        }
        return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def plan_stats(
    runs: Runs,
    *,
    query_length: int,
    key_length: int,
    causal_pairs: int,
    largest_group: int,
    method: Method,
    permuted: bool,
    block_q: int,
    block_k: int,
) -> PlanStats:
    """Counts a plan; see `AttentionPlan.stats`."""
    start, stop = np.asarray(runs.k_start), np.asarray(runs.k_stop)
    keys = np.asarray(keys_of_queries(runs))
    heads, visible = math.prod(keys.shape[:2]), _sum(keys)
    if runs.blocks is not None:
        block_q, block_k = math.gcd(block_q, runs.blocks.sizes.queries), math.gcd(block_k, runs.blocks.sizes.keys)
    tiles = _tiles(runs, block_q, block_k)
    empty_slots = int((keys == 0).sum())
    density = visible / (heads * causal_pairs)
    expected = None
    if query_length == key_length and 0 < density <= 1 and runs.plain and not _windowed(start, stop):
        expected = expected_time_share(query_length, density, method=method)
        if expected is not None and not permuted:
            expected = expected._replace(share=expected.own_dense)
    return PlanStats(
        heads=heads,
        visible_pairs=visible,
        density=density,
        block_q=block_q,
        block_k=block_k,
        total_tiles=heads * -(-query_length // block_q) * -(-key_length // block_k),
        executed_tiles=_sum(tiles.stop - tiles.start),
        full_tiles=_sum(tiles.full_stop - tiles.full_start),
        empty_queries=empty_slots + heads * (query_length - start.shape[-1]),
        largest_group=largest_group,
        expected_time=expected,
    )


def _tiles(runs: Runs, block_q: int, block_k: int) -> TileRange:
    """What the passes over queries visit."""
    if not runs.plain:
        steps = walk_of(of_queries(runs), block_q, block_k).steps
        return TileRange(steps[..., 0], steps[..., 1], steps[..., 2], steps[..., 3])
    start, stop = np.asarray(runs.k_start), np.asarray(runs.k_stop)
    first = np.arange(0, start.shape[-1], block_q)
    last = np.minimum(first + block_q, start.shape[-1]) - 1
    ends = (start[..., first], stop[..., first], start[..., last], stop[..., last])
    first_start, first_stop, last_start, last_stop = (jnp.asarray(x) for x in ends)
    return tile_range(first_start, first_stop, last_start, last_stop, block_k)


def _windowed(start: np.ndarray, stop: np.ndarray) -> bool:
    """Whether runs move on within a group: without a window, those that overlap start at the same key."""
    earlier, later = start[..., :-1], start[..., 1:]
    return bool(((earlier < later) & (later < stop[..., :-1])).any())


def _sum(counts: np.ndarray | Array) -> int:
    """A sum that does not stop at int32."""
    return int(np.asarray(counts).sum(dtype=np.int64))
