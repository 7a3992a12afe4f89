"""Which tokens each head keeps, by chance or by score, and how scores learn. What is attended then is left to plans."""

import functools
import math
import numbers
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.selection import best
from sparse_flash_jax.validation import FLOAT_DTYPES, at_least, check_array

ScoreGradient = Literal["scaled", "straight_through", "none"]
"""How scores learn: see `score_gate`."""


def random_keep(
    key: PRNGKeyArray,
    shape: tuple[int, int, int],
    rate: float | tuple[float, ...],
    *,
    axis_name: str | None = None,
) -> Bool[Array, "B T N"]:
    """Returns a mask that drops tokens at random, the same number in every head or a number of its own in each.

    Args:
        key: PRNG key.
        shape: (B, T, N).
        rate: share of tokens to drop, in [0, 1]; or a tuple of N, one for each head.
        axis_name: a mapped axis of `pmap` or `shard_map` that divides the batch, of which B is one device's part: each
            device then draws for the whole batch, and what is dropped does not depend on how it is divided.

    Returns:
        bool [B T N] with exactly `math.ceil((1 - rate) * T)` tokens kept for each batch entry and head.

    Raises:
        TypeError: if a rate is not a number.
        ValueError: if the shape has not three axes, a rate lies outside [0, 1], or there is not one for each head.
    """
    if len(shape) != 3:
        raise ValueError(f"shape must be (B, T, N), got {tuple(shape)}.")
    for one in _each(rate):
        if not isinstance(one, numbers.Real):
            raise TypeError(f"rate must be a number, or a tuple of one for each head, got {rate!r}.")
        if not 0 <= one <= 1:
            raise ValueError(f"rate must be in [0, 1], the share of tokens to drop, got {one}.")
    batch, length, heads = shape
    check_by_head("rate", rate, heads)
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    scores = jax.random.uniform(key, (parts * batch, length, heads), jnp.float32)
    if axis_name is not None:
        scores = lax.dynamic_slice_in_dim(scores, lax.axis_index(axis_name) * batch, batch)
    counts = tuple(keep_count(one, length) for one in _each(rate))
    return top_keep(scores, counts if isinstance(rate, tuple) else counts[0])


def keep_count(rate: float, length: int) -> int:
    """Tokens that are kept of so many where a share of them is dropped."""
    return math.ceil((1 - rate) * length)


def top_keep(scores: Float[Array, "B T N"], count: int | tuple[int, ...]) -> Bool[Array, "B T N"]:
    """Returns a mask that keeps the best-scored tokens of each head; of equal scores the earlier wins.

    Args:
        scores: float [B T N]. No gradient flows through the choice: they learn by `score_gate`. NaN counts as the
            lowest score.
        count: tokens to keep for each batch entry and head; a static int, or a tuple of N, one for each head.

    Returns:
        bool [B T N] with exactly `count` tokens kept for each batch entry and head.

    Raises:
        TypeError: if scores are not float, or a count is not an int.
        ValueError: if scores have not three axes, a count is not in [0, T], or there is not one for each head.
    """
    check_array("scores", scores, "B T N", FLOAT_DTYPES)
    for one in _each(count):
        at_least("count", one, 0)
        if one > scores.shape[1]:
            raise ValueError(f"count must be at most the length T={scores.shape[1]}, got {one}.")
    check_by_head("count", count, scores.shape[2])
    by_head = jnp.swapaxes(lax.stop_gradient(scores), 1, 2)
    return jnp.swapaxes(best(by_head, count), 1, 2)


def score_gate(
    x: Float[Array, "B T N H"], scores: Float[Array, "B T N"], gradient: ScoreGradient = "scaled"
) -> Float[Array, "B T N H"]:
    """Puts scores that chose tokens on the way of the gradient: a gate on values of keys, and on outputs of queries.

        scaled            x * g                              g = sigmoid(scores)
        straight_through  x * (1 + g - stop_gradient(g))     which is x, to the bit, with a gradient for the scores
        none              x                                  scores have no gradient, and stay as they are

    Where a token was dropped, its output and the gradient of its value are 0, so that its score gets a gradient of 0: a
    score learns while its token is kept, and the bound between kept and dropped moves by those alone.

    Args:
        x: float [B T N H], values before attention, or outputs after it.
        scores: float [B T N], as `top_keep` was given them.
        gradient: which of the three. The first is the gradient of what is computed, given the choice; the second leaves
            what is computed as it is without learning, and its gradient is an estimate.

    Returns:
        [B T N H] in the dtype of x; gates and their gradients are float32 in between.

    Raises:
        TypeError: if x or scores are not float.
        ValueError: if shapes do not fit, or the gradient is none of the three.

    Source: for scaled "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models", arXiv
    2404.02258, in which a router's weight multiplies what kept tokens become; for straight-through "Estimating or
    Propagating Gradients Through Stochastic Neurons for Conditional Computation", arXiv 1308.3432.
    """
    check_score_gradient(gradient)
    check_array("x", x, "B T N H", FLOAT_DTYPES)
    check_array("scores", scores, "B T N", FLOAT_DTYPES)
    if scores.shape != x.shape[:3]:
        raise ValueError(f"scores must have the shape {x.shape[:3]} of x without its last axis, got {scores.shape}.")
    return x if gradient == "none" else _gate(gradient == "scaled", *vary_alike((x, scores)))


def check_score_gradient(gradient: str) -> None:
    """Raises ValueError unless `score_gate` knows this gradient."""
    if gradient not in get_args(ScoreGradient):
        raise ValueError(f"the gradient of scores must be one of {get_args(ScoreGradient)}, got {gradient!r}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(scaled: bool, x: Float[Array, "B T N H"], scores: Float[Array, "B T N"]) -> Float[Array, "B T N H"]:
    """A rule of its own keeps no float32 copy of x, and sums the scores' gradient over features in float32."""
    if not scaled:
        return x
    return (x.astype(jnp.float32) * _sigmoid(scores)[..., None]).astype(x.dtype)


def _gate_forward(scaled, x, scores):
    return _gate(scaled, x, scores), (x, scores)


def _gate_backward(scaled, residuals, cotangent):
    x, scores = residuals
    gate = _sigmoid(scores)
    of_gate = jnp.sum(cotangent.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)
    return _gate(scaled, cotangent, scores), (of_gate * gate * (1 - gate)).astype(scores.dtype)


_gate.defvjp(_gate_forward, _gate_backward)


def _sigmoid(scores: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    return jax.nn.sigmoid(scores.astype(jnp.float32))


def _each[Number](by_head: Number | tuple[Number, ...]) -> tuple[Number, ...]:
    return by_head if isinstance(by_head, tuple) else (by_head,)


def check_by_head(name: str, by_head: Any, heads: int) -> None:
    """Raises ValueError where there is a tuple, and not of one number for each head."""
    if isinstance(by_head, tuple) and len(by_head) != heads:
        raise ValueError(f"{name} must be one number, or one for each of {heads} heads, got {len(by_head)}.")
