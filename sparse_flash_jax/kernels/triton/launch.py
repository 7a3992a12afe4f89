"""What the three Triton kernels share: the launch, with its padding and order of tiles, and steps of the kernels."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.alibi import Distances
from sparse_flash_jax.kernels.config import Blocks, Config, operand_side
from sparse_flash_jax.kernels.padding import pad, padded_shape
from sparse_flash_jax.kernels.repeats import Repeats
from sparse_flash_jax.kernels.walks import Side, bounds_of

_SMALLEST = 16  # side of a product's operands


def launch(
    kernel: Callable,
    side: Side,
    rows: Sequence[Array],
    columns: Sequence[Array],
    outputs: Sequence[Array | jax.ShapeDtypeStruct],
    *,
    scale: float,
    soft_cap: float | None,
    distances: Distances | None,
    repeats: Repeats,
    block: Blocks,
    last_first: bool,
    config: Config[Blocks],
    name: str,
) -> list[Array]:
    """Returns a kernel's outputs, computed tile of rows by tile of rows.

    Args:
        kernel: takes refs, whole and in global memory, of the order of tiles, of (`Bounds`, `distances`,
            `repeats`), `rows`, `columns` and `outputs`, the last three padded; by keyword scale, soft_cap, block, heads
            (N), group (N / K), tiles, listed and precision.
        side: what each row sees of the columns.
        rows: [B N|K L H] or [B N L]: what a tile of rows holds of its own.
        columns: [B K|N M H] or [B N M]: what streams past it.
        outputs: of their shapes and dtypes, with the rows' batch, heads and length.
        scale: factor on the scores.
        soft_cap: of the scores, or None.
        distances: by which scores lose, or None.
        repeats: pairs that are hidden.
        block: the tile.
        last_first: whether later tiles, of runs of equal length, start before earlier ones: the longest of a causal
            head are the last tiles of queries, and the first of keys.
        config: which says whether to round to tf32, and to interpret.
        name: of the kernel, as profilers show it.
    """
    _check_block(block)
    heads, key_heads = sorted((rows[0].shape[1], columns[0].shape[1]), reverse=True)
    batch, row_heads = rows[0].shape[:2]
    tiles = pl.cdiv(rows[0].shape[2], block.rows)
    bounds, listed = bounds_of(side, block.rows, block.columns, block.rows)
    if bounds.steps is None:
        work = bounds.stop[..., block.rows - 1 :: block.rows] - bounds.start[..., :: block.rows]
    else:
        work = block.columns * (bounds.steps[..., 3] - bounds.steps[..., 0])
    order = longest_first(work, last_first=last_first, batch=batch, heads=heads, group=heads // row_heads)
    call = triton_call(
        functools.partial(
            kernel,
            scale=scale,
            soft_cap=soft_cap,
            block=block,
            heads=heads,
            group=heads // key_heads,
            tiles=tiles,
            listed=listed,
            precision=_precision(rows[0].dtype, config),
        ),
        [jax.ShapeDtypeStruct(padded_shape(x.shape, block.rows, operand_side), x.dtype) for x in outputs],
        like=rows[0],
        grid=(batch * row_heads * tiles,),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=config.interpret,
        name=name,
    )
    rows = [pad(x, block.rows, operand_side) for x in rows]
    columns = [pad(x, block.columns, operand_side) for x in columns]
    if distances is not None:
        distances = distances.padded(rows[0].shape[2], columns[0].shape[2])
    repeats = repeats.padded(rows[0].shape[2], columns[0].shape[2])
    padded = call(order, (bounds, distances, repeats), *rows, *columns)
    return [lax.slice(x, (0,) * x.ndim, like.shape) for x, like in zip(padded, outputs, strict=True)]


def triton_call(
    kernel: Callable,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    like: Array,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    name: str,
) -> Callable[..., list[Array]]:
    """Returns a kernel as a function of its operands; its outputs vary over the mesh axes that `like` varies over."""
    # Raised anew at each lowering; this one message, and no other, is silenced.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    varying = jax.typeof(like).manual_axis_type
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs],
        grid=grid,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )


def _check_block(block: Blocks) -> None:
    for side in (block.rows, block.columns):
        if side < _SMALLEST or side & (side - 1):
            raise ValueError(f"tiles of the Triton kernels have sides that are powers of two from 16 on, got {block}.")


def _precision(dtype: Any, config: Config[Blocks]) -> lax.Precision:
    """Full float32 for float32 operands, unless the config allows tf32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 and not config.tf32 else lax.Precision.DEFAULT


def longest_first(
    work: Int32[Array, "b a tiles"],
    *,
    last_first: bool,
    batch: int,
    heads: int,
    group: int,
) -> Int32[Array, " programs"]:
    """Returns the programs, numbered ((batch, head), tile), in the order in which to start them.

    Tiles far longer than the mean come first, so that none of them starts when the others have ended. The rest stay
    head by head, where neighbours read the same keys. A program does the work of `group` of the `heads` heads.
    `work` is how many columns each tile of rows visits.
    """
    work = jnp.broadcast_to(jnp.repeat(work, heads // work.shape[1], axis=1), (batch, heads, work.shape[2]))
    work = work.reshape(batch, heads // group, group, -1).sum(axis=2).astype(jnp.float32)
    times_mean = work / jnp.maximum(jnp.mean(work), 1.0)
    rank = -jnp.floor(jnp.log2(jnp.maximum(times_mean, 1.0))).astype(jnp.int32)
    rank = jnp.flip(rank, axis=2) if last_first else rank
    # One int32 a program, rank above place: at most log2(size) ranks, so it fits for up to 2^26 programs.
    ranked = jnp.sort(rank.reshape(-1) * work.size + jnp.arange(work.size, dtype=jnp.int32))
    program, tiles = ranked % work.size, work.shape[-1]
    return program + tiles - 1 - 2 * (program % tiles) if last_first else program


def place(order_ref: Any, heads: int, tiles: int) -> tuple[Array, Array, Array]:
    """Returns the batch entry, head and tile of this program."""
    program = order_ref[pl.program_id(0)]
    row = lax.div(program, jnp.int32(tiles))
    return lax.div(row, jnp.int32(heads)), lax.rem(row, jnp.int32(heads)), lax.rem(program, jnp.int32(tiles))


def dot(a: Array, b: Array, *, contract: tuple[int, int], precision: Any) -> Array:
    """Returns a product accumulated in float32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
