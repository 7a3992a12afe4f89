"""Plans whose rule on positions is more than a causal window: sinks beside one, prefixes; unions and intersections.

Documents are runs of equal ids here, so that tokens have a place in theirs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.documents import document_bounds
from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.plan import AttentionPlan, repeat_heads
from sparse_flash_jax.planning import PLAN_NAME
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.sorting import SortedTokens, look_up, runs_between, sort_tokens
from sparse_flash_jax.validation import check_array, check_tokens, positive_int


def sinks_and_window(
    length: int,
    sinks: int,
    window: int,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B T #K"] | None = None,
) -> AttentionPlan:
    """Plans causal attention to the first few tokens and to the last few: `j < sinks` or `i - j < window`.

    Args:
        length: T.
        sinks: tokens at the start that all later ones see; of each document, where there are several.
        window: positions that a query looks back, its own included.
        segment_ids: int32 [B T], the document of each token; a document is a run of equal ids.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0.
        key_keep: bool [B|1 T K|1]; a dropped key is seen by nobody, a sink or not.

    Returns:
        The plan, of two runs for each query.

    Raises:
        TypeError: if ids are not int32 or masks not bool.
        ValueError: if a number is not positive, or shapes do not fit.

    Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
    """
    for name, value in (("length", length), ("sinks", sinks)):
        positive_int(name, value)
    check_tokens((length, length), segment_ids, query_keep, key_keep)
    return _plan_with_sinks(segment_ids, query_keep, key_keep, length=length, sinks=sinks, rule=Rule(window=window))


def prefix_lm(
    prefix: Bool[Array, "#B T"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    query_keep: Bool[Array, "#B T #N"] | None = None,
    key_keep: Bool[Array, "#B T #K"] | None = None,
) -> AttentionPlan:
    """Plans causal attention in which all tokens see the whole prefix: `j <= i`, or j is in the prefix.

    Args:
        prefix: bool [B|1 T], the first tokens, or the first of each document; only how many those are counts.
        segment_ids: int32 [B T], the document of each token; a document is a run of equal ids.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0.
        key_keep: bool [B|1 T K|1]; a dropped key is seen by nobody.

    Raises:
        TypeError: if ids are not int32 or masks not bool.
        ValueError: if shapes do not fit.

    Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683.
    """
    check_array("prefix", prefix, "B T", (jnp.bool_,))
    check_tokens((prefix.shape[1],) * 2, segment_ids, query_keep, key_keep, prefix=(prefix.shape[0], 1))
    return _plan_with_prefix(prefix, segment_ids, query_keep, key_keep)


def intersect(a: AttentionPlan, b: AttentionPlan) -> AttentionPlan:
    """Returns the plan of what both plans show.

    Args:
        a: of one run for each query, in the order of positions, as `causal` has it and what `packed`, `prefix_lm` and
            the like make without groups; or with block lists, as `block_sparse` without keep masks.
        b: likewise; one of the two may have block lists.

    Raises:
        NotImplementedError: of plans that sort tokens, or show two runs: give `make_plan` the groups of both.
        ValueError: if they are not for the same lengths.
    """
    _check_pair("intersect", a, b)
    if a.runs.second is not None or b.runs.second is not None:
        raise NotImplementedError("intersect takes plans of one run for each query, got one of two runs.")
    if a.runs.blocks is not None and b.runs.blocks is not None:
        raise NotImplementedError("intersect takes block lists of one plan; combine the masks for block_sparse.")
    runs = _map_runs(_overlap, a.runs, b.runs)._replace(blocks=a.runs.blocks or b.runs.blocks)
    return _combined(a, b, runs)


def union(a: AttentionPlan, b: AttentionPlan) -> AttentionPlan:
    """Returns the plan of what either plan shows, a pair that both show counted once.

    Args:
        a: of one run for each query, in the order of positions: from `causal`, `prefix_lm` or `intersect`.
        b: likewise.

    Raises:
        NotImplementedError: of plans that sort tokens, show two runs, or have block lists.
        ValueError: if they are not for the same lengths.
    """
    _check_pair("union", a, b)
    if not (a.runs.plain and b.runs.plain):
        raise NotImplementedError(
            "union takes plans of one run for each query, got one of two runs or of blocks; "
            "a mask of blocks, for block_sparse, can be any union."
        )
    first, second = (_map_runs(part, a.runs, b.runs) for part in (_first_of_union, _second_of_union))
    return _combined(a, b, first._replace(second=second))


@functools.partial(jax.jit, static_argnames=("length", "sinks", "rule"))
def _plan_with_sinks(segment_ids, query_keep, key_keep, *, length, sinks, rule) -> AttentionPlan:
    queries, keys, heads = _sorted(segment_ids, query_keep, key_keep, length)
    query_first, key_first = _first(queries), _first(keys)
    k_start, k_stop = runs_between(queries, keys, rule.keys_seen(queries.position, length), heads)
    q_start, q_stop = runs_between(keys, queries, rule.queries_seeing(keys.position, length), heads)
    # Sinks beside the window, and the queries past it that see a sink.
    before = lambda tokens, x: jnp.minimum(x, tokens.position - rule.reach + 1)
    sink_bounds = (query_first, jnp.maximum(query_first, before(queries, query_first + sinks)))
    second_k = runs_between(queries, keys, sink_bounds, heads)
    past = keys.position + rule.reach
    is_sink = keys.position < key_first + sinks
    second_q = runs_between(keys, queries, (past, jnp.where(is_sink, jnp.int32(length), past)), heads)
    second = Runs(*second_k, *second_q)
    plan = _plan_of(queries, keys, Runs(k_start, k_stop, q_start, q_stop, second))
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), plan)


@jax.jit
def _plan_with_prefix(prefix, segment_ids, query_keep, key_keep) -> AttentionPlan:
    length = prefix.shape[1]
    first, stop = jnp.zeros_like(prefix, jnp.int32), jnp.full(prefix.shape, length, jnp.int32)
    if segment_ids is not None:
        first, stop = document_bounds(segment_ids)
        prefix = jnp.broadcast_to(prefix, first.shape)
    before = jnp.pad(jnp.cumsum(prefix, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    before_of = lambda index: jnp.take_along_axis(before, index, axis=1)
    end = (first + before_of(stop) - before_of(first))[:, None]  # of each document's prefix: [B 1 T]
    queries, keys, heads = _sorted(segment_ids, query_keep, key_keep, length)
    query_end, key_end = (look_up(end, tokens.position) for tokens in (queries, keys))
    seen = _first(queries), jnp.maximum(queries.position + 1, query_end)
    seeing = jnp.where(keys.position < key_end, _first(keys), keys.position), jnp.full_like(keys.position, length)
    # Prefixes differ by batch entry, though all tokens are in one group: bounds are of one shape all the same.
    of_queries, of_keys = runs_between(queries, keys, seen, heads), runs_between(keys, queries, seeing, heads)
    runs = _runs(of_queries, of_keys)
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), _plan_of(queries, keys, runs))


def _sorted(segment_ids, query_keep, key_keep, length: int) -> tuple[SortedTokens, SortedTokens, int]:
    """Both sides by document, and the number of heads of the runs between them."""
    # The position at which a document begins is as good as its id.
    group = () if segment_ids is None else (document_bounds(segment_ids)[0][:, None],)
    # Plans are laid out [B A L].
    keeps = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (query_keep, key_keep))
    queries, keys = (sort_tokens(group, keep, length, None) for keep in keeps)
    return queries, keys, max(queries.num_kept.shape[1], keys.num_kept.shape[1])


def _first(tokens: SortedTokens) -> Int32[Array, "B A T"]:
    """The position at which each token's document begins."""
    return tokens.groups[0] if tokens.groups else jnp.zeros_like(tokens.position)


def _plan_of(queries: SortedTokens, keys: SortedTokens, runs: Runs) -> AttentionPlan:
    return AttentionPlan(
        queries.order, queries.slot, keys.order, keys.slot, runs, queries.overflow, keys.overflow, keys.num_kept, None
    )


def _check_pair(name: str, a: AttentionPlan, b: AttentionPlan) -> None:
    if any(x is not None for plan in (a, b) for x in (plan.queries, plan.keys)):
        raise NotImplementedError(
            f"{name} takes plans in the order of positions, got one that sorts tokens (by groups or dropping); "
            "give make_plan the groups and keep masks of both."
        )
    lengths = [(plan.query_length, plan.key_length) for plan in (a, b)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"{name} takes plans for the same lengths (T, S), got {lengths[0]} and {lengths[1]}.")


def _map_runs(function, a: Runs, b: Runs) -> Runs:
    """Bounds out of those of both plans, of queries and of keys."""
    heads = max(a.k_start.shape[1], b.k_start.shape[1])
    a, b = (jax.tree.map(lambda x: repeat_heads(x, heads), runs._replace(blocks=None)) for runs in (a, b))
    of_queries = function((a.k_start, a.k_stop), (b.k_start, b.k_stop))
    of_keys = function((a.q_start, a.q_stop), (b.q_start, b.q_stop))
    return _runs(of_queries, of_keys)


def _runs(of_queries: tuple[Array, Array], of_keys: tuple[Array, Array]) -> Runs:
    """Runs of bounds that are brought to one shape."""
    (k_start, k_stop), (q_start, q_stop) = (jnp.broadcast_arrays(*bounds) for bounds in (of_queries, of_keys))
    return Runs(k_start, k_stop, q_start, q_stop)


def _overlap(a, b):
    start = jnp.maximum(a[0], b[0])
    return start, jnp.maximum(start, jnp.minimum(a[1], b[1]))


def _first_of_union(a, b):
    """The run that begins first, and the other's where they touch."""
    (start, stop), (other, until) = _in_order(a, b)
    return start, jnp.where(other <= stop, jnp.maximum(stop, until), stop)


def _second_of_union(a, b):
    """The other run, where they do not touch."""
    (_, stop), (other, until) = _in_order(a, b)
    return other, jnp.where(other <= stop, other, until)


def _in_order(a, b):
    """The bounds of both runs of each row, the one that begins first in front, and empty ones last."""
    far = jnp.int32(jnp.iinfo(jnp.int32).max)
    starts = [jnp.where(start < stop, start, far) for start, stop in (a, b)]
    swap = starts[1] < starts[0]
    return tuple((jnp.where(swap, y[0], x[0]), jnp.where(swap, y[1], x[1])) for x, y in ((a, b), (b, a)))


def _combined(a: AttentionPlan, b: AttentionPlan, runs: Runs) -> AttentionPlan:
    overflow, key_overflow, kept = (
        jnp.broadcast_to(getattr(a, name), jnp.broadcast_shapes(getattr(a, name).shape, getattr(b, name).shape))
        for name in ("query_overflow", "key_overflow", "kept_keys")
    )
    return a._replace(runs=runs, query_overflow=overflow, key_overflow=key_overflow, kept_keys=kept)
