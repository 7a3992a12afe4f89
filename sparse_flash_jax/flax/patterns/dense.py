"""A layer that sees every earlier token, or the last few."""

import dataclasses
from typing import Literal

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.division import Context
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.patterns import causal, packed
from sparse_flash_jax.plan import AttentionPlan


@dataclasses.dataclass(frozen=True)
class Dense:
    """Every earlier token, or the last few.

    Args:
        window: tokens that a query sees, itself included; None for all.
        backend: None for the kernels of this package, or the implementation of `jax.nn.dot_product_attention`.
    """

    window: int | None = None
    backend: Literal["xla", "cudnn"] | None = None

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan:
        """Returns the causal plan, within documents where `segment_ids` [B T] are given."""
        if segment_ids is None:
            return causal(q.shape[1], k.shape[1], window=self.window)
        return packed(segment_ids, window=self.window)

    def tokens(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        context: Context,
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> Tokens:
        """Returns what `plan` goes by, for a divided sequence.

        Raises:
            ValueError: if a backend is named: those take whole sequences.
        """
        if self.backend is not None:
            raise ValueError(f"backend {self.backend!r} takes whole sequences; leave it out for a divided one.")
        groups = document_groups(segment_ids)
        return Tokens(groups, groups, window=self.window)
