"""What a layer sees, as frozen descriptions that make a plan out of its queries and keys.

A pattern is a static choice (hashable, comparable); the plan that it makes depends on the data and on a PRNG key. Both
Flax APIs and the models share these; which one is the faster is left to auto.py. Flax itself is not needed here.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from sparse_flash_jax.block_sparse import block_top_k
from sparse_flash_jax.context.division import Context, devices, is_divided_already
from sparse_flash_jax.context.layout import from_zigzag, to_zigzag
from sparse_flash_jax.context.tokens import Tokens
from sparse_flash_jax.flax.shared_keys import normalise
from sparse_flash_jax.hashing import hash_sides
from sparse_flash_jax.patterns import causal, packed, random_keep, top_keep
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import make_plan
from sparse_flash_jax.positional import sinks_and_window
from sparse_flash_jax.validation import at_least, positive_int


class KeepScores(NamedTuple):
    """Learned scores by which `QK(scored=True)` keeps tokens.

    Attributes:
        query: float [B T N].
        key: float [B S K].
    """

    query: Float[Array, "B T N"]
    key: Float[Array, "B S K"]


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
        group = None if segment_ids is None else segment_ids[..., None]
        return Tokens(group, group, window=self.window)


@dataclasses.dataclass(frozen=True)
class Hash:
    """Earlier tokens of the same bucket of an angular locality-sensitive hash.

    Args:
        num_buckets: even.
        exclude_self: whether a token does not see itself; the first token of a bucket then outputs 0.
        window: tokens back that a query sees, itself included; None for all.
        centred: whether to hash vectors minus their running mean, which evens buckets out: see `lsh_buckets`.
    """

    num_buckets: int
    exclude_self: bool = False
    window: int | None = None
    centred: bool = False

    def __post_init__(self):
        at_least("num_buckets", self.num_buckets, 2)
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even and at least 2, got {self.num_buckets}.")

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
        """Returns the plan for rotations drawn from `key`, one for each key head.

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
        return self.plan_buckets(*buckets, segment_ids=segment_ids, implementation=implementation)

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
        """
        if self.centred:
            raise ValueError(f"{self} takes means over whole sequences; leave out centred for a divided one.")
        buckets = self.hash(q, k, key, documents=segment_ids is not None, implementation=implementation)
        document = () if segment_ids is None else (segment_ids[..., None],)
        query_group, key_group = ((*document, bucket) for bucket in buckets)
        return Tokens(query_group, key_group, exclude_self=self.exclude_self, window=self.window)

    def hash(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        key: PRNGKeyArray | None,
        *,
        documents: bool,
        implementation: str | None,
    ) -> tuple[Int32[Array, "B T N"], Int32[Array, "B S K"]]:
        """Returns the buckets of queries and keys."""
        if key is None:
            raise ValueError(f"{self} draws random rotations: pass key=jax.random.key(...), a fresh one each step.")
        self.check_documents(documents)
        return hash_sides(q, k, self.num_buckets, key, centred=self.centred, implementation=implementation)

    def check_documents(self, separate: bool) -> None:
        """Raises ValueError where documents are to be separate, and buckets centred."""
        if self.centred and separate:
            raise ValueError(f"{self} centres whole rows, across documents; leave out segment_ids, or centred.")

    def plan_buckets(
        self,
        query_bucket: Int32[Array, "B T N"],
        key_bucket: Int32[Array, "B S K"],
        *,
        segment_ids: Int32[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan:
        """Returns the plan for buckets that are known."""
        document = () if segment_ids is None else (segment_ids[..., None],)
        return make_plan(
            query_group=(*document, query_bucket),
            key_group=(*document, key_bucket),
            exclude_self=self.exclude_self,
            window=self.window,
            num_buckets=None if document else self.num_buckets,
            implementation=implementation,
        )


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
        group = None if segment_ids is None else segment_ids[..., None]
        return Tokens(group, group, query_keep, key_keep, window=self.window)

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


Concrete = Dense | Hash | QK | Window | BlockTopK
"""The patterns that are the same at every length."""
