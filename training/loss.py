"""Cross-entropy without ever holding the logits of a whole sequence.

    for each chunk of the sequence:  logits = hidden @ embedding.T; sum += logsumexp(logits) - logits[target]

The backward pass computes a chunk's logits again. At a vocabulary of 50304, the logits of 4 x 8192 tokens would take
6.6 GB in float32; a chunk takes some hundred megabytes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from models.transformer import Transformer

# Logits of about this many elements are held at once: 256 MB in float32.
_CHUNK_ELEMENTS = 1 << 26


def total_cross_entropy(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> Float32[Array, ""]:
    """The weighted sum over tokens of -log p(target), in nats.

    Args:
        model: gives logits.
        hidden: last hidden states.
        targets: next tokens.
        weights: of each token's loss.
    """
    batch, length = targets.shape
    chunk = min(length, max(1, _CHUNK_ELEMENTS // (batch * model.config.padded_vocab)))
    chunks = -(-length // chunk)
    pad = chunks * chunk - length

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(total, piece):
        hidden, targets, weights = piece
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)), None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights)))
    return total
