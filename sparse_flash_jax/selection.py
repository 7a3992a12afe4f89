"""The best scores of each row, exactly as many as asked for, by counting: no sort, and a few passes over the scores."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

_DIGIT = 4  # bits that a pass settles, of a threshold that 2**_DIGIT - 1 counts narrow down


def best(scores: Float[Array, "B N T"], count: int | tuple[int, ...]) -> Bool[Array, "B N T"]:
    """Returns which `count` scores of each row are the best; of equal ones the earlier are, and NaN equals -inf.

    The count is that of every row, or one for each of N.
    """
    length = scores.shape[-1]
    order = _in_order(jnp.where(jnp.isnan(scores), -jnp.inf, scores))
    counts = jnp.broadcast_to(jnp.asarray(count, jnp.uint32), order.shape[:2])
    worst = _reached_by(order, counts, 8 * scores.dtype.itemsize)[..., None]
    missing = counts - jnp.sum(order > worst, axis=-1, dtype=jnp.uint32)
    earliness = jnp.where(order == worst, jnp.arange(length, 0, -1, dtype=jnp.uint32)[None, None], jnp.uint32(0))
    latest = _reached_by(earliness, missing, length.bit_length())[..., None]
    return (order > worst) | ((order == worst) & (earliness >= latest))


def _in_order(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns the bits of numbers, -0 being 0, so changed that they compare as the numbers do."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), f"uint{8 * x.dtype.itemsize}")
    sign = jnp.array(1 << (8 * x.dtype.itemsize - 1), bits.dtype)
    return jnp.where(bits < sign, bits | sign, ~bits).astype(jnp.uint32)


def _reached_by(x: UInt32[Array, "B N T"], count: UInt32[Array, "B N"], bits: int) -> UInt32[Array, "B N"]:
    """Returns the largest number, of so many bits, that at least `count` of each row are equal to or above.

    Digit by digit from the highest: how many thresholds, one for each digit, enough of the row reach, is the digit.
    """
    x = lax.optimization_barrier(x)  # else each pass computes it anew
    digits = jnp.arange(1, 1 << _DIGIT, dtype=jnp.uint32)[None, None]
    found = jnp.zeros_like(count)
    for shift in reversed(range(0, bits, _DIGIT)):
        thresholds = found[..., None] + (digits << shift)
        reach = jnp.sum(x[:, :, None] >= thresholds[..., None], axis=-1, dtype=jnp.uint32)
        found += jnp.sum(reach >= count[..., None], axis=-1, dtype=jnp.uint32) << shift
    return found
