"""How a sequence is divided over the devices of a mesh, as a user says it, and what follows for arrays."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Int32

from sparse_flash_jax.context.layout import Layout, Part

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Context:
    """How sequences are divided over the devices of a mesh; static.

    Args:
        axis: mesh axis over which positions are divided, in equal parts.
        exchange: how keys come to queries. "ring" passes them round: memory for two parts of k and v, whatever the
            number of devices, and parts that the rule hides cost no attention. "gather" has all of k and v on each
            device, and one call of the kernels: mostly faster on GPUs of one host, where that fits.
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

    def layout(self, length: int, parts: int) -> Layout:
        """How a sequence of so many tokens lies over as many devices."""
        return Layout(length, parts, self.zigzag)

    def __post_init__(self):
        if self.exchange not in ("ring", "gather"):
            raise ValueError(f"exchange must be 'ring' or 'gather', got {self.exchange!r}.")


def is_divided_already(context: Context) -> bool:
    """Whether this is inside a `jax.shard_map` over the sequence, where arrays are a device's own parts."""
    return context.axis in jax.sharding.get_abstract_mesh().manual_axes


def devices(q: Array, context: Context) -> int:
    """Returns how many devices the sequence is divided over.

    Raises:
        ValueError: if there is no mesh with the context's axis.
    """
    return lax.axis_size(context.axis) if is_divided_already(context) else mesh_of(q, context).shape[context.axis]


def row_positions(q: Array, context: Context) -> Int32[Array, "1 T"]:
    """Returns the position in the whole sequence of each row of q [B T N H]: of those of this device, or of all."""
    parts = devices(q, context)
    if not is_divided_already(context):
        return jnp.asarray(context.layout(q.shape[1], parts).positions())[None]
    part = Part(context.layout(q.shape[1] * parts, parts), lax.axis_index(context.axis))
    return part.position_of(jnp.arange(q.shape[1], dtype=jnp.int32))[None]


def mesh_of(q: Array, context: Context) -> Mesh | AbstractMesh:
    """Returns the mesh that has the context's axis; ValueError where there is none."""
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


def check_divisible(q: Array, k: Array, context: Context, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where an axis is not a multiple of the devices along it."""
    for x in (q, k):
        context.layout(x.shape[1], mesh.shape[context.axis])
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
