"""Forward on Hopper: o and lse of 64 rows of queries for each computing warpgroup, as in program.py.

    s = q k^T                              product 1, operands in shared memory
    top, total, p = online softmax of s    in base 2
    o = o * keep + p v                     product 2, p in registers

With overlap, product 2 of one step runs while the next step's product 1 waits for its softmax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from sparse_flash_jax.kernels.alibi import Alibi, from_queries
from sparse_flash_jax.kernels.config import Config, HopperBlocks, padded_head_dim
from sparse_flash_jax.kernels.mosaic.launch import (
    buffers,
    by_head,
    free_barriers,
    launch,
    ready_barriers,
    row_buffers,
)
from sparse_flash_jax.kernels.mosaic.outputs import store
from sparse_flash_jax.kernels.mosaic.pipeline import Stream, compute_and_load, compute_tiles, load_keys, pass_keys
from sparse_flash_jax.kernels.mosaic.products import (
    BY_ROW,
    LAYOUT,
    afresh,
    hide_repeats,
    hide_unseen,
    load_bounds,
    multiply,
    penalty_of_steps,
    product,
    spread_rows,
)
from sparse_flash_jax.kernels.mosaic.program import WARPGROUP_ROWS, Program, Shapes, after_first
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.tiles import FLOOR, LOG2E, LOWEST, Runs, sweep
from sparse_flash_jax.kernels.walks import of_queries


def _kernel(
    bounds,
    distances,
    repeats,
    order,
    q,
    k,
    v,
    o,
    lse,
    q_tile,
    k_ring,
    v_ring,
    lse_tile,
    q_ready,
    k_ready,
    v_ready,
    k_free,
    v_free,
    turn,
    stage=None,
    *,
    scale: float,
    soft_cap: float | None,
    shapes: Shapes,
):
    program, block = Program(shapes), shapes.block
    n = program.head
    head_dim, dtype = q.shape[3], q.dtype
    tile = (WARPGROUP_ROWS, block.columns)
    factor = (scale if soft_cap is None else soft_cap) * LOG2E
    # exp2 takes the factor in where nothing is added first, it keeps the order of scores, and what hides them finite
    late = distances is None and factor > 1e-6
    left = factor if late else 1.0
    stage = None if stage is None else stage.at[program.warpgroup]
    streams = Stream(k, k_ring, k_ready, k_free), Stream(v, v_ring, v_ready, v_free)

    def fetch(r):
        own = program.own(r)
        plgpu.copy_gmem_to_smem(program.part(q, n, program.rows(r)), q_tile.at[own], q_ready.at[own])

    def look(r):
        return program.visit(r, bounds), load_bounds(bounds, program, r)

    def compute(turns, r, seen, taken):
        (visit, edges), tile_at = seen, program.tile_at(r, bounds)
        penalty = penalty_of_steps(distances, program, r, tile_at)
        hide_repeated = hide_repeats(repeats, program, r, tile_at)
        own = program.own(r)
        slot = lambda j: afresh(program.slot(taken + j - visit.start))
        plgpu.barrier_wait(q_ready.at[own])

        def softmax(s, top, total, j, masked):
            if soft_cap is not None:
                s = jnp.tanh(s * (scale / soft_cap))
            if not late:
                s = s * factor
            lost = penalty(j)
            s = s if lost is None else s - lost
            if masked:
                column_tile = tile_at(j)
                first, limit = column_tile * block.columns, program.limit(bounds, column_tile)
                s = hide_unseen(s, LOWEST / left, edges, first, limit, masked)
            s = hide_repeated(s, LOWEST / left, j)
            new_top = jnp.maximum(top, s.max(axis=1) * left)
            p = jnp.exp2(s * left - spread_rows(new_top, tile))
            keep = jnp.exp2(top - new_top)
            return p.astype(dtype), new_top, total * keep + p.sum(axis=1), keep

        def scores(j):
            def scoped(acc):
                multiply(acc, q_tile.at[afresh(own)], k_ring.at[slot(j)], stage, transposed=True)
                return acc[...]

            s = pl.run_scoped(scoped, product(tile))
            plgpu.barrier_arrive(k_free.at[slot(j)])
            return s

        def add_values(acc, p, j):
            plgpu.barrier_wait(v_ready.at[slot(j)])
            if stage is None:
                acc = _accumulate(lambda ref: plgpu.wgmma(ref, p, v_ring.at[slot(j)]), acc)
            else:

                def scoped(ref):
                    multiply(ref, p, v_ring.at[slot(j)], stage)
                    return ref[...]

                acc = acc + pl.run_scoped(scoped, product((WARPGROUP_ROWS, head_dim)))
            return acc

        def step(j, carry, *, masked):
            acc, top, total = carry
            plgpu.barrier_wait(k_ready.at[slot(j)])
            turns.take()
            s = scores(j)
            turns.give()
            p, top, total, keep = softmax(s, top, total, j, masked)
            acc = add_values(acc * spread_rows(keep, acc.shape), p, j)
            plgpu.barrier_arrive(v_free.at[slot(j)])
            return acc, top, total

        def overlapped(j, carry, *, masked):
            acc, top, total, p = carry
            plgpu.barrier_wait(k_ready.at[slot(j)])
            turns.take()
            if masked or stage is not None:  # one after another: masks want registers
                acc = add_values(acc, p, j - 1)
                s = scores(j)
                turns.give()
                p, top, total, keep = softmax(s, top, total, j, masked)
            else:

                def both(acc_ref, p_ref, top_ref, total_ref, keep_ref):
                    def scoped(s_ref):
                        multiply(s_ref, q_tile.at[afresh(own)], k_ring.at[slot(j)], stage, transposed=True)
                        plgpu.wgmma_wait(1)  # waits for nothing, and keeps the two products apart
                        plgpu.barrier_wait(v_ready.at[slot(j - 1)])
                        plgpu.wgmma(acc_ref, p, v_ring.at[slot(j - 1)])
                        turns.give()
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                        p_ref[...], top_ref[...], total_ref[...], keep_ref[...] = softmax(s, top, total, j, masked)

                    pl.run_scoped(scoped, product(tile))

                old = p
                acc, p, top, total, keep = _accumulate(both, acc, p, top, total, top)
                # The compiler takes the old p for dead once its product is issued, and would write the new one over it.
                _, p = lax.optimization_barrier((old, p))
            plgpu.barrier_arrive(v_free.at[slot(j - 1)])
            return acc * spread_rows(keep, acc.shape), top, total, p

        row = lambda value: plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), BY_ROW)
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, head_dim), jnp.float32), LAYOUT)

        def one_after_another(tiles):
            return sweep(step, tiles, (acc, row(FLOOR), row(0.0)))

        def in_overlap(tiles):
            first, last = tiles.start, tiles.stop - 1
            plgpu.barrier_wait(k_ready.at[slot(first)])
            turns.take()
            s = scores(first)
            turns.give()
            p, top, total, _ = softmax(s, row(FLOOR), row(0.0), first, "both")
            o, top, total, p = sweep(overlapped, after_first(tiles), (acc, top, total, p))
            turns.take()
            o = add_values(o, p, last)
            turns.give()
            plgpu.barrier_arrive(v_free.at[slot(last)])
            return o, top, total

        compute_own = in_overlap if block.overlap else one_after_another
        acc, top, total = visit.run(compute_own, lambda j: pass_keys(turns, streams, slot(j)))
        some = total > 0.0
        total = jnp.where(some, total, 1.0)
        q_tile[own] = (acc * spread_rows(1.0 / total, acc.shape)).astype(dtype)
        lse_tile[own] = jnp.where(some, (top + jnp.log(total) * LOG2E) / LOG2E, -jnp.inf)
        store(program, r, order, (q_tile, o), (lse_tile, lse))
        return taken + visit.stop - visit.start

    compute_and_load(
        block,
        lambda: compute_tiles(program, turn, fetch, look, compute, copies=2 if order is None else 1),
        lambda: load_keys(program, bounds, streams),
    )


def _accumulate(issue: Callable[..., None], acc: Array, *others: Array) -> Any:
    """Runs issue(accumulator, *refs) on an accumulator that starts from `acc`, and refs of the others; returns all."""
    if not others:
        return pl.run_state(issue)(plgpu.WGMMAAccumulatorRef.init(acc))
    return pl.run_state(lambda refs: issue(*refs))((plgpu.WGMMAAccumulatorRef.init(acc), *others))


def forward(
    q: Float[Array, "B _N _T H"],
    k: Float[Array, "B _K _S H"],
    v: Float[Array, "B _K _S H"],
    runs: Runs,
    *,
    scale: float,
    config: Config[HopperBlocks],
    soft_cap: float | None = None,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
    order: Int32[Array, "#B #N C"] | None = None,
    in_place: bool = False,
) -> tuple[Float[Array, "B _N _T H"] | Float[Array, "B _C _N H"], Float32[Array, "B N T"]]:
    """Returns o in q's dtype, and lse with -inf where a row sees nothing; o [B C N H] by position, given the order.

    With `in_place` q, k, v and o are all by position, [B T N H].
    """
    block, head_dim = config.forward, padded_head_dim(q.shape[3])
    if block.overlap and block.num_stages < 2:
        raise ValueError(f"with overlap two tiles of keys are in use, so num_stages must be at least 2, got {block}.")
    held = row_buffers(block)
    ready, free = ready_barriers(block), free_barriers(block)
    ring = buffers(block.walks * block.num_stages, block.columns, head_dim, q.dtype)
    o, lse = launch(
        _kernel,
        of_queries(runs),
        order,
        (q,),
        (k, v),
        (q, jax.ShapeDtypeStruct(by_head(q, in_place), jnp.float32)),
        (
            buffers(held, WARPGROUP_ROWS, head_dim, q.dtype),
            ring,
            ring,
            plgpu.SMEM((held, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=held),
            ready,
            ready,
            free,
            free,
            plgpu.Barrier(num_barriers=block.warpgroups),
        ),
        scale=scale,
        soft_cap=soft_cap,
        distances=from_queries(alibi),
        repeats=repeats,
        block=block,
        last_first=True,
        config=config,
        name="interval_attention_forward",
        in_place=in_place,
    )
    return o, lse
