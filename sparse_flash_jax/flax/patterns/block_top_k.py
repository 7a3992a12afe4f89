"""A layer that sees blocks of earlier tokens, those that suit best."""

import dataclasses

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.block_sparse import block_top_k
from sparse_flash_jax.context.division import Context
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.flax.shared_keys import normalise
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.validation import positive_int


@dataclasses.dataclass(frozen=True)
class BlockTopK:
    """Earlier tokens, of the blocks that suit a block of queries best by their mean keys, and of its own block.

    The mean query looks ahead within its block: which earlier blocks a token sees depends on up to block_size - 1 later
    tokens, so a language model trained with it is not strictly causal. No later key is seen.

    Args:
        block_size: tokens of a block; GPU kernels take multiples of 16, Hopper's those of 64.
        count: blocks that a block of queries sees, its own included.

    Source: as in "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189: see `block_top_k`.
    """

    block_size: int
    count: int

    def __post_init__(self):
        positive_int("block_size", self.block_size)
        positive_int("count", self.count)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan:
        """Returns the plan for the blocks that these queries and keys choose.

        Args:
            q: queries [B T N H].
            k: keys [B T K H]; give q itself where keys are its vectors normalised.
            key: not used.
            segment_ids: documents [B T]; means go across them, what is seen does not.
            scores: not used.
            implementation: not used.

        Raises:
            ValueError: if there are not as many keys as queries.
        """
        keys = normalise(q) if k is q else k
        return block_top_k(q, keys, self.block_size, self.count, segment_ids=segment_ids)

    def tokens(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        context: Context,
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> Tokens:
        """Raises NotImplementedError: blocks are chosen among all of a sequence."""
        raise NotImplementedError(f"{self} takes whole sequences, and no divided ones.")
