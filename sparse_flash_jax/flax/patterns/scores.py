"""Learned scores that go with a layer's queries and keys."""

from typing import NamedTuple

from jaxtyping import Array, Float


class KeepScores(NamedTuple):
    """Learned scores by which `QK(scored=True)` keeps tokens.

    Attributes:
        query: float [B T N].
        key: float [B S K].
    """

    query: Float[Array, "B T N"]
    key: Float[Array, "B S K"]
