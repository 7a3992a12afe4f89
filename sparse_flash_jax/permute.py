"""Rows into slot order and back. Each direction's gradient is the other's gather, so nothing is ever scatter-added."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


class Permutation(NamedTuple):
    """Which position each slot of one side of a plan holds. Batch and head axes may be 1, to stand for any size."""

    order: Int32[Array, "B A C"]
    """Position of the token in each slot."""
    slot: Int32[Array, "B A L"]
    """Slot of the token at each position, C or more where it has none."""


def identity(length: int) -> Permutation:
    """Returns the permutation in which slots are positions, as arrays."""
    positions = jnp.arange(length, dtype=jnp.int32)[None, None]
    return Permutation(positions, positions)


def gather(x: Float[Array, "B L A H"], permutation: Permutation | None) -> Float[Array, "B A _C H"]:
    """Returns the rows of x in slot order, and the layout changed from [B L A H] to [B A C H].

    Args:
        x: [B L A H], by position.
        permutation: of L positions; None where slots are positions.
    """
    x = jnp.swapaxes(x, 1, 2)
    return x if permutation is None else _permute(x, *permutation)


def restore(x: Float[Array, "B A C H"], permutation: Permutation | None) -> Float[Array, "B _L A H"]:
    """Returns the rows of x by position: the inverse of `gather`. A position without a slot gets 0."""
    x = x if permutation is None else _permute(x, permutation.slot, permutation.order)
    return jnp.swapaxes(x, 1, 2)


def restore_lse(lse: Float32[Array, "B N C"], queries: Permutation | None) -> Float32[Array, "B _T N"]:
    """Returns log-sum-exp by position, -inf where a query has no slot."""
    slots, restored = lse.shape[2], restore(lse[..., None], queries)[..., 0]
    if queries is None or slots == queries.slot.shape[2]:
        return restored
    return jnp.where(jnp.swapaxes(queries.slot < slots, 1, 2), restored, -jnp.inf)


@jax.custom_vjp
def _permute(
    x: Float[Array, "B A M H"], index: Int32[Array, "#B #A L"], inverse: Int32[Array, "#B #A M"]
) -> Float[Array, "B A L H"]:
    """Rows of x at the index, 0 where the index is past the end; `inverse` says where each row of x went."""
    rows = x.shape[2]
    out = jnp.take_along_axis(x, index[..., None], axis=2, mode="clip")
    if rows >= index.shape[2]:  # each row of a shortened order is a row of x
        return out
    return jnp.where(index[..., None] < rows, out, jnp.zeros((), x.dtype))


def _permute_forward(x, index, inverse):
    return _permute(x, index, inverse), (index, inverse)


def _permute_backward(residuals, cotangent):
    index, inverse = residuals
    return _permute(cotangent, inverse, index), None, None


_permute.defvjp(_permute_forward, _permute_backward)
