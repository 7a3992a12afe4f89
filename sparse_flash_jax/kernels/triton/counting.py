"""Plans of buckets by counting: three small kernels where sorts and searches would be.

Tokens go by chunks of CHUNK positions. What a plan says follows from counts alone: a token's slot is the first slot of
its bucket, plus the tokens of its bucket in earlier chunks, plus those before it in its chunk; and a query sees the
keys of its bucket that are counted in the same way. Nothing is sorted, searched or added atomically.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.kernels.triton.launch import triton_call

CHUNK = 256  # a count of the other tokens of a chunk fits a byte
WORDS = 8  # of four counts each, that are in registers at a time
COUNTED = 64  # buckets that are counted at a time
SCANNED = 8192  # counts that are summed at a time


class CountedSide(NamedTuple):
    """One side of a plan, queries or keys: arrays of `AttentionPlan`."""

    order: Int32[Array, "B A C"]
    slot: Int32[Array, "B A L"]
    kept: Int32[Array, "B A"]
    """Tokens that are in a bucket and have a slot."""
    overflow: Int32[Array, "B A"]
    """Tokens that are in a bucket and have none."""
    largest: Int32[Array, "B A"]
    """Tokens of the largest bucket that have a slot."""


def count_tokens(
    query_bucket: Int32[Array, "#B N T"],
    key_bucket: Int32[Array, "#B K S"],
    buckets: int,
    *,
    slots: tuple[int, int],
    causal: bool,
    exclude_self: bool,
    interpret: bool = False,
) -> tuple[CountedSide, CountedSide, Runs]:
    """Returns both sides of a plan and its runs.

    Args:
        query_bucket: bucket of each query, in [0, buckets]; `buckets` stands for none: such a token is dropped.
        key_bucket: bucket of each key; the same array where both are one. One number of heads divides the other.
        buckets: how many there are.
        slots: of queries and of keys: T and S; or of one bucket less, and then its latest tokens get none.
        causal: whether a query sees no later key; queries and keys are at the same positions.
        exclude_self: whether it does not see the key of its own position, either.
        interpret: whether to run in Pallas' interpreter.
    """
    query_rows, queries = query_bucket.shape[:2], query_bucket.shape[2]
    key_rows, keys = key_bucket.shape[:2], key_bucket.shape[2]
    batch, heads = map(max, query_rows, key_rows)
    chunks = pl.cdiv(max(queries, keys), CHUNK)
    # Beyond the length tokens are dropped, behind all others. Rows: all heads of queries, then all of keys.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, chunks * CHUNK - x.shape[2])), constant_values=buckets)
    shared = key_bucket is query_bucket
    sides = (query_bucket,) if shared else (query_bucket, key_bucket)
    ids = jnp.concatenate([pad(x).reshape(-1, chunks * CHUNK) for x in sides])
    first_key_row = 0 if shared else math.prod(query_rows)
    columns = pl.cdiv(buckets + 1, 4 * WORDS) * 4 * WORDS
    call = functools.partial(_call, interpret=interpret, like=ids)
    (counts,) = call(_count, [(len(ids), chunks, columns)], (chunks, len(ids)), "count_buckets", 4)(ids)
    before, edges = call(_sum, [counts.shape, (len(ids), 2, columns)], (len(ids),), "sum_buckets", 8)(counts)
    rank = functools.partial(
        _rank, buckets=buckets, first_key_row=first_key_row, causal=causal, exclude_self=exclude_self
    )
    sizes = [(*query_rows, slots[0]), (*query_rows, queries), (*key_rows, slots[1]), (*key_rows, keys)]
    sizes += [(batch, heads, slots[0])] * 2 + [(batch, heads, slots[1])] * 2
    outputs = call(rank, sizes, (chunks, heads, batch), "rank_tokens", 1)(ids, before, edges)
    query_order, query_slot, key_order, key_slot, *runs = outputs
    query_edges, key_edges = edges[: math.prod(query_rows)], edges[first_key_row:]
    return (
        CountedSide(query_order, query_slot, *_totals(query_edges.reshape(*query_rows, 2, -1), buckets, slots[0])),
        CountedSide(key_order, key_slot, *_totals(key_edges.reshape(*key_rows, 2, -1), buckets, slots[1])),
        Runs._make([*runs, None, None]),
    )


def _totals(edges: Int32[Array, "B A 2 columns"], buckets: int, slots: int) -> tuple[Int32[Array, "B A"], ...]:
    """Returns a side's `kept`, `overflow` and `largest`."""
    in_buckets = edges[:, :, 0, buckets]
    kept = jnp.minimum(in_buckets, slots)
    largest = jnp.max((edges[:, :, 1] - edges[:, :, 0])[..., :buckets], axis=-1)
    return kept, in_buckets - kept, jnp.minimum(largest, slots)


def _call(
    kernel: Callable, shapes: Any, grid: tuple[int, ...], name: str, num_warps: int, *, interpret: bool, like: Array
) -> Callable[..., list[Array]]:
    outputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    options = {"num_warps": num_warps, "num_stages": 1, "interpret": interpret, "name": name}
    return triton_call(kernel, outputs, like=like, grid=grid, **options)


def _count(ids_ref, counts_ref):
    """counts[row, chunk, b]: tokens of a chunk in bucket b."""
    chunk, row = pl.program_id(0), pl.program_id(1)
    ids = ids_ref[row, pl.ds(chunk * CHUNK, CHUNK)]
    columns = counts_ref.shape[2]
    width = math.gcd(columns, COUNTED)
    for first in range(0, columns, width):
        column = first + lax.broadcasted_iota(jnp.int32, (CHUNK, width), 1)
        counts_ref[row, chunk, pl.ds(first, width)] = jnp.sum((ids[:, None] == column).astype(jnp.int32), axis=0)


def _sum(counts_ref, before_ref, edges_ref):
    """before[row, chunk, b]: slot of the chunk's first token in bucket b. edges[row, :, b]: its start and stop."""
    row = pl.program_id(0)
    _, chunks, columns = counts_ref.shape
    width = 1 << (columns - 1).bit_length()
    lines = max(1, min(SCANNED // width, 1 << (chunks - 1).bit_length()))
    line, column = (lax.broadcasted_iota(jnp.int32, (lines, width), axis) for axis in (0, 1))

    def at(i):
        return (row, i * lines + line, column), (i * lines + line < chunks) & (column < columns)

    def counts(i):
        index, inside = at(i)
        return pltriton.load(counts_ref.at[index], mask=inside, other=0)

    steps = pl.cdiv(chunks, lines)
    zero = jnp.zeros((width,), jnp.int32)
    total = lax.fori_loop(0, steps, lambda i, sums: sums + jnp.sum(counts(i), axis=0), zero)
    stop = jnp.cumsum(total)
    own = lax.broadcasted_iota(jnp.int32, (width,), 0)
    for edge, x in enumerate((stop - total, stop)):
        pltriton.store(edges_ref.at[row, edge, own], x, mask=own < columns)

    def write(i, first):
        x, (index, inside) = counts(i), at(i)
        pltriton.store(before_ref.at[index], first[None, :] + jnp.cumsum(x, axis=0) - x, mask=inside)
        return first + jnp.sum(x, axis=0)

    lax.fori_loop(0, steps, write, stop - total)


def _rank(
    ids_ref,
    before_ref,
    edges_ref,
    query_order_ref,
    query_slot_ref,
    key_order_ref,
    key_slot_ref,
    k_start_ref,
    k_stop_ref,
    q_start_ref,
    q_stop_ref,
    *,
    buckets: int,
    first_key_row: int,
    causal: bool,
    exclude_self: bool,
):
    """Slots of a chunk's tokens, and in these slots the tokens' positions and runs."""
    chunk, n, b = (pl.program_id(axis) for axis in range(3))

    def row_of(ref):
        """Batch entry and head of a side, of which either may serve several of the runs."""
        return tuple(
            lax.div(i, jnp.int32(size // own))
            for i, size, own in zip((b, n), k_start_ref.shape, ref.shape, strict=False)
        )

    query_at, key_at = row_of(query_slot_ref), row_of(key_slot_ref)
    query_row = query_at[0] * query_slot_ref.shape[1] + query_at[1]
    key_row = first_key_row + key_at[0] * key_slot_ref.shape[1] + key_at[1]
    queries, keys = query_order_ref.shape[2], key_order_ref.shape[2]
    # A tile [depth, lanes] of positions: consecutive ones in a thread.
    depth, lanes = CHUNK // 32, 32
    i, lane = (lax.broadcasted_iota(jnp.int32, (depth, lanes), axis) for axis in (0, 1))
    t = chunk * CHUNK + lane * depth + i
    query = ids_ref[query_row, t]
    key = ids_ref[key_row, t] if first_key_row else query
    counted = ((query, query), (query, key), (key, query), (key, key)) if causal else ((query, query), (key, key))
    earlier = _earlier(counted, edges_ref.shape[2] // 4)
    query_slot = before_ref[query_row, chunk, query] + earlier[0]
    key_slot = before_ref[key_row, chunk, key] + earlier[-1]
    if causal:
        own = (query == key).astype(jnp.int32)
        k_stop = before_ref[key_row, chunk, query] + earlier[1] + (0 if exclude_self else own)
        q_start = before_ref[query_row, chunk, key] + earlier[2] + (own if exclude_self else 0)
    else:
        k_stop, q_start = edges_ref[key_row, 1, query], edges_ref[query_row, 0, key]
    # Dropped tokens see nothing, behind all that is kept.
    for runs, row, slots, kind, slot, start, stop in (
        ((k_start_ref, k_stop_ref), key_row, keys, query, query_slot, edges_ref[key_row, 0, query], k_stop),
        ((q_start_ref, q_stop_ref), query_row, queries, key, key_slot, q_start, edges_ref[query_row, 1, key]),
    ):
        end = edges_ref[row, 0, buckets]
        for ref, bound in zip(runs, (start, stop), strict=True):
            seen = jnp.minimum(jnp.where(kind == buckets, end, bound), slots)
            pltriton.store(ref.at[b, n, slot], seen, mask=slot < ref.shape[2])
    # Entries and heads that share a side write the same.
    for order_ref, slot_ref, at, slot, slots in (
        (query_order_ref, query_slot_ref, query_at, query_slot, queries),
        (key_order_ref, key_slot_ref, key_at, key_slot, keys),
    ):
        pltriton.store(slot_ref.at[*at, t], jnp.minimum(slot, slots), mask=t < slot_ref.shape[2])
        pltriton.store(order_ref.at[*at, slot], t, mask=slot < slots)


def _earlier(pairs: tuple[tuple[Array, Array], ...], words: int) -> list[Array]:
    """For each (of, among): how many tokens of `among`, earlier in the chunk, are in the bucket of a token of `of`.

    Counts are four to a word, a byte each. The same pair is counted once.
    """
    named = {(id(of), id(among)): (of, among) for of, among in pairs}
    counts = dict(zip(named, _count_earlier(tuple(named.values()), words), strict=True))
    return [counts[id(of), id(among)] for of, among in pairs]


def _count_earlier(pairs: tuple[tuple[Array, Array], ...], words: int) -> list[Array]:
    shape = pairs[0][0].shape

    def add_block(block, sums):
        column = block * WORDS + lax.broadcasted_iota(jnp.int32, (shape[0], WORDS, shape[1]), 1)
        word = lambda ids: (ids >> 2)[:, None, :] == column
        byte = lambda ids: (ids & 3) * 8

        def before(ids):
            one = jnp.where(word(ids), (jnp.int32(1) << byte(ids))[:, None, :], 0)
            of_thread = jnp.sum(one, axis=0)
            return jnp.cumsum(one, axis=0) - one + (jnp.cumsum(of_thread, axis=1) - of_thread)[None]

        counted = {id(among): before(among) for _, among in pairs}
        return tuple(
            x + jnp.sum(jnp.where(word(of), counted[id(among)], 0), axis=1)
            for x, (of, among) in zip(sums, pairs, strict=True)
        )

    sums = tuple(jnp.zeros(shape, jnp.int32) for _ in pairs)
    blocks = pl.cdiv(words, WORDS)
    sums = add_block(0, sums) if blocks == 1 else lax.fori_loop(0, blocks, add_block, sums)
    return [(x >> ((of & 3) * 8)) & 255 for x, (of, _) in zip(sums, pairs, strict=True)]
