"""Which pairs each scheme shows, counted: of those that share a bucket, and of those that weigh most.

Both schemes have the same buckets. What ours shows is read off its plan, the runs that its kernels walk over; what
Reformer's shows, off its slots and chunks. A pair is a token and an earlier one, so that a query does not see itself.
Pairs are looked at a block of queries at a time, and all the while there is no T x T array.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from coverage_vectors import Vectors
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32
from reformer import Place, hash_rounds, shown, sort_rounds

import sparse_flash_jax as sfj

BLOCK = 128  # queries that are looked at together
SCHEMES = ("same_bucket", "ours", "reformer")
TOP = 32


class Rounds(NamedTuple):
    """What each round shows, in both schemes; arrays [R N T] by position."""

    reformer: Place
    """Buckets, which are those of both schemes, and Reformer's chunks."""
    slot: Int32[Array, "R N T"]
    """Of a key, in the plan."""
    start: Int32[Array, "R N T"]
    """First slot that a query sees, by the plan."""
    stop: Int32[Array, "R N T"]


def hashed_rounds(
    vectors: Vectors, num_buckets: int, chunk: int, rounds: int, seed: int
) -> tuple[Rounds, list[sfj.AttentionPlan]]:
    """Returns rounds of hashes, and the plan of each."""
    buckets = hash_rounds(vectors.hashed, num_buckets, jax.random.key(seed), rounds, centred=vectors.centred)
    plans = [sfj.hash_sparse(ids, ids, exclude_self=True, num_buckets=num_buckets) for ids in buckets]
    of_plans = [_by_position(plan) for plan in plans]
    _, place = sort_rounds(buckets, chunk)
    first = lambda x: x[:, 0]  # the sequence
    return Rounds(Place(*map(first, place)), *(jnp.stack(x) for x in zip(*of_plans, strict=True))), plans


def _by_position(plan: sfj.AttentionPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slots of keys, and bounds of queries, arrays [N T]."""
    assert plan.query_slot is not None
    assert plan.key_slot is not None
    start, stop = (jnp.take_along_axis(x, plan.query_slot, axis=2)[0] for x in (plan.runs.k_start, plan.runs.k_stop))
    return plan.key_slot[0], start, stop


def _shown_by(rounds: Rounds, query: Int32[Array, "..."], key: Int32[Array, "..."]) -> Bool[Array, "schemes R ..."]:
    """Which schemes show a key to a query, by round; positions broadcast, and so do those of the head in front."""
    head = jnp.arange(rounds.slot.shape[1], dtype=jnp.int32).reshape(-1, *[1] * (query.ndim - 1))
    places = rounds.reformer.at((head, query)), rounds.reformer.at((head, key))
    slot = rounds.slot[:, head, key]
    ours = (rounds.start[:, head, query] <= slot) & (slot < rounds.stop[:, head, query])
    earlier = (key < query)[None]
    return jnp.stack([(places[0].bucket == places[1].bucket) & earlier, ours, shown(*places) & earlier])


@functools.partial(jax.jit, static_argnames="after")
def _count(rounds: Rounds, after: tuple[int, ...]) -> Int32[Array, "blocks after schemes N"]:
    length = rounds.slot.shape[2]
    keys = jnp.arange(length, dtype=jnp.int32)[None, None]

    def of_block(first):
        queries = first + jnp.arange(BLOCK, dtype=jnp.int32)
        by_round = _shown_by(rounds, jnp.minimum(queries, length - 1)[None, :, None], keys)
        by_round &= (queries < length)[None, None, None, :, None]
        union = [jnp.any(by_round[:, :number], axis=1) for number in after]
        outside = [(ours | reformer) & ~same for same, ours, reformer in union]
        counted = [jnp.concatenate([x, wrong[None]]) for x, wrong in zip(union, outside, strict=True)]
        return jnp.stack([jnp.sum(x, axis=(2, 3), dtype=jnp.int32) for x in counted])

    return lax.map(of_block, jnp.arange(0, length, BLOCK, dtype=jnp.int32))


def count_pairs(rounds: Rounds, after: Sequence[int]) -> list[dict[str, int]]:
    """Returns how many pairs of all heads share a bucket, and how many each scheme shows, after so many rounds.

    Raises:
        AssertionError: if a scheme shows a pair that shares no bucket.
    """
    counts = np.asarray(_count(rounds, tuple(after))).sum(axis=(0, 3), dtype=np.int64)
    assert not counts[:, -1].any(), "a pair of two buckets is shown"
    return [dict(zip(SCHEMES, map(int, row), strict=False)) for row in counts]


@functools.partial(jax.jit, static_argnames=("after", "scale"))
def _weigh(rounds: Rounds, q, k, queries: Int32[Array, "Q"], after: tuple[int, ...], scale: float):
    """Of the sampled queries, shares of the largest weights that are shown, and of all weights; [after schemes N]."""
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)

    def of_block(queries):
        of_queries = q[0][queries].astype(jnp.float32)
        scores = scale * jnp.einsum(
            "qnh,knh->nqk", of_queries, k[0].astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        scores = jnp.where((keys[None] < queries[:, None])[None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        by_round = _shown_by(rounds, queries[None, :, None], keys[None, None])
        _, top = lax.top_k(scores, TOP)
        results = []
        for number in after:
            union = jnp.any(by_round[:, :number], axis=1)
            among = jnp.take_along_axis(union, jnp.broadcast_to(top[None], (len(SCHEMES), *top.shape)), axis=3)
            mass = jnp.sum(jnp.where(union, weights[None], 0.0), axis=3)
            results.append(jnp.stack([among.mean(axis=(2, 3)), mass.mean(axis=2)]))
        return jnp.stack(results)

    return lax.map(of_block, queries.reshape(-1, min(BLOCK, queries.shape[0]))).mean(axis=0)


def weigh_pairs(
    rounds: Rounds, vectors: Vectors, after: Sequence[int], samples: int, seed: int
) -> list[dict[str, dict[str, float]]]:
    """Returns what each scheme shows of exact dense attention that excludes itself, after so many rounds.

    `top`: the share of a query's 32 largest weights; `mass`: of its softmax. Both are means over heads and queries, so
    many of which are drawn for all heads among those with 32 keys or more; `samples` is a multiple of 128, or below.
    """
    length = rounds.slot.shape[2]
    queries = np.random.default_rng(seed).integers(TOP, length, samples).astype(np.int32)
    shares = np.asarray(_weigh(rounds, vectors.q, vectors.k, jnp.asarray(queries), tuple(after), vectors.scale))
    by_scheme: Float32[np.ndarray, "after 2 schemes"] = shares.mean(axis=3)
    return [
        {
            name: dict(zip(SCHEMES, map(float, of_scheme), strict=True))
            for name, of_scheme in zip(("top", "mass"), row, strict=True)
        }
        for row in by_scheme
    ]
