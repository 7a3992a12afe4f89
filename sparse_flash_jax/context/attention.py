"""Attention over a sequence that is divided over devices, as a user calls it: check, divide, exchange, attend.

Inside `jax.shard_map` over the sequence it works on the device's own part. Elsewhere it makes that `shard_map` itself.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sparse_flash_jax.attention import sparse_attention
from sparse_flash_jax.context.divided_plan import DividedPlan
from sparse_flash_jax.context.division import Context, check_divisible, devices, is_divided_already, mesh_of
from sparse_flash_jax.context.gather import gather_ids, gather_rows
from sparse_flash_jax.context.layout import Layout, Part
from sparse_flash_jax.context.planning import plan_of_parts, sort_rows
from sparse_flash_jax.context.ring import Ring, ring_attention
from sparse_flash_jax.context.tokens import Tokens, check_tokens
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import check_implementation, pick_implementation
from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.plan import repeat_heads, visible_pairs
from sparse_flash_jax.validation import check_attention_inputs, check_scale


def context_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    context: Context,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
    return_residual: bool = False,
    return_plan: bool = False,
) -> Any:
    """Returns what `sparse_attention` does, of sequences that are divided over devices: exact, and so are gradients.

    Each device keeps its queries; keys and values go to them. Positions are those of the whole sequence. Inside
    `jax.shard_map` (over `context.axis` and whatever else is divided) all arrays are the device's own parts, and T and
    S are the rows that it holds. Elsewhere they are whole, under `jit` or not, and divided as `context` says: those
    that are not yet, are moved.

    Gradients of k and v are sums over devices in float32, of parts that each device has in k's dtype; around the ring
    they travel in float32. Repeats agree to the bit.

    Args:
        q: float32, float16 or bfloat16 [B T N H].
        k: [B S K H] in q's dtype; K divides N.
        v: [B S K H] in q's dtype.
        tokens: groups, keep masks and the rule; `Tokens()` for causal attention.
        context: over which mesh axes arrays are divided, and how keys come to queries.
        scale: as in `sparse_attention`.
        implementation: as in `sparse_attention`.
        config: as in `sparse_attention`.
        return_residual: whether to also return the log-sum-exp of each query's scores.
        return_plan: whether to also return, last, what can be told of the plan whose parts the devices have.

    Returns:
        [B T N H] in q's dtype, divided as q is. With return_residual also lse, float32 [B T N], as in
        `sparse_attention`; with return_plan also a `DividedPlan`.

    Raises:
        TypeError: if dtypes are not as said.
        ValueError: if shapes do not fit one another or the mesh, or there is no mesh with these axes.
        NotImplementedError: if the named implementation cannot do this call.

    Sources: "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889; the zigzag, and
        gathering, as in "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2.
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_implementation(implementation, q.dtype, q.shape[-1], config)
    check_tokens(tokens, q, k)
    attend = functools.partial(_attend_part, context=context, scale=scale, implementation=implementation, config=config)
    if is_divided_already(context):
        o, lse, pairs = attend(q, k, v, tokens)
    else:
        o, lse, pairs = _by_parts(attend, q, k, v, tokens, context)
    more = [lse] if return_residual else []
    if return_plan:
        parts = devices(q, context) if is_divided_already(context) else 1
        more.append(DividedPlan(pairs, q.shape[1] * parts, k.shape[1] * parts))
    return (o, *more) if more else o


def _attend_part(q, k, v, tokens, *, context, scale, implementation, config):
    """What one device does."""
    axis, parts, device = context.axis, lax.axis_size(context.axis), lax.axis_index(context.axis)
    query_layout, key_layout = (context.layout(x.shape[1] * parts, parts) for x in (q, k))
    query_groups, key_groups = tokens.groups
    queries = sort_rows(query_groups, tokens.query_keep, query_layout.rows)
    if context.exchange == "ring":
        keys = sort_rows(key_groups, tokens.key_keep, key_layout.rows)
        ring = Ring(
            axis,
            query_layout,
            key_layout,
            tokens.rule,
            1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
            implementation or pick_implementation(q.dtype, q.shape[-1], config),
            config,
        )
        o, lse, pairs = ring_attention(q, k, v, queries, keys, ring)
        return o, lse, lax.psum(pairs, axis)
    key_groups, key_keep = gather_ids((key_groups, tokens.key_keep), axis, key_layout)
    keys = sort_rows(key_groups, key_keep, key_layout.length)
    plan = plan_of_parts(queries, keys, Part(query_layout, device), Part(Layout(key_layout.length), 0), tokens.rule)
    k, v = (gather_rows(x, axis, key_layout) for x in (k, v))
    options = {"scale": scale, "implementation": implementation, "config": config}
    o, lse = sparse_attention(q, k, v, plan, **options, return_residual=True)
    pairs = jnp.broadcast_to(repeat_heads(visible_pairs(plan.runs), q.shape[2]), (q.shape[0], q.shape[2]))
    pairs, _ = vary_alike((pairs, q))
    return o, lse, lax.psum(pairs, axis)


def _by_parts(attend, q, k, v, tokens, context):
    """Calls `attend` on each device's part of whole arrays."""
    mesh = mesh_of(q, context)
    check_divisible(q, k, context, mesh)
    operands, tree = jax.tree.flatten((q, k, v, tokens))
    specs = [_spec(x, context) for x in operands]
    if AxisType.Explicit in mesh.axis_types:
        operands = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    return jax.shard_map(
        lambda *operands: attend(*jax.tree.unflatten(tree, operands)),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=(specs[0], specs[0], PartitionSpec(specs[0][0], specs[0][2])),
    )(*operands)


def _spec(x: Array, context: Context) -> PartitionSpec:
    """How an array [B L A ...] is divided; axes of size 1 stand for any size, and are not."""
    batch, heads = (
        over if size > 1 else None for over, size in ((context.batch, x.shape[0]), (context.heads, x.shape[2]))
    )
    return PartitionSpec(batch, context.axis, heads)
