"""What a tile leaves in device memory: rows by slot, or at the positions of their slots.

A copy by TMA writes a box, but the rows of neighbouring slots lie anywhere in [B L A H]. So the warpgroup's threads
take the tile out of shared memory again, 16 bytes each, four side by side in a row.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array

from sparse_flash_jax.kernels.mosaic.launch import swizzled
from sparse_flash_jax.kernels.mosaic.products import BY_ROW, LAYOUT, afresh, load_rows
from sparse_flash_jax.kernels.mosaic.program import Program

_PIECE = 16  # bytes that a thread moves at a time
_NEIGHBOURS = 4  # threads that hold the same rows in `BY_ROW`


def store(program: Program, r: Any, order: Any, *outputs: tuple[Any, Any]) -> None:
    """Starts to write this warpgroup's part of the r-th tile, unless that is past the last row.

    Args:
        program: whose tile.
        r: its number.
        order: [B|1 A|1 L], the position of each slot, -1 for none; None leaves outputs by slot.
        outputs: buffers of tiles [count, 64, ...], and the array, [B A L ...]; with an order, or in place, [B L A H].
            What has no axis H stays by slot.
    """
    rows, own = program.rows(r), program.own(r)
    plgpu.commit_smem()

    @pl.when(~program.past_the_end(r))
    def _():
        position = None if order is None else load_rows(order.at[*program.bounds(order, 0), rows])
        for tiles, target in outputs:
            if position is not None and len(target.shape) == 4:
                _store_rows(tiles.at[afresh(own)], position, target, program.batch, program.head)
            else:
                plgpu.copy_smem_to_gmem(tiles.at[own], program.part(target, program.head, rows))


def _store_rows(tile: Any, position: Array, target: Any, batch: Any, head: Any) -> None:
    """Writes the rows of a tile [64, H] to their positions in an array [B L A H]."""
    length, heads, head_dim = target.shape[1:]
    number = jnp.where(position < 0, -1, (batch * length + position) * heads + head)
    row = afresh(plgpu.broadcasted_iota(jnp.int32, number.shape, 0, layout=BY_ROW))
    column = afresh(plgpu.broadcasted_iota(jnp.int32, (number.shape[0], 8), 1, layout=LAYOUT))
    types = (plgpu.RefType(swizzled(head_dim, target.dtype)), BY_ROW, LAYOUT, BY_ROW, plgpu.RefType())
    plgpu.inline_mgpu(arg_types=types)(_write)(tile, row, column, number, target)


def _write(_: Any, tile: Any, rows: Any, columns: Any, numbers: Any, target: Any) -> None:
    """Writes rows of `tile`, boxes [64 / 8, H / width, 8, width] swizzled, to those of `target` with these numbers."""
    index = ir.IndexType.get()
    const = lambda x: arith.constant(index, x)
    element, (_, across, height, width) = ir.MemRefType(tile.type).element_type, ir.MemRefType(tile.type).shape
    size = 8 * _PIECE // mgpu.bitwidth(element)  # elements of a piece
    vec, pieces = ir.VectorType.get((size,), element), width // size
    groups = across * pieces // _NEIGHBOURS
    target = mgpu.memref_fold(target, 0, 3)
    neighbour = arith.divui(arith.index_cast(index, vector.extract(columns.registers.flat[0], [], [0])), const(2))

    for held in zip(rows.registers.flat, numbers.registers.flat, strict=True):
        row, number = (vector.extract(x, [], [0]) for x in held)
        row = arith.index_cast(index, row)
        within = arith.remui(row, const(height))
        # Odd rows begin with the other half, so that eight threads read from all banks.
        turn = arith.remui(row, const(2)) if groups % 2 == 0 else const(0)
        # Of a piece's place in its row, the swizzle exchanges the bits that follow bit 7 of its address.
        exchanged = arith.divui(arith.muli(within, const(pieces)), const(8))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, number, mgpu.c(0, number.type))):
            to = arith.index_cast(index, number)
            for group in range(groups):
                nth = arith.addi(arith.muli(arith.xori(const(group), turn), const(_NEIGHBOURS)), neighbour)
                place = arith.xori(arith.remui(nth, const(pieces)), exchanged)
                box = (arith.divui(row, const(height)), arith.divui(nth, const(pieces)), within)
                piece = vector.load(vec, tile, [*box, arith.muli(place, const(size))], alignment=_PIECE)
                vector.store(piece, target, [to, arith.muli(nth, const(size))], alignment=_PIECE)
