"""How a Hopper program runs: warpgroups that compute, one that loads, and the barriers between them.

The rows' own operands come to shared memory once a tile; columns stream past them through a ring of buffers, which the
loading warpgroup fills as the others free them.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flash_jax.kernels.config import HopperBlocks
from sparse_flash_jax.kernels.mosaic.program import Program
from sparse_flash_jax.kernels.walks import Bounds

MAX_REGISTERS = {1: (None, None), 2: (240, 24), 3: (160, 32), 4: (112, 32)}
"""Of a thread that computes and of one that loads, by how many warpgroups compute; None leaves it to the compiler."""

REGISTERS = 512
"""Of one thread of each warpgroup, all together: a multiprocessor has 64 Ki, a warpgroup 128 threads."""


class Feed(NamedTuple):
    """Columns of one operand, or of several that are used together, on their way through a ring."""

    free: Any
    """Barriers, one a buffer: every computing warpgroup has read it."""
    load: Callable[[Any, Any, Any], None]
    """(member, tile of columns, buffer): starts the copies."""


def load_columns(program: Program, bounds: Bounds, feeds: Sequence[Feed]) -> None:
    """Loads all columns that the program's tiles visit, in their order, as buffers come free."""
    stages, walks = jnp.int32(program.block.num_stages), [program.on_walk(x) for x in range(program.block.walks)]

    def of_member(r: Any, member: Any, taken: tuple[Any, ...]) -> Any:
        visited = [walk.columns(r, bounds, member) for walk in walks]
        tile_at = [walk.tile_at(r, bounds, member) for walk in walks]
        steps = [x.stop - x.start for x in visited]

        def load(i: int, step: Any) -> None:
            n = taken[i] + step
            for feed in feeds:

                @pl.when(n >= stages)
                def _(feed=feed):
                    plgpu.barrier_wait(feed.free.at[walks[i].slot(n)])

                feed.load(member, tile_at[i](visited[i].start + step), walks[i].slot(n))

        if len(walks) == 1:
            pl.loop(0, steps[0])(functools.partial(load, 0))
        else:

            @pl.loop(0, functools.reduce(lax.max, steps))
            def _(step):
                for i in range(len(walks)):
                    pl.when(step < steps[i])(functools.partial(load, i, step))

        return tuple(map(operator.add, taken, steps))

    def of_tile(r: Any, taken: Any) -> Any:
        return over_members(program.shapes.members, functools.partial(of_member, r), taken)

    taken = program.over_tiles(of_tile, (0,) * len(walks))

    # Barriers must be as often waited for as completed.
    for walk, steps in zip(walks, taken, strict=True):

        @pl.loop(lax.max(jnp.int32(0), steps - stages), steps)
        def _(n, walk=walk):
            for feed in feeds:
                plgpu.barrier_wait(feed.free.at[walk.slot(n)])


class Stream(NamedTuple):
    """Keys or values on their way through a ring of their own."""

    source: Any
    ring: Any
    ready: Any
    free: Any


def load_keys(program: Program, bounds: Bounds, streams: Sequence[Stream]) -> None:
    """Loads the tiles of keys and of values that the program's queries see."""
    head = lax.div(program.head, jnp.int32(program.shapes.group))

    def feed(stream: Stream) -> Feed:
        def load(member: Any, j: Any, buffer: Any) -> None:
            columns = pl.ds(j * program.block.columns, program.block.columns)
            source = program.part(stream.source, head, columns)
            plgpu.copy_gmem_to_smem(source, stream.ring.at[buffer], stream.ready.at[buffer])

        return Feed(stream.free, load)

    load_columns(program, bounds, [feed(x) for x in streams])


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


def pass_keys(turns: Turns, streams: Sequence[Stream], buffer: Any) -> None:
    """Lets a tile of keys and values go by, in this warpgroup's turn."""
    turns.take()
    turns.give()
    for stream in streams:
        plgpu.barrier_wait(stream.ready.at[buffer])
        plgpu.barrier_arrive(stream.free.at[buffer])


def over_members(members: int, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs carry = visit(member, carry) over the query heads of a group."""
    return visit(0, carry) if members == 1 else lax.fori_loop(0, members, visit, jax.tree.map(jnp.int32, carry))


def compute_tiles(
    program: Program,
    turn: Any,
    fetch: Callable[[Any], None],
    look: Callable[[Any], Any],
    compute: Callable[[Turns, Any, Any, Any], Any],
    copies: int,
) -> None:
    """Runs n = compute(turns, r, look(r), n) over the program's tiles, n the steps taken before.

    The next tile's rows are on their way meanwhile, by `fetch(r)`, and so is what `look` reads.

    Args:
        program: whose tiles.
        turn: barriers of the warpgroups' turns.
        fetch: starts to copy the rows of a tile.
        look: reads what a tile needs in registers.
        compute: starts to copy outputs back.
        copies: how many of them are copies by TMA.
    """
    turns = Turns(program, turn)
    fetch(0)

    def tile(r: Any, carry: Any) -> Any:
        n, seen = carry
        # The next rows' buffers held the outputs of the tile before the last. (What `store` leaves out belongs to the
        # first or last tile of a program, so that this counts right in between.)
        plgpu.wait_smem_to_gmem(copies, wait_read_only=True)

        @pl.when(r + 1 < program.count)
        def _():
            fetch(r + 1)

        ahead = look(lax.min(r + 1, program.count - 1))
        return compute(turns, r, seen, n), ahead

    if program.block.tiles == 1:
        compute(turns, 0, look(0), 0)
    else:
        lax.fori_loop(0, program.count, tile, (jnp.int32(0), look(0)))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    turns.close()


class Role(NamedTuple):
    """What some warpgroups of a program do."""

    warpgroups: int
    registers: int | None
    """Of a thread; None leaves it to the compiler."""
    run: Callable[[], None]


def split_roles(*roles: Role) -> None:
    """Runs each role on as many warpgroups as it says, in order."""
    warpgroup, first = lax.axis_index("warpgroup"), 0
    at_launch = REGISTERS // sum(role.warpgroups for role in roles)
    for role in roles:

        @pl.when((warpgroup >= first) & (warpgroup < first + role.warpgroups))
        def _(role=role):
            if role.registers:
                plgpu.set_max_registers(role.registers, action="increase" if role.registers > at_launch else "decrease")
            role.run()

        first += role.warpgroups


def compute_and_load(block: HopperBlocks, compute: Callable[[], None], load: Callable[[], None]) -> None:
    """Runs `load` on the last warpgroup and `compute` on the others, with registers to suit."""
    computing, loading = MAX_REGISTERS[block.warpgroups]
    split_roles(Role(block.warpgroups, computing, compute), Role(1, loading, load))
