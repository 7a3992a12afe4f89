"""dq on Hopper: 64 rows of queries for each computing warpgroup, as in program.py.

for each tile of keys:
    p  = exp2(q k^T - lse), hidden pairs 0
    ds = p * (do v^T - delta)
    dq += ds k
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from sparse_flash_jax.kernels.alibi import Alibi, from_queries
from sparse_flash_jax.kernels.config import Config, HopperBlocks, padded_head_dim
from sparse_flash_jax.kernels.mosaic.launch import (
    buffers,
    free_barriers,
    launch,
    ready_barriers,
    row_buffers,
)
from sparse_flash_jax.kernels.mosaic.outputs import store
from sparse_flash_jax.kernels.mosaic.pipeline import Stream, compute_and_load, compute_tiles, load_keys, pass_keys
from sparse_flash_jax.kernels.mosaic.products import (
    afresh,
    hide_repeats,
    hide_unseen,
    load_bounds,
    load_rows,
    multiply,
    penalty_of_steps,
    product,
    spread_rows,
)
from sparse_flash_jax.kernels.mosaic.program import WARPGROUP_ROWS, Program, Shapes
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.tiles import LOG2E, LOWEST, Runs, scores_of, sweep
from sparse_flash_jax.kernels.walks import of_queries


def _dq_kernel(
    bounds,
    distances,
    repeats,
    order,
    q,
    do,
    lse,
    delta,
    k,
    v,
    dq,
    q_tile,
    do_tile,
    k_ring,
    v_ring,
    rows_ready,
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
    b, n = program.batch, program.head
    dtype = q.dtype
    tile = (WARPGROUP_ROWS, block.columns)
    stage = None if stage is None else stage.at[program.warpgroup]
    streams = Stream(k, k_ring, k_ready, k_free), Stream(v, v_ring, v_ready, v_free)

    def fetch(r):
        own, rows = program.own(r), program.rows(r)
        plgpu.copy_gmem_to_smem(program.part(q, n, rows), q_tile.at[own], rows_ready.at[own])
        plgpu.copy_gmem_to_smem(program.part(do, n, rows), do_tile.at[own], rows_ready.at[own])

    def look(r):
        rows = program.rows(r)
        edges = load_bounds(bounds, program, r)
        return program.visit(r, bounds), edges, load_rows(lse.at[b, n, rows]), load_rows(delta.at[b, n, rows])

    def compute(turns, r, seen, taken):
        (visit, edges, lse_row, delta_row), tile_at = seen, program.tile_at(r, bounds)
        penalty = penalty_of_steps(distances, program, r, tile_at)
        hide_repeated = hide_repeats(repeats, program, r, tile_at)
        own = program.own(r)
        slot = lambda j: afresh(program.slot(taken + j - visit.start))
        plgpu.barrier_wait(rows_ready.at[own])

        def step(acc, j, carry, *, masked):
            here = afresh(own)

            def gradient(s_ref, dp_ref):
                """ds."""
                plgpu.barrier_wait(k_ready.at[slot(j)])
                turns.take()
                multiply(s_ref, q_tile.at[here], k_ring.at[slot(j)], stage, transposed=True)
                plgpu.barrier_wait(v_ready.at[slot(j)])
                multiply(dp_ref, do_tile.at[here], v_ring.at[slot(j)], stage, transposed=True)
                turns.give()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                s, slope = scores_of(s, scale, soft_cap, penalty(j), unit=LOG2E)
                s = s - spread_rows(lse_row, tile)
                if masked:
                    column_tile = tile_at(j)
                    first, limit = column_tile * block.columns, program.limit(bounds, column_tile)
                    s = hide_unseen(s, LOWEST, edges, first, limit, masked)
                p = jnp.exp2(hide_repeated(s, LOWEST, j))
                dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                plgpu.barrier_arrive(v_free.at[slot(j)])
                ds = p * (dp - spread_rows(delta_row, tile))
                return (ds if slope is None else ds * slope).astype(dtype)

            ds = pl.run_scoped(gradient, product(tile), product(tile))
            multiply(acc, ds, k_ring.at[slot(j)], stage)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free.at[slot(j)])
            return carry

        def accumulate(acc):
            compute_own = lambda tiles: sweep(functools.partial(step, acc), tiles, jnp.int32(0))
            visit.run(compute_own, lambda j: pass_keys(turns, streams, slot(j)))
            return acc[...]

        acc = pl.run_scoped(accumulate, product((WARPGROUP_ROWS, q.shape[3])))
        q_tile[own] = (acc * scale).astype(dtype)
        store(program, r, order, (q_tile, dq))
        return taken + visit.stop - visit.start

    compute_and_load(
        block,
        lambda: compute_tiles(program, turn, fetch, look, compute, copies=1 if order is None else 0),
        lambda: load_keys(program, bounds, streams),
    )


def backward_dq(
    q: Float[Array, "B _N _T H"],
    k: Float[Array, "B _K _S H"],
    v: Float[Array, "B _K _S H"],
    runs: Runs,
    lse: Float32[Array, "B N T"],
    do: Float[Array, "B _N _T H"],
    delta: Float32[Array, "B N T"],
    *,
    scale: float,
    config: Config[HopperBlocks],
    soft_cap: float | None = None,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
    order: Int32[Array, "#B #N C"] | None = None,
    in_place: bool = False,
) -> Float[Array, "B _N _T H"] | Float[Array, "B _C _N H"]:
    """Returns dq in q's dtype, [B C N H] by position given the order; `delta` is sum(o * do) less lse's cotangent.

    With `in_place` q, k, v, do and dq are all by position, [B T N H].
    """
    block, head_dim = config.dq, padded_head_dim(q.shape[3])
    held = row_buffers(block)
    ready, free = ready_barriers(block), free_barriers(block)
    own = buffers(held, WARPGROUP_ROWS, head_dim, q.dtype)
    ring = buffers(block.walks * block.num_stages, block.columns, head_dim, q.dtype)
    turn = plgpu.Barrier(num_barriers=block.warpgroups)
    (dq,) = launch(
        _dq_kernel,
        of_queries(runs),
        order,
        (q, do, lse * LOG2E, delta),
        (k, v),
        (q,),
        (own, own, ring, ring, plgpu.Barrier(num_arrivals=2, num_barriers=held), ready, ready, free, free, turn),
        scale=scale,
        soft_cap=soft_cap,
        distances=from_queries(alibi),
        repeats=repeats,
        block=block,
        last_first=True,
        config=config,
        name="interval_attention_dq",
        in_place=in_place,
    )
    return dq
