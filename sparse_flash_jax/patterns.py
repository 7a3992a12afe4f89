"""The patterns: what a group, a keep mask and a rule stand for. Each is a few lines over `make_plan`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.documents import document_groups
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import make_plan, plan_sides
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.validation import check_array, positive_int


def causal(
    query_length: int,
    key_length: int | None = None,
    query_offset: int | Int32[Array, ""] = 0,
    *,
    window: int | None = None,
) -> AttentionPlan:
    """Plans dense causal attention, optionally in a sliding window; the plan fits any batch size and head count.

    Query i sees key j where `0 <= i + query_offset - j < window`.

    Args:
        query_length: T.
        key_length: S; None for T.
        query_offset: position of the first query among the keys, as a KV cache needs; may be traced.
        window: positions that a query looks back, its own included; None for all.

    Returns:
        A plan with batch and head axes of size 1, in which slots are positions, so that nothing is permuted.

    Raises:
        TypeError: if a length is not an int.
        ValueError: if a length or the window is not positive.
    """
    key_length = query_length if key_length is None else key_length
    positive_int("query_length", query_length)
    positive_int("key_length", key_length)
    return plan_sides(
        (),
        None,
        (),
        None,
        lengths=(query_length, key_length),
        rule=Rule(window=window),
        query_offset=query_offset,
        capacities=(None, None),
    )


def packed(
    segment_ids: Int32[Array, "B T"],
    key_segment_ids: Int32[Array, "B S"] | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
) -> AttentionPlan:
    """Plans attention within documents that are packed into one sequence.

    Args:
        segment_ids: int32 [B T], the document of each query; any values, in any order.
        key_segment_ids: int32 [B S], the document of each key; None for those of the queries.
        causal: whether a query sees no later key.
        window: positions that a query looks back, its own included; None for all.

    Returns:
        A plan whose head axes have size 1. To combine documents with buckets or dropping, give `make_plan`
        the groups `(segment_ids[..., None], bucket)`, and keep masks.

    Raises:
        TypeError: if ids are not int32.
        ValueError: if shapes do not fit, or the window is not positive.
    """
    check_array("segment_ids", segment_ids, "B T", (jnp.int32,))
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    check_array("key_segment_ids", key_segment_ids, "B S", (jnp.int32,))
    query_group, key_group = segment_ids[..., None], key_segment_ids[..., None]
    return make_plan(query_group=query_group, key_group=key_group, causal=causal, window=window)


def qk_sparse(
    query_keep: Bool[Array, "#B T #N"],
    key_keep: Bool[Array, "#B S #K"],
    causal: bool = True,
    *,
    window: int | None = None,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    implementation: str | None = None,
) -> AttentionPlan:
    """Plans attention among the queries and keys that are kept, each side by its own mask (QK-sparse).

    Args:
        query_keep: bool [B T N].
        key_keep: bool [B S K].
        causal: whether a query sees no later key.
        window: positions that a query looks back, its own included; None for all.
        query_capacity: most queries that any head keeps; attention then runs at this length.
        key_capacity: most keys that any head keeps.
        implementation: as in `make_plan`.

    Returns:
        The plan. Dropped queries, and those that see no kept key, output 0 with zero gradients.

    Raises:
        TypeError, ValueError: as `make_plan`.

    Source: "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention", arXiv 2306.01160, 3.1.
    """
    return make_plan(
        query_keep=query_keep,
        key_keep=key_keep,
        causal=causal,
        window=window,
        query_capacity=query_capacity,
        key_capacity=key_capacity,
        implementation=implementation,
    )


def hash_sparse(
    query_bucket: Int32[Array, "#B T #N"],
    key_bucket: Int32[Array, "#B S #K"],
    causal: bool = True,
    exclude_self: bool = False,
    *,
    window: int | None = None,
    num_buckets: int | None = None,
    implementation: str | None = None,
) -> AttentionPlan:
    """Plans attention in which a query sees the keys of its own bucket (hash-sparse).

    Args:
        query_bucket: int32 [B T N], any ids if num_buckets is None, from `lsh_buckets` for one.
        key_bucket: int32 [B S K].
        causal: whether a query sees no later key.
        exclude_self: whether a query also does not see the key of its own position.
        window: positions that a query looks back, its own included; None for all.
        num_buckets: says that ids are in [0, num_buckets), which lets GPUs count them, many times faster than sorting:
            see `make_plan`.
        implementation: as in `make_plan`.

    Returns:
        The plan. A query that is alone in its bucket outputs 0 with zero gradients.

    Raises:
        TypeError, ValueError: as `make_plan`.

    Source: "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention", arXiv 2306.01160, 3.2.
    """
    return make_plan(
        query_group=query_bucket,
        key_group=key_bucket,
        causal=causal,
        exclude_self=exclude_self,
        window=window,
        num_buckets=num_buckets,
        implementation=implementation,
    )


def chunked(
    length: int,
    chunk: int,
    causal: bool = True,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B T #K"] | None = None,
) -> AttentionPlan:
    """Plans attention within chunks of consecutive positions: `i // chunk == j // chunk`.

    Args:
        length: T.
        chunk: positions of a chunk.
        causal: whether a query sees no later key.
        segment_ids: int32 [B T], the document of each token.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0.
        key_keep: bool [B|1 T K|1]; a dropped key is seen by nobody.

    Raises:
        TypeError, ValueError: as `make_plan`; also if a number is not positive.
    """
    positive_int("length", length)
    positive_int("chunk", chunk)
    return _grouped(jnp.arange(length, dtype=jnp.int32) // chunk, causal, segment_ids, query_keep, key_keep)


def dilated(
    length: int,
    stride: int,
    causal: bool = True,
    *,
    window: int | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B T #K"] | None = None,
) -> AttentionPlan:
    """Plans attention to every `stride`-th token: where `i - j` is a multiple of the stride.

    Args:
        length: T.
        stride: distance of neighbours.
        causal: whether a query sees no later key.
        window: positions that a query looks back, its own included; it then sees window / stride tokens.
        segment_ids: int32 [B T], the document of each token.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0.
        key_keep: bool [B|1 T K|1]; a dropped key is seen by nobody.

    Raises:
        TypeError, ValueError: as `make_plan`; also if a number is not positive.

    Source: "Longformer: The Long-Document Transformer", arXiv 2004.05150, dilated sliding windows.
    """
    positive_int("length", length)
    positive_int("stride", stride)
    return _grouped(
        jnp.arange(length, dtype=jnp.int32) % stride, causal, segment_ids, query_keep, key_keep, window=window
    )


def _grouped(group, causal, segment_ids, query_keep, key_keep, *, window=None) -> AttentionPlan:
    """Positions in groups, in documents where there are some."""
    groups = (*document_groups(segment_ids), group[None, :, None])
    return make_plan(
        query_group=groups,
        key_group=groups,
        query_keep=query_keep,
        key_keep=key_keep,
        causal=causal,
        window=window,
    )
