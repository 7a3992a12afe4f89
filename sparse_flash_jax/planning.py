"""Making plans: tokens ordered by (group, position), after which each query sees one run of keys.

Decides order, capacity and run bounds, by sorting or, on NVIDIA GPUs and where groups are few, by counting. Leaves it
to patterns.py to say what the groups mean. Everything here is integer work inside `jit`, linear in memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.kernels.implementations import by_platform, counting_kernels
from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.partitioning import by_batch_and_head
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.sorting import largest_group, runs_between, sort_tokens
from sparse_flash_jax.validation import (
    check_implementation_name,
    check_num_buckets,
    check_offset,
    check_sides,
    keep_in_buckets,
    positive_int,
    raise_on_overflow,
)

PLAN_NAME = "sparse_attention_plan"
"""`checkpoint_name` of a plan's arrays: a remat policy that saves it does not sort again in the backward pass."""

_MOST_COUNTED = 256  # buckets up to which the kernels that count are tested


def make_plan(
    *,
    query_group: Int32[Array, "#B T #N"] | tuple[Int32[Array, "#B T #N"], ...] | None = None,
    key_group: Int32[Array, "#B S #K"] | tuple[Int32[Array, "#B S #K"], ...] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B S #K"] | None = None,
    causal: bool = True,
    exclude_self: bool = False,
    window: int | None = None,
    query_offset: int | Int32[Array, ""] = 0,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    num_buckets: int | None = None,
    implementation: str | None = None,
) -> AttentionPlan:
    """Plans attention in which query i sees key j where all of these hold.

    - both are kept, and their groups are equal;
    - `i + query_offset >= j` if `causal`, or `>` with `exclude_self`;
    - `i + query_offset - j < window` if a window is given. With `causal=False` this bounds the past alone.

    Args:
        query_group: int32 [B|1 T N|1], any values; or a tuple of several, of which all must be equal (a document and
            a bucket, say). None with `key_group` None: all in one group.
        key_group: int32 [B|1 S K|1], or a tuple of as many.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0. None: all are kept.
        key_keep: bool [B|1 S K|1]; a dropped key is seen by nobody. None: all are kept.
        causal: whether a query sees no later key.
        exclude_self: whether a query also does not see the key of its own position.
        window: positions that a query looks back, its own included.
        query_offset: position of the first query among the keys, as a KV cache needs; may be traced. At most
            2**30 in size.
        query_capacity: most queries that any head keeps; shortens the sorted sequence to this static length.
        key_capacity: most keys that any head keeps.
        num_buckets: says that group ids, one array a side, are in [0, num_buckets); static. NVIDIA GPUs then plan by
            counting: the same plan in a small part of the time that sorting takes. They do so without groups, too. That
            is for up to 256 buckets, and neither window, offset nor, with several buckets, capacities; else they sort.
        implementation: "xla" plans by XLA alone, which sorts; None, or another that `sparse_attention` has: by kernels
            where there are any.

    Returns:
        The plan. Axes of size 1 stay and stand for any size.

    Raises:
        TypeError: if groups are not int32 or keeps not bool.
        ValueError: if shapes, head counts or options do not fit one another, or if, outside `jit`, a head keeps more
            than its capacity or a kept token's id is not in [0, num_buckets). Inside `jit` tokens of such ids and the
            latest that do not fit are dropped, and `plan.overflow` counts them.
    """
    query_groups, key_groups = (
        () if x is None else tuple(x) if isinstance(x, tuple | list) else (x,) for x in (query_group, key_group)
    )
    check_sides(query_groups, query_keep, key_groups, key_keep)
    check_num_buckets(num_buckets, query_groups, key_groups)
    check_implementation_name(implementation)
    query_length, key_length = (
        jax.tree.leaves(side)[0].shape[1] for side in ((query_groups, query_keep), (key_groups, key_keep))
    )
    of_both = zip((*query_groups, query_keep), (*key_groups, key_keep), strict=True)
    shared = query_capacity == key_capacity and all(x is y for x, y in of_both)
    # Plans are laid out [B A L].
    sides = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (query_groups, query_keep, key_groups, key_keep))
    return plan_sides(
        *sides,
        lengths=(query_length, key_length),
        rule=Rule(causal, exclude_self, window),
        query_offset=query_offset,
        capacities=(query_capacity, key_capacity),
        num_buckets=num_buckets,
        shared=shared,
        by_xla=implementation == "xla",
    )


def plan_sides(
    query_groups: tuple[Int32[Array, "#B #N T"], ...],
    query_keep: Bool[Array, "#B #N T"] | None,
    key_groups: tuple[Int32[Array, "#B #K S"], ...],
    key_keep: Bool[Array, "#B #K S"] | None,
    *,
    lengths: tuple[int, int],
    rule: Rule,
    query_offset: int | Int32[Array, ""],
    capacities: tuple[int | None, int | None],
    num_buckets: int | None = None,
    shared: bool = False,
    by_xla: bool = False,
) -> AttentionPlan:
    """`make_plan` on checked arrays; with no groups and no keeps, one group in which nothing is dropped.

    `shared` says that both sides are the same arrays, so that one is planned for both; `by_xla`, to use no kernels.
    """
    check_offset(query_offset)
    for name, capacity in zip(("query_capacity", "key_capacity"), capacities, strict=True):
        if capacity is not None:
            positive_int(name, capacity)
    queries_outside = keys_outside = 0
    if num_buckets is not None:
        of_queries = keep_in_buckets("query", query_groups[0], query_keep, num_buckets)
        of_keys = of_queries if shared else keep_in_buckets("key", key_groups[0], key_keep, num_buckets)
        (query_keep, queries_outside), (key_keep, keys_outside) = of_queries, of_keys
    slots = tuple(x if c is None else min(c, x) for x, c in zip(lengths, capacities, strict=True))
    dropping = query_keep is not None and key_keep is not None  # always, where buckets are known
    can_count = dropping and _can_count(num_buckets if query_groups else 1, rule, query_offset, cut=slots != lengths)
    count_tokens = counting_kernels() if can_count and not by_xla else None
    queries, keys = (query_groups, query_keep), None if shared else (key_groups, key_keep)
    # Past these an offset shows or hides everything; clipped, no position plus offset leaves int32.
    farthest = lengths[1] + rule.reach
    offset = jnp.clip(jnp.asarray(query_offset, jnp.int32), -lengths[0], farthest)
    plan = _plan(
        queries,
        keys,
        offset,
        count_tokens=count_tokens,
        lengths=lengths,
        rule=rule,
        slots=slots,
        num_buckets=num_buckets,
    )
    for side, overflow, capacity in zip(
        ("query", "key"), (plan.query_overflow, plan.key_overflow), capacities, strict=True
    ):
        if capacity is not None and not isinstance(overflow, Tracer):
            raise_on_overflow(side, np.asarray(overflow), capacity)
    plan = plan._replace(
        query_overflow=plan.query_overflow + queries_outside, key_overflow=plan.key_overflow + keys_outside
    )
    if _is_zero(query_offset):
        return plan
    of_heads = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), plan.query_overflow.shape)
    return plan._replace(query_offset=of_heads)


def _can_count(buckets: int | None, rule: Rule, query_offset: int | Array, *, cut: bool) -> bool:
    """Returns whether counting makes the plan. `cut`: some tokens may get no slot."""
    # The latest tokens do not fit: which ones they are, counts by bucket do not say of several.
    countable = buckets is not None and buckets <= _MOST_COUNTED and (buckets == 1 or not cut)
    return countable and _is_zero(query_offset) and rule.window is None


def _is_zero(query_offset: int | Array) -> bool:
    return isinstance(query_offset, int) and query_offset == 0


@functools.partial(jax.jit, static_argnames=("count_tokens", "lengths", "rule", "slots", "num_buckets"))
def _plan(queries, keys, query_offset, *, count_tokens, lengths, rule, slots, num_buckets) -> AttentionPlan:
    options = {"rule": rule, "slots": slots, "num_buckets": num_buckets}
    make = by_sorting = functools.partial(_plan_by_sorting, lengths=lengths, **options)
    if count_tokens is not None:
        by_counting = functools.partial(_plan_by_counting, count_tokens=count_tokens, **options)
        make = functools.partial(by_platform, by_counting, by_sorting)
    axes = *(jax.tree.map(lambda _, axes=axes: axes, side) for side, axes in ((queries, "bn-"), (keys, "bk-"))), ""
    results = _plan_axes(queries, queries if keys is None else keys, lengths, slots)
    plan = by_batch_and_head(make, (queries, keys, query_offset), axes, results)
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), plan)


def _plan_axes(queries, keys, lengths, slots) -> AttentionPlan:
    """The axes of a plan's arrays, as `by_batch_and_head` has them; None of those that a plan like this has not."""
    query_axes, key_axes = (
        axes if any(x is not None for x in jax.tree.leaves(side)) or capacity < length else None
        for axes, side, length, capacity in zip(("bn-", "bk-"), (queries, keys), lengths, slots, strict=True)
    )
    groups, _ = queries
    of_orders, runs = [query_axes] * 2 + [key_axes] * 2, Runs._make([*["bn-"] * 4, None, None])
    return AttentionPlan._make([*of_orders, runs, "bn", "bk", "bk", "bk" if groups else None, None])


def _plan_by_counting(queries, keys, _query_offset, *, count_tokens, rule, slots, num_buckets) -> AttentionPlan:
    groups, _ = queries
    buckets = num_buckets if groups else 1
    query_bucket = _bucket_if_kept(queries, buckets)
    key_bucket = query_bucket if keys is None else _bucket_if_kept(keys, buckets)
    queries, keys, runs = count_tokens(
        query_bucket, key_bucket, buckets, slots=slots, causal=rule.causal, exclude_self=rule.exclude_self
    )
    return AttentionPlan(
        queries.order,
        queries.slot,
        keys.order,
        keys.slot,
        runs,
        queries.overflow,
        keys.overflow,
        keys.kept,
        keys.largest if groups else None,
    )


def _bucket_if_kept(side: tuple[tuple[Array, ...], Array], buckets: int) -> Int32[Array, "B A L"]:
    """Returns each token's bucket: 0 where a side has no groups, `buckets` if the token is dropped."""
    groups, keep = side
    return jnp.where(keep, groups[0] if groups else jnp.int32(0), jnp.int32(buckets))


def _plan_by_sorting(query_side, key_side, query_offset, *, lengths, rule, slots, num_buckets) -> AttentionPlan:
    query_groups, query_keep = query_side
    queries = keys = sort_tokens(query_groups, query_keep, lengths[0], slots[0], num_buckets)
    if key_side is not None:
        key_groups, key_keep = key_side
        keys = sort_tokens(key_groups, key_keep, lengths[1], slots[1], num_buckets)
    heads = max(queries.num_kept.shape[1], keys.num_kept.shape[1])
    k_start, k_stop = runs_between(queries, keys, rule.keys_seen(queries.position + query_offset, lengths[1]), heads)
    q_start, q_stop = runs_between(keys, queries, rule.queries_seeing(keys.position - query_offset, lengths[0]), heads)
    return AttentionPlan(
        queries.order,
        queries.slot,
        keys.order,
        keys.slot,
        Runs(k_start, k_stop, q_start, q_stop),
        queries.overflow,
        keys.overflow,
        keys.num_kept,
        largest_group(keys) if keys.groups else None,
    )
