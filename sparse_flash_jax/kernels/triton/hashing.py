"""Buckets of the angular hash in one pass over the vectors, whose projections never leave the chip.

for each ROWS positions of a head:
    p = sum over blocks of the head dim: x[ROWS, block] R[block, buckets / 2]
    bucket = the first of [p, -p] that equals max |p|
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32, Int32

from sparse_flash_jax.kernels.triton.launch import triton_call

ROWS = 128  # positions of a program
_WARPS = 8
_BLOCK = 64  # of the head dim, at a time in registers
_SMALLEST = 16  # side of a product's operands
# Six products of the three bfloat16 parts of each operand: what they leave out is below float32's rounding.
_PRECISION = lax.DotAlgorithmPreset.BF16_BF16_F32_X6


def hash_rows(
    x: Float[Array, "B T N H"], rotation: Float32[Array, "K H directions"], *, interpret: bool = False
) -> Int32[Array, "B T N"]:
    """Returns the bucket of each vector, as `lsh_buckets` but for ties within float32's rounding.

    Args:
        x: vectors.
        rotation: half as many directions as there are buckets; K divides N.
        interpret: whether to run in Pallas' interpreter.
    """
    batch, length, heads, _ = x.shape
    call = triton_call(
        functools.partial(_hash, group=heads // rotation.shape[0]),
        [jax.ShapeDtypeStruct((batch, heads, length), jnp.int32)],
        like=x,
        grid=(heads, pl.cdiv(length, ROWS), batch),
        num_warps=_WARPS,
        num_stages=1,
        interpret=interpret,
        name="hash_rows",
    )
    (bucket,) = call(x, rotation)
    return jnp.swapaxes(bucket, 1, 2)


def _hash(x_ref, rotation_ref, bucket_ref, *, group: int):
    """Buckets of one head's positions; `group` heads share a rotation."""
    n, chunk, b = (pl.program_id(axis) for axis in range(3))
    _, length, _, head_dim = x_ref.shape
    directions = rotation_ref.shape[2]
    block, columns = min(_BLOCK, _operand_side(head_dim)), _operand_side(directions)
    row, i = (lax.broadcasted_iota(jnp.int32, (ROWS, block), axis) for axis in (0, 1))
    j, column = (lax.broadcasted_iota(jnp.int32, (block, columns), axis) for axis in (0, 1))

    def add_block(step, projected):
        first, t = step * block, chunk * ROWS + row
        x_inside, inside = (t < length) & (first + i < head_dim), (first + j < head_dim) & (column < directions)
        x = pltriton.load(x_ref.at[b, t, n, first + i], mask=x_inside, other=0)  # [ROWS, block]
        directions_at = (lax.div(n, jnp.int32(group)), first + j, column)
        rotation = pltriton.load(rotation_ref.at[directions_at], mask=inside, other=0)  # [block, columns]
        return projected + lax.dot(x.astype(jnp.float32), rotation, precision=_PRECISION)

    zeros = jnp.zeros((ROWS, columns), jnp.float32)
    projected = lax.fori_loop(0, pl.cdiv(head_dim, block), add_block, zeros)
    # Columns past the directions are 0, and never the first of the longest.
    column = lax.broadcasted_iota(jnp.int32, projected.shape, 1)
    longest = jnp.max(jnp.abs(projected), axis=1)[:, None]
    along, against = projected == longest, projected == -longest
    bucket = jnp.where(along | jnp.isnan(projected), column, jnp.where(against, directions + column, 2 * directions))
    t = chunk * ROWS + lax.iota(jnp.int32, ROWS)
    pltriton.store(bucket_ref.at[b, n, t], jnp.min(bucket, axis=1), mask=t < length)


def _operand_side(size: int) -> int:
    """The power of two that holds a size, and is enough for a product."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())
