"""Flax Linen: a self-attention module, and an `attention_fn` for `linen.MultiHeadDotProductAttention`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.divided_plan import DividedPlan
from sparse_flash_jax.context.division import Context
from sparse_flash_jax.flax.adapter import attention_fn
from sparse_flash_jax.flax.auto import Auto, Pattern, is_scored
from sparse_flash_jax.flax.heads import attend, check_heads
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Dense, Hash, KeepScores, Window
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rounds import Rounds

__all__ = [
    "QK",
    "Auto",
    "BlockTopK",
    "Dense",
    "Hash",
    "Pattern",
    "SparseSelfAttention",
    "Window",
    "attention_fn",
]


class SparseSelfAttention(linen.Module):
    """Causal multi-head self-attention under a pattern.

    Args:
        num_heads: query heads, N.
        pattern: what a token sees: `Dense`, `Window`, `Hash`, `QK`, `BlockTopK`, or `Auto` to let the shapes decide.
        head_dim: H; default the size of the inputs / num_heads.
        num_key_heads: K, which divides N; default N.
        shared_qk: project no keys; they are the queries, normalised per head.
        rope_base: largest wavelength of rotary positions; None for none.
        scale: of the scores; default 1 / sqrt(H).
        use_bias: whether the projections have biases.
        dtype: to compute in; None promotes inputs and parameters.
        param_dtype: of the parameters.
        kernel_init: of the projections into heads.
        out_kernel_init: of the projection out of them; default kernel_init.
        implementation: as of `sparse_attention`.
        context: how sequences are divided over devices; inputs then are laid out as it says. None for whole ones.
    """

    num_heads: int
    pattern: Pattern
    head_dim: int | None = None
    num_key_heads: int | None = None
    shared_qk: bool = False
    rope_base: float | None = None
    scale: float | None = None
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = linen.initializers.lecun_normal()
    out_kernel_init: Callable[..., Array] | None = None
    implementation: str | None = None
    context: Context | None = None

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        return_plan: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], AttentionPlan | Rounds | DividedPlan]:
        """Attends within a sequence.

        Args:
            x: inputs [B T D].
            key: PRNG key of hashing or random dropping; fresh for each layer and step, fixed in evaluation.
            positions: int32 [B|1 T] for rotary positions; default 0..T-1.
            segment_ids: int32 [B T]; tokens see only their own document.
            return_plan: whether to return the plan too.

        Returns:
            Outputs [B T D], and the plan if asked for; of a divided sequence what can be told of it.
        """
        features = x.shape[-1]
        if self.head_dim is None and features % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide the input size {features}, or give head_dim.")
        head_dim = features // self.num_heads if self.head_dim is None else self.head_dim
        key_heads = self.num_heads if self.num_key_heads is None else self.num_key_heads
        check_heads(self.num_heads, key_heads, head_dim, self.shared_qk, self.rope_base is not None)
        q = self._projection((self.num_heads, head_dim), "query")(x)
        k = None if self.shared_qk else self._projection((key_heads, head_dim), "key")(x)
        v = self._projection((key_heads, head_dim), "value")(x)
        scores = None
        if is_scored(self.pattern):
            query_score = self._projection(self.num_heads, "query_score")(x)
            scores = KeepScores(query_score, self._projection(key_heads, "key_score")(x))
        o, plan = attend(
            self.pattern,
            q,
            k,
            v,
            key=key,
            positions=positions,
            rope_base=self.rope_base,
            segment_ids=segment_ids,
            scores=scores,
            scale=self.scale,
            implementation=self.implementation,
            context=self.context,
        )
        out = self._projection(features, "out", axis=(-2, -1), kernel_init=self.out_kernel_init)(o)
        return (out, plan) if return_plan else out

    def _projection(
        self, features: tuple[int, ...] | int, name: str, *, axis: tuple[int, ...] | int = -1, kernel_init: Any = None
    ) -> linen.DenseGeneral:
        return linen.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init if kernel_init is None else kernel_init,
            name=name,
        )
