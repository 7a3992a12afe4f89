"""Interval attention as `lax` loops over tile ranges: any device, any head dim, memory linear in length.

for each batch entry, head and block of rows:            one writer per output tile, in a fixed order
    for each block of columns that its runs touch:       the trip count is data, so hidden tiles cost nothing
        s = scale * q k^T; hidden pairs masked where the tile is not wholly visible
        forward   online softmax into (o, lse)
        backward  p = exp(s - lse), ds = p (do v^T - delta), into dq or (dk, dv)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from sparse_flash_jax.kernels import walks
from sparse_flash_jax.kernels.alibi import Alibi, Distances, from_keys, from_queries, penalty_by_distance
from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats, repeated
from sparse_flash_jax.kernels.tiles import LOWEST, Runs, TileRange, scores_of, sweep, tile_range


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    *,
    scale: float,
    config: Config[Blocks],
    soft_cap: float | None = None,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
) -> tuple[Float[Array, "B N T H"], Float32[Array, "B N T"]]:
    """Returns o in q's dtype, and lse with -inf where a row sees nothing."""
    batch, heads, length, _ = q.shape
    block = config.forward
    far, penalty = _distances(from_queries(alibi), batch, (heads, k.shape[1]), block)
    ids, unrepeated = _earlier(repeats, batch, (heads, k.shape[1]), block)
    k, v = (_columns(x, block.columns) for x in (k, v))

    def tile(operands):
        q, seen, head, far, ids = operands

        def step(j, carry, *, visible):
            top, total, o = carry
            kj, vj = (_block(x, head, j, block.columns) for x in (k, v))  # [columns, H]
            s, _ = scores_of(_dot("rh,ch->rc", q, kj), scale, soft_cap, penalty(far, head, j))
            visible = unrepeated(visible, ids, head, j)
            s = _where(visible, s, LOWEST)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            p = _where(visible, jnp.exp(s - new_top[:, None]), 0.0)
            keep = jnp.exp(top - new_top)
            o = o * keep[:, None] + _dot("rc,ch->rh", p.astype(vj.dtype), vj)
            return new_top, total * keep + jnp.sum(p, axis=1), o

        zeros = jnp.zeros_like(q, dtype=jnp.float32)
        top, total, o = seen.sweep(step, block.columns, (zeros[:, 0] + LOWEST, zeros[:, 0], zeros))
        some = total > 0
        o = o / jnp.where(some, total, 1.0)[:, None]
        return o.astype(q.dtype), jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)

    seen = _seen(walks.of_queries(runs), (batch, heads), block)
    key_head = _key_heads(batch, heads, k.shape[0] // batch, -(-length // block.rows))
    o, lse = lax.map(tile, (_rows(q, block.rows), seen, key_head, far, ids))
    return _unrows(o, batch, heads, length), _unrows(lse, batch, heads, length)


def backward_dq(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    lse: Float32[Array, "B N T"],
    do: Float[Array, "B N T H"],
    delta: Float32[Array, "B N T"],
    *,
    scale: float,
    config: Config[Blocks],
    soft_cap: float | None = None,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
) -> Float[Array, "B N T H"]:
    """Returns dq in q's dtype; `delta` is sum(o * do) less the cotangent of lse."""
    batch, heads, length, _ = q.shape
    block = config.dq
    far, penalty = _distances(from_queries(alibi), batch, (heads, k.shape[1]), block)
    ids, unrepeated = _earlier(repeats, batch, (heads, k.shape[1]), block)
    k, v = (_columns(x, block.columns) for x in (k, v))

    def tile(operands):
        q, lse, do, delta, seen, head, far, ids = operands

        def step(j, dq, *, visible):
            kj, vj = (_block(x, head, j, block.columns) for x in (k, v))  # [columns, H]
            s, slope = scores_of(_dot("rh,ch->rc", q, kj), scale, soft_cap, penalty(far, head, j))
            p = jnp.exp(s - lse[:, None])
            visible = unrepeated(visible, ids, head, j)
            ds = p * (_dot("rh,ch->rc", do, vj) - delta[:, None])
            ds = _where(visible, ds if slope is None else ds * slope, 0.0)
            return dq + _dot("rc,ch->rh", ds.astype(kj.dtype), kj)

        dq = seen.sweep(step, block.columns, jnp.zeros_like(q, dtype=jnp.float32))
        return (scale * dq).astype(q.dtype)

    rows = (_rows(x, block.rows) for x in (q, lse, do, delta))
    seen = _seen(walks.of_queries(runs), (batch, heads), block)
    key_head = _key_heads(batch, heads, k.shape[0] // batch, -(-length // block.rows))
    return _unrows(lax.map(tile, (*rows, seen, key_head, far, ids)), batch, heads, length)


def backward_dkv(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    lse: Float32[Array, "B N T"],
    do: Float[Array, "B N T H"],
    delta: Float32[Array, "B N T"],
    *,
    scale: float,
    config: Config[Blocks],
    soft_cap: float | None = None,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns dk and dv in k's dtype: the same loop over the transposed runs, summed over the heads of a group."""
    batch, key_heads, length, _ = k.shape
    heads, block = q.shape[1], config.dkv
    group = heads // key_heads
    far, penalty = _distances(from_keys(alibi), batch, (key_heads, heads), block)
    ids, unrepeated = _earlier(repeats.transposed, batch, (key_heads, heads), block)
    q, lse, do, delta = (_columns(x, block.columns) for x in (q, lse, do, delta))

    def tile(operands):
        k, v, seen, head, far, ids = operands  # rows are keys; what they see is [group, ...]

        def step(i, carry, *, member, visible):
            dk, dv = carry
            qi, lse_i, do_i, delta_i = (_block(x, head + member, i, block.columns) for x in (q, lse, do, delta))
            s, slope = scores_of(_dot("rh,ch->rc", k, qi), scale, soft_cap, penalty(far, head, i, member))
            visible = unrepeated(visible, ids, head, i, member)
            p = _where(visible, jnp.exp(s - lse_i[None]), 0.0)
            ds = p * (_dot("rh,ch->rc", v, do_i) - delta_i[None])
            ds = _where(visible, ds if slope is None else ds * slope, 0.0)
            dk = dk + _dot("rc,ch->rh", ds.astype(qi.dtype), qi)
            return dk, dv + _dot("rc,ch->rh", p.astype(do_i.dtype), do_i)

        def of_member(member, carry):
            of_head = jax.tree.map(lambda x: x[member], seen)
            return of_head.sweep(functools.partial(step, member=member), block.columns, carry)

        zeros = jnp.zeros_like(k, dtype=jnp.float32)
        dk, dv = lax.fori_loop(0, group, of_member, (zeros, zeros))
        return (scale * dk).astype(k.dtype), dv.astype(v.dtype)

    tiles = -(-length // block.rows)
    # [batch * heads * tiles, ...] -> [batch * key heads * tiles, group, ...]
    of_group = lambda x: (
        x.reshape(batch * key_heads, group, tiles, *x.shape[1:]).swapaxes(1, 2).reshape(-1, group, *x.shape[1:])
    )
    seen = jax.tree.map(of_group, _seen(walks.of_keys(runs), (batch, heads), block))
    first_head = jnp.repeat(jnp.arange(batch * key_heads, dtype=jnp.int32) * group, tiles)
    dk, dv = lax.map(tile, (_rows(k, block.rows), _rows(v, block.rows), seen, first_head, far, ids))
    return _unrows(dk, batch, key_heads, length), _unrows(dv, batch, key_heads, length)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "stop", "second", "steps", "index", "limit"),
    meta_fields=("split",),
)
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the rows of a tile see; arrays have the tiles in front, until `lax.map` takes them apart."""

    start: Int32[Array, "*tiles rows"]
    stop: Int32[Array, "*tiles rows"]
    second: tuple[Int32[Array, "*tiles rows"], Int32[Array, "*tiles rows"]] | None
    steps: Int32[Array, "*tiles 6"] | None
    """These and those below as in `walks.Walk`; None of one run alone."""
    index: Int32[Array, "*tiles listed"] | None
    limit: Int32[Array, "*tiles blocks"] | None
    split: int

    def sweep(self, step: Callable, columns: int, carry: Any) -> Any:
        """Runs `step(tile, carry, visible=...)` over the tiles that the rows touch, of so many columns."""
        steps, index = self.steps, self.index
        if steps is None:
            tiles, tile_at = (
                tile_range(self.start[0], self.stop[0], self.start[-1], self.stop[-1], columns),
                lambda i: i,
            )
        else:
            listed = None if index is None else lambda i: index[i]
            tiles, tile_at = TileRange(*steps[:4]), lambda i: walks.tile_at(i, lambda x: steps[x], listed, self.split)

        def at(i, carry, *, masked):
            tile = tile_at(i)
            return step(tile, carry, visible=self._visible(tile, columns) if masked else None)

        return sweep(at, tiles, carry)

    def _visible(self, tile: Int32[Array, ""], columns: int) -> Bool[Array, "rows columns"]:
        column = tile * columns + jnp.arange(columns, dtype=jnp.int32)[None]
        runs = ((self.start, self.stop),) if self.second is None else ((self.start, self.stop), self.second)
        visible = functools.reduce(
            jnp.logical_or, ((start[:, None] <= column) & (column < stop[:, None]) for start, stop in runs)
        )
        limit = self.limit
        if limit is None:
            return visible
        return visible & (column < walks.limit_at(tile, lambda block: limit[block], self.split, columns))


def _seen(side: walks.Side, axes: tuple[int, int], block: Blocks) -> _Seen:
    """What each tile of rows sees, for each batch entry and head."""

    def of_tiles(x: Array, tiles: Int32[Array, " tiles"] | None = None) -> Array:
        """[b a tiles ...] -> [B * N * tiles, ...]; of blocks, those that the tiles are in."""
        x = x if tiles is None else x[:, :, tiles]
        return _of_each_head(x, axes).reshape(-1, *x.shape[3:])

    bounds = [_bound_rows(x, axes, block.rows) for x in (side.start, side.stop, *(side.second or ()))]
    second = None if side.second is None else (bounds[2], bounds[3])
    if side.plain:
        return _Seen(bounds[0], bounds[1], None, None, None, None, 1)
    steps, index = walks.walk_of(side, block.rows, block.columns)
    tiles = jnp.arange(steps.shape[2], dtype=jnp.int32)
    of_rows, of_columns = side.blocks
    if index is None:
        return _Seen(bounds[0], bounds[1], second, of_tiles(steps), None, None, 1)
    limit = (
        None
        if side.limit is None
        else jnp.broadcast_to(side.limit[:, :, None], (*side.limit.shape[:2], len(tiles), side.limit.shape[2]))
    )
    return _Seen(
        bounds[0],
        bounds[1],
        None,
        of_tiles(steps),
        of_tiles(index, tiles * block.rows // of_rows),
        None if limit is None else of_tiles(limit),
        of_columns // block.columns,
    )


def _distances(
    distances: Distances | None, batch: int, heads: tuple[int, int], block: Blocks
) -> tuple[Any, Callable[..., Float32[Array, "rows columns"] | None]]:
    """Returns slopes and positions of each tile of rows, and of them `penalty(far, head, tile, member)` of its scores.

    Heads are those of rows and of columns; a tile has the slopes of all query heads that its rows meet.
    """
    if distances is None:
        return None, lambda *_: None
    rows = _bound_rows(distances.rows, (batch, heads[0]), block.rows)
    columns = _columns(_of_each_head(distances.columns, (batch, heads[1])), block.columns)
    slopes = jnp.tile(distances.slopes.reshape(heads[0], -1), (batch, 1))
    slopes = jnp.repeat(slopes, rows.shape[0] // slopes.shape[0], axis=0)

    def penalty(far: Any, head: Int32[Array, ""], tile: Int32[Array, ""], member: Any = 0):
        slopes, rows = far
        return penalty_by_distance(slopes[member], rows, _block(columns, head + member, tile, block.columns))

    return (slopes, rows), penalty


def _earlier(
    repeats: Repeats, batch: int, heads: tuple[int, int], block: Blocks
) -> tuple[tuple[Int32[Array, "tiles rows"], ...], Callable[..., Bool[Array, "rows columns"] | None]]:
    """Returns ids of each tile of rows, and of them `unrepeated(visible, ids, head, tile, member)`: what is left of it.

    Heads are those of rows and of columns.
    """
    rows = tuple(_bound_rows(x, (batch, heads[0]), block.rows) for x in repeats.rows)
    columns = [_columns(_of_each_head(x, (batch, heads[1])), block.columns) for x in repeats.columns]

    def unrepeated(visible: Any, ids: Any, head: Int32[Array, ""], tile: Int32[Array, ""], member: Any = 0):
        for of_rows, of_columns in zip(ids, columns, strict=True):
            new = ~repeated(of_rows, _block(of_columns, head + member, tile, block.columns))
            visible = new if visible is None else visible & new
        return visible

    return rows, unrepeated


def _where(visible: Bool[Array, "rows columns"] | None, x: Float32[Array, "rows columns"], hidden: float):
    return x if visible is None else jnp.where(visible, x, hidden)


def _dot(spec: str, a: Float[Array, "_ _"], b: Float[Array, "_ _"]) -> Float32[Array, "_ _"]:
    """A product accumulated in float32; float32 operands are not rounded to a shorter type on any device."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _rows(x: Array, rows: int) -> Array:
    """[B A L ...] -> [B * A * tiles, rows, ...], the length padded with zeros."""
    x = _columns(x, rows)
    return x.reshape(-1, rows, *x.shape[2:])


def _unrows(x: Array, batch: int, heads: int, length: int) -> Array:
    """The inverse of `_rows`."""
    return x.reshape(batch, heads, -1, *x.shape[2:])[:, :, :length]


def _of_each_head(x: Array, axes: tuple[int, int]) -> Array:
    """[B|1 A|1 ...] -> [B A ...]; A may be a divisor of the heads, too."""
    return jnp.broadcast_to(jnp.repeat(x, axes[1] // x.shape[1], axis=1), (*axes, *x.shape[2:]))


def _bound_rows(bound: Shaped[Array, "b a L"], axes: tuple[int, int], rows: int) -> Shaped[Array, "tiles rows"]:
    """Bounds for each batch entry and head, as `_rows`, padded with the last value, which keeps them monotone.

    The last value pads starts as well as stops: whatever the padded rows then see, their q, do and delta are zero or
    their output is cut off.
    """
    bound = _of_each_head(bound, axes)
    padding = -bound.shape[2] % rows
    return jnp.pad(bound, ((0, 0), (0, 0), (0, padding)), mode="edge").reshape(-1, rows)


def _columns(x: Array, columns: int) -> Array:
    """[B A L ...] -> [B * A, padded L, ...]."""
    padding = -x.shape[2] % columns
    x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
    return x.reshape(-1, *x.shape[2:])


def _block(x: Array, head: Int32[Array, ""], tile: Int32[Array, ""], columns: int) -> Array:
    """Tile of a head of x [B * A, L, ...]."""
    start = (head, tile * columns, *[jnp.int32(0)] * (x.ndim - 2))
    return lax.dynamic_slice(x, start, (1, columns, *x.shape[2:]))[0]


def _key_heads(batch: int, heads: int, key_heads: int, tiles: int) -> Int32[Array, " tiles"]:
    """Row of k [B * K, ...] that each tile of queries reads: query head n reads key head n // (N / K)."""
    row = jnp.arange(batch * heads, dtype=jnp.int32) // (heads // key_heads)
    return jnp.repeat(row, tiles)
