"""A layer that sees earlier tokens after queries and keys were dropped."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.division import Context, devices, is_divided_already
from sparse_flash_jax.context.layout import from_zigzag, to_zigzag
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.patterns import random_keep, top_keep
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import make_plan


@dataclasses.dataclass(frozen=True)
class QK:
    """Earlier tokens, after a share of the queries and of the keys is dropped in each head.

    Each head keeps exactly ceil((1 - rate) * T) queries and as many keys, so the sorted sequence really is shorter.

    Args:
        rate: share to drop, in [0, 1).
        scored: keep the tokens with the highest learned scores, not random ones. The choice compares a token with
            later ones too: it looks ahead, so a language model trained with it is not strictly causal.
        window: tokens back that a query sees, itself included; None for all.
        axis_name: a mapped axis of `pmap` or `shard_map` that divides the batch: see `random_keep`.
    """

    rate: float
    scored: bool = False
    window: int | None = None
    axis_name: str | None = None

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), the share of tokens to drop, got {self.rate}.")

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
        """Returns the plan for tokens dropped by `key`, or by `scores` where the pattern is scored.

        Args:
            q: queries [B T N H]; only its shape counts.
            k: keys [B S K H]; only its shape counts.
            key: PRNG key of random dropping.
            segment_ids: documents [B T].
            scores: scores of queries and keys, for scored dropping.
            implementation: as of `sparse_attention`; "xla" plans without kernels, too.

        Raises:
            ValueError: if the key, or the scores, are missing.
        """
        query_keep, key_keep = self.keep(q, k, key, scores)
        return self.plan_kept(
            query_keep,
            key_keep,
            capacities=(self.kept(q.shape[1]), self.kept(k.shape[1])),
            segment_ids=segment_ids,
            implementation=implementation,
        )

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
        """Returns what `plan` goes by, for a divided sequence: the same tokens are kept as in a whole one.

        Args:
            q: queries [B T N H]; only its shape counts.
            k: keys [B S K H]; only its shape counts.
            context: how rows are laid out, those of the scores as well.
            key: as of `plan`, like those below.
            segment_ids: documents [B T].
            scores: scores of queries and keys.
            implementation: not used.

        Raises:
            ValueError: if the key, or the scores, are missing.
            NotImplementedError: inside of `jax.shard_map` over the sequence, where no device has all the tokens.
        """
        if is_divided_already(context):
            raise NotImplementedError(f"{self} chooses among all tokens of a sequence; call it outside of shard_map.")
        parts = devices(q, context)
        if scores is not None and context.zigzag:
            scores = KeepScores(*(from_zigzag(x, parts) for x in scores))
        keep = self.keep(q, k, key, scores)
        query_keep, key_keep = (to_zigzag(x, parts) for x in keep) if context.zigzag else keep
        groups = document_groups(segment_ids)
        return Tokens(groups, groups, query_keep, key_keep, window=self.window)

    def keep(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        key: PRNGKeyArray | None,
        scores: KeepScores | None,
    ) -> tuple[Bool[Array, "B T N"], Bool[Array, "B S K"]]:
        """Returns which queries and keys are kept."""
        if self.scored:
            if scores is None:
                raise ValueError(f"{self} keeps tokens by score: pass scores=KeepScores(query, key).")
            return top_keep(scores.query, self.kept(q.shape[1])), top_keep(scores.key, self.kept(k.shape[1]))
        if key is None:
            raise ValueError(f"{self} drops tokens at random: pass key=jax.random.key(...), a fresh one each step.")
        query_shape, key_shape = ((x.shape[0], x.shape[1], x.shape[2]) for x in (q, k))
        return self.draw(key, query_shape, key_shape)

    def kept(self, length: int) -> int:
        """Tokens that each head keeps of so many."""
        return math.ceil((1 - self.rate) * length)

    def draw(
        self, key: PRNGKeyArray, query_shape: tuple[int, int, int], key_shape: tuple[int, int, int]
    ) -> tuple[Bool[Array, "B T N"], Bool[Array, "B S K"]]:
        """Returns which queries and which keys are kept at random."""
        query_key, key_key = jax.random.split(key)
        drop = functools.partial(random_keep, rate=self.rate, axis_name=self.axis_name)
        return drop(query_key, query_shape), drop(key_key, key_shape)

    def plan_kept(
        self,
        query_keep: Bool[Array, "B T N"],
        key_keep: Bool[Array, "B S K"],
        *,
        capacities: tuple[int, int],
        segment_ids: Int32[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan:
        """Returns the plan for tokens of which it is known whether they are kept, at most `capacities` in a head."""
        group = None if segment_ids is None else segment_ids[..., None].astype(jnp.int32)
        return make_plan(
            query_group=group,
            key_group=group,
            query_keep=query_keep,
            key_keep=key_keep,
            window=self.window,
            query_capacity=capacities[0],
            key_capacity=capacities[1],
            implementation=implementation,
        )
