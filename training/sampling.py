"""Continuing a text, token by token, in a buffer of fixed size.

Each new token runs the whole model over the buffer: exact for every pattern, at the price of no cache. Causality makes
the unfilled end of the buffer invisible (but not to `QK(scored=True)`, which compares scores over the whole buffer).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from training.config import TrainConfig
from training.data import Stream
from training.step import document_ids, evaluation_key
from training.tokens import Tokenizer


class Continuation(NamedTuple):
    """A text and how the model goes on.

    Attributes:
        prompt: held-out text.
        continuation: sampled text.
    """

    prompt: str
    continuation: str


def continue_held_out(
    config: TrainConfig, structure: nnx.GraphDef, params: nnx.State, held_out: Stream, tokenizer: Tokenizer
) -> Continuation | None:
    """Samples how a text from the middle of the held-out stream goes on; None where no tokens are asked for."""
    settings = config.sample
    if settings.tokens == 0:
        return None
    middle = max(len(held_out.tokens) // 2, 1)
    prompt = held_out.tokens[max(middle - settings.prompt, 0) : middle]
    tokens = sample(
        structure,
        params,
        prompt,
        count=settings.tokens,
        vocab_size=tokenizer.vocab_size,
        temperature=settings.temperature,
        end_token=tokenizer.end if config.data.documents_apart else None,
        packed=config.data.packing == "documents",
        pattern_key=evaluation_key(config.seed),
        key=jax.random.key(config.seed),
    )
    return Continuation(tokenizer.decode(prompt.tolist()), tokenizer.decode(tokens.tolist()))


def sample(
    structure: nnx.GraphDef,
    params: nnx.State,
    prompt: np.ndarray,
    *,
    count: int,
    vocab_size: int,
    temperature: float,
    end_token: int | None,
    pattern_key: PRNGKeyArray,
    key: PRNGKeyArray,
    packed: bool = False,
) -> np.ndarray:
    """Samples tokens that continue a prompt.

    Args:
        structure: of the model.
        params: of the model.
        prompt: int [L], at least one token.
        count: tokens to sample.
        vocab_size: tokens that may be chosen, below the padded vocabulary.
        temperature: 0 takes the likeliest token.
        end_token: token after which a new document begins, where tokens see only their own; else None.
        pattern_key: of hashes and drops.
        key: of the choices.
        packed: the model learned from packed documents, each of which begins with the end token before it.

    Returns:
        int32 [count].
    """
    buffer = jnp.zeros((1, len(prompt) + count), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    filled = _fill(structure, params, buffer, len(prompt), vocab_size, temperature, end_token, packed, pattern_key, key)
    return np.asarray(filled)[0, len(prompt) :]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6, 7), donate_argnums=2)
def _fill(structure, params, buffer, start, vocab_size, temperature, end_token, packed, pattern_key, key):
    model = nnx.merge(structure, params)

    def add_token(place, buffer):
        documents = None if end_token is None else document_ids(buffer, end_token, packed=packed)
        hidden, _ = model.hidden(buffer, key=pattern_key, segment_ids=documents)
        last = jax.lax.dynamic_index_in_dim(hidden, place - 1, axis=1, keepdims=False)
        logits = model.logits(last)[:, :vocab_size]
        if temperature > 0:
            token = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
        else:
            token = jnp.argmax(logits, axis=-1)
        return jax.lax.dynamic_update_index_in_dim(buffer, token.astype(jnp.int32), place, axis=1)

    return jax.lax.fori_loop(start, buffer.shape[1], add_token, buffer)
