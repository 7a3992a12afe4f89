"""Interval attention as `lax` loops over tile ranges: any device, any head dim, memory linear in length.

for each batch entry, head and block of rows:            one writer per output tile, in a fixed order
    for each block of columns that its runs touch:       the trip count is data, so hidden tiles cost nothing
        s = scale * q k^T; hidden pairs masked where the tile is not wholly visible
        forward   online softmax into (o, lse)
        backward  p = exp(s - lse), ds = p (do v^T - delta), into dq or (dk, dv)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.tiles import LOWEST, Runs, sweep, tile_range


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    *,
    scale: float,
    config: Config[Blocks],
) -> tuple[Float[Array, "B N T H"], Float32[Array, "B N T"]]:
    """Returns o in q's dtype, and lse with -inf where a row sees nothing."""
    batch, heads, length, _ = q.shape
    block = config.forward
    k, v = (_columns(x, block.columns) for x in (k, v))

    def tile(operands):
        q, start, stop, head = operands

        def step(j, carry, *, masked):
            top, total, o = carry
            kj, vj = (_block(x, head, j, block.columns) for x in (k, v))  # [columns, H]
            s = scale * _dot("rh,ch->rc", q, kj)
            visible = _visible(start, stop, j, block.columns) if masked else None
            s = _where(visible, s, LOWEST)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            p = _where(visible, jnp.exp(s - new_top[:, None]), 0.0)
            keep = jnp.exp(top - new_top)
            o = o * keep[:, None] + _dot("rc,ch->rh", p.astype(vj.dtype), vj)
            return new_top, total * keep + jnp.sum(p, axis=1), o

        zeros = jnp.zeros_like(q, dtype=jnp.float32)
        top, total, o = _sweep(step, start, stop, block.columns, (zeros[:, 0] + LOWEST, zeros[:, 0], zeros))
        some = total > 0
        o = o / jnp.where(some, total, 1.0)[:, None]
        return o.astype(q.dtype), jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)

    bounds = (_bound_rows(x, (batch, heads), block.rows) for x in (runs.k_start, runs.k_stop))
    key_head = _key_heads(batch, heads, k.shape[0] // batch, -(-length // block.rows))
    o, lse = lax.map(tile, (_rows(q, block.rows), *bounds, key_head))
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
) -> Float[Array, "B N T H"]:
    """Returns dq in q's dtype; `delta` is sum(o * do) less the cotangent of lse."""
    batch, heads, length, _ = q.shape
    block = config.dq
    k, v = (_columns(x, block.columns) for x in (k, v))

    def tile(operands):
        q, lse, do, delta, start, stop, head = operands

        def step(j, dq, *, masked):
            kj, vj = (_block(x, head, j, block.columns) for x in (k, v))  # [columns, H]
            p = jnp.exp(scale * _dot("rh,ch->rc", q, kj) - lse[:, None])
            ds = p * (_dot("rh,ch->rc", do, vj) - delta[:, None])
            ds = _where(_visible(start, stop, j, block.columns) if masked else None, ds, 0.0)
            return dq + _dot("rc,ch->rh", ds.astype(kj.dtype), kj)

        dq = _sweep(step, start, stop, block.columns, jnp.zeros_like(q, dtype=jnp.float32))
        return (scale * dq).astype(q.dtype)

    rows = (_rows(x, block.rows) for x in (q, lse, do, delta))
    bounds = (_bound_rows(x, (batch, heads), block.rows) for x in (runs.k_start, runs.k_stop))
    key_head = _key_heads(batch, heads, k.shape[0] // batch, -(-length // block.rows))
    return _unrows(lax.map(tile, (*rows, *bounds, key_head)), batch, heads, length)


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
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns dk and dv in k's dtype: the same loop over the transposed runs, summed over the heads of a group."""
    batch, key_heads, length, _ = k.shape
    heads, block = q.shape[1], config.dkv
    group = heads // key_heads
    q, lse, do, delta = (_columns(x, block.columns) for x in (q, lse, do, delta))

    def tile(operands):
        k, v, start, stop, head = operands  # rows are keys; start and stop are [group, rows]

        def step(i, carry, *, member, masked):
            dk, dv = carry
            qi, lse_i, do_i, delta_i = (_block(x, head + member, i, block.columns) for x in (q, lse, do, delta))
            visible = _visible(start[member], stop[member], i, block.columns) if masked else None
            p = jnp.exp(scale * _dot("rh,ch->rc", k, qi) - lse_i[None])
            p = _where(visible, p, 0.0)
            ds = _where(visible, p * (_dot("rh,ch->rc", v, do_i) - delta_i[None]), 0.0)
            dk = dk + _dot("rc,ch->rh", ds.astype(qi.dtype), qi)
            return dk, dv + _dot("rc,ch->rh", p.astype(do_i.dtype), do_i)

        def of_member(member, carry):
            return _sweep(functools.partial(step, member=member), start[member], stop[member], block.columns, carry)

        zeros = jnp.zeros_like(k, dtype=jnp.float32)
        dk, dv = lax.fori_loop(0, group, of_member, (zeros, zeros))
        return (scale * dk).astype(k.dtype), dv.astype(v.dtype)

    tiles = -(-length // block.rows)
    bounds = (
        _bound_rows(x, (batch, heads), block.rows)
        .reshape(batch, key_heads, group, tiles, block.rows)
        .swapaxes(2, 3)
        .reshape(batch * key_heads * tiles, group, block.rows)
        for x in (runs.q_start, runs.q_stop)
    )
    first_head = jnp.repeat(jnp.arange(batch * key_heads, dtype=jnp.int32) * group, tiles)
    dk, dv = lax.map(tile, (_rows(k, block.rows), _rows(v, block.rows), *bounds, first_head))
    return _unrows(dk, batch, key_heads, length), _unrows(dv, batch, key_heads, length)


def _sweep(step: Callable, start: Int32[Array, " rows"], stop: Int32[Array, " rows"], columns: int, carry: Any) -> Any:
    """Runs `step(tile, carry, masked=...)` over the tiles that the rows touch."""
    return sweep(step, tile_range(start[0], stop[0], start[-1], stop[-1], columns), carry)


def _visible(
    start: Int32[Array, " rows"], stop: Int32[Array, " rows"], tile: Int32[Array, ""], columns: int
) -> Bool[Array, "rows columns"]:
    column = tile * columns + jnp.arange(columns, dtype=jnp.int32)[None]
    return (start[:, None] <= column) & (column < stop[:, None])


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


def _bound_rows(bound: Int32[Array, "b a L"], axes: tuple[int, int], rows: int) -> Int32[Array, "tiles rows"]:
    """Bounds for each batch entry and head, as `_rows`, padded with the last value, which keeps them monotone.

    The last value pads starts as well as stops: whatever the padded rows then see, their q, do and delta are zero or
    their output is cut off.
    """
    bound = jnp.broadcast_to(jnp.repeat(bound, axes[1] // bound.shape[1], axis=1), (*axes, bound.shape[2]))
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
