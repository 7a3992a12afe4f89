"""dq inside of the dK/dV kernel: five products for a pair of tiles, where a dQ kernel of its own makes them seven.

The warpgroups that compute ds, of 64 keys each, leave it in shared memory. One more warpgroup makes of it

    dq[queries of the step] += ds^T k    over all keys of the program

in float32 sums in device memory. Programs add to a sum one after the other, from the last keys to the first, so that
it is the same in every run: float32 sums depend on their order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from sparse_flash_jax.kernels.config import HopperBlocks
from sparse_flash_jax.kernels.mosaic.launch import buffers
from sparse_flash_jax.kernels.mosaic.pipeline import Role, over_members, split_roles
from sparse_flash_jax.kernels.mosaic.products import afresh, multiply, product
from sparse_flash_jax.kernels.mosaic.program import WARPGROUP_ROWS, Program
from sparse_flash_jax.kernels.tiles import TileRange
from sparse_flash_jax.kernels.walks import Bounds

DS_STAGES = 3
"""Blocks of ds on their way to the warpgroup that sums dq."""
DQ_STAGES = 2
"""Blocks of dq on their way to device memory."""
SPAN = 4
"""Blocks of queries that are handed on at a time: to wait for one's turn takes as long as two steps."""
BESIDE = 4
"""Heads whose programs are numbered by turns, at most, so that a tile's program does not follow on its successor's."""
CACHED = 16 * 2**20
"""Bytes that these heads may read and add to, so that they stay in an H100's L2 cache, of which half is near."""


class DsRing(NamedTuple):
    """Blocks of ds in shared memory, on their way from the warpgroups that compute them to the one that sums dq."""

    ring: Any
    """[stages, warpgroups, 64 keys, 64 queries]."""
    ready: Any
    """Barriers, one a stage: every computing warpgroup has written its part."""
    free: Any
    """Barriers, one a stage: it has been read."""

    def slot(self, n: Any) -> Any:
        """Returns the stage of the n-th step."""
        return afresh(lax.rem(n, jnp.int32(self.ring.shape[0])))

    def give(self, n: Any, warpgroup: Any, ds: Array) -> None:
        """Writes a warpgroup's part of the n-th step."""
        slot = self.slot(n)

        @pl.when(n >= self.ring.shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        self.ring[slot, warpgroup] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready.at[slot])

    def close(self, taken: Any) -> None:
        """Waits until all of so many steps have been read, and k with them."""

        @pl.loop(lax.max(jnp.int32(0), taken - self.ring.shape[0]), taken)
        def _(n):
            plgpu.barrier_wait(self.free.at[self.slot(n)])


class DqSums(NamedTuple):
    """What the dK/dV kernel has besides if it sums dq."""

    dq: Any
    """float32 [B N T H], in device memory."""
    staged: Any
    """Blocks of dq on their way there."""
    ds: DsRing


def sums_scratch(block: HopperBlocks, head_dim: int, dtype: Any) -> tuple[Any, ...]:
    """Returns shared memory for what is staged, and what `DsRing` is made of."""
    staged = buffers(DQ_STAGES, WARPGROUP_ROWS, head_dim, jnp.float32)
    one = buffers(1, WARPGROUP_ROWS, block.columns, dtype)
    ring = plgpu.SMEM((DS_STAGES, block.warpgroups, WARPGROUP_ROWS, block.columns), dtype, transforms=one.transforms)
    ready = plgpu.Barrier(num_arrivals=block.warpgroups, num_barriers=DS_STAGES)
    return staged, ring, ready, plgpu.Barrier(num_barriers=DS_STAGES)


def heads_beside(heads: int, length: int, head_dim: int) -> int:
    """Returns how many heads' programs are numbered by turns; q and do have 2 bytes an element, sums of dq 4."""
    most = max(1, min(BESIDE, CACHED // (8 * length * head_dim)))
    return next(n for n in range(most, 0, -1) if heads % n == 0)


def compute_sum_and_load(
    warpgroups: int, compute: Callable[[], None], sum_up: Callable[[], None], load: Callable[[], None]
) -> None:
    """Runs `sum_up` and `load` on the last two warpgroups and `compute` on the others, with registers to suit."""
    split_roles(Role(warpgroups, 208, compute), Role(1, 72, sum_up), Role(1, 24, load))


def sum_of_programs(dq: Float32[Array, "P B N T H"]) -> Float32[Array, "B N T H"]:
    """Returns the sum of what programs have in the interpreter, each NaN in blocks of queries where it has not been."""
    blocks = jnp.pad(dq, [(0, 0)] * 3 + [(0, -dq.shape[3] % WARPGROUP_ROWS), (0, 0)], constant_values=jnp.nan)
    blocks = blocks.reshape(*dq.shape[:3], -1, WARPGROUP_ROWS, dq.shape[4])
    untouched = jnp.isnan(blocks).all(axis=(4, 5), keepdims=True)
    total = jnp.sum(jnp.where(untouched, 0.0, blocks), axis=0)
    return total.reshape(*dq.shape[1:3], -1, dq.shape[4])[:, :, : dq.shape[3]]


class Order:
    """Whose turn it is to add to the sums of some queries.

    A counter for each SPAN blocks of queries holds how many tiles of keys, from the last one on, have none left to add;
    a program waits for that of its tile's successor. Programs are numbered from the last tile on. That they start by
    their numbers CUDA does not promise, but GPUs do; else one could wait for a program that has no place to run.
    """

    def __init__(self, program: Program, visited: TileRange, bounds: Bounds, member: Any, counters: Any):
        shapes, tile = program.shapes, program.tile(0)
        spans = pl.cdiv(shapes.column_tiles, SPAN)
        head = program.head * shapes.members + member
        self._counters, self._first = counters, (program.batch * shapes.heads + head) * spans
        neighbour = lambda i: lax.clamp(jnp.int32(0), tile + i, program.row_tiles - 1)
        self._before, self._after = (program.columns_of(neighbour(i), bounds, member) for i in (1, -1))
        self._own = visited
        self._is_first, self._is_last = tile == program.row_tiles - 1, tile == 0
        self._done, self._tiles = program.row_tiles - tile, program.row_tiles

    def adds(self, j: Any) -> Any:
        """Returns whether a program before this one has been at these queries: who is the first stores."""
        return ~self._is_first & (j >= self._before.start) & (j < self._before.stop)

    def enter(self, j: Any) -> None:
        """Waits for this program's turn at the span of j, if that is new; ends its turn at the one before."""
        new = lax.rem(j, jnp.int32(SPAN)) == 0

        @pl.when(new & (j > self._own.start))
        def _():
            self.leave(j - 1)

        @pl.when((new | (j == self._own.start)) & ~self._is_first & self._visits(self._before, j))
        def _():
            plgpu.semaphore_wait(self._counter(j), self._done - 1, decrement=False, memory_scope="gpu")

    def leave(self, j: Any) -> None:
        """Ends this program's turn at the span of j, once all that it adds is there."""
        plgpu.wait_smem_to_gmem(0)

        @pl.when(~self._is_last & self._visits(self._after, j))
        def _():
            # The first at a span counts the tiles that do not visit it, too. What is added to a counter is static.
            more = jnp.where(~self._is_first & self._visits(self._before, j), 1, self._done)
            for power in (1 << bit for bit in range(self._tiles.bit_length())):

                @pl.when((more & power) != 0)
                def _(power=power):
                    plgpu.semaphore_signal(self._counter(j), power, memory_scope="gpu")

    def _visits(self, columns: Any, j: Any) -> Any:
        span = lambda i: lax.div(i, jnp.int32(SPAN))
        return (span(j) >= span(columns.start)) & (span(j) <= span(columns.stop - 1))

    def _counter(self, j: Any) -> Any:
        return self._counters.at[self._first + lax.div(j, jnp.int32(SPAN))]


def counters(program: Program, batch: int) -> Any:
    """Returns counters for all programs of the launch, each 0."""
    shapes = program.shapes
    return pl.get_global(plgpu.SemaphoreType.REGULAR((batch * shapes.heads * pl.cdiv(shapes.column_tiles, SPAN),)))


def sum_dq(program: Program, bounds: Bounds, k_tile: Any, sums: DqSums, stage: Any) -> None:
    """Adds dq of all queries that the program's keys are seen by, step by step.

    The interpreter knows neither counters nor sums by copies: there dq has the sums of each program by themselves.
    """
    (dq, staged, ds), shapes, interpreted = sums, program.shapes, stage is not None
    batch = dq.shape[0] // (program.row_tiles if interpreted else 1)
    counted = None if interpreted else counters(program, batch)

    def of_member(member: Any, taken: Any) -> Any:
        visited = program.columns(0, bounds, member)
        order = None if interpreted else Order(program, visited, bounds, member, counted)

        @pl.loop(visited.start, visited.stop)
        def _(j):
            n = taken + j - visited.start
            slot, place = ds.slot(n), afresh(lax.rem(n, jnp.int32(DQ_STAGES)))
            plgpu.barrier_wait(ds.ready.at[slot])

            def over_keys(acc):
                for warpgroup in range(program.block.warpgroups):
                    multiply(acc, ds.ring.at[slot, warpgroup].T, k_tile.at[warpgroup], stage)
                if order:
                    order.enter(j)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(ds.free.at[slot])
                return acc[...]

            x = pl.run_scoped(over_keys, product((WARPGROUP_ROWS, k_tile.shape[2])))
            plgpu.wait_smem_to_gmem(DQ_STAGES - 1, wait_read_only=True)
            staged[place] = x
            plgpu.commit_smem()
            head, queries = program.head * shapes.members + member, pl.ds(j * WARPGROUP_ROWS, WARPGROUP_ROWS)
            if order is None:
                own = dq.at[program.tile(0) * batch + program.batch, head, queries]
                plgpu.copy_smem_to_gmem(staged.at[place], own)
                return
            adds, target = order.adds(j), dq.at[program.batch, head, queries]

            @pl.when(adds)
            def _():
                plgpu.copy_smem_to_gmem(staged.at[place], target, reduction_op="add")

            @pl.when(~adds)
            def _():
                plgpu.copy_smem_to_gmem(staged.at[place], target)

        if order:
            order.leave(visited.stop - 1)
        return taken + visited.stop - visited.start

    over_members(shapes.members, of_member, 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
