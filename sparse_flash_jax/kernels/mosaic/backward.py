"""Backward on Hopper: dq of a tile of queries; dk and dv of a tile of keys, from the transposed runs, as in program.py.

for each tile of columns:
    p  = exp2(s - lse), hidden pairs 0              s = q k^T for dq, k q^T for dk and dv
    ds = p * (do v^T - delta)
    dq += ds k          or          dv += p do, dk += ds q, summed over the query heads of a group in turn
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.config import Config, HopperBlocks
from sparse_flash_jax.kernels.mosaic.launch import (
    buffers,
    free_barriers,
    launch,
    padded_head_dim,
    ready_barriers,
    row_buffers,
)
from sparse_flash_jax.kernels.mosaic.program import (
    BY_COLUMN,
    BY_ROW,
    LAYOUT,
    NARROW,
    WARPGROUP_ROWS,
    Feed,
    Program,
    Shapes,
    Stream,
    Turns,
    afresh,
    after_first,
    compute_tiles,
    hide,
    load_columns,
    load_keys,
    multiply,
    over_members,
    pass_keys,
    product,
    split_roles,
    spread_columns,
    spread_rows,
)
from sparse_flash_jax.kernels.tiles import LOG2E, LOWEST, Runs, sweep


def _dq_kernel(
    k_start,
    k_stop,
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
        plgpu.copy_gmem_to_smem(q.at[b, n, rows], q_tile.at[own], rows_ready.at[own])
        plgpu.copy_gmem_to_smem(do.at[b, n, rows], do_tile.at[own], rows_ready.at[own])

    def look(r):
        rows = program.rows(r)
        bounds = (ref.at[*program.bounds(k_start, 0), rows] for ref in (k_start, k_stop))
        refs = (*bounds, lse.at[b, n, rows], delta.at[b, n, rows])
        return program.visit(r, k_start, k_stop), *(plgpu.load(ref, layout=BY_ROW, optimized=False) for ref in refs)

    def compute(turns, r, seen, taken):
        visit, start, stop, lse_row, delta_row = seen
        rows, own = program.rows(r), program.own(r)
        slot = lambda j: afresh(program.slot(taken + j - visit.start))
        plgpu.barrier_wait(rows_ready.at[own])

        pass_by = lambda j: pass_keys(turns, streams, slot(j))

        def issue(s_ref, dp_ref, j):
            here = afresh(own)
            plgpu.barrier_wait(k_ready.at[slot(j)])
            turns.take()
            multiply(s_ref, q_tile.at[here], k_ring.at[slot(j)], stage, transposed=True)
            plgpu.barrier_wait(v_ready.at[slot(j)])
            multiply(dp_ref, do_tile.at[here], v_ring.at[slot(j)], stage, transposed=True)

        def gradient(s_ref, dp_ref, j, masked, behind):
            """ds of a step, both products issued and `behind` more after them."""
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 + behind)
            s = s * (scale * LOG2E) - spread_rows(lse_row, tile)
            p = jnp.exp2(hide(s, LOWEST, start, stop, j * block.columns, masked))
            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=behind)
            plgpu.barrier_arrive(v_free.at[slot(j)])
            ds = p * (dp - spread_rows(delta_row, tile))
            return ds.astype(dtype)

        def accumulate(acc):
            def alone(j, masked):
                def scoped(s_ref, dp_ref):
                    issue(s_ref, dp_ref, j)
                    turns.give()
                    return gradient(s_ref, dp_ref, j, masked, 0)

                return pl.run_scoped(scoped, product(tile), product(tile))

            def finish(ds, j):
                multiply(acc, ds, k_ring.at[slot(j)], stage)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_free.at[slot(j)])

            def step(j, carry, *, masked):
                finish(alone(j, masked), j)
                return carry

            def overlapped(j, before, *, masked):
                def scoped(s_ref, dp_ref):
                    issue(s_ref, dp_ref, j)
                    plgpu.wgmma_wait(2)  # waits for nothing, and keeps the products apart
                    multiply(acc, before, k_ring.at[slot(j - 1)], stage)
                    turns.give()
                    return gradient(s_ref, dp_ref, j, masked, 1)

                ds = pl.run_scoped(scoped, product(tile), product(tile))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_free.at[slot(j - 1)])
                return lax.optimization_barrier((before, ds))[1]  # or ds might take the registers of `before` too soon

            def one_after_another(tiles):
                sweep(step, tiles, jnp.int32(0))

            def in_overlap(tiles):
                finish(sweep(overlapped, after_first(tiles), alone(tiles.start, "both")), tiles.stop - 1)

            visit.run(in_overlap if block.overlap else one_after_another, pass_by)
            return acc[...]

        acc = pl.run_scoped(accumulate, product((WARPGROUP_ROWS, q.shape[3])))
        q_tile[own] = (acc * scale).astype(dtype)
        program.store(r, (q_tile.at[own], dq.at[b, n, rows]))
        return taken + visit.stop - visit.start

    def computing():
        turns = Turns(program, turn)
        compute_tiles(program, fetch, look, functools.partial(compute, turns), outputs=1)
        turns.close()

    split_roles(block, computing, lambda: load_keys(program, k_start, k_stop, streams))


def _dkv_kernel(
    q_start,
    q_stop,
    k,
    v,
    q,
    do,
    lse,
    delta,
    *refs,
    parts: str,
    scale: float,
    shapes: Shapes,
):
    """Computes dk, dv, or both: `parts` is "k", "v" or "kv"."""
    outputs, scratch = refs[: len(parts)], refs[len(parts) :]
    k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, *scratch = scratch
    rows_ready, q_ready, do_ready, free, turn, *stage = scratch
    program, block = Program(shapes), shapes.block
    b, head = program.batch, program.head
    dtype = k.dtype
    tile = (WARPGROUP_ROWS, block.columns)
    stage = stage[0].at[program.warpgroup] if stage else None
    # Beyond head dim 64 or columns of 64 p in float32 would not fit the registers until dp is there.
    short_p = k.shape[3] > 64 or block.columns > NARROW or block.warpgroups > 2
    in_registers = block.rows_in_registers and stage is None

    def fetch(r):
        own, rows = program.own(r), program.rows(r)
        plgpu.copy_gmem_to_smem(k.at[b, head, rows], k_tile.at[own], rows_ready.at[own])
        if "k" in parts:
            plgpu.copy_gmem_to_smem(v.at[b, head, rows], v_tile.at[own], rows_ready.at[own])

    def look(r, member=0):
        seen = (*program.bounds(q_start, member), program.rows(r))
        bounds = (plgpu.load(ref.at[*seen], layout=BY_ROW, optimized=False) for ref in (q_start, q_stop))
        return program.visit(r, q_start, q_stop, member), *bounds

    def compute(turns, r, first_seen, taken):
        rows, own = program.rows(r), program.own(r)
        plgpu.barrier_wait(rows_ready.at[own])
        held = [plgpu.load(x.at[own], layout=LAYOUT) for x in (k_tile, v_tile)] if in_registers else None

        def of_member(sums, member, taken):
            visit, start, stop = first_seen if shapes.members == 1 else look(r, member)
            slot = lambda j: afresh(program.slot(taken + j - visit.start))
            load = lambda ring, j: spread_columns(plgpu.load(ring.at[slot(j)], layout=BY_COLUMN), tile)

            def issue_scores(j, s_ref):
                plgpu.barrier_wait(q_ready.at[slot(j)])
                turns.take()
                rows = held[0] if held else k_tile.at[afresh(own)]
                multiply(s_ref, rows, q_ring.at[slot(j)], stage, transposed=True)

            def issue_dp(j, dp_ref):
                rows = held[1] if held else v_tile.at[afresh(own)]
                multiply(dp_ref, rows, do_ring.at[slot(j)], stage, transposed=True)

            def weights(s_ref, j, masked, behind):
                """p of a step, `behind` products issued after that of its scores."""
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=behind)
                s = s * (scale * LOG2E) - load(lse_ring, j)
                return jnp.exp2(hide(s, LOWEST, start, stop, j * block.columns, masked))

            def gradient(p, dp_ref, j, behind):
                """ds of a step, `behind` products issued after that of dp."""
                if short_p:
                    p = p.astype(dtype)
                p, dp = lax.optimization_barrier((p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=behind)))
                return (p.astype(jnp.float32) * (dp - load(delta_ring, j))).astype(dtype)

            def release(j):
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot(j)])

            def step(j, carry, *, masked):
                # The masks of a wide block want the registers of dp.
                late = bool(masked and block.columns > NARROW)

                def scoped(s_ref, dp_ref=None):
                    issue_scores(j, s_ref)
                    plgpu.barrier_wait(do_ready.at[slot(j)])
                    if "k" in parts and not late:
                        issue_dp(j, dp_ref)
                    p = weights(s_ref, j, masked, behind=0 if late else len(products) - 1)
                    turns.give()
                    if "k" in parts and late:
                        issue_dp(j, dp_ref)
                    if "v" in parts:
                        multiply(sums["v"], p.astype(dtype), do_ring.at[slot(j)], stage)
                    return gradient(p, dp_ref, j, behind=len(parts) - 1) if "k" in parts else None

                products = [product(tile)] * (2 if "k" in parts else 1)
                ds = pl.run_scoped(scoped, *products)
                if "k" in parts:
                    multiply(sums["k"], ds, q_ring.at[slot(j)], stage)
                release(j)
                return carry

            def pass_by(j):
                turns.take()
                turns.give()
                plgpu.barrier_wait(q_ready.at[slot(j)])
                plgpu.barrier_wait(do_ready.at[slot(j)])
                plgpu.barrier_arrive(free.at[slot(j)])

            visit.run(lambda tiles: sweep(step, tiles, jnp.int32(0)), pass_by)
            return taken + visit.stop - visit.start

        def accumulate(*refs):
            visit = functools.partial(of_member, dict(zip(parts, refs, strict=True)))
            return over_members(shapes.members, visit, taken), *(ref[...] for ref in refs)

        taken, *sums = pl.run_scoped(accumulate, *[product((WARPGROUP_ROWS, k.shape[3]))] * len(parts))
        buffers_of = {"k": k_tile, "v": k_tile if parts == "v" else v_tile}
        for part, x in zip(parts, sums, strict=True):
            buffers_of[part][own] = (x * scale if part == "k" else x).astype(dtype)
        targets = (output.at[b, head, rows] for output in outputs)
        program.store(r, *((buffers_of[part].at[own], target) for part, target in zip(parts, targets, strict=True)))
        return taken

    def loading():
        def load(member, j, buffer):
            n, columns = head * shapes.members + member, pl.ds(j * block.columns, block.columns)
            streams = [(q, q_ring, q_ready), (lse, lse_ring, q_ready), (do, do_ring, do_ready)]
            streams += [(delta, delta_ring, do_ready)] if "k" in parts else []
            for source, ring, ready in streams:
                plgpu.copy_gmem_to_smem(source.at[b, n, columns], ring.at[buffer], ready.at[buffer])

        load_columns(program, lambda r, member: program.columns(r, q_start, q_stop, member), [Feed(free, load)])

    def computing():
        turns = Turns(program, turn)
        compute_tiles(program, fetch, look, functools.partial(compute, turns), outputs=len(parts))
        turns.close()

    split_roles(block, computing, loading)


def backward_dq(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    lse: Float32[Array, "B N T"],
    do: Float[Array, "B N T H"],
    delta: Float32[Array, "B N T"],
    *,
    scale: float,
    config: Config[HopperBlocks],
) -> Float[Array, "B N T H"]:
    """Returns dq in q's dtype; `delta` is sum(o * do) less the cotangent of lse."""
    block, head_dim = config.dq, padded_head_dim(q.shape[3])
    held = row_buffers(block)
    ready, free = ready_barriers(block), free_barriers(block)
    own = buffers(held, WARPGROUP_ROWS, head_dim, q.dtype)
    ring = buffers(block.num_stages, block.columns, head_dim, q.dtype)
    turn = plgpu.Barrier(num_barriers=block.warpgroups)
    (dq,) = launch(
        _dq_kernel,
        (runs.k_start, runs.k_stop),
        (q, do, lse * LOG2E, delta),
        (k, v),
        (q,),
        (own, own, ring, ring, plgpu.Barrier(num_arrivals=2, num_barriers=held), ready, ready, free, free, turn),
        scale=scale,
        block=block,
        last_first=True,
        config=config,
        name="interval_attention_dq",
    )
    return dq


def backward_dkv(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    lse: Float32[Array, "B N T"],
    do: Float[Array, "B N T H"],
    delta: Float32[Array, "B N T"],
    *,
    scale: float,
    config: Config[HopperBlocks],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns dk and dv in k's dtype, summed over the query heads of a group."""
    # From head dim 192 on the registers hold one of the two sums.
    launches = ("kv",) if k.shape[3] <= 128 else ("k", "v")
    operands = (q, k, v, runs, lse, do, delta)
    dk, dv = (x for parts in launches for x in _dkv(parts, *operands, scale=scale, config=config))
    return dk, dv


def _dkv(parts, q, k, v, runs, lse, do, delta, *, scale, config):
    block, head_dim = config.dkv, padded_head_dim(k.shape[3])
    held, both = row_buffers(block), 2 if "k" in parts else 1
    q_ready, do_ready, free = ready_barriers(block, 2), ready_barriers(block, both), free_barriers(block)
    own = buffers(held, WARPGROUP_ROWS, head_dim, k.dtype)
    ring = buffers(block.num_stages, block.columns, head_dim, k.dtype)
    vector = plgpu.SMEM((block.num_stages, block.columns), jnp.float32)
    rows_ready = plgpu.Barrier(num_arrivals=both, num_barriers=held)
    unused = plgpu.SMEM((32,), jnp.float32)
    turn = plgpu.Barrier(num_barriers=block.warpgroups)
    barriers = (rows_ready, q_ready, do_ready, free, turn)
    if "k" in parts:
        scratch = (own, own, ring, ring, vector, vector, *barriers)
    else:
        scratch = (own, unused, ring, ring, vector, unused, *barriers)
    return launch(
        functools.partial(_dkv_kernel, parts=parts),
        (runs.q_start, runs.q_stop),
        (k, v),
        (q, do, lse * LOG2E, delta),
        [{"k": k, "v": v}[part] for part in parts],
        scratch,
        scale=scale,
        block=block,
        last_first=False,
        config=config,
        name="interval_attention_d" + parts,
    )
