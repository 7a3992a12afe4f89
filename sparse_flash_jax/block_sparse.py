"""Patterns whose visible pairs lie in blocks: of a mask, of FlexAttention's lists, or chosen by mean keys.

Slots of queries are positions, and blocks of slots are blocks of positions: dropped keys go to the end of their own
block. Within a block the rule still holds row by row, so that causal edges, windows and documents stay exact.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from sparse_flash_jax.documents import document_bounds
from sparse_flash_jax.kernels.tiles import BlockLists, BlockSizes, Runs
from sparse_flash_jax.permute import Permutation
from sparse_flash_jax.plan import AttentionPlan, repeat_heads
from sparse_flash_jax.planning import PLAN_NAME
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.selection import best
from sparse_flash_jax.sorting import invert, look_up
from sparse_flash_jax.validation import FLOAT_DTYPES, check_array, check_tokens, positive_int


def block_sparse(
    block_mask: Bool[Array, "#B #N TB SB"],
    block_size: int | tuple[int, int],
    causal: bool = True,
    *,
    query_length: int | None = None,
    key_length: int | None = None,
    window: int | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B S #K"] | None = None,
    max_listed: int | None = None,
) -> AttentionPlan:
    """Plans attention within the blocks of a mask: query i sees key j where all of these hold.

    - `block_mask[..., i // rows, j // columns]`, for a block size of (rows, columns);
    - `i >= j` if causal, and `i - j < window` if a window is given;
    - both are in one document and kept, if these are given.

    Args:
        block_mask: bool [B|1 N|1 T/rows S/columns], rounded up.
        block_size: rows and columns of a block, or one number for both. The Hopper kernels take multiples of 64, those
            of Triton of 16.
        causal: whether a query sees no later key.
        query_length: T, where the last block is not whole; None for all of it.
        key_length: S, likewise.
        window: positions that a query looks back, its own included; None for all.
        segment_ids: int32 [B T], the document of each token, where T is S; a document is a run of equal ids.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0.
        key_keep: bool [B|1 S K|1]; a dropped key is seen by nobody.
        max_listed: most blocks of keys that any block of queries sees: shortens the lists that the kernels read. None
            for S/columns. Further blocks, the last of a row, would be hidden: outside `jit` they raise.

    Returns:
        The plan.

    Raises:
        TypeError: if the mask is not bool or ids are not int32.
        ValueError: if shapes do not fit one another, or a row has more than `max_listed` blocks.
    """
    check_array("block_mask", block_mask, "B N T/rows S/columns", (jnp.bool_,))
    rows, columns = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    positive_int("block_size", rows)
    positive_int("block_size", columns)
    lengths = tuple(
        _length(name, given, count, size)
        for name, given, count, size in (
            ("query_length", query_length, block_mask.shape[2], rows),
            ("key_length", key_length, block_mask.shape[3], columns),
        )
    )
    rule = Rule(causal, False, window)
    check_tokens(lengths, segment_ids, query_keep, key_keep, block_mask=block_mask.shape[:2])
    if max_listed is not None:
        positive_int("max_listed", max_listed)
        _check_listed(block_mask, max_listed)
    listed = block_mask.shape[3] if max_listed is None else min(max_listed, block_mask.shape[3])
    # Plans are laid out [B A L].
    keeps = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (query_keep, key_keep))
    return _plan(block_mask, segment_ids, *keeps, lengths=lengths, sizes=(rows, columns), rule=rule, listed=listed)


def from_flex(
    kv_num_blocks: Any,
    kv_indices: Any,
    block_size: int | tuple[int, int] = 128,
    *,
    full_kv_num_blocks: Any = None,
    full_kv_indices: Any = None,
    causal: bool,
    **options: Any,
) -> AttentionPlan:
    """Plans what a `BlockMask` of PyTorch's FlexAttention lists, its arrays given as numpy's.

    A `BlockMask` has a function beside its lists, which decides within the partial blocks; here `causal`, and what else
    `block_sparse` takes, decides in all of them.

    Args:
        kv_num_blocks: int [B|1 N|1 T/rows], how many blocks of keys each block of queries sees in part.
        kv_indices: int [B|1 N|1 T/rows S/columns], which ones, in any order.
        block_size: `BLOCK_SIZE` of the mask.
        full_kv_num_blocks: of blocks that are seen as a whole, likewise; None of none.
        full_kv_indices: likewise.
        causal: whether a query sees no later key.
        **options: as of `block_sparse`.

    Returns:
        The plan.

    Raises:
        ValueError: if a block is listed twice, or is none of the key blocks.
    """
    mask = _mask_of_lists("kv", np.asarray(kv_num_blocks), np.asarray(kv_indices))
    if full_kv_num_blocks is not None:
        full = _mask_of_lists("full_kv", np.asarray(full_kv_num_blocks), np.asarray(full_kv_indices))
        if (mask & full).any():
            raise ValueError("kv_indices and full_kv_indices must not list the same block.")
        mask = mask | full
    return block_sparse(jnp.asarray(mask), block_size, causal, **options)


def block_top_k(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    block_size: int,
    count: int,
    **options: Any,
) -> AttentionPlan:
    """Plans causal attention of each block of queries to the blocks of keys that suit it best, and to its own.

    A block's score is the product of its mean key and the mean query. The mean query looks ahead within its own block,
    so that which earlier blocks a query sees depends on up to block_size - 1 later tokens; no later key is seen.

    Args:
        q: queries [B T N H]; no gradient flows through the choice.
        k: keys [B T K H].
        block_size: tokens of a block.
        count: blocks that a block of queries sees, its own included; earlier ones may be fewer.
        **options: `window`, `segment_ids`, `query_keep` and `key_keep` of `block_sparse`.

    Returns:
        The plan.

    Raises:
        TypeError: if q and k are not float.
        ValueError: if shapes do not fit one another, or the count is not positive.

    Source: as in "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, which chooses for each
        query by itself.
    """
    check_array("q", q, "B T N H", FLOAT_DTYPES)
    check_array("k", k, "B T K H", FLOAT_DTYPES)
    if q.shape[1] != k.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q and k must have one length, and key heads divide query heads, got {q.shape}, {k.shape}.")
    positive_int("block_size", block_size)
    positive_int("count", count)
    chosen = _best_blocks(lax.stop_gradient(q), lax.stop_gradient(k), block_size, count)
    return block_sparse(
        chosen,
        block_size,
        query_length=q.shape[1],
        key_length=k.shape[1],
        max_listed=min(count, chosen.shape[3]),
        **options,
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _best_blocks(q, k, size: int, count: int) -> Bool[Array, "B N TB TB"]:
    query_mean, key_mean = (_mean_of_blocks(x, size) for x in (q, k))
    key_mean = jnp.repeat(key_mean, q.shape[2] // k.shape[2], axis=2)
    score = jnp.einsum("bcnh,bdnh->bncd", query_mean, key_mean, precision=lax.Precision.HIGHEST)
    blocks = score.shape[-1]
    row, column = (lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (2, 3))
    # Later blocks come last, and the own one first. -inf, which NaN counts as, is for those later.
    score = jnp.where(column < row, jnp.maximum(score, jnp.finfo(jnp.float32).min), -jnp.inf)
    score = jnp.where(column == row, jnp.inf, score)
    if count >= blocks:
        return column <= row
    flat = score.reshape(*score.shape[:1], -1, blocks)
    return best(flat, count).reshape(score.shape) & (column <= row)


def _mean_of_blocks(x: Float[Array, "B T N H"], size: int) -> Float[Array, "B blocks N H"]:
    batch, length, heads, head_dim = x.shape
    blocks = -(-length // size)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)))
    tokens = jnp.clip(length - size * jnp.arange(blocks, dtype=jnp.int32), 1, size).astype(jnp.float32)
    return padded.reshape(batch, blocks, size, heads, head_dim).sum(axis=2) / tokens[None, :, None, None]


@functools.partial(jax.jit, static_argnames=("lengths", "sizes", "rule", "listed"))
def _plan(mask, segment_ids, query_keep, key_keep, *, lengths, sizes, rule, listed) -> AttentionPlan:
    (queries, keys), (rows, columns) = lengths, sizes
    heads = max(x.shape[1] for x in (mask, query_keep, key_keep) if x is not None)
    mask = repeat_heads(mask, heads)
    i, j = (jnp.arange(x, dtype=jnp.int32)[None, None] for x in lengths)
    seen, seeing = rule.keys_seen(i, keys), rule.queries_seeing(j, queries)
    if segment_ids is not None:
        first, stop = (x[:, None] for x in document_bounds(segment_ids))
        seen, seeing = ((jnp.maximum(x[0], first), jnp.minimum(x[1], stop)) for x in (seen, seeing))
    key_order, kept = None, None
    k_start, k_stop = (jnp.clip(x, 0, keys) for x in seen)
    if key_keep is not None:
        slots, kept, before = _kept_first(key_keep, columns)
        key_order = Permutation(invert(slots), slots)
        k_start, k_stop = (look_up(repeat_heads(before, heads), x) for x in (k_start, k_stop))
    key_index, key_count = _lists(mask, listed)
    query_index, query_count = _lists(jnp.swapaxes(mask, 2, 3), mask.shape[2])
    sees, seen_at_all = key_count[:, :, i[0, 0] // rows] > 0, query_count[:, :, j[0, 0] // columns] > 0
    sees = sees if query_keep is None else sees & query_keep
    q_start, q_stop = (jnp.clip(x, 0, queries) for x in seeing)
    if key_order is not None and key_keep is not None:
        of_slots = lambda x: look_up(x, repeat_heads(key_order.order, heads))
        q_start, q_stop = map(of_slots, (q_start, q_stop))
        seen_at_all = seen_at_all & of_slots(repeat_heads(key_keep, heads))
    runs = Runs(
        *_where_any(sees, k_start, k_stop),
        *_where_any(seen_at_all, q_start, q_stop),
        blocks=BlockLists(
            key_index,
            key_count,
            query_index,
            query_count,
            None if kept is None else repeat_heads(kept, heads),
            BlockSizes(rows, columns),
        ),
    )
    batch = max(x.shape[0] for x in (mask, segment_ids, query_keep, key_keep) if x is not None)
    query_heads = max(x.shape[1] for x in (mask, query_keep) if x is not None)
    num_kept = jnp.full((1, 1), keys, jnp.int32) if kept is None else jnp.sum(kept, axis=2)
    plan = AttentionPlan(
        None,
        None,
        *(key_order or (None, None)),
        runs,
        jnp.zeros((batch, query_heads), jnp.int32),
        jnp.zeros_like(num_kept),
        num_kept,
        None,
    )
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), plan)


def _lists(mask: Bool[Array, "B A R C"], most: int) -> tuple[Int32[Array, "B A R listed"], Int32[Array, "B A R"]]:
    """Returns which columns are set in each row, in increasing order, and how many."""
    column = lax.broadcasted_iota(jnp.int32, mask.shape, 3)
    index = jnp.sort(jnp.where(mask, column, mask.shape[3]), axis=3)[..., :most]
    count = jnp.minimum(jnp.sum(mask, axis=3, dtype=jnp.int32), most)
    return jnp.where(index < mask.shape[3], index, 0), count


def _kept_first(
    keep: Bool[Array, "B K S"], size: int
) -> tuple[Int32[Array, "B K S"], Int32[Array, "B K blocks"], Int32[Array, "B K S1"]]:
    """Returns slots in which the kept tokens of each block come first; how many; and the slot that a position has, or
    would have if it were kept, with one position more: the end."""
    batch, heads, length = keep.shape
    blocks = -(-length // size)
    padded = jnp.pad(keep, ((0, 0), (0, 0), (0, blocks * size - length))).reshape(batch, heads, blocks, size)
    kept_before, dropped_before = (
        jnp.cumsum(x, axis=3, dtype=jnp.int32) - x.astype(jnp.int32) for x in (padded, ~padded)
    )
    kept = jnp.sum(padded, axis=3, dtype=jnp.int32)
    first = (size * jnp.arange(blocks, dtype=jnp.int32))[None, None, :, None]
    flat = lambda x: x.reshape(batch, heads, -1)[..., :length]
    slot = jnp.where(padded, kept_before, kept[..., None] + dropped_before) + first
    before = jnp.pad(flat(kept_before + first), ((0, 0), (0, 0), (0, 1)), constant_values=length)
    return flat(slot), kept, before


def _where_any(some: Bool[Array, "B A L"], start: Array, stop: Array) -> tuple[Array, Array]:
    """Bounds that are empty where nothing is visible."""
    start = jnp.broadcast_to(start, jnp.broadcast_shapes(some.shape, start.shape))
    return start, jnp.where(some, jnp.maximum(start, stop), start)


def _length(name: str, given: int | None, blocks: int, size: int) -> int:
    if given is None:
        return blocks * size
    positive_int(name, given)
    if -(-given // size) != blocks:
        raise ValueError(f"{name} {given} is {-(-given // size)} blocks of {size}, and block_mask has {blocks}.")
    return given


def _check_listed(mask: Bool[Array, "B N TB SB"], most: int) -> None:
    if isinstance(mask, Tracer):
        return
    counts = np.asarray(mask).sum(axis=3)
    if counts.max() > most:
        raise ValueError(f"max_listed={most} is too small: a block of queries sees {counts.max()} blocks of keys.")


def _mask_of_lists(name: str, counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    blocks = indices.shape[-1]
    listed = np.arange(blocks) < counts[..., None]
    if ((indices < 0) | (indices >= blocks))[listed].any():
        raise ValueError(f"{name}_indices must be in [0, {blocks}), got {indices[listed].min()} to {indices.max()}.")
    times = np.zeros(indices.shape, np.int64)
    np.add.at(times, (*np.indices(indices.shape)[:-1], np.where(listed, indices, 0)), listed)
    if times.max() > 1:
        raise ValueError(f"{name}_indices must list a block once, got one {times.max()} times.")
    return times > 0
