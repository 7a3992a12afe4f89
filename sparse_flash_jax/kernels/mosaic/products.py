"""Blocks of scores in a warpgroup's registers: layout, products, what hides pairs, penalties by distance."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparse_flash_jax.kernels.alibi import Distances, penalty_by_distance
from sparse_flash_jax.kernels.mosaic.program import NARROW
from sparse_flash_jax.kernels.repeats import Repeats, repeated
from sparse_flash_jax.kernels.tiles import LOG2E, Masked
from sparse_flash_jax.kernels.walks import Bounds

LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)


def afresh(buffer: Any) -> Any:
    """Returns a buffer's number as one that changes in a loop.

    The compiler makes addresses of what stays ahead of the loop, one for each step of a product, and keeps them in
    registers that sums need: up to 1 KiB a thread was spilled for them.
    """
    return lax.optimization_barrier(buffer)


def load_rows(ref: Any) -> Array:
    """Returns [rows] of an array in global memory, each thread with the value of its rows."""
    return plgpu.load(ref, layout=BY_ROW, optimized=False)


def spread_rows(x: Array, shape: Sequence[int]) -> Array:
    """Returns [rows] as [rows, columns]."""
    return lax.broadcast_in_dim(x, shape, [0])


def spread_columns(x: Array, shape: Sequence[int]) -> Array:
    """Returns [columns] as [rows, columns]."""
    return lax.broadcast_in_dim(x, shape, [1])


def hide(x: Array, fill: float, start: Array, stop: Array, first: Any, masked: Masked) -> Array:
    """Returns a block of columns from `first` on, with `fill` where the row does not see the column."""
    if masked is None:
        return x
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=LAYOUT)
    if masked == "stop" or x.shape[1] > NARROW:
        x = jnp.where(column < spread_rows(stop - first, x.shape), x, fill)
        return x if masked == "stop" else jnp.where(column >= spread_rows(start - first, x.shape), x, fill)
    # One comparison for both bounds, which takes more registers: columns before the start wrap round to large ones.
    since = (column - spread_rows(start - first, x.shape)).astype(jnp.uint32)
    return jnp.where(since < spread_rows((stop - start).astype(jnp.uint32), x.shape), x, fill)


def load_bounds(bounds: Bounds, program: Any, r: Any, member: Any = 0) -> list[Array]:
    """Returns start and stop of each row, and of the second runs if there are any, as `hide_unseen` takes them."""
    refs = [bounds.start, bounds.stop, *(bounds.second or ())]
    return [load_rows(ref.at[*program.bounds(ref, member), program.rows(r)]) for ref in refs]


def hide_unseen(x: Array, fill: float, edges: Sequence[Array], first: Any, limit: Any, masked: Masked) -> Array:
    """Returns a block of columns from `first` on, with `fill` where the row sees the column in none of its runs.

    Args:
        x: [rows, columns].
        fill: of hidden pairs.
        edges: from `load_bounds`.
        first: column.
        limit: from which column on all is hidden, or None.
        masked: None where nothing of the block is hidden.
    """
    if masked is None:
        return x
    start, stop, *second = edges
    if limit is not None:
        stop = jnp.maximum(start, jnp.minimum(stop, limit))
    if not second:
        return hide(x, fill, start, stop, first, masked if limit is None else "both")
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=LAYOUT)

    def inside(start: Array, stop: Array) -> Array:
        since = (column - spread_rows(start - first, x.shape)).astype(jnp.uint32)
        return since < spread_rows((stop - start).astype(jnp.uint32), x.shape)

    # One after another: the compiler has no "or" of masks in this layout that it does not keep in registers.
    return jnp.where(inside(start, stop), x, jnp.where(inside(*second), x, fill))


def penalty_of_steps(
    distances: Distances | None, program: Any, r: Any, tile_at: Callable[[Any], Any], member: Any = 0
) -> Callable[[Any], Array | None]:
    """Returns what the scores of each step of the r-th tile lose by distance, in base 2; None of no slopes.

    Args:
        distances: refs of them, or None.
        program: whose tile.
        r: its number.
        tile_at: which tile of columns a step is at.
        member: query head of the group.
    """
    if distances is None:
        return lambda j: None
    slopes, rows, columns = distances
    slope = slopes[program.head * program.shapes.members + member] * LOG2E
    position = load_rows(rows.at[*program.bounds(rows, member), program.rows(r)])

    return lambda j: penalty_by_distance(slope, position, _load_columns(columns, program, tile_at(j), member))


def hide_repeats(
    repeats: Repeats, program: Any, r: Any, tile_at: Callable[[Any], Any], member: Any = 0
) -> Callable[[Array, float, Any], Array]:
    """Returns `hide(x, fill, j)`: a block of the r-th tile's step j, with `fill` where earlier rounds show the pair.

    Args:
        repeats: refs of them.
        program: whose tile.
        r: its number.
        tile_at: which tile of columns a step is at.
        member: query head of the group.
    """
    rows = [load_rows(ref.at[*program.bounds(ref, member), program.rows(r)]) for ref in repeats.rows]

    def hide(x: Array, fill: float, j: Any) -> Array:
        for of_rows, ref in zip(rows, repeats.columns, strict=True):
            x = jnp.where(repeated(of_rows, _load_columns(ref, program, tile_at(j), member)), fill, x)
        return x

    return hide


def _load_columns(ref: Any, program: Any, tile: Any, member: Any) -> Array:
    """[columns] of a tile, from an array [B|1 A L] in global memory, each thread with the value of its columns."""
    here = pl.ds(tile * program.block.columns, program.block.columns)
    return plgpu.load(ref.at[*program.bounds(ref, member), here], layout=BY_COLUMN, optimized=False)


def multiply(acc: Any, a: Any, b: Any, stage: Any, *, transposed: bool = False) -> None:
    """Issues acc += a @ b, or a @ b.T, with a in registers or in shared memory.

    The interpreter cannot take a from registers, and looks for races among loads, not among the reads of a product:
    for it there is `stage`, shared memory that a goes through, and the operands are loaded besides. As loads are not
    ordered with copies that later overwrite what they read, and products are, a fence follows.
    """
    if stage is not None:
        if isinstance(a, Array):
            stage[...] = a
            plgpu.commit_smem()
            a = stage
        for operand in (a, b):
            plgpu.load(operand, layout=LAYOUT)
        plgpu.commit_smem()
    plgpu.wgmma(acc, a, b.T if transposed else b)


def product(shape: tuple[int, int]) -> Any:
    """Returns an accumulator of a product, in registers."""
    return plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
