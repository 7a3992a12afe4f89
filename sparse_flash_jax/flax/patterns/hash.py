"""A layer that sees earlier tokens of the same bucket."""

import dataclasses

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.division import Context
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.flax.patterns.scores import KeepScores
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import make_plan
from sparse_flash_jax.rounds import Buckets, Rounds, hash_rounds, in_rounds
from sparse_flash_jax.validation import at_least, check_near


@dataclasses.dataclass(frozen=True)
class Hash:
    """Earlier tokens of the same bucket of an angular locality-sensitive hash.

    Args:
        num_buckets: even.
        exclude_self: whether a token does not see itself; the first token of a bucket then outputs 0.
        window: tokens back that a query sees, itself included; None for all.
        centred: whether to hash vectors minus their running mean, which evens buckets out: see `lsh_buckets`.
        rounds: hashes, of which each shows what is in the same bucket, as in `hash_sparse_attention`.
        near: tokens back, itself included, that a token sees whatever their buckets, as in `hash_sparse_attention`.
        rotated: whether a layer with rotary positions hashes vectors as these have turned them: buckets then go by
            place, too, and not by content alone. `plan` takes vectors as they are to be hashed.
    """

    num_buckets: int
    exclude_self: bool = False
    window: int | None = None
    centred: bool = False
    rounds: int = 1
    rotated: bool = False
    near: int | None = None

    def __post_init__(self):
        at_least("num_buckets", self.num_buckets, 2)
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even and at least 2, got {self.num_buckets}.")
        at_least("rounds", self.rounds, 1)
        check_near(self.near, self.window, causal=True)

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan | Rounds:
        """Returns the plan for rotations drawn from `key`, one for each key head; of several rounds, those of all.

        Args:
            q: queries [B T N H].
            k: keys [B S K H]; give q itself where keys are its vectors normalised, to hash once.
            key: PRNG key of the rotations.
            segment_ids: documents [B T]; buckets then do not cross them.
            scores: not used.
            implementation: as of `sparse_attention`; "xla" hashes and plans without kernels, too.

        Raises:
            ValueError: if there is no key, or if documents are to be centred, whose means would go across them.
        """
        buckets = self.hash(q, k, key, documents=segment_ids is not None, implementation=implementation)
        return self.plan_rounds(buckets, segment_ids=segment_ids, implementation=implementation)

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
        """Returns what `plan` goes by, for a divided sequence; its arguments are those of `plan`.

        Raises:
            ValueError: if there is no key, or buckets are centred: their means would go over all devices.
            NotImplementedError: of several rounds, or near tokens.
        """
        if self.rounds > 1 or self.near is not None:
            raise NotImplementedError(f"{self} takes whole sequences; leave out rounds and near for a divided one.")
        if self.centred:
            raise ValueError(f"{self} takes means over whole sequences; leave out centred for a divided one.")
        (buckets,) = self.hash(q, k, key, documents=segment_ids is not None, implementation=implementation)
        documents = document_groups(segment_ids)
        query_group, key_group = ((*documents, bucket) for bucket in buckets)
        return Tokens(query_group, key_group, exclude_self=self.exclude_self, window=self.window)

    def hash(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        key: PRNGKeyArray | None,
        *,
        documents: bool,
        implementation: str | None,
    ) -> tuple[Buckets, ...]:
        """Returns the buckets of queries and keys in each round."""
        if key is None:
            raise ValueError(f"{self} draws random rotations: pass key=jax.random.key(...), a fresh one each step.")
        self.check_documents(documents)
        options = {"centred": self.centred, "implementation": implementation}
        return hash_rounds(q, k, self.num_buckets, key, self.rounds, **options)

    def check_documents(self, separate: bool) -> None:
        """Raises ValueError where documents are to be separate, and buckets centred."""
        if self.centred and separate:
            raise ValueError(f"{self} centres whole rows, across documents; leave out segment_ids, or centred.")

    def plan_rounds(
        self,
        buckets: tuple[Buckets, ...],
        *,
        segment_ids: Int32[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan | Rounds:
        """Returns the plan for the buckets of each round, that of near tokens included."""
        options = {"segment_ids": segment_ids, "implementation": implementation}
        plans = tuple(self.plan_buckets(*of_round, **options) for of_round in buckets)
        return in_rounds(plans, buckets, self.near, exclude_self=self.exclude_self, segment_ids=segment_ids)

    def plan_buckets(
        self,
        query_bucket: Int32[Array, "B T N"],
        key_bucket: Int32[Array, "B S K"],
        *,
        segment_ids: Int32[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan:
        """Returns the plan for buckets that are known."""
        documents = document_groups(segment_ids)
        return make_plan(
            query_group=(*documents, query_bucket),
            key_group=(*documents, key_bucket),
            exclude_self=self.exclude_self,
            window=self.window,
            num_buckets=None if documents else self.num_buckets,
            implementation=implementation,
        )
