"""The model that the settings describe."""

from typing import Any, Literal

from models.transformer import TransformerConfig
from sparse_flash_jax.flax.auto import Auto, AutoChoice, Pattern
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Dense, Hash, Window
from training.config import Kind, ModelConfig, TrainConfig, identity


def layer_pattern(config: TrainConfig, kind: Kind) -> Pattern:
    """The attention pattern of a layer of this kind."""
    model = config.model
    match kind:
        case "dense":
            return Dense(backend=None if model.dense_backend == "sparse_flash" else model.dense_backend)
        case "local":
            return Dense(window=model.window)
        case "window":
            assert model.window is not None
            return Window(model.window, model.sinks)
        case "block_top_k":
            return BlockTopK(config.block_size, model.block_count)
        case "hash" | "qk":
            return _sparse_pattern(model, kind)
        case "auto":
            return automatic_choice(config).pattern


def automatic_choice(config: TrainConfig) -> AutoChoice:
    """What the layers of kind "auto" are: chosen once, so that evaluation and sampling see what training sees."""
    model = config.model
    return Auto(_sparse_pattern(model, model.auto_sparse), model.auto_density).choose(
        config.batch.length,
        dtype=model.dtype,
        head_dim=model.width // model.heads,
        documents=config.data.documents_apart,
        implementation=model.implementation,
    )


def resolved_identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result, and the kind that "auto" is here: on another device it may be another."""
    if "auto" not in config.model.attention:
        return identity(config)
    dense = isinstance(automatic_choice(config).pattern, Dense)
    return identity(config) | {"auto": "dense" if dense else config.model.auto_sparse}


def _sparse_pattern(model: ModelConfig, kind: Literal["hash", "qk"]) -> Hash | QK:
    if kind == "hash":
        return Hash(
            model.buckets,
            exclude_self=model.exclude_self,
            centred=model.centred,
            rounds=model.rounds,
            rotated=model.rotated,
            near=model.near,
        )
    return QK(model.rates or model.rate, scored=model.scored, score_gradient=model.score_gradient)


def transformer_config(config: TrainConfig, vocab_size: int) -> TransformerConfig:
    """The model's own configuration out of the run's settings."""
    model = config.model
    kinds = model.attention * model.layers if len(model.attention) == 1 else model.attention
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=model.layers,
        width=model.width,
        num_heads=model.heads,
        num_key_heads=model.key_heads,
        mlp_ratio=model.mlp_ratio,
        positions=model.positions,
        max_length=config.batch.length,
        attention=tuple(layer_pattern(config, kind) for kind in kinds),
        shared_qk=model.shared_qk,
        shared_scale=model.shared_scale,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        implementation=model.implementation,
        remat=model.remat,
    )
