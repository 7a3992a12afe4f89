"""Refusing settings that cannot work, before any work is done."""

import math

from sparse_flash_jax.flax.heads import check_heads
from sparse_flash_jax.kernels.implementations import check_block_sizes, check_implementation
from sparse_flash_jax.kernels.tiles import BlockSizes
from training.config import DataConfig, ModelConfig, TrainConfig
from training.errors import ConfigError
from training.hugging_face import PREFIX


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: naming the setting, its value and what is expected.
    """
    _check_numbers(config)
    sample, length = config.sample, config.batch.length
    if sample.tokens and sample.prompt + sample.tokens > length:
        raise ConfigError(
            f"--sample.prompt {sample.prompt} and --sample.tokens {sample.tokens} must fit into --batch.length {length}"
        )
    longest = max(config.evaluation.lengths, default=0)
    if config.model.positions == "learned" and longest > length:
        raise ConfigError(
            f"--evaluation.lengths {longest} is beyond the {length} learned positions of --batch.length; leave it out,"
            " or take --model.positions rope"
        )
    defaults = DataConfig()
    for name in ("configuration", "split", "field", "streaming"):
        given = getattr(config.data, name) != getattr(defaults, name)
        if given and not config.data.source.startswith(PREFIX):
            raise ConfigError(f"--data.{name} needs a Hugging Face data set, --data {PREFIX}NAME_OR_PATH")
    _check_single_documents(config)
    _check_heads(config.model)
    _check_attention(config.model, config.data.documents_apart)
    _check_blocks(config)


def _check_numbers(config: TrainConfig) -> None:
    model, batch, optimizer = config.model, config.batch, config.optimizer
    at_least_one = {
        "--steps": config.steps,
        "--log-every": config.log_every,
        "--optimizer.max-skipped": optimizer.max_skipped,
        "--model.layers": model.layers,
        "--model.width": model.width,
        "--model.heads": model.heads,
        "--model.key-heads": model.key_heads,
        "--model.mlp-ratio": model.mlp_ratio,
        "--model.window": model.window,
        "--model.near": model.near,
        "--model.block-size": model.block_size,
        "--model.block-count": model.block_count,
        "--evaluation.lengths": min(config.evaluation.lengths, default=None),
        "--batch.length": batch.length,
        "--batch.size": batch.size,
        "--batch.accumulation": batch.accumulation,
        "--sample.prompt": config.sample.prompt,
        "--checkpoint.keep": config.checkpoint.keep,
    }
    above_zero = {
        "--learning-rate": optimizer.learning_rate,
        "--optimizer.clip-norm": optimizer.clip_norm,
        "--data.max-megabytes": config.data.max_megabytes,
    }
    not_negative = {
        "--seed": config.seed,
        "--max-minutes": config.max_minutes,
        "--evaluation.every": config.evaluation.every,
        "--evaluation.windows": config.evaluation.windows,
        "--evaluation.final-windows": config.evaluation.final_windows,
        "--checkpoint.every": config.checkpoint.every,
        "--sample.tokens": config.sample.tokens,
        "--sample.temperature": config.sample.temperature,
        "--model.rate": model.rate,
        "--model.sinks": model.sinks,
        "--optimizer.weight-decay": optimizer.weight_decay,
        "--optimizer.final": optimizer.final,
    }
    below_one = {"--optimizer.beta1": optimizer.beta1, "--optimizer.beta2": optimizer.beta2}
    rules = (
        (at_least_one, lambda value: value >= 1, "be at least 1"),
        (above_zero, lambda value: 0 < value < math.inf, "be above 0"),
        (not_negative, lambda value: 0 <= value < math.inf, "not be negative"),
        (below_one, lambda value: 0 <= value < 1, "lie in [0, 1)"),
        ({"--optimizer.ema": optimizer.ema}, lambda value: 0 < value < 1, "lie between 0 and 1"),
        ({"--model.auto-density": model.auto_density}, lambda value: 0 < value <= 1, "lie in (0, 1]"),
        ({"--optimizer.warmup": optimizer.warmup}, lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    )
    for values, holds, expected in rules:
        for name, value in values.items():
            if value is not None and not holds(value):
                raise ConfigError(f"{name} must {expected}, got {value}")


def _check_single_documents(config: TrainConfig) -> None:
    data = config.data
    if data.images and data.packing != "single":
        raise ConfigError(
            f"--data {data.source}: each image is a sequence; take the preset mnist, or --data.packing single and as"
            f" --length an image's pixels, got --data.packing {data.packing}"
        )
    if data.images and data.tokenizer != "bytes":
        raise ConfigError(f"--data {data.source} is pixels, and no text for --tokenizer {data.tokenizer}; leave it out")
    if data.packing == "single" and data.separate_documents:
        raise ConfigError("--data.separate-documents: --data.packing single has one document a sequence; leave it out")
    if data.packing == "single" and config.evaluation.lengths:
        raise ConfigError("--evaluation.lengths: --data.packing single has sequences of one length; leave it out")


def _check_heads(model: ModelConfig) -> None:
    if model.width % model.heads:
        raise ConfigError(f"--model.width {model.width} is not a multiple of --model.heads {model.heads}")
    key_heads = model.heads if model.key_heads is None else model.key_heads
    rope = model.positions == "rope"
    try:
        check_heads(model.heads, key_heads, model.width // model.heads, model.shared_qk, rope)
    except ValueError as error:
        raise ConfigError(
            f"--model.heads {model.heads}, --model.key-heads {key_heads}, --model.width {model.width}: {error}"
        ) from error


def _check_attention(model: ModelConfig, documents_apart: bool) -> None:
    if len(model.attention) not in (1, model.layers):
        raise ConfigError(
            f"--model.attention takes one kind or one for each of the {model.layers} layers, got {len(model.attention)}"
        )
    for kind in ("local", "window"):
        if kind in model.attention and model.window is None:
            raise ConfigError(f"--model.attention {kind} needs --model.window")
    kinds = {*model.attention, *([model.auto_sparse] if "auto" in model.attention else [])}
    if "qk" in kinds and model.rate >= 1:
        raise ConfigError(f"--model.rate must be below 1, got {model.rate}")
    if model.rates and len(model.rates) != model.heads:
        raise ConfigError(f"--model.rates takes one for each of the {model.heads} heads, got {len(model.rates)}")
    if not all(0 <= rate < 1 for rate in model.rates):
        raise ConfigError(f"--model.rates must lie in [0, 1), got {' '.join(map(str, model.rates))}")
    if "hash" in kinds and (model.buckets < 2 or model.buckets % 2):
        raise ConfigError(f"--model.buckets must be even and at least 2, got {model.buckets}")
    if "hash" in kinds and model.rounds < 1:
        raise ConfigError(f"--model.rounds must be at least 1, got {model.rounds}")
    if "hash" in kinds and model.rotated and model.positions != "rope":
        raise ConfigError(f"--model.rotated needs --model.positions rope, got {model.positions}")
    if "auto" in model.attention and model.auto_sparse == "hash" and (model.rounds > 1 or model.near is not None):
        raise ConfigError("--model.rounds, --model.near: nothing was measured; leave them out, or --attention auto")
    if "hash" in kinds and model.centred and documents_apart:
        raise ConfigError(
            "--model.centred centres across documents; leave it out, or leave out --data.separate-documents and"
            " --data.packing documents"
        )
    if "dense" in model.attention and model.dense_backend != "sparse_flash" and documents_apart:
        raise ConfigError(
            f"--model.dense-backend {model.dense_backend} cannot keep documents apart; leave it out, or leave out"
            " --data.separate-documents and --data.packing documents"
        )
    if model.param_dtype != "float32" and model.dtype != model.param_dtype:
        raise ConfigError(
            f"--model.param-dtype {model.param_dtype} needs --model.dtype {model.param_dtype}, got {model.dtype}"
        )
    try:
        check_implementation(model.implementation, model.dtype, model.width // model.heads)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"--model.implementation {model.implementation}: {error}") from error


def _check_blocks(config: TrainConfig) -> None:
    model, size = config.model, config.block_size
    if "block_top_k" not in model.attention:
        return
    if model.block_size is not None and size > config.batch.length:
        raise ConfigError(
            f"--model.block-size {size} is more than --batch.length {config.batch.length}: one block sees all; take a"
            " smaller one"
        )
    if model.implementation is not None:
        try:
            check_block_sizes(model.implementation, BlockSizes(size, size))
        except NotImplementedError as error:
            raise ConfigError(f"--model.block-size {size}: {error}") from error
