"""The model with a cache: the first tokens at once, then one at a time, as in a forward pass over all of them.

    cache = init_cache(model, batch, length, key=key)
    hidden, cache = prefill(model, tokens, cache)                 # [B T] the first T tokens
    hidden, cache = step(model, token, cache, positions)          # [B] the next one, as often as there are more

What a layer remembers is left to `sparse_flash_jax.flax.cache`, and which token follows to decoding.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from models.transformer import Transformer
from sparse_flash_jax.flax.auto import Auto
from sparse_flash_jax.flax.cache import LayerCache

type Cache = tuple[LayerCache, ...]
"""That of each layer."""


def cacheable(model: Transformer, length: int, *, documents: bool = False) -> Transformer:
    """The model with each `Auto` fixed to what it chooses at this length; parameters are shared.

    Raises:
        ValueError: if the length is more than the learned positions.
    """
    model.check_length(length)
    if not any(isinstance(block.attention.pattern, Auto) for block in model.blocks):
        return model
    model = nnx.merge(*nnx.split(model))
    for block in model.blocks:
        attention = block.attention
        if isinstance(attention.pattern, Auto):
            attention.pattern = attention.pattern.choose(
                length,
                dtype=model.config.dtype,
                head_dim=attention.head_dim,
                documents=documents,
                implementation=attention.implementation,
            ).pattern
    return model


def init_cache(model: Transformer, batch: int, length: int, *, key: PRNGKeyArray, documents: bool = False) -> Cache:
    """The cache before the first token.

    Args:
        model: without `Auto`: see `cacheable`.
        batch: rows, B.
        length: most tokens of a row. `QK` drops as a forward pass over this many.
        key: PRNG key of hashes and drops, as of the forward pass.
        documents: whether tokens see only their own document.

    Raises:
        NotImplementedError: if a layer looks ahead, `QK(scored=True)` and `BlockTopK`, or hashes in rounds.
        ValueError: if a layer is `Auto`, or hashes with centred buckets in documents.
    """
    return tuple(
        block.attention.init_cache(batch, length, key=jax.random.fold_in(key, number), documents=documents)
        for number, block in enumerate(model.blocks)
    )


def prefill(
    model: Transformer,
    tokens: Int32[Array, "B T"],
    cache: Cache,
    *,
    lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """The first tokens of each row, in one forward pass.

    Args:
        model: the model.
        tokens: int32 [B T].
        cache: an empty one.
        lengths: int32 [B], how many tokens each row has; what lies past them does not count. None for T.
        segment_ids: int32 [B T], documents, if the cache is for them.

    Returns:
        Hidden states [B T D], of which `model.logits` makes scores, and the filled cache.

    Raises:
        ValueError: if there are more tokens than learned positions.
    """
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else lengths
    model.check_length(tokens.shape[1])
    x, filled = model.embed(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]), []
    for block, layer in zip(model.blocks, cache, strict=True):
        attention = functools.partial(block.attention.prefill, cache=layer, lengths=lengths, segment_ids=segment_ids)
        x, layer = block.around(x, attention)
        filled.append(layer)
    return model.last(x), tuple(filled)


def step(
    model: Transformer,
    token: Int32[Array, " B"],
    cache: Cache,
    positions: Int32[Array, " B"],
    *,
    segment_ids: Int32[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """One more token of each row.

    Args:
        model: the model.
        token: int32 [B].
        cache: of all tokens before it.
        positions: int32 [B], how many those are.
        segment_ids: int32 [B], its document, if the cache is for them.

    Returns:
        Its hidden state [B D] and the cache with it.
    """
    x, extended = model.embed(token[:, None], positions[:, None]), []
    for block, layer in zip(model.blocks, cache, strict=True):
        attention = functools.partial(block.attention.step, cache=layer, positions=positions, segment_ids=segment_ids)
        x, layer = block.around(x, attention)
        extended.append(layer)
    return model.last(x)[:, 0], tuple(extended)
