"""Rows of several arrays into slot order and back: in one kernel where there is one, else by a gather each."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.implementations import has_triton
from sparse_flash_jax.permute import Permutation, gather, restore


class RowKernels(NamedTuple):
    """Kernels that move rows, as a static argument."""

    interpret: bool

    def load(self, name: str) -> Callable[..., Any]:
        """Returns one of them."""
        return getattr(importlib.import_module("sparse_flash_jax.kernels.triton.rows"), name)


def row_kernels(implementation: str, *, interpret: bool) -> RowKernels | None:
    """Returns the kernels that move rows for an implementation; None where it has none, or this JAX has not."""
    return RowKernels(interpret) if implementation != "xla" and has_triton() else None


def to_slots(
    xs: Sequence[Float[Array, "B _L _A H"]],
    permutations: Sequence[Permutation | None],
    kernels: RowKernels | None,
    whole: int = 1,
) -> tuple[Float[Array, "B _A _C H"], ...]:
    """Returns the rows of each array in slot order, and its layout changed.

    Kernels round the number of slots up to a multiple of `whole`; those past the last are 0.
    """
    return _move(xs, permutations, kernels, gather, "to_slots", whole=whole)


def to_positions(
    xs: Sequence[Float[Array, "B _A _C H"]], permutations: Sequence[Permutation | None], kernels: RowKernels | None
) -> tuple[Float[Array, "B _L _A H"], ...]:
    """Returns the rows of each array by position: the inverse of `to_slots`. A position without a slot gets 0."""
    return _move(xs, permutations, kernels, restore, "to_positions")


def to_slots_with_delta(
    do: Float[Array, "B T N H"],
    o: Float[Array, "B T N H"],
    permutation: Permutation | None,
    kernels: RowKernels | None,
    whole: int = 1,
) -> tuple[Float[Array, "B N Tc H"], Float32[Array, "B N Tc"]]:
    """Returns do in slot order, as `to_slots` does, and delta, the sum of o * do over the head dim, too."""
    if kernels is not None and permutation is not None:
        return kernels.load("to_slots_with_delta")(do, o, permutation, whole=whole, interpret=kernels.interpret)
    delta = gather(sum_of_products(o, do)[..., None], permutation)[..., 0]
    return gather(do, permutation), delta


def sum_of_products(x: Float[Array, "*rows H"], y: Float[Array, "*rows H"]) -> Float32[Array, "*rows"]:
    """Returns the sum of x * y over the head dim, in float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum("...h,...h->...", x, y, precision=lax.Precision.HIGHEST)


def _move(
    xs: Sequence[Array],
    permutations: Sequence[Permutation | None],
    kernels: RowKernels | None,
    move_one: Callable[[Array, Permutation | None], Array],
    name: str,
    **options: int,
) -> tuple[Array, ...]:
    pairs = list(zip(xs, permutations, strict=True))
    moved = {}
    if kernels is not None:
        by_kernel = {i: (x, by) for i, (x, by) in enumerate(pairs) if by is not None}
        load = functools.partial(kernels.load(name), interpret=kernels.interpret, **options)
        outputs = load(list(by_kernel.values())) if by_kernel else ()
        moved = dict(zip(by_kernel, outputs, strict=True))
    return tuple(moved[i] if i in moved else move_one(x, by) for i, (x, by) in enumerate(pairs))
