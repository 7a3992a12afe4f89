"""Held-out quality: bits per byte and perplexity of the model, and of a unigram model beside it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from training.batches import EvaluationBatch
from training.data import Stream
from training.mesh import ONE_DEVICE, Layout


class Evaluation(NamedTuple):
    """Quality on held-out text.

    Attributes:
        loss: mean nats a token, end tokens included where they are learned.
        bits_per_byte: bits of all tokens over the bytes of text they stand for; comparable between tokenizers. Of
            images, whose pixels are bytes and all that is learned, exactly the bits per pixel.
        perplexity: exp(loss), a token.
    """

    loss: float
    bits_per_byte: float
    perplexity: float


def evaluate(
    evaluation_step: Callable[..., jax.Array],
    params: nnx.State,
    batches: Sequence[EvaluationBatch],
    layout: Layout = ONE_DEVICE,
) -> Evaluation:
    """The model's quality over the batches, on the devices of the layout."""
    sums = [evaluation_step(params, *layout.place_whole((batch.tokens, batch.weights))) for batch in batches]
    return _evaluation(math.fsum(float(value) for value in sums), batches)


def unigram(train: Stream, vocab_size: int, batches: Sequence[EvaluationBatch]) -> Evaluation:
    """The quality of predicting each token by its share of the training text, all counts raised by one."""
    counts = np.bincount(train.tokens, minlength=vocab_size) + 1
    nats = -np.log(counts / counts.sum())
    # Tokens that begin a packed piece are negative, and their weight is 0, whatever they look up.
    total = math.fsum(float((nats[batch.tokens[:, 1:]] * batch.weights).sum()) for batch in batches)
    return _evaluation(total, batches)


def _evaluation(nats: float, batches: Sequence[EvaluationBatch]) -> Evaluation:
    tokens = sum(float(batch.weights.sum()) for batch in batches)
    num_bytes = sum(batch.num_bytes for batch in batches)
    loss = nats / tokens
    # exp overflows where a model has gone wild; infinity says so without stopping the run.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, nats / math.log(2) / max(num_bytes, 1), perplexity)
