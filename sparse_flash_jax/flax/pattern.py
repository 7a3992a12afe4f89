"""What a layer sees, as frozen descriptions that make a plan out of its queries and keys.

A pattern is a static choice (hashable, comparable); the plan that it makes depends on the data and on a PRNG key. Both
Flax APIs and the models share these. Flax itself is not needed here.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.hashing import hash_sides
from sparse_flash_jax.kernels.implementations import cudnn_attends
from sparse_flash_jax.patterns import causal, packed, random_keep, top_keep
from sparse_flash_jax.plan import AttentionPlan, make_plan
from sparse_flash_jax.time_share import TimeShare, expected_time_share


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
    ) -> AttentionPlan:
        """Returns the causal plan, within documents where `segment_ids` [B T] are given."""
        if segment_ids is None:
            return causal(q.shape[1], k.shape[1], window=self.window)
        return packed(segment_ids, window=self.window)


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
        if self.num_buckets < 2 or self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even and at least 2, got {self.num_buckets}.")

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
    ) -> AttentionPlan:
        """Returns the plan for rotations drawn from `key`, one for each key head.

        Args:
            q: queries [B T N H].
            k: keys [B S K H]; give q itself where keys are its vectors normalised, to hash once.
            key: PRNG key of the rotations.
            segment_ids: documents [B T]; buckets then do not cross them.
            scores: not used.

        Raises:
            ValueError: if there is no key, or if documents are to be centred, whose means would go across them.
        """
        if key is None:
            raise ValueError(f"{self} draws random rotations: pass key=jax.random.key(...), a fresh one each step.")
        if self.centred and segment_ids is not None:
            raise ValueError(f"{self} centres whole rows, across documents; leave out segment_ids, or centred.")
        query_bucket, key_bucket = hash_sides(q, k, self.num_buckets, key, centred=self.centred)
        document = () if segment_ids is None else (segment_ids[..., None],)
        return make_plan(
            query_group=(*document, query_bucket),
            key_group=(*document, key_bucket),
            exclude_self=self.exclude_self,
            window=self.window,
            num_buckets=None if document else self.num_buckets,
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
    """

    rate: float
    scored: bool = False
    window: int | None = None

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
    ) -> AttentionPlan:
        """Returns the plan for tokens dropped by `key`, or by `scores` where the pattern is scored.

        Args:
            q: queries [B T N H]; only its shape counts.
            k: keys [B S K H]; only its shape counts.
            key: PRNG key of random dropping.
            segment_ids: documents [B T].
            scores: scores of queries and keys, for scored dropping.

        Raises:
            ValueError: if the key, or the scores, are missing.
        """
        query_count, key_count = (math.ceil((1 - self.rate) * x.shape[1]) for x in (q, k))
        if self.scored:
            if scores is None:
                raise ValueError(f"{self} keeps tokens by score: pass scores=KeepScores(query, key).")
            query_keep, key_keep = top_keep(scores.query, query_count), top_keep(scores.key, key_count)
        else:
            if key is None:
                raise ValueError(f"{self} drops tokens at random: pass key=jax.random.key(...), a fresh one each step.")
            query_key, key_key = jax.random.split(key)
            query_keep, key_keep = (
                random_keep(side_key, (x.shape[0], x.shape[1], x.shape[2]), self.rate)
                for side_key, x in ((query_key, q), (key_key, k))
            )
        group = None if segment_ids is None else segment_ids[..., None].astype(jnp.int32)
        return make_plan(
            query_group=group,
            key_group=group,
            query_keep=query_keep,
            key_keep=key_keep,
            window=self.window,
            query_capacity=query_count,
            key_capacity=key_count,
        )


class Choice(NamedTuple):
    """What `Auto` chooses between for calls of one kind, and what it expects of them."""

    sparse: Hash | QK
    dense: Dense
    """With the backend that is fastest."""
    length: int
    """Tokens of a sequence."""
    density: float
    """Share of causal pairs that the sparse pattern is expected to show."""
    expected: TimeShare | None
    """Time of the sparse pattern; None where nothing like this device was measured."""

    @property
    def share(self) -> float | None:
        """Expected time of the sparse pattern over that of the dense one; None where that is not known."""
        if self.expected is None:
            return None
        return self.expected.share / (1.0 if self.dense.backend else self.expected.own_dense)

    @property
    def pattern(self) -> Dense | Hash | QK:
        """The one that runs: the sparse one, unless it is known to be no faster."""
        return self.sparse if self.share is None or self.share < 1 else self.dense

    def __str__(self) -> str:
        chosen = "sparse" if self.pattern is self.sparse else "dense"
        where = f"{chosen}: at {self.length:,} tokens and density {self.density:.4g} {self.sparse}"
        if self.expected is None:
            return f"{where} was measured on no device like this"
        return f"{where} is expected to take {self.share:.2f} of the time of {self.dense} ({self.expected.source})"


@dataclasses.dataclass(frozen=True)
class Auto:
    """A sparse pattern where it is expected to be faster than dense attention, else dense attention.

    Chosen while tracing, from static shapes, the expected density and the device alone; `choose` tells. A layer that
    runs at several lengths may be dense at one and sparse at another; with `choose(...).pattern` it is one of them.

    Args:
        sparse: `Hash` or `QK`, without a window.
        density: share of causal pairs that it is expected to show; None for evenly filled buckets, 1 / num_buckets, and
            for (1 - rate)**2. Buckets of alike tokens show more: `plan.density()` tells.

    Raises:
        ValueError: if the sparse pattern has a window, of which nothing was measured, or the density is not in (0, 1].
    """

    sparse: Hash | QK
    density: float | None = None

    def __post_init__(self):
        if self.sparse.window is not None:
            raise ValueError(f"Auto has no measurements of windows, leave out the window of {self.sparse}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], the visible share of causal pairs, got {self.density}.")

    @property
    def expected_density(self) -> float:
        """Share of causal pairs that the sparse pattern is expected to show."""
        if self.density is not None:
            return self.density
        return 1 / self.sparse.num_buckets if isinstance(self.sparse, Hash) else (1 - self.sparse.rate) ** 2

    def choose(
        self, length: int, *, dtype: Any, head_dim: int, packed: bool = False, implementation: str | None = None
    ) -> Choice:
        """Returns what is expected of calls like this on the default device, and with it the pattern that runs.

        Dense attention is cuDNN's where it can do the call, else that of this package's kernels.

        Args:
            length: tokens of a sequence, T.
            dtype: of the heads.
            head_dim: H.
            packed: whether there are `segment_ids`, which cuDNN does not take here.
            implementation: as of `sparse_attention`; a named one is for dense attention too.
        """
        method = "hash" if isinstance(self.sparse, Hash) else "qk"
        cudnn = implementation is None and not packed and cudnn_attends(dtype, head_dim)
        return Choice(
            sparse=self.sparse,
            dense=Dense(backend="cudnn" if cudnn else None),
            length=length,
            density=self.expected_density,
            expected=expected_time_share(length, self.expected_density, method=method),
        )

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
    ) -> AttentionPlan:
        """Returns the plan of what is chosen for these queries."""
        return resolve(self, q, segment_ids).plan(q, k, key=key, segment_ids=segment_ids, scores=scores)


Pattern = Dense | Hash | QK | Auto


def resolve(
    pattern: Pattern,
    q: Float[Array, "B T N H"],
    segment_ids: Int32[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Dense | Hash | QK:
    """Returns the pattern that runs for these queries: what `Auto` chooses, else the pattern itself."""
    if not isinstance(pattern, Auto):
        return pattern
    packed = segment_ids is not None
    return pattern.choose(
        q.shape[1], dtype=q.dtype, head_dim=q.shape[-1], packed=packed, implementation=implementation
    ).pattern


def is_scored(pattern: Pattern) -> bool:
    """Whether the layer learns scores by which tokens are kept."""
    sparse = pattern.sparse if isinstance(pattern, Auto) else pattern
    return isinstance(sparse, QK) and sparse.scored
