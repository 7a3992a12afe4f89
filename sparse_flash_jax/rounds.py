"""Attention in rounds: over all that several plans show, each pair counted once.

Each round attends by its own plan, among the pairs that no earlier round has shown; the rounds' outputs are merged by
their log-sum-exp. That a pair was shown is seen by its ids: those of query and key are equal in an earlier round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.hashing import hash_sides
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.interval import permuted_attention
from sparse_flash_jax.kernels.repeats import Repeats
from sparse_flash_jax.permute import Permutation, restore_lse
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import plan_sides
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.validation import positive_int

Buckets = tuple[Int32[Array, "B T N"], Int32[Array, "B S K"]]
"""Of queries and of keys."""


class Rounds(NamedTuple):
    """What several rounds show; their plans differ in buckets alone, but that the last may be of near tokens."""

    plans: tuple[AttentionPlan, ...]
    buckets: tuple[Buckets, ...]
    """A pair of a plan's runs is shown by each round in which its buckets are equal; of near tokens there are none."""

    def mask(self) -> Bool[Array, "B N T S"]:
        """Returns which keys a query sees in any round, in original order; T x S, so for tests and pictures."""
        mask, *more = (plan.mask() for plan in self.plans)
        for other in more:
            mask = mask | other
        return mask

    def density(self) -> Float32[Array, ""]:
        """Returns the sum of the plans' densities, which is what the kernels compute; jit-able.

        A pair that several rounds show counts in each, so that the union's density is at most this.
        """
        return sum((plan.density() for plan in self.plans), start=jnp.float32(0))

    @property
    def query_overflow(self) -> Int32[Array, "B N"]:
        """Queries that did not fit into the capacity: the same in each plan."""
        return self.plans[0].query_overflow

    @property
    def key_overflow(self) -> Int32[Array, "B K"]:
        """Keys, likewise."""
        return self.plans[0].key_overflow


def hash_rounds(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    num_buckets: int,
    key: PRNGKeyArray,
    rounds: int,
    *,
    centred: bool,
    implementation: str | None = None,
) -> tuple[Buckets, ...]:
    """Returns the buckets of queries and keys in each round; those of one are `hash_sides`' of the key itself."""
    positive_int("rounds", rounds)
    keys = [key] if rounds == 1 else list(jax.random.split(key, rounds))
    options = {"centred": centred, "implementation": implementation}
    return tuple(hash_sides(q, k, num_buckets, each, **options) for each in keys)


def near_plan(
    lengths: tuple[int, int], near: int, *, exclude_self: bool, segment_ids: Int32[Array, "B T"] | None = None
) -> AttentionPlan:
    """Plans the last round: tokens that are seen as they are near, whatever their buckets.

    Args:
        lengths: T and S.
        near: positions that a query looks back, its own included.
        exclude_self: whether it does not see its own.
        segment_ids: int32 [B T], documents; None for none.
    """
    documents = tuple(jnp.swapaxes(group, 1, 2) for group in document_groups(segment_ids))
    return plan_sides(
        documents,
        None,
        documents,
        None,
        lengths=lengths,
        rule=Rule(exclude_self=exclude_self, window=near),
        query_offset=0,
        capacities=(None, None),
        shared=bool(documents),
    )


def in_rounds(
    plans: tuple[AttentionPlan, ...],
    buckets: tuple[Buckets, ...],
    near: int | None,
    *,
    exclude_self: bool,
    segment_ids: Int32[Array, "B T"] | None = None,
) -> AttentionPlan | Rounds:
    """Returns the plans of buckets, and of near tokens where those are seen, as rounds; a plan alone as it is."""
    if near is not None:
        of_queries, of_keys = buckets[0]
        lengths = of_queries.shape[1], of_keys.shape[1]
        plans += (near_plan(lengths, near, exclude_self=exclude_self, segment_ids=segment_ids),)
    return plans[0] if len(plans) == 1 else Rounds(plans, buckets)


def attend_in_rounds(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    rounds: Rounds,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Returns o and lse over the pairs that any round shows, as `sparse_attention` does; differentiable alike.

    For the backward pass each round keeps q, k and v in its own order, and its o.
    """
    results = []
    for number, plan in enumerate(rounds.plans):
        out, lse = permuted_attention(
            q,
            k,
            v,
            plan.runs,
            plan.queries,
            plan.keys,
            scale=scale,
            implementation=implementation,
            config=config,
            long_runs=plan.long_runs,
            repeats=_repeats(rounds.buckets[:number], plan),
        )
        results.append((out, restore_lse(lse, plan.queries)))
    return _merged(results)


def _repeats(earlier: Sequence[Buckets], plan: AttentionPlan) -> Repeats:
    """The buckets of earlier rounds, in the order of this one's slots."""

    def by_slot(ids: Int32[Array, "B L A"], side: Permutation | None) -> Int32[Array, "B A _C"]:
        ids = jnp.swapaxes(ids, 1, 2)
        return ids if side is None else jnp.take_along_axis(ids, side.order, axis=2, mode="clip")

    return Repeats(
        tuple(by_slot(of_queries, plan.queries) for of_queries, _ in earlier),
        tuple(by_slot(of_keys, plan.keys) for _, of_keys in earlier),
    )


def _merged(
    results: Sequence[tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]],
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """One softmax out of those over disjoint sets of keys, of which any may be empty."""
    outputs, lses = zip(*results, strict=True)
    top = lax.stop_gradient(jnp.stack(lses).max(axis=0))
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weights = [jnp.exp(lse - top) for lse in lses]
    total = jnp.stack(weights).sum(axis=0)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o = jnp.zeros(outputs[0].shape, jnp.float32)
    for weight, out in zip(weights, outputs, strict=True):
        o += (weight / total)[..., None] * out.astype(jnp.float32)
    return o.astype(outputs[0].dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)
