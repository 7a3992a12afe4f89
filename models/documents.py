"""Which document each token of a stream belongs to, where an end token separates them."""

import jax.numpy as jnp
from jaxtyping import Array, Int32


def document_ids(tokens: Int32[Array, "B T"], end_token: int, *, packed: bool = False) -> Int32[Array, "B T"]:
    """Numbers the documents of each row; an end token belongs to the one that it ends, where packed to the next."""
    ended = jnp.cumsum((tokens == end_token).astype(jnp.int32), axis=1)
    return ended if packed else jnp.pad(ended[:, :-1], ((0, 0), (1, 0)))
