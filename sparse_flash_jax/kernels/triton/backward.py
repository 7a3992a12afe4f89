"""Backward: dq of one tile of queries; dk and dv of one tile of keys, from the transposed runs.

for each tile of the other side, masked | unmasked | masked:
    p  = exp2(s - lse), hidden pairs 0              s = q k^T for dq, k q^T for dk and dv
    ds = p * (do v^T - delta)
    dq += ds k          or          dv += p do, dk += ds q, summed over the query heads of a group in turn
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.alibi import Alibi, from_keys, from_queries
from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.tiles import LOG2E, Runs, scores_of
from sparse_flash_jax.kernels.triton import launch
from sparse_flash_jax.kernels.triton.sight import Sight
from sparse_flash_jax.kernels.walks import of_keys, of_queries


def _dq_kernel(
    order, sides, q, do, lse, delta, k, v, dq, *, scale, block, heads, group, tiles, listed, precision, soft_cap
):
    b, n, i = launch.place(order, heads, tiles)
    rows = pl.ds(i * block.rows, block.rows)
    sight = Sight(sides, listed, b, n, heads, i, rows, block)
    head = n // group
    q_tile, do_tile = q[b, n, rows, :], do[b, n, rows, :]  # [rows, H]
    lse_row, delta_row = lse[b, n, rows] * LOG2E, delta[b, n, rows]  # [rows]

    def step(j, acc, *, masked):
        columns = pl.ds(j * block.columns, block.columns)
        k_tile, v_tile = k[b, head, columns, :], v[b, head, columns, :]  # [columns, H]
        products = launch.dot(q_tile, k_tile, contract=(1, 1), precision=precision)
        s, slope = scores_of(products, scale, soft_cap, sight.penalty(j), unit=LOG2E)
        p = jnp.exp2(s - lse_row[:, None])
        ds = p * (launch.dot(do_tile, v_tile, contract=(1, 1), precision=precision) - delta_row[:, None])
        ds = ds if slope is None else ds * slope
        seen = sight.visible(j, masked)
        ds = ds if seen is None else jnp.where(seen, ds, 0.0)
        return acc + launch.dot(ds.astype(k_tile.dtype), k_tile, contract=(1, 0), precision=precision)

    acc = sight.sweep(step, jnp.zeros(q_tile.shape, jnp.float32))
    dq[b, n, rows, :] = (acc * scale).astype(dq.dtype)


def _dkv_kernel(
    order, sides, k, v, q, do, lse, delta, dk, dv, *, scale, block, heads, group, tiles, listed, precision, soft_cap
):
    b, head, i = launch.place(order, heads // group, tiles)
    rows = pl.ds(i * block.rows, block.rows)
    k_tile, v_tile = k[b, head, rows, :], v[b, head, rows, :]  # [rows, H]

    def of_member(member, carry):
        n = head * group + member
        sight = Sight(sides, listed, b, n, heads, i, rows, block)

        def step(j, carry, *, masked):
            dk_acc, dv_acc = carry
            columns = pl.ds(j * block.columns, block.columns)
            q_tile, do_tile = q[b, n, columns, :], do[b, n, columns, :]  # [columns, H]
            lse_column, delta_column = lse[b, n, columns] * LOG2E, delta[b, n, columns]  # [columns]
            products = launch.dot(k_tile, q_tile, contract=(1, 1), precision=precision)
            s, slope = scores_of(products, scale, soft_cap, sight.penalty(j), unit=LOG2E)
            p = jnp.exp2(s - lse_column[None, :])
            dp = launch.dot(v_tile, do_tile, contract=(1, 1), precision=precision) - delta_column[None, :]
            ds = p * dp if slope is None else p * dp * slope
            seen = sight.visible(j, masked)
            if seen is not None:
                p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
            dv_acc += launch.dot(p.astype(do_tile.dtype), do_tile, contract=(1, 0), precision=precision)
            dk_acc += launch.dot(ds.astype(q_tile.dtype), q_tile, contract=(1, 0), precision=precision)
            return dk_acc, dv_acc

        return sight.sweep(step, carry)

    zeros = jnp.zeros(k_tile.shape, jnp.float32)
    members = (zeros, zeros)
    members = of_member(0, members) if group == 1 else lax.fori_loop(0, group, of_member, members)
    dk[b, head, rows, :] = (members[0] * scale).astype(dk.dtype)
    dv[b, head, rows, :] = members[1].astype(dv.dtype)


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
    (dq,) = launch.launch(
        _dq_kernel,
        of_queries(runs),
        (q, do, lse, delta),
        (k, v),
        (q,),
        scale=scale,
        soft_cap=soft_cap,
        distances=from_queries(alibi),
        repeats=repeats,
        block=config.dq,
        last_first=True,
        config=config,
        name="interval_attention_dq",
    )
    return dq


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
    """Returns dk and dv in k's dtype, summed over the query heads of a group."""
    dk, dv = launch.launch(
        _dkv_kernel,
        of_keys(runs),
        (k, v),
        (q, do, lse, delta),
        (k, v),
        scale=scale,
        soft_cap=soft_cap,
        distances=from_keys(alibi),
        repeats=repeats.transposed,
        block=config.dkv,
        last_first=False,
        config=config,
        name="interval_attention_dkv",
    )
    return dk, dv
