"""From projected heads to attended heads: shared keys, rotary positions, the plan, gates.

Both Flax modules call `attend`; they differ in how parameters are held, and in nothing of what is computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.attention import sparse_attention
from sparse_flash_jax.context.attention import context_attention
from sparse_flash_jax.context.divided_plan import DividedPlan
from sparse_flash_jax.context.division import Context, row_positions
from sparse_flash_jax.flax.auto import Auto, Pattern, resolve
from sparse_flash_jax.flax.pattern import QK, Concrete, Dense, Hash, KeepScores
from sparse_flash_jax.flax.shared_keys import normalise
from sparse_flash_jax.keep import score_gate
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rounds import Rounds, attend_in_rounds


def check_heads(num_heads: int, num_key_heads: int, head_dim: int, shared_qk: bool, rope: bool) -> None:
    """Checks the options of an attention layer.

    Raises:
        ValueError: naming the options that do not fit one another.
    """
    if num_heads % num_key_heads:
        raise ValueError(f"num_key_heads must divide num_heads {num_heads}, got {num_key_heads}.")
    if shared_qk and num_key_heads != num_heads:
        raise ValueError(
            f"shared_qk makes each head's keys out of its own queries, so num_key_heads must be num_heads {num_heads}, "
            f"got {num_key_heads}."
        )
    if rope and head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of features, so head_dim must be even, got {head_dim}.")


def attend(
    pattern: Pattern,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | None,
    v: Float[Array, "B S K H"],
    *,
    key: PRNGKeyArray | None = None,
    positions: Int32[Array, "#B T"] | None = None,
    rope_base: float | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    scores: KeepScores | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    context: Context | None = None,
) -> tuple[Float[Array, "B T N H"], AttentionPlan | Rounds | DividedPlan]:
    """Attention of projected heads under a pattern.

    The plan is made before rotary positions are applied, so that buckets go by content, but for `Hash(rotated=True)`.
    Where tokens are kept by learned scores, their outputs and values pass through gates, by which the scores learn: see
    `score_gate`. A pattern that is not scored, such as the dense one that `Auto` may choose, has no gates.

    Args:
        pattern: what is visible.
        q: queries [B T N H].
        k: keys [B S K H]; None makes them of the queries, each normalised to length 1. S is T where there are
            rotary positions, segments or scores.
        v: values [B S K H].
        key: PRNG key of hashing or dropping.
        positions: int32 [B|1 T], for rotary positions; default 0..T-1, or those of the rows where they are divided.
        rope_base: largest wavelength of rotary positions; None for none.
        segment_ids: int32 [B T], documents.
        scores: of queries and keys, for `QK(scored=True)`; others leave them alone.
        scale: of the scores; default 1 / sqrt(H).
        implementation: as of `sparse_attention`.
        context: how sequences are divided over devices, and rows with them; None for whole ones.

    Returns:
        The heads' outputs [B T N H] and the plan.
    """
    automatic = isinstance(pattern, Auto)
    pattern = resolve(pattern, q, segment_ids, implementation)
    ids = {"key": key, "segment_ids": segment_ids, "scores": scores, "implementation": implementation}
    options = {"scale": scale, "implementation": implementation}
    gradient = pattern.score_gradient if isinstance(pattern, QK) and pattern.scored else "none"
    gated = v if scores is None else score_gate(v, scores.key, gradient)
    if context is None:
        plan = pattern.plan(*planned_by(pattern, q, k, positions, rope_base), **ids)
        q, k = place(q, k, positions, rope_base)
        o = attend_planned(pattern, q, k, gated, plan, segment_ids=segment_ids, **options)
    else:
        if automatic and isinstance(pattern, Dense):
            pattern = dataclasses.replace(pattern, backend=None)
        positions = row_positions(q, context) if positions is None else positions
        tokens = pattern.tokens(*planned_by(pattern, q, k, positions, rope_base), context, **ids)
        q, k = place(q, k, positions, rope_base)
        o, plan = context_attention(q, k, gated, tokens, context, return_plan=True, **options)
    return (o if scores is None else score_gate(o, scores.query, gradient)), plan


def planned_by(
    pattern: Pattern,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | None,
    positions: Int32[Array, "#B T"] | None,
    rope_base: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
    """Queries and keys as a pattern plans by them, before rotary positions or after; shared keys are the queries.

    Raises:
        ValueError: if a hash is to be of rotated vectors, and there are no rotary positions.
    """
    if not (isinstance(pattern, Hash) and pattern.rotated):
        return q, q if k is None else k
    if rope_base is None:
        raise ValueError(f"{pattern} hashes by rotary positions, and the layer has none: give it a rope_base.")
    turned = _turned(q, positions, rope_base)
    return turned, turned if k is None else _turned(k, positions, rope_base)


def place(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | None,
    positions: Int32[Array, "#B T"] | None,
    rope_base: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
    """Queries and keys as their products are taken: shared ones normalised, both rotated; arguments as of `attend`."""
    k = normalise(q) if k is None else k
    return (q, k) if rope_base is None else (_turned(q, positions, rope_base), _turned(k, positions, rope_base))


def attend_planned(
    pattern: Concrete,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: AttentionPlan | Rounds,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention under a plan that the pattern made, by the backend that a dense one names."""
    if isinstance(pattern, Dense) and pattern.backend is not None:
        return _jax_attention(pattern, q, k, v, segment_ids, scale)
    if isinstance(plan, Rounds):
        return attend_in_rounds(q, k, v, plan, scale=scale, implementation=implementation)[0]
    return sparse_attention(q, k, v, plan, scale=scale, implementation=implementation)


def _turned(x: Float[Array, "B T N H"], positions: Int32[Array, "#B T"] | None, base: float) -> Float[Array, "B T N H"]:
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
    return rotate(x, positions, base)


def rotate(x: Float[Array, "B T N H"], positions: Int32[Array, "#B T"], base: float) -> Float[Array, "B T N H"]:
    """Rotary positions: feature i and feature i + H/2 turn by position * base^(-2i/H), in float32.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _jax_attention(pattern: Dense, q, k, v, segment_ids, scale):
    if segment_ids is not None:
        raise ValueError(f"backend {pattern.backend!r} takes no segment_ids; leave out the backend to use them.")
    window = None if pattern.window is None else (pattern.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, local_window_size=window, implementation=pattern.backend
    )
