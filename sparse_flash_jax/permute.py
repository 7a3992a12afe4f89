"""Rows into slot order and back. Each direction's gradient is the other's gather, so nothing is ever scatter-added."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def gather(
    x: Float[Array, "B L A H"], order: Int32[Array, "#B #A C"] | None, slot: Int32[Array, "#B #A L"] | None
) -> Float[Array, "B A C H"]:
    """Returns the rows of x in slot order, and the layout changed from [B L A H] to [B A C H].

    Args:
        x: [B L A H], by position.
        order: int32 [B|1 A|1 C], the position of each slot; None where slots are positions.
        slot: int32 [B|1 A|1 L], the slot of each position, C or more for none; None with order None.
    """
    x = jnp.swapaxes(x, 1, 2)
    return x if order is None or slot is None else _permute(x, order, slot)


def restore(
    x: Float[Array, "B A C H"], order: Int32[Array, "#B #A C"] | None, slot: Int32[Array, "#B #A L"] | None
) -> Float[Array, "B L A H"]:
    """Returns the rows of x by position: the inverse of `gather`. A position without a slot gets 0."""
    x = x if order is None or slot is None else _permute(x, slot, order)
    return jnp.swapaxes(x, 1, 2)


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
