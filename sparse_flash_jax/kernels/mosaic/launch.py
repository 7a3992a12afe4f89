"""What the Hopper kernels share outside of them: padding, shared memory and the launch itself."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.alibi import Distances
from sparse_flash_jax.kernels.config import HELD_TILES, HOPPER_HEAD_DIMS, Config, HopperBlocks, padded_head_dim
from sparse_flash_jax.kernels.mosaic.pipeline import MAX_REGISTERS
from sparse_flash_jax.kernels.mosaic.program import WARPGROUP_ROWS, Shapes
from sparse_flash_jax.kernels.padding import pad, padded_shape
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.walks import Side, bounds_of
from sparse_flash_jax.manual_axes import vary_alike

# JAX before 0.12 has no `on_race`, and prints.
_RAISE: dict[str, Any] = (
    {"on_race": "raise"} if "on_race" in inspect.signature(plgpu.InterpretGPUParams).parameters else {}
)
_INTERPRET = plgpu.InterpretGPUParams(detect_races=True, **_RAISE)


def launch(
    kernel: Callable,
    side: Side,
    order: Int32[Array, "_b _a C"] | None,
    rows: Sequence[Array],
    columns: Sequence[Array],
    outputs: Sequence[Array | jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    *,
    scale: float,
    soft_cap: float | None,
    distances: Distances | None = None,
    repeats: Repeats = NO_REPEATS,
    block: HopperBlocks,
    last_first: bool,
    config: Config[HopperBlocks],
    name: str,
    beside: int = 1,
    helpers: int = 1,
    in_place: bool = False,
) -> list[Array]:
    """Returns a kernel's outputs, computed tile of rows by tile of rows.

    Args:
        kernel: takes refs of `Bounds`, `distances` (or None), `repeats`, the order (or None), `rows`, `columns`,
            `outputs` (the last three padded) and `scratch`; in the interpreter one more, of shared memory for operands
            that it cannot take from registers; and by keyword scale, soft_cap and shapes.
        side: what each row sees of the columns.
        order: position of each row that has one; outputs with a head dim are then [B T A H], by position, for as many
            positions. None leaves them by slot.
        rows: [B N|K L H] or [B N L]: what a tile of rows holds of its own.
        columns: [B K|N M H] or [B N M]: what streams past it.
        outputs: of their shapes and dtypes, [B A L H] or [B A L].
        scratch: shared memory and barriers.
        scale: factor on the scores.
        soft_cap: of the scores, or None.
        distances: by which scores lose, or None.
        repeats: pairs that are hidden.
        block: the tile.
        last_first: whether programs start from the last tile of rows.
        config: which says whether to interpret.
        name: of the kernel, as profilers show it.
        beside: heads whose programs are numbered by turns; a divisor of the rows' heads.
        helpers: warpgroups besides those that compute.
        in_place: whether rows, columns and outputs with a head dim are by position, [B L A H], in whole tiles
            (`reads_in_place`), as far as the kernel goes by `Program.part`; not with an order.

    Raises:
        ValueError: if there are no such tiles.
    """
    if block.warpgroups not in MAX_REGISTERS or block.columns % 64:
        raise ValueError(f"tiles of the Hopper kernels have 1 to 4 warpgroups and columns in 64s, got {block}.")
    if block.walks > 1 and (side.lists is None or block.warpgroups % block.walks):
        raise ValueError(f"walks are of listed blocks, and divide a tile's warpgroups; got {block}.")
    batch, row_heads, length = by_head(rows[0], in_place)
    _, column_heads, column_length = by_head(columns[0], in_place)
    heads, key_heads = sorted((row_heads, column_heads), reverse=True)
    bounds, listed = bounds_of(side, block.rows // block.walks, block.columns, WARPGROUP_ROWS)
    shapes = Shapes(
        block=block,
        length=pl.cdiv(length, WARPGROUP_ROWS) * WARPGROUP_ROWS,
        column_tiles=pl.cdiv(column_length, block.columns),
        heads=heads,
        group=heads // key_heads,
        members=heads // row_heads,
        last_first=last_first,
        beside=beside,
        listed=listed,
        in_place=in_place,
    )
    if distances is not None:
        distances = distances.padded(shapes.length, shapes.column_tiles * block.columns)
    repeats = repeats.padded(shapes.length, shapes.column_tiles * block.columns)
    of_sides, tree = jax.tree.flatten((bounds, distances, repeats))
    by_slot, positions = list(of_sides), None
    if order is not None:
        positions = order.shape[2]
        past = (0, 0), (0, 0), (0, shapes.length - positions)
        by_slot.append(jnp.pad(order, past, constant_values=-1))

    def body(*refs):
        sides, refs = jax.tree.unflatten(tree, refs[: len(of_sides)]), refs[len(of_sides) :]
        before = refs if order is not None else (None, *refs)
        kernel(*sides, *before, scale=scale, soft_cap=soft_cap, shapes=shapes)

    body.__name__ = name
    interpreted = {}
    if config.interpret:
        interpreted["interpret"] = _INTERPRET
        scratch = [*scratch, buffers(block.warpgroups, WARPGROUP_ROWS, block.columns, rows[0].dtype)]
    call = plgpu.kernel(
        body,
        out_type=[_padded_output(x, positions, in_place) for x in outputs],
        scratch_types=tuple(scratch),
        grid=(batch, row_heads // beside, pl.cdiv(shapes.length, block.rows * block.tiles) * beside),
        grid_names=("batch", "head", "program"),  # the last is the fastest: neighbours read the same columns
        num_threads=block.warpgroups + helpers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **interpreted,
    )
    if not in_place:
        rows = [pad(x, WARPGROUP_ROWS, padded_head_dim) for x in rows]
        columns = [pad(x, block.columns, padded_head_dim) for x in columns]
    # The call takes no note of the mesh axes that its operands vary over.
    _, *padded = vary_alike((rows[0], *call(*by_slot, *rows, *columns)))
    return padded if in_place else [_cut(x, like, positions) for x, like in zip(padded, outputs, strict=True)]


def _padded_output(like: Array | jax.ShapeDtypeStruct, positions: int | None, in_place: bool) -> jax.ShapeDtypeStruct:
    """[B A L] or [B A L H] in whole tiles; for so many positions [B T A H], of which the head dim alone is padded."""
    if in_place:
        return jax.ShapeDtypeStruct(like.shape, like.dtype)
    if positions is not None and like.ndim == 4:
        batch, heads, _, head_dim = like.shape
        return jax.ShapeDtypeStruct((batch, positions, heads, padded_head_dim(head_dim)), like.dtype)
    return jax.ShapeDtypeStruct(padded_shape(like.shape, WARPGROUP_ROWS, padded_head_dim), like.dtype)


def _cut(x: Array, like: Array | jax.ShapeDtypeStruct, positions: int | None) -> Array:
    """Returns an output without its padding."""
    if positions is not None and like.ndim == 4:
        return x[..., : like.shape[3]]
    return jax.lax.slice(x, (0,) * x.ndim, like.shape)


def by_head(x: Array | jax.ShapeDtypeStruct, in_place: bool) -> tuple[int, int, int]:
    """Returns batch, heads and length of [B A L ...], or of [B L A H] if it lies in place."""
    batch, first, second = x.shape[:3]
    return (batch, second, first) if in_place else (batch, first, second)


def reads_in_place(config: Config[HopperBlocks], lengths: Sequence[int], head_dim: int) -> bool:
    """Returns whether rows of such lengths may stay by position, [B L A H]: where no tile or head dim is padded."""
    sides = WARPGROUP_ROWS, *(tile.columns for tile in (config.forward, config.dq, config.dkv))
    return head_dim in HOPPER_HEAD_DIMS and not any(length % side for length in lengths for side in sides)


def buffers(count: int, rows: int, columns: int, dtype: Any) -> Any:
    """Returns shared memory for tiles that wgmma reads: [count, rows, columns], swizzled."""
    return plgpu.SMEM((count, rows, columns), dtype, transforms=swizzled(columns, dtype))


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Returns how such a tile lies in shared memory: in boxes of 8 rows, their columns exchanged."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def row_buffers(block: HopperBlocks) -> int:
    """Returns how many tiles of 64 rows are held."""
    return min(block.tiles, HELD_TILES) * block.warpgroups


def ready_barriers(block: HopperBlocks, copies: int = 1) -> Any:
    """Returns the barriers of a ring's buffers that so many copies have filled."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=block.walks * block.num_stages)


def free_barriers(block: HopperBlocks) -> Any:
    """Returns the barriers of a ring's buffers that all who compute have read."""
    return plgpu.Barrier(num_arrivals=block.warpgroups // block.walks, num_barriers=block.walks * block.num_stages)
