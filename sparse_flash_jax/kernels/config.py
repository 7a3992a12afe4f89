"""Block sizes: which tiles a kernel works in. Plans know nothing of them, so passes may tile differently."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of one pass: `rows` of the output's operand (queries; keys for dK/dV) by `columns` streamed past it."""

    rows: int
    columns: int
    num_warps: int = 4
    """Warps of a program on a GPU."""
    num_stages: int = 2
    """Streamed tiles in flight on a GPU."""


@dataclasses.dataclass(frozen=True)
class HopperBlocks:
    """Tile of one pass of the Mosaic kernels: 64 rows for each of one to four warpgroups that compute."""

    warpgroups: int
    columns: int
    """Slots streamed past the rows in a step."""
    num_stages: int
    """Streamed tiles in flight."""
    turns: bool = False
    """Whether warpgroups issue in turn, so that the products of one run under the softmax of another."""
    overlap: bool = False
    """Forward: whether the last product of a step runs under the next step's softmax."""
    tiles: int = 1
    """Tiles that one program walks through, loading ahead: for short runs."""
    rows_in_registers: bool = False
    """dK/dV: whether k and v are first operands from registers, not from shared memory."""
    walks: int = 1
    """Of listed blocks: parts of the tile's rows that walk lists of their own, with a ring of buffers each."""

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Config[Tile: Blocks | HopperBlocks]:
    """Tiles of the three passes; that of dQ goes unused if the other backward kernel is `fused` with it."""

    forward: Tile
    dq: Tile
    dkv: Tile
    tf32: bool = False
    """Whether float32 products on a GPU's tensor cores may round their operands to tf32."""
    fused: bool = False
    """Hopper kernels: whether the dK/dV kernel sums dQ too, with the tile of `dkv`."""
    interpret: bool = False
    """Whether GPU kernels run in Pallas' interpreter, on any device and slowly: for tests."""

    def __post_init__(self):
        tile = self.dkv
        if self.fused and not (
            isinstance(tile, HopperBlocks) and (tile.warpgroups, tile.columns, tile.tiles, tile.walks) == (2, 64, 1, 1)
        ):
            raise ValueError(
                "fused, one Hopper kernel for all gradients, takes as dkv a HopperBlocks of two warpgroups, 64 columns "
                f"and one tile, got {tile}."
            )


FUSED_HEAD_DIM = 64
"""The largest that `Config.fused` serves."""


HELD_TILES = 3
"""Tiles of rows that a Hopper program has at a time: it computes with one, loads another, stores one's output."""

_BARRIERS = 1024
"""Bytes, and more than there are."""

HOPPER_HEAD_DIMS = (64, 96, 128, 192, 256)
"""Of the Hopper kernels; others are padded to the next of these."""


def within_blocks[Tile: Blocks | HopperBlocks](
    config: Config[Tile], query_block: int, key_block: int, head_dim: int
) -> Config[Tile]:
    """Returns tiles no larger than those given, of which listed blocks of such sizes are made; for each pass by itself.

    Raises:
        NotImplementedError: if the kernels have no such tiles.
    """
    fit: Any = _fit_blocks
    if isinstance(config.forward, HopperBlocks):
        fit = functools.partial(_fit_hopper, head_dim=padded_head_dim(head_dim))
    forward = fit(config.forward, query_block, key_block, row_operands=1)
    dq = fit(config.dq, query_block, key_block, row_operands=2)
    dkv = fit(config.dkv, key_block, query_block, row_operands=2)
    return dataclasses.replace(config, forward=forward, dq=dq, dkv=dkv, fused=False)


def padded_head_dim(head_dim: int) -> int:
    """Returns the head dim that the Hopper kernels run at."""
    return next(size for size in HOPPER_HEAD_DIMS if size >= head_dim)


def _fit_blocks(tile: Blocks, rows: int, columns: int, *, row_operands: int) -> Blocks:
    return dataclasses.replace(tile, rows=math.gcd(tile.rows, rows), columns=math.gcd(tile.columns, columns))


def _fit_hopper(tile: HopperBlocks, rows: int, columns: int, *, row_operands: int, head_dim: int) -> HopperBlocks:
    """A tile in which as many blocks walk lists of their own as shared memory holds; of fewer rows, if of one only."""
    if rows % 64 or columns % 64:
        raise NotImplementedError(f"the Hopper kernels take blocks of multiples of 64 tokens, got {rows} x {columns}.")
    most, columns = tile.warpgroups, math.gcd(tile.columns, columns)
    of_walk = next(x for x in range(most, 0, -1) if rows % (64 * x) == 0)
    tile = dataclasses.replace(tile, warpgroups=of_walk, columns=columns)
    # Turns are for warpgroups that take equally many steps.
    side_by_side = [
        dataclasses.replace(tile, warpgroups=walks * of_walk, turns=tile.turns and walks == 1, walks=walks)
        for walks in range(most // of_walk, 0, -1)
    ]
    fitting = (x for x in side_by_side if hopper_bytes(x, row_operands, head_dim) <= shared_memory(9.0))
    return next(fitting, side_by_side[-1])


def hopper_bytes(tile: HopperBlocks, row_operands: int, head_dim: int) -> int:
    """Returns the shared memory of a tile: rows and rings in 16 bits, a float32 for each row, and two for each column.

    Args:
        tile: of one pass.
        row_operands: of its rows: q in forward; with do in dQ; k and v in dK/dV.
        head_dim: a padded one.
    """
    held = min(tile.tiles, HELD_TILES) * tile.rows * (2 * row_operands * head_dim + 4)
    return held + tile.walks * tile.num_stages * tile.columns * (4 * head_dim + 8) + _BARRIERS


def xla_config(query_slots: int, key_slots: int) -> Config[Blocks]:
    """Returns tiles for the XLA implementation.

    128 x 64 is the best all-round tile on two CPU cores (benchmarks/notes.md): a larger one is a fifth faster where
    runs are long, and up to twice as slow where they are short; a smaller one pays more loop overhead.
    """
    q, k = _multiple_of_8(query_slots), _multiple_of_8(key_slots)
    by_queries = Blocks(rows=min(128, q), columns=min(64, k))
    return Config(forward=by_queries, dq=by_queries, dkv=Blocks(rows=min(128, k), columns=min(64, q)))


def _multiple_of_8(slots: int) -> int:
    return -(-slots // 8) * 8


def triton_config(dtype: Any, head_dim: int, *, long_runs: bool, capability: float) -> Config[Blocks]:
    """Returns tiles for the Triton implementation.

    In 16 bits and up to head dim 128, those that were fastest, all in all, on an H100 at T = 16384
    (benchmarks/notes.md). GPUs with less shared memory keep fewer tiles in flight.

    Args:
        dtype: of q, k and v.
        head_dim: H.
        long_runs: whether a run spans many tiles.
        capability: compute capability of the GPU.
    """
    itemsize, head_dim = jnp.dtype(dtype).itemsize, operand_side(head_dim)
    if itemsize == 4 or head_dim > 128:
        small = Blocks(rows=32, columns=16 if itemsize * head_dim > 512 else 32, num_warps=4, num_stages=2)
        tiles = (small, small, small)
    elif head_dim > 64:
        tall = Blocks(rows=128, columns=64, num_warps=8, num_stages=3)
        small = Blocks(rows=64, columns=32, num_warps=4, num_stages=3)
        square = Blocks(rows=64, columns=64, num_warps=4, num_stages=2)
        tiles = (tall, tall, square) if long_runs else (small, square, square)
    else:
        square = Blocks(rows=64, columns=64, num_warps=4, num_stages=3)
        tiles = (square, square, square)
    limit = shared_memory(capability)
    # Forward holds q of its rows; dQ also do, dK/dV k and v.
    forward, dq, dkv = (_fit(tile, n, head_dim, itemsize, limit) for tile, n in zip(tiles, (1, 2, 2), strict=True))
    return Config(forward=forward, dq=dq, dkv=dkv)


def operand_side(size: int) -> int:
    """Returns the side that an operand of a product has in Triton, the head dim for one: a power of two, from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def mosaic_config(head_dim: int, *, long_runs: bool) -> Config[HopperBlocks]:
    """Returns tiles for the Hopper kernels: those fastest on an H100 (benchmarks/notes.md) that spill nothing in loops.

    With slopes some spill a little.

    Args:
        head_dim: H.
        long_runs: whether a run spans many tiles.
    """
    if head_dim > 128:
        gradient = HopperBlocks(warpgroups=2, columns=64, num_stages=2 if head_dim <= 192 else 1)  # all that fits
        return Config(
            forward=HopperBlocks(warpgroups=2, columns=64, num_stages=2, turns=True, overlap=True),
            dq=gradient,
            dkv=dataclasses.replace(gradient, turns=long_runs),
        )
    if head_dim > 64:
        return Config(
            forward=HopperBlocks(warpgroups=2, columns=128, num_stages=2, turns=True, overlap=True)
            if long_runs
            else HopperBlocks(warpgroups=3, columns=64, num_stages=3, overlap=True),
            dq=HopperBlocks(warpgroups=2, columns=128 if long_runs else 64, num_stages=2, turns=long_runs),
            dkv=HopperBlocks(warpgroups=2, columns=64, num_stages=2, turns=long_runs),
        )
    if long_runs:
        return Config(
            forward=HopperBlocks(warpgroups=3, columns=128, num_stages=2, turns=True),
            dq=HopperBlocks(warpgroups=2, columns=128, num_stages=2),
            dkv=HopperBlocks(warpgroups=2, columns=64, num_stages=4, rows_in_registers=True),
            fused=True,
        )
    return Config(
        forward=HopperBlocks(warpgroups=4, columns=64, num_stages=3, tiles=3),
        dq=HopperBlocks(warpgroups=3, columns=64, num_stages=3, tiles=2),
        dkv=HopperBlocks(warpgroups=2, columns=64, num_stages=3, tiles=2, rows_in_registers=True),
    )


def mosaic_config_beyond_runs(
    head_dim: int, *, long_runs: bool, blocks: tuple[int, int] | None
) -> Config[HopperBlocks]:
    """Returns tiles for the Hopper kernels where rows see two runs, or listed blocks; those are still to be fitted.

    Up to head dim 64 they are the fastest of those tried on an H100 (benchmarks/notes.md): blocks of 128 tokens and
    more take wide columns; of those of 64 several are side by side.

    Args:
        head_dim: H.
        long_runs: as of `mosaic_config`.
        blocks: rows and columns of a listed block, or None.
    """
    if head_dim > 64:
        return mosaic_config(head_dim, long_runs=long_runs)
    if blocks is not None and any(size % 128 for size in blocks):
        return Config(
            forward=HopperBlocks(warpgroups=3, columns=64, num_stages=4, overlap=True),
            dq=HopperBlocks(warpgroups=2, columns=64, num_stages=3),
            dkv=HopperBlocks(warpgroups=2, columns=64, num_stages=3, tiles=2, rows_in_registers=True),
        )
    return Config(
        forward=HopperBlocks(warpgroups=2, columns=128, num_stages=2, turns=True, overlap=True, tiles=2),
        dq=HopperBlocks(warpgroups=2, columns=128, num_stages=2, tiles=2),
        dkv=HopperBlocks(warpgroups=2, columns=64, num_stages=3, tiles=2, rows_in_registers=True)
        if blocks is None
        else HopperBlocks(warpgroups=2, columns=128, num_stages=2),
    )


def shared_memory(capability: float) -> int:
    """Returns the bytes of shared memory that a thread block may have.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """
    kibibytes = {8.0: 163, 8.7: 163, 9.0: 227, 10.0: 227, 10.3: 227, 11.0: 227}
    return 1024 * kibibytes.get(capability, 99)


def tile_bytes(block: Blocks, row_operands: int, head_dim: int, itemsize: int) -> int:
    """Returns the shared memory of a tile: the operands of its rows, and two of each block of columns in flight.

    Products of float32 use no tensor cores, and pass p and ds through shared memory too.
    """
    operands = (row_operands * block.rows + 2 * block.num_stages * block.columns) * head_dim
    exchanged = row_operands * block.rows * block.columns if itemsize == 4 else 0
    return (operands + exchanged) * itemsize


def _fit(block: Blocks, row_operands: int, head_dim: int, itemsize: int, limit: int) -> Blocks:
    while tile_bytes(block, row_operands, head_dim, itemsize) > limit:
        smaller = {"num_stages": block.num_stages - 1} if block.num_stages > 1 else {"rows": block.rows // 2}
        block = dataclasses.replace(block, **smaller)
    return block
