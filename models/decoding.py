"""Continuing texts with a cache: a forward pass over the prompts, then one loop inside `jit`, a token a turn.

Decides in which order tokens are drawn and where documents and rows end. How a token is drawn is left to sampler.py,
and what the model remembers to cache.py.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32, Integer, PRNGKeyArray

from models.cache import Cache, cacheable, init_cache, prefill, step
from models.documents import document_ids
from models.sampler import Sampler
from models.transformer import Transformer
from sparse_flash_jax.flax.cache import CACHE_MULTIPLE

_PLAIN = Sampler()


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """All that is static, compared by identity: `_decoder` makes one for all calls that are alike."""

    structure: nnx.GraphDef
    params_tree: Any
    sampler: Sampler
    document_end: int | None
    packed: bool
    stop_token: int | None

    def model(self, params: list[jax.Array]) -> Transformer:
        """The model out of the leaves of its parameters, which are quick to hand over."""
        return nnx.merge(self.structure, jax.tree.unflatten(self.params_tree, params))

    def choose(self, model: Transformer, hidden, key: PRNGKeyArray, produced) -> Int32[Array, " B"]:
        """The next token of each row."""
        logits = model.logits(hidden)[:, : model.config.vocab_size]
        return self.sampler(logits, jax.random.fold_in(key, produced))

    def ended(self, token: Int32[Array, " B"]) -> Bool[Array, " B"]:
        """Whether a row ends with this token."""
        return jnp.zeros(token.shape, bool) if self.stop_token is None else token == self.stop_token


# To hash and compare a model's structure takes milliseconds: too long for each token of a stream.
_decoder = functools.lru_cache(maxsize=16)(_Decoder)


class _Decoded(NamedTuple):
    """What changes from token to token.

    Attributes:
        cache: of all tokens but the last.
        tokens: int32 [B C], those that were drawn, in the first columns.
        produced: int32, how many columns.
        positions: int32 [B], of the last token in its row.
        document: int32 [B], documents that ended before the last token; None where documents do not matter.
        ended: bool [B], rows that came to the stop token.
    """

    cache: Cache
    tokens: Int32[Array, "B C"]
    produced: Int32[Array, ""]
    positions: Int32[Array, " B"]
    document: Int32[Array, " B"] | None
    ended: Bool[Array, " B"]


def generate(
    model: Transformer,
    prompt: Integer[Array | np.ndarray, "B P"],
    count: int,
    *,
    key: PRNGKeyArray,
    pattern_key: PRNGKeyArray,
    sampler: Sampler = _PLAIN,
    lengths: Integer[Array | np.ndarray, " B"] | None = None,
    document_end: int | None = None,
    packed: bool = False,
    stop_token: int | None = None,
) -> Int32[Array, "B count"]:
    """Samples tokens that continue prompts.

    Each token has the scores that a forward pass over the whole row gives it, but for rounding. A compiled loop serves
    all lengths that round up to the same multiple of 64.

    Args:
        model: any `Transformer`, of which `nnx.merge` makes one out of its structure and parameters.
        prompt: ints [B P], below the model's vocab_size.
        count: tokens to sample for each row.
        key: PRNG key of the choices.
        pattern_key: PRNG key of hashes and drops, as of `model.hidden`. `QK` drops as in a pass over P + count tokens.
        sampler: how a token is drawn.
        lengths: ints [B], from 1 to P: tokens of each prompt, after which the rest of its row is padding. None for P.
        document_end: token after which a new document begins, if tokens see only their own; else None.
        packed: whether that token itself belongs to the document that it begins, as in rows of packed documents.
        stop_token: token after which a row ends, and is filled with it; None to go on to `count`.

    Returns:
        int32 [B count].

    Raises:
        NotImplementedError: if a layer looks ahead, by learned scores or by means of blocks, or hashes in rounds.
        ValueError: if a prompt is empty, `count` is below 1, or P + count - 1 exceeds the learned positions.
    """
    decoder, params, decoded = _begin(
        model, prompt, count, key, pattern_key, sampler, lengths, document_end, packed, stop_token
    )
    return _advance(decoder, params, decoded, key, count).tokens[:, :count]


def stream(
    model: Transformer,
    prompt: Integer[Array | np.ndarray, "B P"],
    count: int,
    *,
    key: PRNGKeyArray,
    pattern_key: PRNGKeyArray,
    sampler: Sampler = _PLAIN,
    lengths: Integer[Array | np.ndarray, " B"] | None = None,
    document_end: int | None = None,
    packed: bool = False,
    stop_token: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, one of each row at a time: int32 [B]. It ends where all rows have come to their end."""
    decoder, params, decoded = _begin(
        model, prompt, count, key, pattern_key, sampler, lengths, document_end, packed, stop_token
    )
    for number in range(count):
        if number:
            decoded = _advance(decoder, params, decoded, key, number + 1)
        yield np.asarray(decoded.tokens)[:, number]
        if stop_token is not None and np.all(decoded.ended):
            return


def _begin(model, prompt, count, key, pattern_key, sampler, lengths, document_end, packed, stop_token):
    """Checks the call and draws the first token."""
    prompt = np.asarray(prompt, np.int32)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt must be [B P] with at least one row and one token, got shape {prompt.shape}.")
    batch, width = prompt.shape
    lengths = np.full(batch, width, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"lengths must be [B={batch}] from 1 to P={width}, got {lengths.tolist()}.")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    total = width + count
    # The last token that is drawn is seen by none, and needs no position.
    model = cacheable(model, total - 1, documents=document_end is not None)
    structure, state = nnx.split(model)
    params, params_tree = jax.tree.flatten(state)
    decoder = _decoder(structure, params_tree, sampler, document_end, packed, stop_token)

    padded = _rounded(width) if model.positions is None else min(_rounded(width), model.config.max_length)
    prompt = jnp.asarray(np.pad(prompt, ((0, 0), (0, padded - width))))
    cache = _empty(decoder, params, batch, total, pattern_key)
    return decoder, params, _first(decoder, params, prompt, jnp.asarray(lengths), cache, key, _rounded(count))


def _rounded(length: int) -> int:
    return -(-length // CACHE_MULTIPLE) * CACHE_MULTIPLE


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(decoder: _Decoder, params, batch, total, pattern_key) -> Cache:
    model = decoder.model(params)
    return init_cache(model, batch, total, key=pattern_key, documents=decoder.document_end is not None)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=4)
def _first(decoder: _Decoder, params, prompt, lengths, cache, key, most) -> _Decoded:
    model = decoder.model(params)
    documents = document = None
    if decoder.document_end is not None:
        documents = document_ids(prompt, decoder.document_end, packed=decoder.packed)
        inside = jnp.arange(prompt.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        document = jnp.sum(inside & (prompt == decoder.document_end), axis=1, dtype=jnp.int32)
    hidden, cache = prefill(model, prompt, cache, lengths=lengths, segment_ids=documents)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = decoder.choose(model, last, key, 0)
    fill = 0 if decoder.stop_token is None else decoder.stop_token
    tokens = jnp.full((prompt.shape[0], most), fill, jnp.int32).at[:, 0].set(token)
    return _Decoded(cache, tokens, jnp.ones((), jnp.int32), lengths, document, decoder.ended(token))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(decoder: _Decoder, params, decoded: _Decoded, key, until) -> _Decoded:
    """Draws tokens until there are so many, or all rows have ended."""
    model = decoder.model(params)

    def more(now: _Decoded):
        return (now.produced < until) & ~jnp.all(now.ended)

    def add_token(now: _Decoded) -> _Decoded:
        token = jax.lax.dynamic_index_in_dim(now.tokens, now.produced - 1, axis=1, keepdims=False)
        own = document = now.document
        if document is not None:
            document = document + (token == decoder.document_end).astype(jnp.int32)
            own = document if decoder.packed else own
        hidden, cache = step(model, token, now.cache, now.positions, segment_ids=own)
        token = decoder.choose(model, hidden, key, now.produced)
        if decoder.stop_token is not None:
            token = jnp.where(now.ended, jnp.int32(decoder.stop_token), token)
        return _Decoded(
            cache=cache,
            tokens=jax.lax.dynamic_update_index_in_dim(now.tokens, token, now.produced, axis=1),
            produced=now.produced + 1,
            positions=now.positions + 1,
            document=document,
            ended=now.ended | decoder.ended(token),
        )

    return jax.lax.while_loop(more, add_token, decoded)
