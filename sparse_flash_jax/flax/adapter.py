"""An `attention_fn` for Flax's own attention layers; both layers pass it the same keywords, and it needs no Flax.

`nnx.MultiHeadAttention` passes every keyword it has, `linen.MultiHeadDotProductAttention` those that the function
names. What cannot be honoured is therefore named here too, so that it is refused and not lost.
"""

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from sparse_flash_jax.flax.auto import Pattern, is_scored
from sparse_flash_jax.flax.heads import attend


def attention_fn(
    pattern: Pattern,
    *,
    key: PRNGKeyArray | None = None,
    shared_qk: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Callable[..., Array]:
    """Makes the `attention_fn` of `nnx.MultiHeadAttention` or `linen.MultiHeadDotProductAttention`.

    The layer is then causal, whatever its own `is_causal`. A PRNG key given here stays the same at every call; for
    fresh hashes or drops, build the function inside the training step: `layer.attention_fn = attention_fn(..., key=k)`.

    Args:
        pattern: what is visible; not `QK(scored=True)`, which needs scores.
        key: PRNG key of hashing or dropping.
        shared_qk: use the normalised queries as keys, and not the layer's own.
        scale: of the scores; default 1 / sqrt(H).
        implementation: as of `sparse_attention`.

    Returns:
        A function of query [... T N H], key and value [... S K H] that gives [... T N H]. It raises ValueError for a
        mask, a bias, dropout, sown weights, or anything else that it cannot honour.

    Raises:
        ValueError: if the pattern does not fit here.
    """
    if is_scored(pattern):
        raise ValueError("attention_fn has no scores to keep tokens by; use SparseSelfAttention for QK(scored=True).")
    rotations = key

    def attention(
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K H"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = True,
        input_positions: Any = None,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*batch T N H"]:
        _refuse(
            bias=bias,
            mask=mask,
            dropout_rate=dropout_rate if dropout_rate and not deterministic else None,
            precision=precision,
            module=module,
            input_positions=input_positions,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        batch = query.shape[:-3]
        q, k, v = (
            (x if dtype is None else x.astype(dtype)).reshape(math.prod(batch), *x.shape[-3:])
            for x in (query, key, value)
        )
        if shared_qk and k.shape != q.shape:
            raise ValueError(f"shared_qk needs keys of the queries' shape {q.shape}, got {k.shape}.")
        keys = None if shared_qk else k
        o, _ = attend(pattern, q, keys, v, key=rotations, scale=scale, implementation=implementation)
        return o.reshape(query.shape)

    return attention


_REMEDY = {
    "mask": "describe what is visible by the pattern (segment_ids of SparseSelfAttention for packed documents)",
    "bias": "sparse_attention adds none; use rotary or learned positions",
    "dropout_rate": "drop tokens with QK(rate), or put dropout after the layer",
    "precision": "leave precision out; the kernels accumulate in float32",
    "module": "attention weights are never formed, so they cannot be sown",
    "input_positions": "use SparseSelfAttention(rope_base=...)",
}


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            remedy = _REMEDY.get(name, "leave it out")
            raise ValueError(f"sparse attention_fn cannot honour {name}: {remedy}.")
