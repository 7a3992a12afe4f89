"""Buckets of the angular hash in one pass over the vectors, whose projections never leave the chip.

for each ROWS positions of a head:
    p = sum over blocks of the head dim: x[ROWS, block] R[block, buckets / 2]
    centred: p -= (sum of p at all positions so far) / their number
    bucket = the first of [p, -p] that equals max |p|
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32, Int32

from sparse_flash_jax.kernels.config import operand_side
from sparse_flash_jax.kernels.triton.launch import triton_call

ROWS = 128  # positions of a program
_WARPS = 8
_BLOCK = 64  # of the head dim, at a time in registers


def hash_rows(
    x: Float[Array, "B T N H"],
    rotation: Float32[Array, "K H R"],
    *,
    centred: bool = False,
    interpret: bool = False,
) -> Int32[Array, "B T N"]:
    """Returns the bucket of each vector, as `lsh_buckets` but for ties within float32's rounding.

    Args:
        x: vectors.
        rotation: R directions, half as many as there are buckets; K divides N.
        centred: whether to hash each vector minus the running mean of those up to it.
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
    (bucket,) = call(x, rotation, *([_sums_before(x, rotation)] if centred else []))
    return jnp.swapaxes(bucket, 1, 2)


def _sums_before(x: Float[Array, "B T N H"], rotation: Float32[Array, "K H R"]) -> Float32[Array, "B C N R"]:
    """Returns the sum of the projections of all positions before each program's."""
    batch, length, heads, head_dim = x.shape
    whole = jnp.pad(x, ((0, 0), (0, -length % ROWS), (0, 0), (0, 0)))
    sums = jnp.sum(whole.reshape(batch, -1, ROWS, heads, head_dim), axis=2, dtype=jnp.float32)
    by_rotation = sums.reshape(batch, -1, len(rotation), heads // len(rotation), head_dim)
    projected = jnp.einsum("bckgh,khr->bckgr", by_rotation, rotation, precision=lax.Precision.HIGHEST)
    projected = projected.reshape(batch, -1, heads, rotation.shape[2])
    # Shifted, not less their own: not even by rounding may a vector matter to those before it.
    return jnp.pad(jnp.cumsum(projected, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))


def _hash(x_ref, rotation_ref, *refs, group: int):
    """Buckets of one head's positions, centred by sums before if there are any; `group` heads share a rotation."""
    *before_refs, bucket_ref = refs
    n, chunk, b = (pl.program_id(axis) for axis in range(3))
    _, length, _, head_dim = x_ref.shape
    directions = rotation_ref.shape[2]
    block, columns = min(_BLOCK, operand_side(head_dim)), operand_side(directions)
    row, i = (lax.broadcasted_iota(jnp.int32, (ROWS, block), axis) for axis in (0, 1))
    j, column = (lax.broadcasted_iota(jnp.int32, (block, columns), axis) for axis in (0, 1))

    def add_block(step, projected):
        first, t = step * block, chunk * ROWS + row
        x_inside, inside = (t < length) & (first + i < head_dim), (first + j < head_dim) & (column < directions)
        x = pltriton.load(x_ref.at[b, t, n, first + i], mask=x_inside, other=0)  # [ROWS, block]
        directions_at = (lax.div(n, jnp.int32(group)), first + j, column)
        rotation = pltriton.load(rotation_ref.at[directions_at], mask=inside, other=0)  # [block, columns]
        return projected + _product(x, rotation)

    zeros = jnp.zeros((ROWS, columns), jnp.float32)
    projected = lax.fori_loop(0, pl.cdiv(head_dim, block), add_block, zeros)
    # Columns past the directions are 0, and never the first of the longest.
    row, column = (lax.broadcasted_iota(jnp.int32, projected.shape, axis) for axis in (0, 1))
    for before_ref in before_refs:
        direction = lax.iota(jnp.int32, columns)
        before = pltriton.load(before_ref.at[b, chunk, n, direction], mask=direction < directions, other=0)
        count = (chunk * ROWS + row + 1).astype(jnp.float32)
        projected -= (before[None, :] + jnp.cumsum(projected, axis=0)) / count
    longest = jnp.max(jnp.abs(projected), axis=1)[:, None]
    along, against = projected == longest, projected == -longest
    bucket = jnp.where(along | jnp.isnan(projected), column, jnp.where(against, directions + column, 2 * directions))
    t = chunk * ROWS + lax.iota(jnp.int32, ROWS)
    pltriton.store(bucket_ref.at[b, n, t], jnp.min(bucket, axis=1), mask=t < length)


def _product(x: Array, rotation: Array) -> Array:
    """Returns x @ rotation to float32's rounding, by products of parts in bfloat16, of which float32 has three."""
    if x.dtype != jnp.bfloat16:
        return lax.dot(x.astype(jnp.float32), rotation, precision=lax.DotAlgorithmPreset.BF16_BF16_F32_X6)
    total = jnp.zeros((x.shape[0], rotation.shape[1]), jnp.float32)
    for _ in range(3):
        part = rotation.astype(jnp.bfloat16)
        total += lax.dot(x, part, preferred_element_type=jnp.float32)
        rotation -= part.astype(jnp.float32)
    return total
