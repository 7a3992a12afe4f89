"""What can be told of the plan of a divided sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from sparse_flash_jax.plan import share_of_causal


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pairs",), meta_fields=("query_length", "key_length"))
@dataclasses.dataclass(frozen=True)
class DividedPlan:
    """What can be told of the plan of a divided sequence, which is nowhere as a whole."""

    pairs: Float32[Array, "B N"]
    """Visible pairs of each batch entry and query head."""
    query_length: int
    """T of the whole sequence."""
    key_length: int
    """S of the whole sequence."""

    def density(self) -> Float32[Array, ""]:
        """Returns visible pairs over the pairs of dense causal attention, as `AttentionPlan.density` does."""
        return share_of_causal(self.pairs, self.query_length, self.key_length)

    @property
    def query_overflow(self) -> Int32[Array, "1 1"]:
        """Zero: there are no capacities here that tokens might not fit into."""
        return jnp.zeros((1, 1), jnp.int32)

    @property
    def key_overflow(self) -> Int32[Array, "1 1"]:
        """Zero, likewise."""
        return self.query_overflow
