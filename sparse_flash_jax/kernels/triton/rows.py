"""Rows into slot order and back at the speed of a copy: kernels that move several arrays in one launch.

Both read or write positions in turn and go to slots at random, so that the slot of each position is all they need.
Slots may be rounded up to whole tiles, for kernels that take no others; those past the last are 0.
Programs of neighbouring heads run side by side, as their rows are neighbours in memory.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.config import operand_side
from sparse_flash_jax.kernels.triton.launch import triton_call
from sparse_flash_jax.permute import Permutation

ROWS = 64  # positions of a program


def to_slots(
    moves: Sequence[tuple[Float[Array, "B _L _A H"], Permutation]], *, whole: int = 1, interpret: bool = False
) -> list[Float[Array, "B _A _C H"]]:
    """Returns the rows of each array in slot order; the number of slots is rounded up to a multiple of `whole`."""
    shape = lambda x, p: (x.shape[0], x.shape[2], _slots(p, whole), x.shape[3])
    return _launch(_to_slots, moves, [jax.ShapeDtypeStruct(shape(x, p), x.dtype) for x, p in moves], interpret)


def to_positions(
    moves: Sequence[tuple[Float[Array, "B _A _C H"], Permutation]], *, interpret: bool = False
) -> list[Float[Array, "B _L _A H"]]:
    """Returns the rows of each array by position, 0 where a position has no slot."""
    shape = lambda x, p: (x.shape[0], p.slot.shape[2], x.shape[1], x.shape[3])
    return _launch(_to_positions, moves, [jax.ShapeDtypeStruct(shape(x, p), x.dtype) for x, p in moves], interpret)


def to_slots_with_delta(
    do: Float[Array, "B T N H"],
    o: Float[Array, "B T N H"],
    permutation: Permutation,
    *,
    whole: int = 1,
    interpret: bool = False,
) -> tuple[Float[Array, "B N Tc H"], Float32[Array, "B N Tc"]]:
    """Returns do in slot order, and in the same pass delta, the sum of o * do over the head dim."""
    batch, _, heads, head_dim = do.shape
    slots = (batch, heads, _slots(permutation, whole))
    outputs = [jax.ShapeDtypeStruct((*slots, head_dim), do.dtype), jax.ShapeDtypeStruct(slots, jnp.float32)]
    moved, delta = _launch(_to_slots_with_delta, [(do, permutation)], outputs, interpret, o)
    return moved, delta


def _slots(permutation: Permutation, whole: int) -> int:
    return pl.cdiv(permutation.order.shape[2], whole) * whole


def _launch(kernel, moves, outputs, interpret, *more) -> list[Array]:
    xs, permutations = zip(*moves, strict=True)
    slots = [permutation.slot for permutation in permutations]
    by_position = outputs if kernel is _to_positions else xs
    batch, heads = xs[0].shape[0], max(x.shape[2] for x in by_position)
    chunks = pl.cdiv(max(x.shape[1] for x in by_position), ROWS)
    call = triton_call(
        functools.partial(kernel, capacities=[by.order.shape[2] for by in permutations], chunks=chunks, heads=heads),
        outputs,
        like=xs[0],
        grid=(batch * chunks * heads,),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )
    return list(call(*slots, *xs, *more))


class _Rows:
    """Where a program's rows of one array are: by position [B L A H], and by slot [B A C H] of which some are used."""

    def __init__(self, slot_ref: Any, by_position: Any, by_slot: Any, capacity: int, *, chunks: int, heads: int):
        program = pl.program_id(0)
        b, rest = lax.div(program, jnp.int32(chunks * heads)), lax.rem(program, jnp.int32(chunks * heads))
        n, (_, length, own_heads, head_dim) = lax.rem(rest, jnp.int32(heads)), by_position.shape
        t = lax.div(rest, jnp.int32(heads)) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        here = (t < length) & (n < own_heads)
        row = (b if slot_ref.shape[0] > 1 else 0, n if slot_ref.shape[1] > 1 else 0, t)
        self.slot = pltriton.load(slot_ref.at[row], mask=here, other=capacity)
        self.has_slot = here & (self.slot < capacity)
        self.b, self.n = b, n
        # A head's first program has the slots past the last one, too.
        first = (t < ROWS) & (n < own_heads)
        pasts = [t + past for past in range(capacity, by_slot.shape[2], ROWS)]
        self.unused = [(past, first & (past < by_slot.shape[2])) for past in pasts]
        tile = (ROWS, operand_side(head_dim))
        column = lax.broadcasted_iota(jnp.int32, tile, 1)
        wide = lambda x: jnp.broadcast_to(x[:, None], tile)
        within = lambda rows: wide(rows) if tile[1] == head_dim else wide(rows) & (column < head_dim)
        self._by_position, self._here = (b, wide(t), n, column), within(here)
        self._by_slot, self._has_slot = (b, n, wide(self.slot), column), within(self.has_slot)
        self._unused = [((b, n, wide(past), column), within(rows)) for past, rows in self.unused]

    def load_by_position(self, ref: Any) -> Array:
        return pltriton.load(ref.at[self._by_position], mask=self._here, other=0)

    def load_by_slot(self, ref: Any) -> Array:
        return pltriton.load(ref.at[self._by_slot], mask=self._has_slot, other=0)

    def store_by_position(self, ref: Any, x: Array) -> None:
        pltriton.store(ref.at[self._by_position], x, mask=self._here)

    def store_by_slot(self, ref: Any, x: Array) -> None:
        pltriton.store(ref.at[self._by_slot], x, mask=self._has_slot)
        for row, mask in self._unused:
            pltriton.store(ref.at[row], jnp.zeros_like(x), mask=mask)


def _to_slots(*refs: Any, capacities: list[int], **place: int) -> None:
    slots, xs, outs = _thirds(refs)
    rows = [_Rows(*each, **place) for each in zip(slots, xs, outs, capacities, strict=True)]
    tiles = [of.load_by_position(x) for of, x in zip(rows, xs, strict=True)]  # all loads first: more bytes in flight
    for of, out, tile in zip(rows, outs, tiles, strict=True):
        of.store_by_slot(out, tile)


def _to_positions(*refs: Any, capacities: list[int], **place: int) -> None:
    slots, xs, outs = _thirds(refs)
    rows = [_Rows(*each, **place) for each in zip(slots, outs, xs, capacities, strict=True)]
    tiles = [of.load_by_slot(x) for of, x in zip(rows, xs, strict=True)]
    for of, out, tile in zip(rows, outs, tiles, strict=True):
        of.store_by_position(out, tile)


def _to_slots_with_delta(slot_ref, do_ref, o_ref, out_ref, delta_ref, *, capacities: list[int], **place: int) -> None:
    rows = _Rows(slot_ref, do_ref, out_ref, *capacities, **place)
    do, o = rows.load_by_position(do_ref), rows.load_by_position(o_ref)
    rows.store_by_slot(out_ref, do)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=1)
    pltriton.store(delta_ref.at[rows.b, rows.n, rows.slot], delta, mask=rows.has_slot)
    for past, mask in rows.unused:
        pltriton.store(delta_ref.at[rows.b, rows.n, past], jnp.zeros_like(delta), mask=mask)


def _thirds(refs: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    count = len(refs) // 3
    return refs[:count], refs[count : 2 * count], refs[2 * count :]
