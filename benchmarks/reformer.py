"""Reformer's attention in plain JAX, as a baseline: hash, sort, cut into chunks, attend to two chunks, merge rounds.

Tokens are sorted by (bucket, position) and cut into chunks of a fixed size m. A query sees the earlier tokens of its
bucket that lie in its own chunk or in the one before it; what its bucket holds further back, it misses:

    o[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]      over the j that any round shows i, each counted once
    i itself with a penalty of 1e5, so that it matters only where nothing else is seen

Source: "Reformer: The Efficient Transformer", arXiv 2001.04451, section 2 and appendix A. Two details are ours. The
first chunk has no chunk before it, where Reformer wraps round to the last one: of a bucket that reaches from the first
chunk to the last, tokens there are later ones, so causal attention sees none of them either way. And a pair counts as
often as rounds show it, in these chunks; the appendix writes the number of rounds in which it shares a bucket, though
a round whose chunks part the pair adds nothing that would have to be divided.

Chunks go through the softmax a group at a time, and again in the backward pass, so that memory grows with T for a given
size of chunk. Gradients are JAX's own, but that rows are sorted and restored by the package's permutations.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from sparse_flash_jax.permute import Permutation, gather, restore, restore_lse
from sparse_flash_jax.rounds import hash_rounds as rounds_of_hashes

SELF_PENALTY = 1e5  # of appendix A
HIDDEN = -1e30  # finite, and far below any score with the penalty
PADDING = jnp.iinfo(jnp.int32).max  # a bucket of its own, which sorts last
GROUP_PAIRS = 2**26  # of queries and keys that go through the softmax at once: 256 MiB in float32

Buckets = Sequence[Int32[Array, "B T N"]]
"""Of each round."""


class Place(NamedTuple):
    """Where the rounds, along the first axis, put tokens."""

    bucket: Int32[Array, "R *tokens"]
    chunk: Int32[Array, "R *tokens"]
    """Chunk that holds the token's slot."""

    def at(self, index: tuple) -> "Place":
        """Returns the places of some tokens."""
        return Place(self.bucket[:, *index], self.chunk[:, *index])


class _Rows(NamedTuple):
    """Rows of queries, or of keys, by slot; axes [B N T ...], later [chunks rows ...]."""

    vectors: tuple[jax.Array, ...]
    position: jax.Array
    bucket: jax.Array
    """Of each round, along the last axis."""
    chunk: jax.Array


def chunk_size(length: int, num_buckets: int) -> int:
    """Returns the size that Reformer gives chunks, twice the mean bucket: 2 T / num_buckets, at most T."""
    return min(length, max(1, 2 * length // num_buckets))


def hash_rounds(
    q: Float[Array, "B T N H"], num_buckets: int, key: PRNGKeyArray, rounds: int, *, centred: bool = False
) -> Buckets:
    """Returns the angular buckets of each round, those of `hash_sparse_attention` for the same key."""
    return [of_queries for of_queries, _ in rounds_of_hashes(q, q, num_buckets, key, rounds, centred=centred)]


def sort_rounds(buckets: Buckets, chunk: int) -> tuple[list[Permutation], Place]:
    """Returns each round's order of tokens, and where it puts them: by position, arrays [R B N T]."""
    by_head = [jnp.swapaxes(ids, 1, 2) for ids in buckets]
    orders = [jnp.argsort(ids, axis=2, stable=True) for ids in by_head]
    permutations = [Permutation(order, jnp.argsort(order, axis=2)) for order in orders]
    chunks = [permutation.slot // chunk for permutation in permutations]
    return permutations, Place(jnp.stack(by_head), jnp.stack(chunks))


def shown(query: Place, key: Place) -> Bool[Array, "R *pairs"]:
    """Returns which rounds show a key to a query, were it earlier: in its bucket, in its chunk or the one before.

    Shapes broadcast.
    """
    back = query.chunk - key.chunk
    return (query.bucket == key.bucket) & (back >= 0) & (back <= 1)


def shown_pairs(buckets: Buckets, chunk: int) -> Float32[Array, "B N"]:
    """Returns how many pairs of a token and an earlier one the rounds show, a pair as often as they do; O(T)."""
    total = jnp.zeros((buckets[0].shape[0], buckets[0].shape[2]), jnp.float32)
    for ids in buckets:
        ids = jnp.sort(jnp.swapaxes(ids, 1, 2), axis=2)
        slot = jnp.broadcast_to(jnp.arange(ids.shape[2], dtype=jnp.int32)[None, None], ids.shape)
        opens = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=2)
        start = lax.cummax(jnp.where(opens, slot, 0), axis=2)
        first = jnp.maximum(start, (slot // chunk - 1) * chunk)
        total += jnp.sum((slot - first).astype(jnp.float32), axis=2)
    return total


@functools.partial(jax.jit, static_argnames=("chunk", "scale"))
def reformer_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    buckets: Buckets,
    *,
    chunk: int,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Returns Reformer's causal attention; differentiable in q, k and v.

    Args:
        q: float32 or bfloat16 [B T N H].
        k: [B T N H] in q's dtype; in Reformer q normalised per head.
        v: [B T N H] in q's dtype.
        buckets: int32 [B T N] of each round, shared by queries and keys.
        chunk: tokens of a chunk, m; see `chunk_size`. Where it does not divide T, the last chunk is filled up.
        scale: of the scores; default 1 / sqrt(H).

    Returns:
        [B T N H] in q's dtype. A token that sees no other outputs its own value.

    Raises:
        ValueError: if there are no rounds, or chunk is not positive.
    """
    if not buckets or chunk < 1:
        raise ValueError(f"at least one round and a chunk of at least 1 token are needed, got {len(buckets)}, {chunk}.")
    length, factor = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    fill = lambda x, value: jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
    q, k, v = (fill(x, 0) for x in (q, k, v))
    permutations, place = sort_rounds([fill(ids, PADDING) for ids in buckets], chunk)
    results = []
    for number, permutation in enumerate(permutations):
        o, lse = _round(q, k, v, number, permutation, place, chunk, factor)
        results.append((restore(o, permutation), restore_lse(lse, permutation)))
    outputs, lses = zip(*results, strict=True)
    weights = jax.nn.softmax(jnp.stack(lses), axis=0)[..., None]
    o = sum((weight * o.astype(jnp.float32) for weight, o in zip(weights, outputs, strict=True)), start=jnp.float32(0))
    return o.astype(q.dtype)[:, :length]


def _round(q, k, v, number: int, permutation: Permutation, place: Place, chunk: int, scale: float):
    """Returns o [B N T H] and lse [B N T] of one round, by slot."""
    order = permutation.order
    batch, heads, length = order.shape
    of_rounds = (jnp.moveaxis(jnp.take_along_axis(x, order[None], axis=3), 0, 3) for x in place)
    about = order, *of_rounds
    q, k, v = (gather(x, permutation) for x in (q, k, v))
    queries, own = (
        jax.tree.map(lambda x: x.reshape(batch, heads, length // chunk, chunk, *x.shape[3:]), rows)
        for rows in (_Rows((q,), *about), _Rows((k, v), *about))
    )
    before = jax.tree.map(lambda x: jnp.roll(x, 1, axis=2), own)
    before = before._replace(position=before.position.at[:, :, 0].set(length))  # later than all: seen by none
    keys = jax.tree.map(lambda *sides: jnp.concatenate(sides, axis=3), before, own)
    queries, keys = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), (queries, keys))

    attend = jax.checkpoint(lambda sides: _attend(sides[0], sides[1], number, scale))
    chunks = batch * heads * (length // chunk)
    together = min(chunks, max(1, GROUP_PAIRS // (2 * chunk * chunk)))
    o, lse = lax.map(attend, (queries, keys), batch_size=together)
    return o.reshape(batch, heads, length, -1), lse.reshape(batch, heads, length)


def _attend(queries: _Rows, keys: _Rows, number: int, scale: float):
    """Returns o [m H] and lse [m] of one chunk of queries over two of keys, in one round of several."""
    (q,), (k, v) = queries.vectors, keys.vectors
    scores = scale * jnp.einsum("qh,kh->qk", q, k, preferred_element_type=jnp.float32)
    back = queries.position[:, None] - keys.position[None]
    places = (Place(jnp.moveaxis(x.bucket, -1, 0), jnp.moveaxis(x.chunk, -1, 0)) for x in (queries, keys))
    of_queries, of_keys = next(places).at((slice(None), None)), next(places).at((None, slice(None)))
    by_round = shown(of_queries, of_keys)
    times = jnp.maximum(jnp.sum(by_round, axis=0, dtype=jnp.int32), 1).astype(jnp.float32)
    scores = jnp.where(back == 0, scores - SELF_PENALTY, scores - jnp.log(times))
    scores = jnp.where(by_round[number] & (back >= 0), scores, HIDDEN)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[:, None])
    return jnp.einsum("qk,kh->qh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype), lse
