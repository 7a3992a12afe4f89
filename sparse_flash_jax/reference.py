"""Dense masked softmax attention in float32: the definition of correct, in which no plan has a part."""

import math
from typing import Literal, overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from sparse_flash_jax.validation import check_array, check_attention_inputs, check_logits, check_scale


@overload
def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #N T S"],
    *,
    scale: float | None = ...,
    soft_cap: float | None = ...,
    sink_logits: Float[Array, " N"] | None = ...,
    alibi_slopes: Float[Array, " N"] | None = ...,
    query_offset: int = ...,
    return_residual: Literal[False] = ...,
) -> Float[Array, "B T N H"]: ...
@overload
def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #N T S"],
    *,
    scale: float | None = ...,
    soft_cap: float | None = ...,
    sink_logits: Float[Array, " N"] | None = ...,
    alibi_slopes: Float[Array, " N"] | None = ...,
    query_offset: int = ...,
    return_residual: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]: ...
def reference_attention(
    q,
    k,
    v,
    mask,
    *,
    scale=None,
    soft_cap=None,
    sink_logits=None,
    alibi_slopes=None,
    query_offset=0,
    return_residual=False,
):
    """Returns softmax(scale * q k^T, where mask) v, computed in float32 with T x S scores.

    Args:
        q: float [B T N H].
        k: float [B S K H]; query head n reads key head n // (N / K).
        v: float [B S K H].
        mask: bool [B|1 N|1 T S], True where a query sees a key. A query that sees nothing outputs 0.
        scale: factor on the scores; None for 1 / sqrt(H).
        soft_cap: bound of the scores, which become soft_cap * tanh(score / soft_cap); None for none.
        sink_logits: [N], of each head the score of one more key, whose value is 0 and which all queries see that see
            another; None for none.
        alibi_slopes: [N], of each head what scores, capped or not, lose for each position between query and key, as in
            `sparse_attention`, though differentiable here; None for none.
        query_offset: position of the first query among the keys, for those distances.
        return_residual: whether to also return the log-sum-exp of the visible scores, sink included.

    Returns:
        [B T N H] in q's dtype; with return_residual also lse float32 [B T N], natural log, -inf where nothing is seen.

    Raises:
        TypeError: if q, k, v are not of one float dtype, or the mask is not bool.
        ValueError: if shapes do not fit.
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_logits(soft_cap, sink_logits, alibi_slopes, q)
    check_array("mask", mask, "B N T S", (jnp.bool_,))
    batch, length, heads, head_dim = q.shape
    full = (batch, heads, length, k.shape[1])
    if any(m not in (1, n) for m, n in zip(mask.shape[:2], full[:2], strict=True)) or mask.shape[2:] != full[2:]:
        raise ValueError(f"mask must be [B|1 N|1 T S] = {list(full)}, got shape {mask.shape}.")
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    k, v = (jnp.repeat(x.astype(jnp.float32), heads // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision=lax.Precision.HIGHEST) * scale
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        position = query_offset + jnp.arange(length, dtype=jnp.int32)[:, None]
        distance = jnp.abs(position - jnp.arange(k.shape[1], dtype=jnp.int32)[None]).astype(jnp.float32)
        scores -= alibi_slopes.astype(jnp.float32)[None, :, None, None] * distance[None, None]
    # Every -inf and division by zero is kept out of the differentiated path, not masked after it.
    some = jnp.any(mask, axis=-1, keepdims=True)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf, where=mask)
    top = lax.stop_gradient(jnp.where(some, top, 0.0))
    p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0.0)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sink_logits is not None:
        total += jnp.exp(sink_logits.astype(jnp.float32)[None, :, None, None] - top)
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", p / total, v, precision=lax.Precision.HIGHEST).astype(q.dtype)
    if not return_residual:
        return out
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)[..., 0]
    return out, jnp.swapaxes(lse, 1, 2)
