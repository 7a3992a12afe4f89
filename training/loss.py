"""Cross-entropy without ever holding the logits of a whole sequence, and with each logit computed once.

    for each chunk of the sequence:
        logits = hidden embedding^T;  total += logsumexp(logits) - logits[target]
        dlogits = softmax(logits) - onehot(target);  dhidden = dlogits embedding;  dembedding += dlogits^T hidden

The total is linear in its cotangent, so where a gradient is wanted the forward pass has it, times one. At a vocabulary
of 50304 the logits of 4 x 8192 tokens would take 6.6 GB in float32; a chunk takes one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from models.transformer import Transformer

# Logits of about this many elements are held at once by a device: 1 GB in float32.
_CHUNK_ELEMENTS = 1 << 28
_ROWS = 128  # of a tile of matrix products; of a chunk a device has batch x positions


class _Division(NamedTuple):
    """How many devices batch entries and positions are divided over."""

    batch: int
    positions: int


def total_cross_entropy(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> Float32[Array, ""]:
    """The weighted sum over tokens of -log p(target), in nats.

    Args:
        model: whose tied embedding gives logits.
        hidden: last hidden states, in whose dtype products are computed, with float32 sums.
        targets: next tokens.
        weights: of each token's loss.
    """
    division = _Division(model.config.batch_parts, model.config.parts)
    return _total(division, hidden, model.embedding[...].astype(jnp.float32), targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    division: _Division,
    hidden: Float[Array, "B T D"],
    embedding: Float32[Array, "vocab D"],
    targets: Int32[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> Float32[Array, ""]:
    narrow = embedding.astype(hidden.dtype)

    def add(total, piece):
        losses, _, _ = _losses(narrow, *piece[:2])
        return total + jnp.sum(piece[2] * losses), None

    pieces = _split(division, embedding.shape[0], hidden, targets, weights)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)
    return total


def _total_with_gradients(division, hidden, embedding, targets, weights):
    narrow = embedding.astype(hidden.dtype)
    token = jnp.arange(embedding.shape[0], dtype=jnp.int32)

    def add(sums, piece):
        total, dembedding = sums
        hidden, targets, weights = piece
        losses, logits, log_total = _losses(narrow, hidden, targets)
        chosen = (targets[..., None] == token[None, None]).astype(jnp.float32)
        dlogits = jnp.exp(logits - log_total[..., None]) - chosen
        dlogits = (weights[..., None] * dlogits).astype(hidden.dtype)
        dhidden = jnp.einsum("btv,vd->btd", dlogits, narrow)
        dembedding += jnp.einsum("btv,btd->vd", dlogits, hidden, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weights * losses), dembedding), (dhidden, losses)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(embedding.shape, jnp.float32)
    pieces = _split(division, embedding.shape[0], hidden, targets, weights)
    (total, dembedding), of_tokens = jax.lax.scan(add, zeros, pieces)
    dhidden, dweights = (_joined(division.positions, x, targets.shape[1]) for x in of_tokens)
    return total, (dhidden, dembedding, dweights)


def _times_cotangent(division, gradients, cotangent):
    dhidden, dembedding, dweights = ((cotangent * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return dhidden, dembedding, None, dweights


_total.defvjp(_total_with_gradients, _times_cotangent)


def _losses(embedding, hidden, targets):
    """Each token's loss, its logits, and the logarithm of the sum of their exponentials."""
    logits = jnp.einsum("btd,vd->btv", hidden, embedding, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return log_total - chosen, logits, log_total


def _split(division: _Division, vocabulary: int, *xs: Array) -> tuple[Array, ...]:
    """[B T ...] in chunks of the sequence, first axis, each a piece of every part; what is padded has weight 0."""
    batch, parts = xs[0].shape[0], division.positions
    length = xs[0].shape[1] // parts
    of_device = max(1, batch // division.batch)
    chunks = -(-length * of_device * vocabulary // _CHUNK_ELEMENTS)
    chunk = -(-length // chunks)
    whole = _ROWS // math.gcd(_ROWS, of_device)
    chunk = min(length, -(-chunk // whole) * whole)
    pad = -length % chunk

    def split(x):
        rest = x.shape[2:]
        padded = jnp.pad(x.reshape(batch, parts, length, *rest), [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * len(rest))
        pieces = jnp.moveaxis(padded.reshape(batch, parts, -1, chunk, *rest), 2, 0)
        return pieces.reshape(-1, batch, parts * chunk, *rest)

    return tuple(map(split, xs))


def _joined(parts: int, chunks: Array, length: int) -> Array:
    """The inverse of `_split`."""
    _, batch, rows, *rest = chunks.shape
    pieces = jnp.moveaxis(chunks.reshape(-1, batch, parts, rows // parts, *rest), 0, 2)
    return pieces.reshape(batch, parts, -1, *rest)[:, :, : length // parts].reshape(batch, length, *rest)
