"""dk and dv on Hopper: 64 rows of keys for each computing warpgroup, from the transposed runs, as in program.py.

for each query head of the group, for each tile of its queries:
    p  = exp2(k q^T - lse), hidden pairs 0
    ds = p * (v do^T - delta)
    dv += p do, dk += ds q
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from sparse_flash_jax.kernels.alibi import Alibi, from_keys
from sparse_flash_jax.kernels.config import Config, HopperBlocks, padded_head_dim
from sparse_flash_jax.kernels.mosaic.dq_sums import (
    DqSums,
    DsRing,
    compute_sum_and_load,
    heads_beside,
    sum_dq,
    sum_of_programs,
    sums_scratch,
)
from sparse_flash_jax.kernels.mosaic.launch import (
    buffers,
    by_head,
    free_barriers,
    launch,
    ready_barriers,
    row_buffers,
)
from sparse_flash_jax.kernels.mosaic.outputs import store
from sparse_flash_jax.kernels.mosaic.pipeline import (
    Feed,
    compute_and_load,
    compute_tiles,
    load_columns,
    over_members,
)
from sparse_flash_jax.kernels.mosaic.products import (
    BY_COLUMN,
    LAYOUT,
    afresh,
    hide_repeats,
    hide_unseen,
    load_bounds,
    multiply,
    penalty_of_steps,
    product,
    spread_columns,
)
from sparse_flash_jax.kernels.mosaic.program import NARROW, WARPGROUP_ROWS, Program, Shapes
from sparse_flash_jax.kernels.padding import extend_bounds
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.tiles import LOG2E, LOWEST, Runs, scores_of, sweep
from sparse_flash_jax.kernels.walks import Side, of_keys


def _dkv_kernel(
    bounds,
    distances,
    repeats,
    order,
    k,
    v,
    q,
    do,
    lse,
    delta,
    *refs,
    parts: str,
    scale: float,
    soft_cap: float | None,
    shapes: Shapes,
):
    """Computes dk, dv, both, or dq (in float32, before its scale) with them: `parts` is "k", "v", "kv" or "qkv"."""
    outputs, scratch = refs[: len(parts)], refs[len(parts) :]
    k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, *scratch = scratch
    rows_ready, q_ready, do_ready, free, turn, *stage = scratch
    sums_of_dq = None
    if "q" in parts:
        (dq, *outputs), parts = outputs, "kv"
        sums_of_dq, stage = DqSums(dq, stage[0], DsRing(*stage[1:4])), stage[4:]
    program, block = Program(shapes), shapes.block
    head = program.head
    dtype = k.dtype
    tile = (WARPGROUP_ROWS, block.columns)
    stage = stage[0].at[program.warpgroup] if stage else None
    # Beyond head dim 64, 64 columns or two warpgroups, or with one more for dq, p in float32 would not fit the
    # registers until dp is there.
    short_p = k.shape[3] > 64 or block.columns > NARROW or block.warpgroups > 2 or sums_of_dq
    in_registers = block.rows_in_registers and stage is None

    def fetch(r):
        own, rows = program.own(r), program.rows(r)
        plgpu.copy_gmem_to_smem(program.part(k, head, rows), k_tile.at[own], rows_ready.at[own])
        if "k" in parts:
            plgpu.copy_gmem_to_smem(program.part(v, head, rows), v_tile.at[own], rows_ready.at[own])

    def look(r, member):
        visit = program.visit(r, bounds, member, together=sums_of_dq is not None)
        return visit, load_bounds(bounds, program, r, member)

    def compute(turns, r, ahead, taken):
        own = program.own(r)
        plgpu.barrier_wait(rows_ready.at[own])
        loaded = (k_tile, v_tile)
        if "k" not in parts or (sums_of_dq and shapes.members > 1):  # v is not used, or has no registers left
            loaded = (k_tile,)
        held = [plgpu.load(x.at[own], layout=LAYOUT) for x in loaded] if in_registers else []
        # Past the last row a warpgroup computes the last rows once more, which would count twice in dq.
        may_be_past = sums_of_dq and shapes.length % block.rows
        absent = jnp.where(program.past_the_end(r), -LOWEST, 0.0) if may_be_past else None

        def of_member(sums, member, taken):
            visit, edges = look(r, member) if ahead is None else ahead
            tile_at = program.tile_at(r, bounds, member)
            penalty = penalty_of_steps(distances, program, r, tile_at, member)
            hide_repeated = hide_repeats(repeats, program, r, tile_at, member)
            slot = lambda j: afresh(program.slot(taken + j - visit.start))
            by_column = lambda ring, j: plgpu.load(ring.at[slot(j)], layout=BY_COLUMN)

            def issue_scores(j, s_ref):
                plgpu.barrier_wait(q_ready.at[slot(j)])
                turns.take()
                k_rows = held[0] if held else k_tile.at[afresh(own)]
                multiply(s_ref, k_rows, q_ring.at[slot(j)], stage, transposed=True)

            def issue_dp(j, dp_ref):
                v_rows = held[1] if len(held) > 1 else v_tile.at[afresh(own)]
                multiply(dp_ref, v_rows, do_ring.at[slot(j)], stage, transposed=True)

            def weights(s_ref, j, masked, behind):
                """p of a step, `behind` products issued after that of its scores; and the slope of a soft cap."""
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=behind)
                lse_row = by_column(lse_ring, j) if absent is None else by_column(lse_ring, j) + absent
                s, slope = scores_of(s, scale, soft_cap, penalty(j), unit=LOG2E)
                first = tile_at(j) * block.columns if masked else None
                s = hide_unseen(s - spread_columns(lse_row, tile), LOWEST, edges, first, None, masked)
                return jnp.exp2(hide_repeated(s, LOWEST, j)), slope

            def gradient(p, slope, dp_ref, j, behind):
                """ds of a step, `behind` products issued after that of dp."""
                if short_p:
                    p = p.astype(dtype)
                p, dp = lax.optimization_barrier((p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=behind)))
                ds = p.astype(jnp.float32) * (dp - spread_columns(by_column(delta_ring, j), tile))
                return (ds if slope is None else ds * slope).astype(dtype)

            def release(j):
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot(j)])

            def step(j, carry, *, masked):
                # Masks want the registers of dp if the block is wide, or one more warpgroup sums dq.
                late = bool(masked and (block.columns > NARROW or sums_of_dq))

                def scoped(s_ref, dp_ref=None):
                    issue_scores(j, s_ref)
                    plgpu.barrier_wait(do_ready.at[slot(j)])
                    if "k" in parts and not late:
                        issue_dp(j, dp_ref)
                    p, slope = weights(s_ref, j, masked, behind=0 if late else len(products) - 1)
                    turns.give()  # only now: the others' first products then run under what follows here
                    if "k" in parts and late:
                        issue_dp(j, dp_ref)
                    if "v" in parts:
                        multiply(sums["v"], p.astype(dtype), do_ring.at[slot(j)], stage)
                    return gradient(p, slope, dp_ref, j, behind=len(parts) - 1) if "k" in parts else None

                products = [product(tile)] * (2 if "k" in parts else 1)
                ds = pl.run_scoped(scoped, *products)
                if sums_of_dq:
                    sums_of_dq.ds.give(taken + j - visit.start, program.warpgroup, ds)
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
            add_member = functools.partial(of_member, dict(zip(parts, refs, strict=True)))
            return over_members(shapes.members, add_member, taken), *(ref[...] for ref in refs)

        taken, *sums = pl.run_scoped(accumulate, *[product((WARPGROUP_ROWS, k.shape[3]))] * len(parts))
        if sums_of_dq:
            sums_of_dq.ds.close(taken)
        buffers_of = {"k": k_tile, "v": k_tile if parts == "v" else v_tile}
        for part, x in zip(parts, sums, strict=True):
            buffers_of[part][own] = (x * scale if part == "k" else x).astype(dtype)
        store(program, r, order, *((buffers_of[part], output) for part, output in zip(parts, outputs, strict=True)))
        return taken

    def loading():
        def load(member, j, buffer):
            n, columns = head * shapes.members + member, pl.ds(j * block.columns, block.columns)
            streams = [(q, q_ring, q_ready), (lse, lse_ring, q_ready), (do, do_ring, do_ready)]
            streams += [(delta, delta_ring, do_ready)] if "k" in parts else []
            for source, ring, ready in streams:
                plgpu.copy_gmem_to_smem(program.part(source, n, columns), ring.at[buffer], ready.at[buffer])

        load_columns(program, bounds, [Feed(free, load)])

    look_ahead = lambda r: look(r, 0) if shapes.members == 1 else None
    copies = len(parts) if order is None else 0
    computing = lambda: compute_tiles(program, turn, fetch, look_ahead, compute, copies)
    if sums_of_dq is None:
        return compute_and_load(block, computing, loading)
    summing = functools.partial(sum_dq, program, bounds, k_tile, sums_of_dq, stage)
    return compute_sum_and_load(block.warpgroups, computing, summing, loading)


def backward_dkv(
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
    order: Int32[Array, "#B #K C"] | None = None,
    in_place: bool = False,
) -> tuple[Float[Array, "B _K _S H"] | Float[Array, "B _C _K H"], ...]:
    """Returns dk and dv in k's dtype, summed over a group's query heads; [B C K H] by position, given the order.

    With `in_place` q, k, v, do, dk and dv are all by position, [B T N H].
    """
    # From head dim 192 on the registers hold one of the two sums.
    launches = ("kv",) if k.shape[3] <= 128 else ("k", "v")
    operands = (q, k, v, runs, lse, do, delta)
    options = {"scale": scale, "soft_cap": soft_cap, "alibi": alibi, "repeats": repeats}
    options |= {"config": config, "order": order, "in_place": in_place}
    dk, dv = (x for parts in launches for x in _dkv(parts, *operands, **options))
    return dk, dv


def backward(
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
    in_place: bool = False,
) -> tuple[Float[Array, "B _N _T H"], Float[Array, "B _K _S H"], Float[Array, "B _K _S H"]]:
    """Returns dq, dk and dv from one kernel, with the tile of `config.dkv`; for head dims up to `FUSED_HEAD_DIM`.

    With `in_place` all but dq are by position, [B T N H]: dq is summed by slot, [B N T H].
    """

    @jax.custom_batching.custom_vmap
    def folded(q, k, v, runs, lse, do, delta):
        options = {"scale": scale, "soft_cap": soft_cap, "config": config, "in_place": in_place}
        return tuple(_dkv("qkv", q, k, v, runs, lse, do, delta, **options))

    @folded.def_vmap
    def _(size, batched, *operands):
        """The mapped axis joins the batch: counters are those of one launch."""
        batch = operands[0].shape[int(batched[0])]

        def fold(x, mapped):
            x = x if mapped else x[None]
            return jnp.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])

        outputs = folded(*jax.tree.map(fold, operands, tuple(batched)))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in outputs), (True, True, True)

    dq, dk, dv = folded(q, k, v, runs, lse, do, delta)
    # Of queries that see nothing, no program may have been at the sums.
    sees = (runs.k_stop > runs.k_start)[:, :, None, :, None]
    by_bounds = dq.reshape(dq.shape[0], sees.shape[1], -1, *dq.shape[2:])
    return jnp.where(sees, by_bounds * scale, 0.0).astype(q.dtype).reshape(dq.shape), dk, dv


def _dkv(
    parts,
    q,
    k,
    v,
    runs,
    lse,
    do,
    delta,
    *,
    scale,
    soft_cap,
    config,
    alibi=None,
    repeats=NO_REPEATS,
    order=None,
    in_place=False,
):
    block, head_dim = config.dkv, padded_head_dim(k.shape[3])
    held, both = row_buffers(block), 2 if "k" in parts else 1
    q_ready, do_ready, free = ready_barriers(block, 2), ready_barriers(block, both), free_barriers(block)
    own = buffers(held, WARPGROUP_ROWS, head_dim, k.dtype)
    ring = buffers(block.walks * block.num_stages, block.columns, head_dim, k.dtype)
    vector = plgpu.SMEM((block.walks * block.num_stages, block.columns), jnp.float32)
    rows_ready = plgpu.Barrier(num_arrivals=both, num_barriers=held)
    unused = plgpu.SMEM((32,), jnp.float32)
    turn = plgpu.Barrier(num_barriers=block.warpgroups)
    barriers = (rows_ready, q_ready, do_ready, free, turn)
    if "k" in parts:
        scratch = (own, own, ring, ring, vector, vector, *barriers)
    else:
        scratch = (own, unused, ring, ring, vector, unused, *barriers)
    like, beside = {"k": k, "v": v}, 1
    (batch, heads, queries), (_, key_heads, keys) = (by_head(x, in_place) for x in (q, k))
    if "q" in parts:
        programs = pl.cdiv(keys, block.rows) if config.interpret else 1
        like["q"] = jax.ShapeDtypeStruct((programs * batch, heads, queries, q.shape[3]), jnp.float32)
        beside = heads_beside(key_heads, queries, head_dim)
        scratch = (*scratch, *sums_scratch(block, head_dim, k.dtype))
    side = of_keys(runs)
    if side.second is not None:
        beside = key_heads  # all heads' first keys to begin with: those that most queries see
    if "q" in parts:
        # Keys past the end must see nothing: what they add to dq would be infinity times zero where scores are low.
        side = Side(*extend_bounds(side.start, side.stop, pl.cdiv(keys, WARPGROUP_ROWS) * WARPGROUP_ROWS))
    outputs = launch(
        functools.partial(_dkv_kernel, parts=parts),
        side,
        order,
        (k, v),
        (q, do, lse * LOG2E, delta),
        [like[part] for part in parts],
        scratch,
        scale=scale,
        soft_cap=soft_cap,
        distances=from_keys(alibi),
        repeats=repeats.transposed,
        block=block,
        last_first="q" in parts,
        config=config,
        name="interval_attention_d" + parts,
        beside=beside,
        helpers=2 if "q" in parts else 1,
        in_place=in_place,
    )
    if "q" in parts and config.interpret:
        outputs[0] = sum_of_programs(outputs[0].reshape(-1, batch, heads, queries, q.shape[3]))
    return outputs
