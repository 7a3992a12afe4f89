"""What scores lose by the distance of query and key, in whatever order slots hold them: ALiBi, arXiv 2108.12409.

Positions are subtracted before anything is multiplied: in float32 that is exact up to 2^24 tokens, where a slope times
a position is not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.padding import pad_slots


class Alibi(NamedTuple):
    """Scores lose `slope * |i - j|`. Batch and head axes of positions may be 1, to stand for any size."""

    slopes: Float32[Array, " N"]
    queries: Float32[Array, "#B #N T"]
    """Position of the query in each slot."""
    keys: Float32[Array, "#B #K S"]
    """Position of the key in each slot."""


class Distances(NamedTuple):
    """The same for a pass over rows, of queries or of keys; in a kernel, refs of it."""

    slopes: Any
    """[N]."""
    rows: Any
    """Position of each row: [B|1 A|1 L]."""
    columns: Any
    """Likewise."""

    def padded(self, rows: int, columns: int) -> "Distances":
        """Returns those of so many rows and columns; the position of what is past the last is 0."""
        return Distances(self.slopes, pad_slots(self.rows, rows), pad_slots(self.columns, columns))


def from_queries(alibi: Alibi | None) -> Distances | None:
    """Returns distances from rows of queries."""
    return None if alibi is None else Distances(alibi.slopes, alibi.queries, alibi.keys)


def from_keys(alibi: Alibi | None) -> Distances | None:
    """Returns distances from rows of keys."""
    return None if alibi is None else Distances(alibi.slopes, alibi.keys, alibi.queries)


def penalty_by_distance(
    slope: Float32[Array, ""], rows: Float32[Array, " rows"], columns: Float32[Array, " columns"]
) -> Float32[Array, "rows columns"]:
    """Returns what the scores of a tile lose."""
    shape = rows.shape[0], columns.shape[0]
    distance = lax.broadcast_in_dim(rows, shape, [0]) - lax.broadcast_in_dim(columns, shape, [1])
    return slope * jnp.abs(distance)


@jax.custom_jvp
def constant(slopes: Float[Array, " N"]) -> Float[Array, " N"]:
    """Returns the slopes; to differentiate them raises NotImplementedError."""
    return slopes


def _constant_jvp(primals, tangents):
    if not isinstance(tangents[0], SymbolicZero):
        raise NotImplementedError(
            "alibi_slopes are constants, and have no gradient; pass jax.lax.stop_gradient(alibi_slopes), or "
            "differentiate with respect to other arguments alone."
        )
    return primals[0], tangents[0]


constant.defjvp(_constant_jvp, symbolic_zeros=True)
