"""How a Hopper program runs: warpgroups that compute, one that loads, and the barriers between them.

A program computes tiles of 64 rows for each computing warpgroup. Its rows' own operands come to shared memory once a
tile; columns stream past them through a ring of buffers, which the loading warpgroup fills as the others free them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparse_flash_jax.kernels.config import HopperBlocks
from sparse_flash_jax.kernels.tiles import Masked, TileRange, tile_range

WARPGROUP_ROWS = 64  # of one wgmma
NARROW = 64  # columns: wider blocks leave few registers beside sums and scores
LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)
HELD_TILES = 3  # of rows: one is computed with while the next one loads and the last one's output is stored
# Of a thread that computes and of one that loads, by how many warpgroups compute; None leaves it to the compiler.
_REGISTERS = {1: None, 2: (240, 24), 3: (160, 32), 4: (112, 32)}


class Shapes(NamedTuple):
    """What is static of a launch. Its grid is (batch, head of the rows, program)."""

    block: HopperBlocks
    length: int
    """Slots of the rows, a multiple of 64."""
    column_tiles: int
    heads: int
    """N."""
    group: int
    """N / K."""
    members: int
    """Query heads that a program's rows meet: the group for rows of keys, else 1."""
    last_first: bool
    """Whether programs start from the last tile of rows: the longest of a causal head."""


class Program:
    """The tiles of this program, and the part of each that this warpgroup computes."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.block = shapes, shapes.block
        self.batch, self.head, self.warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        self._first = lax.axis_index("program") * self.block.tiles
        self.row_tiles = pl.cdiv(shapes.length, self.block.rows)
        self.count = lax.min(jnp.int32(self.block.tiles), self.row_tiles - self._first)

    def rows(self, r: Any) -> Any:
        """Returns the rows of this warpgroup in the program's r-th tile; the last ones where it would be past them."""
        return pl.ds(lax.min(self._row(r), jnp.int32(self.shapes.length - WARPGROUP_ROWS)), WARPGROUP_ROWS)

    def store(self, r: Any, *copies: tuple[Any, Any]) -> None:
        """Starts to copy (shared memory, array) for each output of the r-th tile, unless it is past the last row."""
        plgpu.commit_smem()

        @pl.when(self._row(r) < self.shapes.length)
        def _():
            for source, target in copies:
                plgpu.copy_smem_to_gmem(source, target)

    def own(self, r: Any) -> Any:
        """Returns the buffer of this warpgroup's rows in the r-th tile, and then of its output."""
        place = 0 if self.block.tiles == 1 else lax.rem(r, jnp.int32(HELD_TILES))
        return place * self.block.warpgroups + self.warpgroup

    def bounds(self, ref: Any, member: Any) -> tuple[Any, Any]:
        """Returns the row of a bounds array [B|1 A L] that holds for this program and a query head of its group."""
        shapes = self.shapes
        n = self.head * shapes.members + member
        return (self.batch if ref.shape[0] > 1 else 0, lax.div(n, jnp.int32(shapes.heads // ref.shape[1])))

    def columns(self, r: Any, start: Any, stop: Any, member: Any = 0) -> TileRange:
        """Returns the tiles of columns that the program's r-th tile visits, at least one."""
        first = self._tile(r) * self.block.rows
        last = lax.min(first + self.block.rows, jnp.int32(self.shapes.length)) - 1
        return self._seen(first, last, start, stop, member)

    def visit(self, r: Any, start: Any, stop: Any, member: Any = 0) -> "Visit":
        """Returns the same, and those among them that this warpgroup computes with."""
        whole = self.columns(r, start, stop, member)
        if self.block.warpgroups == 1 or self.block.columns > NARROW:  # wide blocks are for runs longer than the tile
            return Visit(whole.start, whole.stop, whole)
        first = self.rows(r).start
        own = self._seen(first, first + WARPGROUP_ROWS - 1, start, stop, member)
        # Rows that see nothing may be given a tile beyond those of the others.
        begin = lax.min(own.start, whole.stop - 1)
        end = lax.max(lax.min(own.stop, whole.stop), begin + 1)
        full = lax.clamp(begin, own.full_start, end)
        return Visit(whole.start, whole.stop, TileRange(begin, full, lax.clamp(full, own.full_stop, end), end))

    def _seen(self, first: Any, last: Any, start: Any, stop: Any, member: Any) -> TileRange:
        """Returns the tiles that rows see; one, masked, where they see nothing, so that none is special."""
        row = self.bounds(start, member)
        seen = tile_range(
            start[*row, first], stop[*row, first], start[*row, last], stop[*row, last], self.block.columns
        )
        begin = lax.min(seen.start, jnp.int32(self.shapes.column_tiles - 1))
        end = lax.max(seen.stop, begin + 1)
        full = lax.clamp(begin, jnp.where(seen.stop > seen.start, seen.full_start, end), end)
        return TileRange(begin, full, lax.clamp(full, seen.full_stop, end), end)

    def walk(self, visit: Callable[[Any, Any], Any]) -> Any:
        """Runs n = visit(r, n) over the program's tiles; n counts the steps taken."""
        if self.block.tiles == 1:
            return visit(0, 0)
        return lax.fori_loop(0, self.count, visit, jnp.int32(0))

    def slot(self, n: Any) -> Any:
        """Returns the buffer of the ring that holds the n-th step's columns."""
        return lax.rem(n, jnp.int32(self.block.num_stages))

    def _tile(self, r: Any) -> Any:
        tile = self._first + r
        return self.row_tiles - 1 - tile if self.shapes.last_first else tile

    def _row(self, r: Any) -> Any:
        return self._tile(r) * self.block.rows + self.warpgroup * WARPGROUP_ROWS


class Visit(NamedTuple):
    """Tiles of columns on a warpgroup's way."""

    start: Any
    stop: Any
    """It passes [start, stop) by, as they are loaded for all warpgroups of the program ..."""
    own: TileRange
    """... and computes with these."""

    def run(self, compute: Callable[[TileRange], Any], pass_by: Callable[[Any], None]) -> Any:
        """Runs `pass_by(j)` for tiles that are not this warpgroup's own, and `compute` for those that are."""
        pl.loop(self.start, self.own.start)(pass_by)
        result = compute(self.own)
        pl.loop(self.own.stop, self.stop)(pass_by)
        return result


def after_first(visited: TileRange) -> TileRange:
    """Returns a range without its first tile."""
    second = visited.start + 1
    return TileRange(second, lax.max(visited.full_start, second), lax.max(visited.full_stop, second), visited.stop)


class Feed(NamedTuple):
    """Columns of one operand, or of several that are used together, on their way through a ring."""

    free: Any
    """Barriers, one a buffer: every computing warpgroup has read it."""
    load: Callable[[Any, Any, Any], None]
    """(member, tile of columns, buffer): starts the copies."""


def load_columns(program: Program, ranges: Callable[[Any, Any], TileRange], feeds: Sequence[Feed]) -> None:
    """Loads all columns that the program's tiles visit, in their order, as buffers come free."""
    stages = jnp.int32(program.block.num_stages)

    def of_member(r: Any, member: Any, n: Any) -> Any:
        visited = ranges(r, member)

        @pl.loop(0, visited.stop - visited.start)
        def _(step):
            for feed in feeds:

                @pl.when(n + step >= stages)
                def _(feed=feed):
                    plgpu.barrier_wait(feed.free.at[program.slot(n + step)])

                feed.load(member, visited.start + step, program.slot(n + step))

        return n + visited.stop - visited.start

    def of_tile(r: Any, n: Any) -> Any:
        return over_members(program.shapes.members, functools.partial(of_member, r), n)

    taken = program.walk(of_tile)

    # Barriers must be as often waited for as completed.
    @pl.loop(lax.max(jnp.int32(0), taken - stages), taken)
    def _(n):
        for feed in feeds:
            plgpu.barrier_wait(feed.free.at[program.slot(n)])


class Stream(NamedTuple):
    """Keys or values on their way through a ring of their own."""

    source: Any
    ring: Any
    ready: Any
    free: Any


def load_keys(program: Program, k_start: Any, k_stop: Any, streams: Sequence[Stream]) -> None:
    """Loads the tiles of keys and of values that the program's queries see."""
    head = lax.div(program.head, jnp.int32(program.shapes.group))

    def feed(stream: Stream) -> Feed:
        def load(member: Any, j: Any, buffer: Any) -> None:
            columns = pl.ds(j * program.block.columns, program.block.columns)
            source = stream.source.at[program.batch, head, columns]
            plgpu.copy_gmem_to_smem(source, stream.ring.at[buffer], stream.ready.at[buffer])

        return Feed(stream.free, load)

    load_columns(program, lambda r, member: program.columns(r, k_start, k_stop), [feed(x) for x in streams])


def pass_keys(turns: "Turns", streams: Sequence[Stream], buffer: Any) -> None:
    """Lets a tile of keys and values go by, in this warpgroup's turn."""
    turns.take()
    turns.give()
    for stream in streams:
        plgpu.barrier_wait(stream.ready.at[buffer])
        plgpu.barrier_arrive(stream.free.at[buffer])


def over_members(members: int, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs carry = visit(member, carry) over the query heads of a group."""
    return visit(0, carry) if members == 1 else lax.fori_loop(0, members, visit, jnp.int32(carry))


def compute_tiles(
    program: Program,
    fetch: Callable[[Any], None],
    look: Callable[[Any], Any],
    compute: Callable[[Any, Any, Any], Any],
    outputs: int,
) -> None:
    """Runs n = compute(r, look(r), n) over the program's tiles, n the steps taken before.

    The next tile's rows are on their way meanwhile, by `fetch(r)`, and so is what `look` reads.

    Args:
        program: whose tiles.
        fetch: starts to copy the rows of a tile.
        look: reads what a tile needs in registers.
        compute: starts to copy `outputs` outputs back.
        outputs: how many.
    """
    fetch(0)

    def tile(r: Any, carry: Any) -> Any:
        n, seen = carry
        plgpu.wait_smem_to_gmem(outputs, wait_read_only=True)  # of the tile before the last: its buffers are next

        @pl.when(r + 1 < program.count)
        def _():
            fetch(r + 1)

        ahead = look(lax.min(r + 1, program.count - 1))
        return compute(r, seen, n), ahead

    if program.block.tiles == 1:
        compute(0, look(0), 0)
    else:
        lax.fori_loop(0, program.count, tile, (jnp.int32(0), look(0)))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Turns:
    """Warpgroups issue their products in turn, so that the softmax of one runs under the products of another."""

    def __init__(self, program: Program, barriers: Any):
        self._taken = program.block.turns and program.block.warpgroups > 1
        self._count, self._mine, self._barriers = program.block.warpgroups, program.warpgroup, barriers
        if self._taken:

            @pl.when(self._mine == self._count - 1)
            def _():
                self.give()

    def take(self) -> None:
        """Waits for this warpgroup's turn."""
        if self._taken:
            plgpu.barrier_wait(self._barriers.at[self._mine])

    def give(self) -> None:
        """Passes the turn on."""
        if self._taken:
            plgpu.barrier_arrive(self._barriers.at[lax.rem(self._mine + 1, jnp.int32(self._count))])

    def close(self) -> None:
        """Takes the turn that the last warpgroup has given in vain."""
        if self._taken:

            @pl.when(self._mine == 0)
            def _():
                self.take()


def split_roles(block: HopperBlocks, compute: Callable[[], None], load: Callable[[], None]) -> None:
    """Runs `load` on the last warpgroup and `compute` on the others, with registers to suit."""
    warpgroup, registers = lax.axis_index("warpgroup"), _REGISTERS[block.warpgroups]

    @pl.when(warpgroup < block.warpgroups)
    def _():
        if registers:
            plgpu.set_max_registers(registers[0], action="increase")
        compute()

    @pl.when(warpgroup == block.warpgroups)
    def _():
        if registers:
            plgpu.set_max_registers(registers[1], action="decrease")
        load()


def afresh(buffer: Any) -> Any:
    """Returns a buffer's number as one that changes in a loop.

    The compiler makes addresses of what stays ahead of the loop, one for each step of a product, and keeps them in
    registers that sums need: up to 1 KiB a thread was spilled for them.
    """
    return lax.optimization_barrier(buffer)


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


def accumulate(issue: Callable[..., None], acc: Array, *others: Array) -> Any:
    """Runs issue(accumulator, *refs) on an accumulator that starts from `acc`, and refs of the others; returns all."""
    if not others:
        return pl.run_state(issue)(plgpu.WGMMAAccumulatorRef.init(acc))
    return pl.run_state(lambda refs: issue(*refs))((plgpu.WGMMAAccumulatorRef.init(acc), *others))
