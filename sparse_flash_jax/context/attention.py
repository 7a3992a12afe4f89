"""Attention over a sequence that is divided over devices, as a user calls it: check, divide, exchange, attend.

Inside `jax.shard_map` over the sequence it works on the device's own part. Elsewhere it makes that `shard_map` itself.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sparse_flash_jax.attention import sparse_attention
from sparse_flash_jax.context.gather import gather_ids, gather_rows
from sparse_flash_jax.context.layout import Layout, Part
from sparse_flash_jax.context.planning import plan_of_parts, sort_rows
from sparse_flash_jax.context.ring import Ring, ring_attention
from sparse_flash_jax.context.tokens import Tokens, check_tokens
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import check_implementation, pick_implementation
from sparse_flash_jax.validation import check_attention_inputs, check_scale

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Context:
    """How sequences are divided over the devices of a mesh; static.

    Args:
        axis: mesh axis over which positions are divided, in equal parts.
        exchange: how keys come to queries. "ring" passes them round: memory for two parts of k and v, whatever the
            number of devices, and parts that the rule hides cost no attention. "gather" has all of k and v on each
            device, and one call of the kernels.
        zigzag: whether the sequence is laid out by `to_zigzag`, which gives each device as many pairs under a causal
            rule; else it is in order, where a window costs least.
        batch: mesh axes over which batch entries are divided. For calls outside of `shard_map`, as are those below.
        heads: mesh axes over which query heads, with their key heads, are divided.
        mesh: None for that of the operands, or the one that `jax.set_mesh` has set.

    Raises:
        ValueError: if the exchange is unknown.
    """

    axis: str
    exchange: Literal["ring", "gather"] = "ring"
    zigzag: bool = False
    batch: MeshAxes = None
    heads: MeshAxes = None
    mesh: Mesh | AbstractMesh | None = None

    def __post_init__(self):
        if self.exchange not in ("ring", "gather"):
            raise ValueError(f"exchange must be 'ring' or 'gather', got {self.exchange!r}.")


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

    Returns:
        [B T N H] in q's dtype, divided as q is. With return_residual also lse, float32 [B T N], as in
        `sparse_attention`.

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
    if context.axis in jax.sharding.get_abstract_mesh().manual_axes:
        o, lse = attend(q, k, v, tokens)
    else:
        o, lse = _by_parts(attend, q, k, v, tokens, context)
    return (o, lse) if return_residual else o


def _attend_part(q, k, v, tokens, *, context, scale, implementation, config):
    """What one device does."""
    axis, parts, device = context.axis, lax.axis_size(context.axis), lax.axis_index(context.axis)
    query_layout, key_layout = (Layout(x.shape[1] * parts, parts, context.zigzag) for x in (q, k))
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
        return ring_attention(q, k, v, queries, keys, ring)
    key_groups, key_keep = gather_ids((key_groups, tokens.key_keep), axis, key_layout)
    keys = sort_rows(key_groups, key_keep, key_layout.length)
    plan = plan_of_parts(queries, keys, Part(query_layout, device), Part(Layout(key_layout.length), 0), tokens.rule)
    k, v = (gather_rows(x, axis, key_layout) for x in (k, v))
    options = {"scale": scale, "implementation": implementation, "config": config}
    return sparse_attention(q, k, v, plan, **options, return_residual=True)


def _by_parts(attend, q, k, v, tokens, context):
    """Calls `attend` on each device's part of whole arrays."""
    mesh = _mesh(q, context)
    _check_divisible(q, k, context, mesh)
    operands, tree = jax.tree.flatten((q, k, v, tokens))
    specs = [_spec(x, context) for x in operands]
    if AxisType.Explicit in mesh.axis_types:
        operands = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    return jax.shard_map(
        lambda *operands: attend(*jax.tree.unflatten(tree, operands)),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=(specs[0], specs[0]),
    )(*operands)


def _spec(x: Array, context: Context) -> PartitionSpec:
    """How an array [B L A ...] is divided; axes of size 1 stand for any size, and are not."""
    batch, heads = (
        over if size > 1 else None for over, size in ((context.batch, x.shape[0]), (context.heads, x.shape[2]))
    )
    return PartitionSpec(batch, context.axis, heads)


def _mesh(q: Array, context: Context) -> Mesh | AbstractMesh:
    """The mesh that has the context's axis."""
    sharding = getattr(q, "sharding", None) if not isinstance(q, Tracer) else None
    own = sharding.mesh if isinstance(sharding, NamedSharding) else jax.typeof(q).sharding.mesh
    candidates = own, jax.sharding.get_abstract_mesh()
    for mesh in (context.mesh,) if context.mesh is not None else candidates:
        if context.axis in mesh.axis_names:
            return mesh
    found = [mesh.axis_names for mesh in (context.mesh, *candidates) if mesh is not None]
    raise ValueError(
        f"context.axis must name an axis of the mesh, got {context.axis!r} and meshes of {found}; give "
        "Context(mesh=...), or q, k and v that are placed on a mesh."
    )


def _check_divisible(q: Array, k: Array, context: Context, mesh: Mesh | AbstractMesh) -> None:
    for x in (q, k):
        Layout(x.shape[1], mesh.shape[context.axis], context.zigzag)
    sizes = (
        ("batch size", q.shape[0], context.batch),
        ("number of query heads", q.shape[2], context.heads),
        ("number of key heads", k.shape[2], context.heads),
    )
    for name, size, over in sizes:
        axes = () if over is None else over if isinstance(over, tuple) else (over,)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size > 1 and size % parts:
            raise ValueError(f"the {name} must be a multiple of the {parts} devices along {over!r}, got {size}.")
