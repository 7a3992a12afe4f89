"""The continuation of a held-out text, sampled from the model of a run."""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from models.decoding import generate
from models.sampler import Sampler
from training.config import TrainConfig
from training.data import Stream
from training.step import evaluation_key
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
    """Samples how a text from the middle of the held-out stream goes on; None where no tokens are asked for.

    Raises:
        NotImplementedError: if the model looks ahead at what is not there yet, by learned scores or means of blocks, or
            hashes in rounds.
    """
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
        temperature: 0 takes the likeliest token.
        end_token: token after which a new document begins, where tokens see only their own; else None.
        pattern_key: of hashes and drops.
        key: of the choices.
        packed: the model learned from packed documents, each of which begins with the end token before it.

    Returns:
        int32 [count].
    """
    tokens = generate(
        nnx.merge(structure, params),
        prompt[None],
        count,
        key=key,
        pattern_key=pattern_key,
        sampler=Sampler(temperature),
        document_end=end_token,
        packed=packed,
    )
    return np.asarray(tokens)[0]
