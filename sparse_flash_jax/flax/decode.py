"""Heads that attend through a cache: the first tokens by the kernels, then one more token at a time.

Decides what each of them sees: exactly what it would in a forward pass over the whole sequence. What is remembered
is left to cache.py, projecting into heads to the module, and which tokens follow to the model.
"""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparse_flash_jax.documents import document_bounds
from sparse_flash_jax.flax.cache import (
    Cacheable,
    LayerCache,
    held_positions,
    put,
    sink_positions,
    sinks_of,
    take_positions,
)
from sparse_flash_jax.flax.heads import attend_planned, place, planned_by
from sparse_flash_jax.flax.pattern import QK, Hash, Window
from sparse_flash_jax.hashing import buckets_of
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rounds import Rounds

# Groups of dropped tokens: they equal no other.
_DROPPED_QUERY, _DROPPED_KEY = -1, -2


def prefill(
    pattern: Cacheable,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"] | None,
    v: Float[Array, "B T K H"],
    cache: LayerCache,
    *,
    lengths: Int32[Array, " B"],
    rope_base: float | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attention of the first tokens by the kernels, as `attend`, into an empty cache.

    Args:
        pattern: what is visible.
        q: queries [B T N H].
        k: keys [B T K H]; None makes them of the queries.
        v: values [B T K H].
        cache: an empty one.
        lengths: int32 [B], from 1 to T; what lies past them is not remembered.
        rope_base: as of `attend`.
        segment_ids: int32 [B T], documents.
        scale: as of `attend`.
        implementation: as of `sparse_attention`.

    Returns:
        The heads' outputs [B T N H] and the filled cache.
    """
    length = q.shape[1]
    planned = planned_by(pattern, q, k, None, rope_base)
    sides = _sides(pattern, *planned, cache, implementation)
    plan = _plan(pattern, q, sides, cache, segment_ids, implementation)
    if cache.sums:
        given = (jnp.arange(length, dtype=jnp.int32)[None] < lengths[:, None])[..., None, None]
        summed = zip(cache.sums, planned[:1] if k is None else planned, strict=True)
        cache = cache._replace(sums=tuple(s + jnp.sum(x.astype(jnp.float32), axis=1, where=given) for s, x in summed))
    q, k = place(q, k, None, rope_base)
    o = attend_planned(pattern, q, k, v, plan, segment_ids=segment_ids, scale=scale, implementation=implementation)

    sinks = sinks_of(pattern)
    held = held_positions(lengths - 1, cache.k.shape[2] - sinks)
    if sinks:
        cache = cache._replace(first=_document_start(lengths, segment_ids))
        held = jnp.concatenate([held, sink_positions(_first(cache), sinks)], axis=1)
    held = jnp.clip(held, 0, length - 1)
    fill = lambda x: take_positions(jnp.swapaxes(x, 1, 2), held)
    groups = tuple(fill(group) for group in _groups(sides[1:], segment_ids, _DROPPED_KEY))
    return o, cache._replace(k=fill(k), v=fill(v), groups=groups)


def step(
    pattern: Cacheable,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"] | None,
    v: Float[Array, "B 1 K H"],
    cache: LayerCache,
    *,
    positions: Int32[Array, " B"],
    rope_base: float | None = None,
    segment_ids: Int32[Array, " B"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """Attention of one more token in each row, which the cache then holds too.

    Args:
        pattern: what is visible.
        q: its queries [B 1 N H].
        k: its keys [B 1 K H]; None makes them of the queries.
        v: its values [B 1 K H].
        cache: of all tokens before it.
        positions: int32 [B], its position in each row.
        rope_base: as of `attend`.
        segment_ids: int32 [B], its document.
        scale: as of `attend`.

    Returns:
        The heads' outputs [B 1 N H], 0 where nothing is visible, and the cache with this token.
    """
    planned = planned_by(pattern, q, k, positions[:, None], rope_base)
    sides, cache = _next_sides(pattern, *planned, cache, positions)
    documents = None if segment_ids is None else segment_ids[:, None]
    query_groups = _groups(sides[:1], documents, _DROPPED_QUERY)
    key_groups = _groups(sides[1:], documents, _DROPPED_KEY)
    q, k = place(q, k, positions[:, None], rope_base)

    sinks = sinks_of(pattern)
    slots = cache.k.shape[2] - sinks
    if sinks and documents is not None:
        cache = cache._replace(first=_next_document_start(cache, documents[:, 0], positions, slots))
    write = functools.partial(_write, positions=positions, slots=slots, first=cache.first, sinks=sinks)
    cache = cache._replace(
        k=write(cache.k, k),
        v=write(cache.v, v),
        groups=tuple(write(ring, group) for ring, group in zip(cache.groups, key_groups, strict=True)),
    )
    held = held_positions(positions, slots)
    visible = held >= 0
    if isinstance(pattern, Hash) and pattern.exclude_self:
        visible &= held < positions[:, None]
    if isinstance(pattern, Window) and sinks:
        first = _first(cache)
        before_window = sink_positions(first, sinks) <= positions[:, None] - pattern.window
        visible = jnp.concatenate([visible & (held >= first[:, None]), before_window], axis=1)
    visible = visible[:, None, None]
    of_both = zip(query_groups, cache.groups, strict=True)
    alike = [_by_key_head(of_q, cache.k.shape[1]) == of_k[:, :, None] for of_q, of_k in of_both]
    if isinstance(pattern, Hash) and pattern.near is not None:  # buckets come last
        alike[-1] |= (held > positions[:, None] - pattern.near)[:, None, None]
    for group in alike:
        visible &= group
    return _attend_one(q, cache.k, cache.v, visible, scale), cache


def _sides(pattern, q, k, cache: LayerCache, implementation: str | None) -> tuple[Array, ...]:
    """What decides which of the first queries and keys see each other: buckets or keeps of both; () if nothing does."""
    match pattern:
        case Hash():
            hashed = lambda x: buckets_of(x, _rotation(cache), centred=pattern.centred, implementation=implementation)
            query_bucket = hashed(q)
            return query_bucket, query_bucket if k is q else hashed(k)
        case QK():
            return tuple(keep[:, : q.shape[1]] for keep in cache.keep)
    return ()


def _plan(
    pattern, q, sides: tuple[Array, ...], cache: LayerCache, segment_ids, implementation
) -> AttentionPlan | Rounds:
    options = {"segment_ids": segment_ids, "implementation": implementation}
    match pattern:
        case Hash():
            of_queries, of_keys = sides
            return pattern.plan_rounds(((of_queries, of_keys),), **options)
        case QK():
            most = min(q.shape[1], pattern.kept(cache.keep[0].shape[1]))
            return pattern.plan_kept(*sides, capacities=(most, most), **options)
    return pattern.plan(q, q, **options)


def _next_sides(pattern, q, k, cache: LayerCache, positions) -> tuple[tuple[Array, ...], LayerCache]:
    """`_sides` of one more token, [B 1 A] each, and the cache with its part in the sums."""
    match pattern:
        case Hash(centred=centred):
            vectors = (q,) if k is q else (q, k)
            if centred:
                summed = zip(cache.sums, vectors, strict=True)
                cache = cache._replace(sums=tuple(s + x[:, 0].astype(jnp.float32) for s, x in summed))
                count = (positions + 1).astype(jnp.float32)[:, None, None, None]
                centre = zip(vectors, cache.sums, strict=True)
                vectors = tuple(x.astype(jnp.float32) - s[:, None] / count for x, s in centre)
            buckets = [buckets_of(x, _rotation(cache), implementation="xla") for x in vectors]
            return (buckets[0], buckets[-1]), cache
        case QK():
            at = positions[:, None, None]
            return tuple(jnp.take_along_axis(keep, at, axis=1) for keep in cache.keep), cache
    return (), cache


def _first(cache: LayerCache) -> Int32[Array, " B"]:
    assert cache.first is not None
    return cache.first


def _document_start(lengths: Int32[Array, " B"], segment_ids) -> Int32[Array, " B"]:
    """Where the document of each row's last token begins."""
    if segment_ids is None:
        return jnp.zeros_like(lengths)
    return jnp.take_along_axis(document_bounds(segment_ids)[0], lengths[:, None] - 1, axis=1)[:, 0]


def _next_document_start(cache: LayerCache, document, positions, slots: int) -> Int32[Array, " B"]:
    """`_document_start` of one more token: there, if the document before it is another one."""
    before = jnp.take_along_axis(cache.groups[0][:, 0], (positions[:, None] - 1) % slots, axis=1)[:, 0]
    return jnp.where(document == before, _first(cache), positions)


def _write(held: Array, new: Array, *, positions, slots: int, first: Int32[Array, " B"] | None, sinks: int) -> Array:
    """What slots hold, [B A S ...], with one more token, [B 1 A ...] as in sequences; where it is a sink, twice."""
    held = put(held, new[:, 0], positions % slots)
    if first is None:
        return held
    place_in_document = positions - first
    return put(held, new[:, 0], jnp.where(place_in_document < sinks, slots + place_in_document, positions % slots))


def _rotation(cache: LayerCache) -> Float32[Array, "K H R"]:
    assert cache.rotation is not None
    return cache.rotation


def _groups(side: tuple[Array, ...], segment_ids, dropped: int) -> tuple[Int32[Array, "B T _"], ...]:
    """Documents, and buckets or keeps, as groups of which all must be equal."""
    documents = () if segment_ids is None else (segment_ids[..., None],)
    to_group = lambda x: jnp.where(x, jnp.int32(0), jnp.int32(dropped)) if x.dtype == jnp.bool_ else x
    return (*documents, *map(to_group, side))


def _by_key_head(group: Int32[Array, "B 1 N"], key_heads: int) -> Int32[Array, "B K G 1"]:
    """The group of one query of each head, by key head and query head of it; axes of size 1 stay."""
    batch, _, heads = group.shape
    return group.reshape(batch, 1, 1, 1) if heads == 1 else group.reshape(batch, key_heads, heads // key_heads, 1)


def _attend_one(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Bool[Array, "B #K #G S"],
    scale: float | None,
) -> Float[Array, "B 1 N H"]:
    """One query's attention to a cache, in float32.

    Sums of products, not matrix products: those would have XLA lay out the whole cache anew for each token.
    """
    batch, _, heads, head_dim = q.shape
    key_heads = k.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    grouped = q.astype(jnp.float32).reshape(batch, key_heads, heads // key_heads, 1, head_dim)
    k, v = (x.astype(jnp.float32)[:, :, None] for x in (k, v))
    scores = jnp.where(visible, scale * jnp.sum(grouped * k, axis=-1), -jnp.inf)  # [B K G S]
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0.0))
    total = jnp.sum(p, axis=-1, keepdims=True)
    o = jnp.sum(p[..., None] * v, axis=-2) / jnp.where(total > 0, total, 1.0)
    return o.reshape(batch, 1, heads, head_dim).astype(q.dtype)
