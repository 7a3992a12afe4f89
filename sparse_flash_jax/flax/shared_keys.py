"""Keys that are made of the queries, where a layer projects none."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The square root of this is far below the length of any useful query, and a zero query still has a finite gradient.
_SMALLEST_SQUARE = 1e-12


def normalise(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Each vector divided by its length, in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + _SMALLEST_SQUARE)).astype(x.dtype)
