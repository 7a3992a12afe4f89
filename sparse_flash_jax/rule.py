"""The rule inside a group: which positions see each other, as half-open ranges. What a group is, the sort decides."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparse_flash_jax.validation import LARGEST_OFFSET, check_window


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which positions of one group see each other; static. The fields are those of `make_plan`."""

    causal: bool = True
    exclude_self: bool = False
    window: int | None = None

    def __post_init__(self):
        check_window(self.window, causal=self.causal, exclude_self=self.exclude_self)

    @property
    def reach(self) -> int:
        """The window, cut where it hides nothing and stays in int32 when positions are added; 0 for none."""
        return 0 if self.window is None else int(min(self.window, LARGEST_OFFSET + (1 << 29)))

    def keys_seen(
        self, i: Int32[Array, "*rows"], key_length: int
    ) -> tuple[Int32[Array, "*rows"], Int32[Array, "*rows"]]:
        """Returns the half-open range of key positions that a query at position i (offset added) may see."""
        lower = jnp.zeros_like(i) if self.window is None else i - self.reach + 1
        upper = i + 1 - int(self.exclude_self) if self.causal else jnp.full_like(i, key_length)
        return lower, upper

    def queries_seeing(
        self, j: Int32[Array, "*rows"], query_length: int
    ) -> tuple[Int32[Array, "*rows"], Int32[Array, "*rows"]]:
        """Returns the half-open range of query positions that may see a key at position j (offset subtracted)."""
        lower = j + int(self.exclude_self) if self.causal else jnp.zeros_like(j)
        upper = jnp.full_like(j, query_length) if self.window is None else j + self.reach
        return lower, upper
