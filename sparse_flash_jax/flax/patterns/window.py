"""A layer that sees the last tokens, and the first."""

import dataclasses

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.division import Context
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.flax.patterns.dense import Dense
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.positional import sinks_and_window
from sparse_flash_jax.validation import at_least, positive_int


@dataclasses.dataclass(frozen=True)
class Window:
    """The last few tokens, and the first few beside them: a sliding window with attention sinks.

    Args:
        window: tokens back that a query sees, itself included.
        sinks: tokens at the start that all later ones see; of each document, where there are several. 0 for none.

    Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
    """

    window: int
    sinks: int = 0

    def __post_init__(self):
        positive_int("window", self.window)
        at_least("sinks", self.sinks, 0)

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
        """Returns the plan, within documents where `segment_ids` [B T] are given; of q and k only shapes count.

        Raises:
            ValueError: if there are sinks, and not as many keys as queries.
        """
        if not self.sinks:
            return Dense(window=self.window).plan(q, k, segment_ids=segment_ids)
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"{self} takes as many keys as queries, got {k.shape[1]} and {q.shape[1]}.")
        return sinks_and_window(q.shape[1], self.sinks, self.window, segment_ids=segment_ids)

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
            NotImplementedError: if there are sinks.
        """
        if self.sinks:
            raise NotImplementedError(f"{self} takes whole sequences; leave out sinks for a divided one.")
        return Dense(window=self.window).tokens(q, k, context, segment_ids=segment_ids)
