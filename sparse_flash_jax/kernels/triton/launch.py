"""What the three Triton kernels share: padding to tiles, the order of tiles, and the launch itself."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.tiles import TileRange, tile_range

LOG2E = 1.4426950408889634
"""exp2 is one instruction on the GPU, exp two: scores are scaled by log2(e)."""


def pad(x: Array, block: Blocks, *, by: str) -> Array:
    """Returns x [B A L ...] padded so that its length is a multiple of a block's rows or columns.

    The head dim of [B A L H] becomes a power of two, at least 16. Zeros in either change no score.
    """
    widths = [(0, 0), (0, 0), (0, -x.shape[2] % getattr(block, by))]
    if x.ndim == 4:
        widths.append((0, max(16, 1 << (x.shape[3] - 1).bit_length()) - x.shape[3]))
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def pad_bounds(bound: Int32[Array, "b a L"], block: Blocks) -> Int32[Array, "b a M"]:
    """Returns bounds padded by rows with their last value, so that they stay monotone."""
    padding = -bound.shape[2] % block.rows
    return jnp.pad(bound, ((0, 0), (0, 0), (0, padding)), mode="edge") if padding else bound


def precision_of(dtype: Any, config: Config) -> Any:
    """Returns the precision of products: full float32 for float32 operands, unless the config allows tf32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 and not config.tf32 else lax.Precision.DEFAULT


def longest_first(
    start: Int32[Array, "b a M"], stop: Int32[Array, "b a M"], block: Blocks, *, batch: int, heads: int, group: int
) -> Int32[Array, " programs"]:
    """Returns the programs, numbered ((batch, head), tile), in the order in which to start them.

    Tiles far longer than the mean come first, so that none of them starts when the others have ended. The rest stay
    head by head, where neighbours read the same keys, with the last tile, a causal head's longest, first. A program
    does the work of `group` of the `heads` heads.
    """
    work = stop[..., block.rows - 1 :: block.rows] - start[..., :: block.rows]
    work = jnp.broadcast_to(jnp.repeat(work, heads // work.shape[1], axis=1), (batch, heads, work.shape[2]))
    work = work.reshape(batch, heads // group, group, -1).sum(axis=2)[..., ::-1].astype(jnp.float32)
    times_mean = work / jnp.maximum(jnp.mean(work), 1.0)
    rank = -jnp.floor(jnp.log2(jnp.maximum(times_mean, 1.0))).astype(jnp.int32)
    program = jnp.arange(work.size, dtype=jnp.int32).reshape(work.shape)[..., ::-1]
    _, order = lax.sort((rank.reshape(-1), program.reshape(-1)), num_keys=1, is_stable=True)
    return order


def place(order_ref: Any, heads: int, tiles: int) -> tuple[Array, Array, Array]:
    """Returns the batch entry, head and tile of this program."""
    program = order_ref[pl.program_id(0)]
    row = lax.div(program, jnp.int32(tiles))
    return lax.div(row, jnp.int32(heads)), lax.rem(row, jnp.int32(heads)), lax.rem(program, jnp.int32(tiles))


def bounds_of(ref: Any, b: Array, n: Array, heads: int) -> tuple[Array | int, Array]:
    """Returns the row of a bounds array [B|1 A M] that holds for a batch entry and one of `heads` heads."""
    return (b if ref.shape[0] > 1 else 0, lax.div(n, jnp.int32(heads // ref.shape[1])))


def range_of(start_ref: Any, stop_ref: Any, row: tuple, first: Array, rows: int, columns: int) -> TileRange:
    """Returns the tiles that rows [first, first + rows) touch, from two scalar loads a bound."""
    last = first + rows - 1
    return tile_range(
        start_ref[*row, first], stop_ref[*row, first], start_ref[*row, last], stop_ref[*row, last], columns
    )


def visible(start: Array, stop: Array, tile: Array, columns: int) -> Array:
    """Returns which columns of a tile each row sees: bool [rows, columns]."""
    column = tile * columns + lax.broadcasted_iota(jnp.int32, (start.shape[0], columns), 1)
    return (start[:, None] <= column) & (column < stop[:, None])


def dot(a: Array, b: Array, *, contract: tuple[int, int], precision: Any) -> Array:
    """Returns a product accumulated in float32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def launch(
    kernel: Callable,
    operands: Sequence[Array],
    out_shape: Any,
    *,
    programs: int,
    block: Blocks,
    name: str,
    interpret: bool,
) -> Any:
    """Runs a kernel over a one-dimensional grid, every operand whole in global memory."""
    # Raised anew at each lowering; this one message, and no other, is silenced.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(programs,),
        compiler_params=pltriton.CompilerParams(num_warps=block.num_warps, num_stages=block.num_stages),
        interpret=interpret,
        name=name,
    )
    return call(*operands)
