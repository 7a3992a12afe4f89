"""Choosing the next token out of its scores."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn; what is cut off is cut in the order of the arguments.

    Args:
        temperature: scores are divided by it; 0 takes the likeliest token, the first of equals.
        top_k: how many of the likeliest tokens may be drawn; None for all.
        top_p: draw from the fewest of the likeliest tokens that together have this probability; None for all.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")

    def __call__(self, logits: Float32[Array, "B vocab"], key: PRNGKeyArray) -> Int32[Array, " B"]:
        """Draws one token for each row."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, logits).astype(jnp.int32)
        vocab = logits.shape[-1]
        best, token = jax.lax.top_k(logits, vocab if self.top_k is None else min(self.top_k, vocab))
        if self.top_p is not None:
            p = jax.nn.softmax(best, axis=-1)
            better = jnp.cumsum(p, axis=-1) - p  # exactly 0 for the first, which thus always stays
            best = jnp.where(better < self.top_p, best, -jnp.inf)
        place = jax.random.categorical(key, best)
        return jnp.take_along_axis(token, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
