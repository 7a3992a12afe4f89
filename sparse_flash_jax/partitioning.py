"""Many devices under plain `jit`: each computes its own batch entries and heads, and no rows or plans move.

XLA does not see that kernels and sorts go head by head: it would gather their operands on every device. What is called
through `by_batch_and_head` says so instead. Axes are named by letters, one for each:

    b  batch    n  query heads    k  key heads, which divide them    t  positions, where each is by itself
    -  any other, whole on every device
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sparse_flash_jax.manual_axes import varies

MeshAxes = tuple[str, ...]

# What is exported is run by this process alone: that Triton's kernels may be others in a later JAX is no matter.
_UNCHECKED = (export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)

_LONG_TO_LOWER = b"mosaic_gpu"  # the custom calls of kernels that take seconds; others are quick


class _Sizes(NamedTuple):
    """Of the whole arrays; axes of size 1, which stand for any size, do not count."""

    batch: int
    query_heads: int
    key_heads: int
    positions: int

    @property
    def head_groups(self) -> int:
        """What heads can be divided into: query heads with their key head, unless all share one."""
        return self.key_heads if self.key_heads > 1 else self.query_heads


class _Shares(NamedTuple):
    """The mesh axes over which batch entries, heads and positions are divided."""

    batch: MeshAxes
    heads: MeshAxes
    positions: MeshAxes

    def spec(self, axes: str, shape: Sequence[int]) -> PartitionSpec:
        """How an array is divided."""
        of = {"b": self.batch, "n": self.heads, "k": self.heads, "t": self.positions, "-": ()}
        return PartitionSpec(*(of[axis] or None if size > 1 else None for axis, size in zip(axes, shape, strict=True)))


def by_batch_and_head(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    axes: tuple[Any, ...],
    results: Any,
    *,
    summed: bool = False,
    divisible: bool = True,
) -> Any:
    """Returns `function(*operands)`, computed by batch entry and head where the operands are divided by these.

    Args:
        function: of arrays that may hold a part of the batch, and of the heads.
        operands: its arguments, pytrees of arrays.
        axes: the letters of each operand's axes, in the same structure.
        results: those of what it returns.
        summed: whether what comes out by key head is a sum over its query heads.
        divisible: false of a function with side effects, as Pallas' interpreter has: it is called as it is.
    """
    leaves, tree = jax.tree.flatten(operands)
    # In `shard_map` and `pmap` each device is told what to do already.
    if not divisible or jax.device_count() == 1 or varies(operands):
        return function(*operands)
    flat = lambda *leaves: tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))
    letters, result_letters = tuple(jax.tree.leaves(axes)), tuple(jax.tree.leaves(results))
    call = _by_types if _explicit_mesh(leaves) else _by_propagation
    return jax.tree.unflatten(jax.tree.structure(results), call(flat, leaves, letters, result_letters, summed))


def _by_propagation(flat, leaves, letters, result_letters, summed) -> Sequence[Array]:
    """Divided as XLA finds the operands to be, while it compiles."""
    # XLA asks for each call in the program, and a kernel takes seconds to lower: layers alike are lowered once.
    lowered = functools.cache(functools.partial(_lowered, flat))

    def partition(mesh, arg_shapes, result_shape):
        shapes = [x.shape for x in arg_shapes]
        sizes = _sizes(letters, shapes)
        specs = [getattr(x.sharding, "spec", ()) for x in (*arg_shapes, *result_shape)]
        ranks = [*shapes, *(x.shape for x in result_shape)]
        shares = _shares(mesh.shape, sizes, _divided((*letters, *result_letters), ranks, specs))
        operands, results = (
            tuple(NamedSharding(mesh, shares.spec(axes, x.shape)) for axes, x in zip(names, arrays, strict=True))
            for names, arrays in ((letters, arg_shapes), (result_letters, result_shape))
        )
        parts = ((of.shard_shape(x.shape), x.dtype) for of, x in zip(operands, arg_shapes, strict=True))
        part = functools.partial(_part, lowered(mesh, *parts), sizes, shares, result_letters, summed)
        return mesh, part, results, operands

    def rule(mesh, operand_types, result_types):
        shapes, result_shapes = ([tuple(x.shape) for x in types] for types in (operand_types, result_types))
        return _rule(_sizes(letters, shapes), letters, shapes, result_letters, result_shapes)

    divided = custom_partitioning(flat)
    divided.def_partition(partition=partition, sharding_rule=rule)
    call = jax.custom_batching.custom_vmap(divided)

    @call.def_vmap
    def _(size, batched, *leaves):
        mapped = jax.vmap(flat, in_axes=[0 if x else None for x in batched])(*leaves)
        return mapped, (True,) * len(mapped)

    return call(*leaves)


def _lowered(flat, mesh: Mesh, *parts: tuple[tuple[int, ...], Any]) -> Callable[..., Any]:
    """`flat`, lowered for parts of these shapes and dtypes on one of the mesh's devices, where that pays."""
    device = mesh.devices.flat[0]
    platform = _long_to_lower_for(device)
    if platform is None:
        return flat
    lower = export.export(jax.jit(flat), platforms=[platform], disabled_checks=_UNCHECKED)
    try:
        with jax.set_mesh(Mesh(np.asarray([device]), ("one",))):  # in place of the caller's, of all devices
            lowered = lower(*(jax.ShapeDtypeStruct(*part) for part in parts))
    except ValueError:  # compiled while something else is traced, or custom calls that this JAX does not export
        return flat
    # XLA takes the stack frames of loops in what is called for those of the whole program. That has fewer, or comes to
    # have others in a circle, and then the pass propagate-call-metadata never ends; with Mosaic's kernels are no loops.
    return lowered.call if _LONG_TO_LOWER in lowered.mlir_module_serialized else flat


def _long_to_lower_for(device: Any) -> str | None:
    """The platform as JAX lowers for it, where kernels are; elsewhere None."""
    return "cuda" if device.platform == "gpu" and "rocm" not in device.client.platform_version else None


def _by_types(flat, leaves, letters, result_letters, summed) -> Sequence[Array]:
    """Divided as the types of the operands say, on a mesh of explicit axes."""
    mesh, shapes = _explicit_mesh(leaves), [x.shape for x in leaves]
    sizes = _sizes(letters, shapes)
    shares = _shares(mesh.shape, sizes, _divided(letters, shapes, [jax.typeof(x).sharding.spec for x in leaves]))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    result_shapes = [x.shape for x in jax.eval_shape(flat, *abstract)]
    specs, result_specs = (
        tuple(shares.spec(*pair) for pair in zip(names, of, strict=True))
        for names, of in ((letters, shapes), (result_letters, result_shapes))
    )
    part = functools.partial(_part, flat, sizes, shares, result_letters, summed)
    operands = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs, strict=True)]
    # Unchecked: with one key head for all, loops meet operands that vary over the heads, and others that do not.
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=result_specs, check_vma=False)(*operands)


def _part(flat, sizes, shares, result_letters, summed, *leaves) -> tuple[Array, ...]:
    """What one device does."""
    results = flat(*leaves)
    if not (summed and shares.heads and sizes.key_heads == 1):
        return results
    total = lambda x: lax.psum(x.astype(jnp.float32), shares.heads).astype(x.dtype)
    return tuple(total(x) if "k" in axes else x for axes, x in zip(result_letters, results, strict=True))


def _sizes(letters: Sequence[str], shapes: Sequence[Sequence[int]]) -> _Sizes:
    named = [
        (axis, size)
        for axes, shape in zip(letters, shapes, strict=True)
        for axis, size in zip(axes, shape, strict=True)
    ]
    return _Sizes(*(max((size for axis, size in named if axis == letter), default=1) for letter in "bnkt"))


def _divided(letters, shapes, specs) -> Iterator[tuple[str, MeshAxes]]:
    """The mesh axes that an array's axis is divided over, array by array."""
    for axes, shape, spec in zip(letters, shapes, specs, strict=True):
        for axis, size, over in zip(axes, shape, spec, strict=False):
            if size > 1 and over is not None and axis != "-":
                yield axis, over if isinstance(over, tuple) else (over,)


def _shares(mesh: Any, sizes: _Sizes, divided: Iterator[tuple[str, MeshAxes]]) -> _Shares:
    """What the first operands that are divided, into whole parts, are divided over."""
    found: dict[str, MeshAxes] = {"b": (), "n": (), "t": ()}
    parts = {"b": sizes.batch, "n": sizes.head_groups, "t": sizes.positions}
    for axis, over in divided:
        axis = "n" if axis == "k" else axis
        free = not found[axis] and not {*over} & {name for names in found.values() for name in names}
        if free and parts[axis] % math.prod(mesh[name] for name in over) == 0:
            found[axis] = over
    return _Shares(found["b"], found["n"], found["t"])


def _rule(sizes: _Sizes, letters, shapes, result_letters, result_shapes) -> str:
    """The letters as Shardy has them: a division of one array leads to that of others along the axes they share."""
    others = (f"x{i}" for i in itertools.count())  # axes that no array shares

    def factor(axis: str, size: int) -> str:
        if axis == "-" or size == 1:
            return next(others)
        # Query and key heads apart: with both in one, Shardy divides a mesh axis that is larger than the key heads.
        return axis if axis in "bt" else "n" if size == sizes.query_heads else "k"

    def side(letters: Sequence[str], shapes: Sequence[Sequence[int]]) -> str:
        return ", ".join(" ".join(map(factor, *pair)) for pair in zip(letters, shapes, strict=True))

    return f"{side(letters, shapes)} -> {side(result_letters, result_shapes)}"


def _explicit_mesh(leaves: Sequence[Any]) -> Any:
    """The mesh of operands that are divided over explicit axes; None of none."""
    for x in leaves:
        sharding = jax.typeof(x).sharding
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        over = [name for names in sharding.spec if names for name in (names if isinstance(names, tuple) else (names,))]
        if any(kinds[name] == AxisType.Explicit for name in over):
            return sharding.mesh
    return None
