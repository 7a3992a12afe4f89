"""Documents beside other groups, and where each token's begins and ends, of those that are runs of equal ids."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


def document_groups(segment_ids: Int32[Array, "B T"] | None) -> tuple[Int32[Array, "B T 1"], ...]:
    """Returns documents as groups that `make_plan` takes, before others: none where there are no documents."""
    return () if segment_ids is None else (segment_ids[..., None],)


def document_bounds(segment_ids: Int32[Array, "B T"]) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """Returns the first position of each token's document, and one past its last."""
    length = segment_ids.shape[1]
    position = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    opens = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    closes = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    first = lax.cummax(jnp.where(opens, position, 0), axis=1)
    last = lax.cummin(jnp.where(closes, position, length - 1), axis=1, reverse=True)
    return first, last + 1
