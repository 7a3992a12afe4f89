"""Forward: o and lse of one tile of queries.

q, start, stop of the rows                          from two scalar loads: which key tiles
for each key tile, masked | unmasked | masked:
    s = q k^T * scale * log2(e), hidden pairs lowest
    top, total, o = online softmax, in base 2
o / total, top + log2(total), in base e
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.alibi import Alibi, from_queries
from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.tiles import LOG2E, LOWEST, Runs, scores_of
from sparse_flash_jax.kernels.triton import launch
from sparse_flash_jax.kernels.triton.sight import Sight
from sparse_flash_jax.kernels.walks import of_queries


def _kernel(order, sides, q, k, v, o, lse, *, scale, block, heads, group, tiles, listed, precision, soft_cap):
    b, n, i = launch.place(order, heads, tiles)
    rows = pl.ds(i * block.rows, block.rows)
    sight = Sight(sides, listed, b, n, heads, i, rows, block)
    head = n // group
    q_tile = q[b, n, rows, :]  # [rows, H]

    def step(j, carry, *, masked):
        top, total, acc = carry
        columns = pl.ds(j * block.columns, block.columns)
        k_tile, v_tile = k[b, head, columns, :], v[b, head, columns, :]  # [columns, H]
        products = launch.dot(q_tile, k_tile, contract=(1, 1), precision=precision)
        s, _ = scores_of(products, scale, soft_cap, sight.penalty(j), unit=LOG2E)
        seen = sight.visible(j, masked)
        s = s if seen is None else jnp.where(seen, s, LOWEST)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        p = jnp.exp2(s - new_top[:, None])
        p = p if seen is None else jnp.where(seen, p, 0.0)
        keep = jnp.exp2(top - new_top)
        acc = acc * keep[:, None] + launch.dot(p.astype(v_tile.dtype), v_tile, contract=(1, 0), precision=precision)
        return new_top, total * keep + jnp.sum(p, axis=1), acc

    zeros = jnp.zeros((block.rows,), jnp.float32)
    carry = (zeros + LOWEST, zeros, jnp.zeros(q_tile.shape, jnp.float32))
    top, total, acc = sight.sweep(step, carry)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o[b, n, rows, :] = (acc / total[:, None]).astype(o.dtype)
    lse[b, n, rows] = jnp.where(some, (top + jnp.log2(total)) / LOG2E, -jnp.inf)


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
    o, lse = launch.launch(
        _kernel,
        of_queries(runs),
        (q,),
        (k, v),
        (q, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        scale=scale,
        soft_cap=soft_cap,
        distances=from_queries(alibi),
        repeats=repeats,
        block=config.forward,
        last_first=True,
        config=config,
        name="interval_attention_forward",
    )
    return o, lse
