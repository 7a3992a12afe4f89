"""The keys and values of one layer that later tokens may see, and what else each pattern has to remember for them.

Nothing is drawn after `empty_cache`: it holds the rotations of hashes and the masks of drops. How heads attend through
a cache is left to decode.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray, Shaped

from sparse_flash_jax.flax.auto import Pattern
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Concrete, Dense, Hash, Window
from sparse_flash_jax.hashing import draw_rotation

CACHE_MULTIPLE = 64
"""Caches are made for a multiple of so many tokens: other lengths close by need no new compilation."""

Cacheable = Dense | Hash | QK | Window
"""The patterns under which tokens can be cached, `QK` if it is not scored."""


class LayerCache(NamedTuple):
    """What a layer remembers: a ring of R slots, in which position p lies in slot p % R. A, heads, may be 1.

    Sinks, the first tokens of a document that all its later ones see, have slots of their own behind it: S in all.

    Attributes:
        k: float [B K S H], as products are taken: shared ones normalised, all rotated.
        v: float [B K S H].
        groups: int32 [B A S] each: a query sees keys all of whose groups are its own: documents, buckets, not dropped.
        rotation: float32 [K H R], of hashes.
        sums: float32 [B A H]: all queries so far added up, and all keys if they are not shared; of centred hashes.
        keep: bool [B L A], which queries and which keys of the whole sequence are kept; of random drops.
        first: int32 [B], position at which the document of the last token begins; where there are sinks.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    groups: tuple[Int32[Array, "B _ S"], ...]
    rotation: Float32[Array, "K H R"] | None
    sums: tuple[Float32[Array, "B _ H"], ...]
    keep: tuple[Bool[Array, "B L _"], ...]
    first: Int32[Array, " B"] | None = None


def empty_cache(
    pattern: Pattern,
    *,
    batch: int,
    length: int,
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    shared_qk: bool,
    documents: bool,
    key: PRNGKeyArray | None,
) -> LayerCache:
    """The cache before the first token, with all that is random drawn as a forward pass draws it.

    Args:
        pattern: of the layer, not `Auto`.
        batch: B.
        length: tokens of the whole sequence; drops are those of a forward pass at this length.
        num_heads: N.
        num_key_heads: K.
        head_dim: H.
        dtype: of keys and values.
        shared_qk: whether keys are the queries normalised.
        documents: whether tokens see only their own document.
        key: PRNG key of hashing or random dropping.

    Raises:
        NotImplementedError: if the pattern looks ahead: by learned scores, or by means of blocks.
        ValueError: if the pattern is `Auto`, documents are to be centred, or a key is missing.
    """
    pattern = concrete(pattern)
    capacity = -(-length // CACHE_MULTIPLE) * CACHE_MULTIPLE
    slots = capacity if pattern.window is None else min(pattern.window, capacity)
    slots += sinks_of(pattern)
    k, v = (jnp.zeros((batch, num_key_heads, slots, head_dim), dtype) for _ in range(2))
    first = jnp.zeros((batch,), jnp.int32) if sinks_of(pattern) else None
    cache = LayerCache(k, v, (), None, (), (), first)
    group_heads = [1] if documents else []
    if isinstance(pattern, Hash | QK):
        group_heads.append(num_key_heads)
        if key is None:
            raise ValueError(f"{pattern} draws at random: pass key=jax.random.key(...), that of the forward pass.")
        if isinstance(pattern, Hash):
            pattern.check_documents(documents)
            of_keys = jnp.zeros((1, 1, num_key_heads, head_dim), jnp.float32)
            sum_heads = ([num_heads] if shared_qk else [num_heads, num_key_heads]) if pattern.centred else []
            cache = cache._replace(
                rotation=draw_rotation(of_keys, pattern.num_buckets, key, None),
                sums=tuple(jnp.zeros((batch, heads, head_dim), jnp.float32) for heads in sum_heads),
            )
        else:
            keep = pattern.draw(key, (batch, length, num_heads), (batch, length, num_key_heads))
            cache = cache._replace(keep=tuple(jnp.pad(x, ((0, 0), (0, capacity - length), (0, 0))) for x in keep))
    return cache._replace(groups=tuple(jnp.zeros((batch, heads, slots), jnp.int32) for heads in group_heads))


def concrete(pattern: Pattern) -> Cacheable:
    """The pattern, if tokens can be cached under it.

    Raises:
        NotImplementedError: if it looks ahead, by learned scores or by means of blocks, or hashes in several rounds.
        ValueError: if it is `Auto`.
    """
    if not isinstance(pattern, Concrete):
        raise ValueError(
            f"{pattern} may choose otherwise at other lengths: fix it to its .choose(length, ...).pattern."
        )
    if isinstance(pattern, BlockTopK):
        raise NotImplementedError(
            f"{pattern} chooses by the mean of a whole block of queries: what a token sees changes with what follows "
            "it in its block, and cannot be cached. Use Window or Hash, which are causal."
        )
    if isinstance(pattern, Hash) and pattern.rounds > 1:
        raise NotImplementedError(f"{pattern} has several rounds, and a cache knows the buckets of one: use rounds=1.")
    if isinstance(pattern, QK) and pattern.scored:
        raise NotImplementedError(
            f"{pattern} compares a token's score with those of later tokens: what a token sees changes with what "
            "follows it, and cannot be cached. Use QK without scores, which is causal."
        )
    return pattern


def sinks_of(pattern: Cacheable) -> int:
    """Tokens at the start of a document that all its later ones see."""
    return pattern.sinks if isinstance(pattern, Window) else 0


def held_positions(last: Int32[Array, " B"], slots: int) -> Int32[Array, "B R"]:
    """The position that each slot of a ring holds once position `last` is written; below 0 where none yet."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    return last[:, None] - (last[:, None] - slot) % slots


def sink_positions(first: Int32[Array, " B"], sinks: int) -> Int32[Array, "B sinks"]:
    """The position that each slot behind the ring is for; past the last token where there is none yet."""
    return first[:, None] + jnp.arange(sinks, dtype=jnp.int32)[None]


def take_positions(x: Shaped[Array, "B A T *H"], positions: Int32[Array, "B S"]) -> Shaped[Array, "B A S *H"]:
    """What lies at some positions of each row."""
    return jax.vmap(lambda row, at: jnp.take(row, at, axis=1))(x, positions)


def put(
    ring: Shaped[Array, "B A S *H"], new: Shaped[Array, "B A *H"], slot: Int32[Array, " B"]
) -> Shaped[Array, "B A S *H"]:
    """The ring with `new` in one slot of each row."""
    return jax.vmap(lambda row, x, at: lax.dynamic_update_index_in_dim(row, x, at, axis=1))(ring, new, slot)
