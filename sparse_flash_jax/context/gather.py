"""Attention of a divided sequence with all keys gathered on each device: one plan, one call of the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparse_flash_jax.context.layout import Layout, from_zigzag


def gather_rows(x: Float[Array, "B L A H"], axis: str, layout: Layout) -> Float[Array, "B _S A H"]:
    """Returns the rows of all devices, by position; their gradients are summed over devices, in float32.

    Args:
        x: [B L A H], this device's part.
        axis: mesh axis of the devices.
        layout: of the whole sequence.
    """
    return _in_order(_gathered(x, axis), layout)


def gather_ids(tree: Any, axis: str, layout: Layout) -> Any:
    """Returns integers or masks [B L A] of all devices, by position."""
    return jax.tree.map(lambda x: _in_order(lax.all_gather(x, axis, axis=1, tiled=True), layout), tree)


def _in_order(x: Array, layout: Layout) -> Array:
    return from_zigzag(x, layout.parts) if layout.zigzag else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x, axis):
    return lax.all_gather(x, axis, axis=1, tiled=True)


def _forward(x, axis):
    return _gathered(x, axis), None


def _backward(axis, _, dx):
    # Each device has summed over its own queries and rounded; what is added to that here is not rounded again.
    part = lax.psum_scatter(dx.astype(jnp.float32), axis, scatter_dimension=1, tiled=True)
    return (part.astype(dx.dtype),)


_gathered.defvjp(_forward, _backward)
