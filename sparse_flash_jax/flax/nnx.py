"""Flax NNX: a self-attention module, and an `attention_fn` for `nnx.MultiHeadAttention`."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.context.divided_plan import DividedPlan
from sparse_flash_jax.context.division import Context
from sparse_flash_jax.flax.adapter import attention_fn
from sparse_flash_jax.flax.auto import Auto, Pattern, is_scored
from sparse_flash_jax.flax.cache import LayerCache, concrete, empty_cache
from sparse_flash_jax.flax.decode import prefill, step
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

_default_init = nnx.initializers.lecun_normal()


class SparseSelfAttention(nnx.Module):
    """Causal multi-head self-attention under a pattern.

    Args:
        in_features: size of the inputs and outputs, D.
        num_heads: query heads, N.
        pattern: what a token sees: `Dense`, `Window`, `Hash`, `QK`, `BlockTopK`, or `Auto` to let the shapes decide.
        head_dim: H; default in_features / num_heads.
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
        rngs: for the parameters.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        pattern: Pattern,
        *,
        head_dim: int | None = None,
        num_key_heads: int | None = None,
        shared_qk: bool = False,
        rope_base: float | None = None,
        scale: float | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Array] = _default_init,
        out_kernel_init: Callable[..., Array] | None = None,
        implementation: str | None = None,
        context: Context | None = None,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and in_features % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide in_features {in_features}, or give head_dim.")
        head_dim = in_features // num_heads if head_dim is None else head_dim
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        check_heads(num_heads, num_key_heads, head_dim, shared_qk, rope_base is not None)
        self.pattern = pattern
        self.num_heads, self.num_key_heads, self.head_dim = num_heads, num_key_heads, head_dim
        self.dtype, self.param_dtype = dtype, param_dtype
        self.rope_base = rope_base
        self.scale = scale
        self.implementation = implementation
        self.context = context

        def projection(out_features: tuple[int, ...] | int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features,
                out_features,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.query = projection((num_heads, head_dim))
        self.key = nnx.data(None if shared_qk else projection((num_key_heads, head_dim)))
        self.value = projection((num_key_heads, head_dim))
        scored = is_scored(pattern)
        self.query_score = nnx.data(projection(num_heads) if scored else None)
        self.key_score = nnx.data(projection(num_key_heads) if scored else None)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            rngs=rngs,
        )

    @overload
    def __call__(
        self,
        x: jax.Array,
        *,
        key: Any = ...,
        positions: Any = ...,
        segment_ids: Any = ...,
        return_plan: Literal[False] = ...,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self, x: jax.Array, *, key: Any = ..., positions: Any = ..., segment_ids: Any = ..., return_plan: Literal[True]
    ) -> tuple[jax.Array, AttentionPlan | Rounds | DividedPlan]: ...

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
        scores = None
        if self.query_score is not None and self.key_score is not None:
            scores = KeepScores(self.query_score(x), self.key_score(x))
        o, plan = attend(
            self.pattern,
            *self._heads(x),
            key=key,
            positions=positions,
            rope_base=self.rope_base,
            segment_ids=segment_ids,
            scores=scores,
            scale=self.scale,
            implementation=self.implementation,
            context=self.context,
        )
        out = self.out(o)
        return (out, plan) if return_plan else out

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        key: PRNGKeyArray | None = None,
        documents: bool = False,
        dtype: Any = None,
    ) -> LayerCache:
        """An empty cache with which `prefill`, then `step`, give what one call over the whole sequence gives.

        Args:
            batch: rows, B.
            length: most tokens of a row. Random drops are those of a call with this many.
            key: PRNG key of hashing or random dropping, as of that call.
            documents: whether tokens see only their own document.
            dtype: of the heads; default that of the layer, else that of its parameters.

        Raises:
            NotImplementedError: if the pattern looks ahead, `QK(scored=True)` and `BlockTopK`, or hashes in rounds.
            ValueError: if the pattern is `Auto`, a key is missing, or centred buckets are to be in documents.
        """
        dtype = dtype or self.dtype or self.param_dtype
        return empty_cache(
            self.pattern,
            batch=batch,
            length=length,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            head_dim=self.head_dim,
            dtype=jnp.dtype(dtype),
            shared_qk=self.key is None,
            documents=documents,
            key=key,
        )

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        lengths: Int32[Array, " B"],
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The first tokens, of which each row has its own number, `lengths` [B]; the rest is not remembered.

        Args:
            x: inputs [B T D].
            cache: an empty one.
            lengths: int32 [B], from 1 to T.
            segment_ids: int32 [B T]; tokens see only their own document.

        Returns:
            Outputs [B T D], and the filled cache.
        """
        o, cache = prefill(
            concrete(self.pattern),
            *self._heads(x),
            cache,
            lengths=lengths,
            rope_base=self.rope_base,
            segment_ids=segment_ids,
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.out(o), cache

    def step(
        self,
        x: Float[Array, "B 1 D"],
        cache: LayerCache,
        *,
        positions: Int32[Array, " B"],
        segment_ids: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """The next token of each row.

        Args:
            x: its input [B 1 D].
            cache: of the tokens before it.
            positions: int32 [B], how many those are.
            segment_ids: int32 [B], its document.

        Returns:
            Its output [B 1 D], and the cache with it.
        """
        o, cache = step(
            concrete(self.pattern),
            *self._heads(x),
            cache,
            positions=positions,
            rope_base=self.rope_base,
            segment_ids=segment_ids,
            scale=self.scale,
        )
        return self.out(o), cache

    def _heads(self, x):
        """Queries, keys unless they are shared, and values."""
        return self.query(x), None if self.key is None else self.key(x), self.value(x)
