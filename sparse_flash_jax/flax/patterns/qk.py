"""A layer that sees earlier tokens after queries and keys were dropped."""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.division import Context, devices, is_divided_already
from sparse_flash_jax.context.layout import from_zigzag, to_zigzag
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.keep import ScoreGradient, check_by_head, check_score_gradient, keep_count, random_keep, top_keep
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import make_plan


@dataclasses.dataclass(frozen=True)
class QK:
    """Earlier tokens, after a share of the queries and of the keys is dropped in each head.

    Each head keeps exactly ceil((1 - rate) * T) queries and as many keys, so the sorted sequence really is shorter: as
    short as the head that keeps most.

    Args:
        rate: share to drop, in [0, 1); or a tuple, one for each query head. Where several share a key head, it drops
            the least share among theirs, so that none sees fewer keys than it asks for.
        scored: keep the tokens with the highest learned scores, not random ones. The choice compares a token with
            later ones too: it looks ahead, so a language model trained with it is not strictly causal.
        window: tokens back that a query sees, itself included; None for all.
        axis_name: a mapped axis of `pmap` or `shard_map` that divides the batch: see `random_keep`.
        score_gradient: how scores learn, by a gate on the values and on the outputs of kept tokens: see `score_gate`.
    """

    rate: float | tuple[float, ...]
    scored: bool = False
    window: int | None = None
    axis_name: str | None = None
    score_gradient: ScoreGradient = "scaled"

    def __post_init__(self):
        if not isinstance(self.rate, numbers.Real | tuple):
            raise TypeError(f"rate must be a number, or a tuple of one for each query head, got {self.rate!r}.")
        if not self.rates:
            raise ValueError("rate must be a number, or a tuple of one for each query head, got an empty one.")
        for rate in self.rates:
            if not 0 <= rate < 1:
                raise ValueError(f"rate must be in [0, 1), the share of tokens to drop, got {rate}.")
        check_score_gradient(self.score_gradient)

    @property
    def rates(self) -> tuple[float, ...]:
        """One for each query head, or a single one for all."""
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

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
            ValueError: if the key, or the scores, are missing, or there is not one rate for each query head.
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
            ValueError: as of `plan`.
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
            rates = self.side_rates(q.shape[2], k.shape[2])
            best = lambda x, rates: top_keep(x, tuple(keep_count(rate, x.shape[1]) for rate in rates))
            return best(scores.query, rates[0]), best(scores.key, rates[1])
        if key is None:
            raise ValueError(f"{self} drops tokens at random: pass key=jax.random.key(...), a fresh one each step.")
        query_shape, key_shape = ((x.shape[0], x.shape[1], x.shape[2]) for x in (q, k))
        return self.draw(key, query_shape, key_shape)

    def kept(self, length: int) -> int:
        """Most tokens that a head keeps of so many, queries or keys."""
        return keep_count(min(self.rates), length)

    def side_rates(self, query_heads: int, key_heads: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the shares that each head of queries drops, and those that each head of keys does.

        Raises:
            ValueError: if there is not one rate for each query head, or those cannot share the key heads.
        """
        if not isinstance(self.rate, tuple):
            return (self.rate,) * query_heads, (self.rate,) * key_heads
        check_by_head("rate", self.rate, query_heads)
        if query_heads % key_heads:
            raise ValueError(f"key heads must divide query heads, got {query_heads} query and {key_heads} key heads.")
        group = query_heads // key_heads
        return self.rate, tuple(min(self.rate[first : first + group]) for first in range(0, query_heads, group))

    def draw(
        self, key: PRNGKeyArray, query_shape: tuple[int, int, int], key_shape: tuple[int, int, int]
    ) -> tuple[Bool[Array, "B T N"], Bool[Array, "B S K"]]:
        """Returns which queries and which keys are kept at random."""
        query_key, key_key = jax.random.split(key)
        query_rates, key_rates = self.side_rates(query_shape[2], key_shape[2])
        drop = functools.partial(random_keep, axis_name=self.axis_name)
        return drop(query_key, query_shape, query_rates), drop(key_key, key_shape, key_rates)

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
