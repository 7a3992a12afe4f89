"""Padding to whole tiles, for kernels whose tiles must not stick out."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int32


def padded_shape(shape: Sequence[int], side: int, head_dim: Callable[[int], int]) -> tuple[int, ...]:
    """Returns [B A L] or [B A L H] with L a multiple of a tile's side, and H as `head_dim(H)` says."""
    batch, heads, length, *size = shape
    return batch, heads, -(-length // side) * side, *map(head_dim, size)


def pad(x: Array, side: int, head_dim: Callable[[int], int]) -> Array:
    """Returns x padded. Zeros past the head dim change no score; those past the length are hidden or cut off."""
    widths = [(0, new - old) for new, old in zip(padded_shape(x.shape, side, head_dim), x.shape, strict=True)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def pad_slots(x: Array, length: int) -> Array:
    """Returns what slots hold, [b a L], for so many of them: 0 past the last."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))


def extend_bounds(
    start: Int32[Array, "b a L"], stop: Int32[Array, "b a L"], length: int
) -> tuple[Int32[Array, "b a M"], Int32[Array, "b a M"]]:
    """Returns bounds of the runs of as many rows; those past the last see nothing."""
    past = jnp.broadcast_to(stop[..., -1:], (*stop.shape[:2], length - stop.shape[2]))
    return jnp.concatenate([start, past], axis=2), jnp.concatenate([stop, past], axis=2)


def pad_bounds(bound: Int32[Array, "b a L"], side: int) -> Int32[Array, "b a M"]:
    """Returns bounds of runs padded with the last value again, so that they stay monotone."""
    return jnp.pad(bound, ((0, 0), (0, 0), (0, -bound.shape[2] % side)), mode="edge")
