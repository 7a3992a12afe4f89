"""The queries on which coverage is measured: drawn ones whose buckets are more or less even, or those of a trained run.

Keys are the queries normalised, per head, as in models that share them.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from loaded_run import load_run
from selection import Shape as Shape  # which finds the packages beside this folder

from sparse_flash_jax.flax.heads import place
from sparse_flash_jax.flax.shared_keys import normalise
from training.step import evaluation_key
from training.trained import Trained

HEAD_DIM = 64
CENTRES = 64
SEED = 0


class Vectors(NamedTuple):
    """Of one sequence. Hashes are of `hashed`, scores are scale * q . k."""

    hashed: Float[Array, "1 T N H"]
    q: Float[Array, "1 T N H"]
    k: Float[Array, "1 T N H"]
    scale: float
    centred: bool = False
    """Whether the hash is of vectors minus their running mean."""


def drawn(kind: str, length: int, heads: int) -> Vectors:
    """Returns vectors of a kind, of which the shorter sequences are the beginning of the longer ones.

    even      standard normal ones, which fill buckets evenly
    skewed    the same plus one vector of a head for all of its tokens, as long as theirs are by themselves
    clusters  the same around 64 centres as long, the n-th of which has 1 / n of what the first has

    Scores have a factor of 1, by which those of unrelated vectors have a standard deviation of about 1.
    """
    q = jnp.stack([_head(kind, length, number) for number in range(heads)], axis=1)[None]
    return Vectors(q, q, normalise(q), scale=1.0)


KINDS = ("even", "skewed", "clusters")


def _head(kind: str, length: int, number: int) -> Float[Array, "T H"]:
    rng = np.random.default_rng([SEED, number])
    centres = rng.standard_normal((CENTRES, HEAD_DIM))
    own = np.random.default_rng([SEED, number, 1]).standard_normal((length, HEAD_DIM))
    if kind == "even":
        common = np.zeros((length, 1))
    elif kind == "skewed":
        common = centres[:1]
    else:
        share = 1 / np.arange(1, CENTRES + 1)
        common = centres[np.random.default_rng([SEED, number, 2]).choice(CENTRES, length, p=share / share.sum())]
    return jnp.asarray(own + common, jnp.float32)


def of_run(run: Path, layer: int | None) -> Callable[..., Vectors]:
    """Returns the queries of a layer of a trained run, over the beginning of its held-out text.

    Args:
        run: a run's folder, or one checkpoint in it.
        layer: its number; None for the one in the middle.

    Returns:
        A function of `length` and `heads`: those of so many tokens and of the first heads.

    Raises:
        SystemExit: if there is no such run, its text cannot be read, its keys are not shared, or it has no such layer;
            of the function, if it has too few tokens or learned positions.
    """
    trained, held_out = load_run(run)
    count = len(trained.model.blocks)
    if not trained.config.model.shared_qk:
        raise SystemExit(f"{run} has keys of its own: coverage is of models with --model.shared-qk")
    if layer is not None and not 0 <= layer < count:
        raise SystemExit(f"{run} has layers 0 to {count - 1}, not {layer}")
    return functools.partial(_of_trained, trained, held_out.tokens, count // 2 if layer is None else layer)


def _of_trained(trained: Trained, text: np.ndarray, layer: int, length: int, heads: int) -> Vectors:
    model, config = trained.model, trained.config
    tokens = text[:length]
    if len(tokens) < length:
        raise SystemExit(f"the held-out text of {trained.checkpoint} has {len(tokens)} tokens, fewer than {length}")

    @jax.jit
    def queries(model, tokens, key):
        x = model.embed(tokens)
        for number, block in enumerate(model.blocks[: layer + 1]):
            if number == layer:
                _, q = block.around(x, lambda x, block=block: (x, block.attention.query(x)))
                return q[:, :, :heads]
            x, _ = block(x, jax.random.fold_in(key, number), None)
        raise AssertionError

    hashed = queries(model, jnp.asarray(tokens[None], jnp.int32), evaluation_key(config.seed))
    attention = model.blocks[layer].attention
    q, k = place(hashed, None, None, attention.rope_base)
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    return Vectors(hashed, q, k, scale, config.model.centred)
