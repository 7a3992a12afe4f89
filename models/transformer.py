"""The language model: a pre-norm decoder whose layers differ from a dense one in what their attention sees, only.

No biases, GELU MLP, tied embeddings, learned or rotary positions, after "Faster Causal Attention Over Large Sequences
Through Sparse Flash Attention" (arXiv 2306.01160). How it is trained is left to `training/`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from sparse_flash_jax import PLAN_NAME, RESIDUAL_NAMES, Context, to_zigzag
from sparse_flash_jax.flax.auto import Pattern
from sparse_flash_jax.flax.nnx import SparseSelfAttention
from sparse_flash_jax.flax.pattern import Dense, Hash

# Standard deviation of initial embeddings, as in GPT-2.
_INIT_STD = 0.02
# Rotary wavelengths reach well past the longest sequence in use.
_ROPE_BASE = 100_000.0
# Embeddings are padded to a multiple of this, which suits the tensor cores: 50257 becomes 50304.
_VOCAB_MULTIPLE = 64
_PAPER_PATTERN = Hash(16, exclude_self=True)

type Remat = Literal["none", "attention", "full"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model.

    Args:
        vocab_size: number of tokens; the embedding is padded to a multiple of 64.
        num_layers: blocks.
        width: size of the residual stream, D.
        num_heads: query heads, N; head_dim H is width / num_heads.
        num_key_heads: key and value heads, K; default N.
        mlp_ratio: hidden size of the MLP over the width.
        positions: "learned" embeddings or "rope".
        max_length: most tokens of a sequence (learned positions).
        attention: the pattern of all layers, or a tuple of one for each. `Auto` chooses at each length that is run.
        shared_qk: keys are the normalised queries, in every layer.
        shared_scale: factor on the scores where keys are shared; default 1 / sqrt(H). As shared keys have length
            1, a factor of 1.0 starts with scores as large as separate keys have at the default.
        dtype: to compute in; norms, softmax and logits are float32.
        param_dtype: of the parameters, drawn in float32 and rounded to it.
        implementation: kernels of `sparse_attention`.
        remat: what the backward pass computes again of each block: "none", which keeps all; "attention", all but what
            attention gave and the plan it went by; "full", all, so that a block keeps its input only.
        stream: how the residual stream [B T D] lies over devices; None leaves that to XLA.
        context: how sequences are divided over devices; None for whole ones. See `laid_out`.
    """

    vocab_size: int
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_key_heads: int | None = None
    mlp_ratio: int = 4
    positions: Literal["learned", "rope"] = "learned"
    max_length: int = 8192
    attention: Pattern | tuple[Pattern, ...] = _PAPER_PATTERN
    shared_qk: bool = True
    shared_scale: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: str | None = None
    remat: Remat = "none"
    stream: NamedSharding | None = None
    context: Context | None = None

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The pattern of each layer.

        Raises:
            ValueError: if there are not as many patterns as layers.
        """
        patterns = self.attention if isinstance(self.attention, tuple) else (self.attention,) * self.num_layers
        if len(patterns) != self.num_layers:
            raise ValueError(f"attention needs one pattern for each of {self.num_layers} layers, got {len(patterns)}.")
        return patterns

    @property
    def parts(self) -> int:
        """Devices that a sequence is divided over."""
        return 1 if self.context is None or self.context.mesh is None else self.context.mesh.shape[self.context.axis]

    @property
    def batch_parts(self) -> int:
        """What the sequences of a batch are divided into, for as many devices or more."""
        if self.stream is None:
            return 1
        over = self.stream.spec[0] or ()
        return math.prod(self.stream.mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over))

    def laid_out[Rows: jax.Array | None](self, rows: Rows) -> Rows:
        """What belongs to tokens, [B T ...] and in order, in the order of the rows that the model works on."""
        if rows is None or self.context is None or not self.context.zigzag:
            return rows
        return to_zigzag(rows, self.parts)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


class LayerStats(NamedTuple):
    """What each layer's plan saw.

    Attributes:
        visible: visible pairs over those of dense causal attention, float32 [layers].
        overflow: tokens that did not fit into a capacity, int32 [layers].
    """

    visible: Float32[Array, " layers"]
    overflow: Int32[Array, " layers"]


class MLP(nnx.Module):
    """Two projections with a GELU between them."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        hidden = config.mlp_ratio * config.width
        self.up = linear(config.width, hidden, kernel_init=_fan_in_init(1.0))
        self.down = linear(hidden, config.width, kernel_init=_residual_init(config))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to each token."""
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream after a norm."""

    def __init__(self, config: TransformerConfig, pattern: Pattern, *, rngs: nnx.Rngs):
        self.attention_norm = _layer_norm(config, rngs)
        self.attention = SparseSelfAttention(
            config.width,
            config.num_heads,
            pattern,
            num_key_heads=config.num_key_heads,
            shared_qk=config.shared_qk,
            rope_base=_ROPE_BASE if config.positions == "rope" else None,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            scale=config.shared_scale if config.shared_qk else None,
            kernel_init=_fan_in_init(1.0),
            out_kernel_init=_residual_init(config),
            implementation=config.implementation,
            context=config.context,
            rngs=rngs,
        )
        self.mlp_norm = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key: PRNGKeyArray, segment_ids: Int32[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Float32[Array, ""], Int32[Array, ""]]]:
        """Returns the stream after this block, and the share of visible pairs and overflow of its plan."""
        x, plan = self.around(x, lambda x: self.attention(x, key=key, segment_ids=segment_ids, return_plan=True))
        return x, (plan.density(), jnp.sum(plan.query_overflow) + jnp.sum(plan.key_overflow))

    def around[Seen](
        self, x: Float[Array, "B T D"], attention: Callable[[jax.Array], tuple[jax.Array, Seen]]
    ) -> tuple[Float[Array, "B T D"], Seen]:
        """The block with its attention called in one way or another, and what that returns beside its outputs."""
        update, seen = attention(_normed(self.attention_norm, x))
        x = x + update
        return x + self.mlp(_normed(self.mlp_norm, x)), seen


class Transformer(nnx.Module):
    """A causal language model over tokens.

    Args:
        config: its shape.
        rngs: for the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config

        def table(rows: int) -> nnx.Param:
            values = _INIT_STD * jax.random.normal(rngs.params(), (rows, config.width), jnp.float32)
            return nnx.Param(values.astype(config.param_dtype))

        self.embedding = table(config.padded_vocab)
        self.positions = nnx.data(table(config.max_length) if config.positions == "learned" else None)
        self.blocks = nnx.List([Block(config, pattern, rngs=rngs) for pattern in config.patterns])
        self.norm = _layer_norm(config, rngs)

    def hidden(
        self, tokens: Int32[Array, "B T"], *, key: PRNGKeyArray, segment_ids: Int32[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], LayerStats]:
        """The last layer's output, from which `logits` predicts the next token.

        Args:
            tokens: int32 [B T], as `TransformerConfig.laid_out` has them.
            key: PRNG key of hashes and drops; each layer folds in its number.
            segment_ids: int32 [B T], likewise; tokens see only their own document.

        Returns:
            [B T D] in the compute type and the order of the tokens, and what each layer's plan saw.

        Raises:
            ValueError: if the sequence is longer than the learned positions, or cannot be divided as `context` says.
        """
        if self.config.context is not None:
            self.config.context.layout(tokens.shape[1], self.config.parts)  # raises what is said above
        x = self._placed(self.embed(tokens))
        stats = []
        run = _remat(self.config.remat)
        for number, block in enumerate(self.blocks):
            x, seen = run(block, x, jax.random.fold_in(key, number), segment_ids)
            x = self._placed(x)
            stats.append(seen)
        visible, overflow = (jnp.stack(values) for values in zip(*stats, strict=True))
        return self.last(x), LayerStats(visible, overflow)

    def check_length(self, length: int) -> None:
        """Raises ValueError where a sequence is longer than the learned positions."""
        if self.positions is not None and length > self.config.max_length:
            raise ValueError(
                f"at most max_length={self.config.max_length} tokens with learned positions, got {length}."
            )

    def embed(
        self, tokens: Int32[Array, "B T"], positions: Int32[Array, "#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What enters the first block, for tokens as `TransformerConfig.laid_out` has them, or at these positions."""
        x = self.embedding[...][tokens]
        if self.positions is not None:
            if positions is None:
                self.check_length(tokens.shape[1])
                # By slices: gradients of rows that are taken by number are wrong on GPUs and TPUs where they are summed
                # over devices and micro-batches (JAX 0.11.2, openxla/xla#49143).
                x = x + self.config.laid_out(self.positions[...][None, : tokens.shape[1]])
            else:
                x = x + self.positions[...][positions]
        return x.astype(self.config.dtype)

    def last(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What leaves the last block, as `logits` takes it."""
        return _normed(self.norm, x)

    def _placed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Else XLA may divide the stream by its width, as parameters are, and gather it for every product.
        return x if self.config.stream is None else jax.lax.with_sharding_constraint(x, self.config.stream)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float32[Array, "*batch vocab"]:
        """Scores of the next token, float32, from hidden states; the embedding is tied."""
        embedding = self.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)

    def __call__(
        self, tokens: Int32[Array, "B T"], *, key: PRNGKeyArray, segment_ids: Int32[Array, "B T"] | None = None
    ) -> Float32[Array, "B T vocab"]:
        """Scores of each next token: `logits` of `hidden`."""
        return self.logits(self.hidden(tokens, key=key, segment_ids=segment_ids)[0])


_KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES, PLAN_NAME)


def _run_block(block: Block, x, key, segment_ids):
    return block(x, key, segment_ids)


def _remat(remat: Remat) -> Callable[..., Any]:
    """`_run_block`, with what its backward pass computes again."""
    match remat:
        case "none":
            return _run_block
        case "attention":
            return nnx.remat(_run_block, policy=_KEEP_ATTENTION)
        case "full":
            return nnx.remat(_run_block)
    raise ValueError(f"remat must be 'none', 'attention' or 'full', got {remat!r}.")


def _normed(norm: nnx.LayerNorm, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """A norm in float32, whatever the stream is kept in."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _layer_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    param_dtype = jnp.dtype(config.param_dtype)
    return nnx.LayerNorm(config.width, use_bias=False, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)


def _fan_in_init(variance: float):
    """Keeps the variance of its inputs, times a factor, at any width; drawn in float32, whatever it is kept in."""
    draw = nnx.initializers.variance_scaling(variance, "fan_in", "normal")
    return lambda key, shape, dtype: draw(key, shape, jnp.float32).astype(dtype)


def _residual_init(config: TransformerConfig):
    """Smaller with depth, so that the stream's variance does not grow with the number of blocks."""
    return _fan_in_init(1 / (2 * config.num_layers))


def dense_twin(config: TransformerConfig, backend: Literal["xla", "cudnn"] | None = None) -> TransformerConfig:
    """The same model with every layer dense."""
    return dataclasses.replace(config, attention=Dense(backend=backend))
