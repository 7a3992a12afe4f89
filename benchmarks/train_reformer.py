"""Train the project's language model with Reformer's attention: settings, data, schedule and files of `train.py`.

python benchmarks/train_reformer.py paper-8k --data enwik8 --length 4096 --model.rounds 4
python benchmarks/train_reformer.py --chunk 64 --attention hash --model.shared-qk

Layers of kind `hash` attend by `reformer.py` in place of this package: `--buckets`, `--centred` and `--model.rounds`
mean the same, keys are shared (`--model.shared-qk`), and a token that sees no other sees itself. Other layers stay, and
so do parameters and how they are drawn: a run of `train.py` with the same settings is the exact counterpart. In the
metrics `visible` counts what chunks show of a bucket, not all that they compute.

`--chunk` is the size of a chunk; without it, twice the mean bucket, 2 T / buckets. Checkpoints go on with the same
`--chunk` alone; `train.py` and `models/generate.py` refuse them.
"""

import argparse
import dataclasses
import sys
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32
from reformer import chunk_size, hash_rounds, reformer_attention, shown_pairs
from selection import Shape as Shape  # which finds the packages beside this folder

import train
from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax.flax.heads import place
from sparse_flash_jax.flax.nnx import SparseSelfAttention
from sparse_flash_jax.flax.pattern import Hash
from sparse_flash_jax.plan import causal_pairs
from training.errors import ConfigError


def main() -> int:
    """Trains; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--chunk", type=int)
    args, settings = parser.parse_known_args()
    if {"-h", "--help"} & {*settings}:
        print(f"{__doc__}\nThe settings of train.py:\n")
    elif args.chunk is not None and args.chunk < 1:
        parser.error(f"--chunk must be at least 1, got {args.chunk}")
    return train.main(settings, Reformer(args.chunk))


@dataclasses.dataclass(frozen=True)
class Reformer:
    """Models whose layers that hash do so as Reformer does.

    Args:
        chunk: tokens of a chunk; None for twice the mean bucket.
    """

    chunk: int | None = None

    def __call__(self, config: TransformerConfig) -> nnx.GraphDef:
        """Returns the structure of such a model; parameters are those of `Transformer(config)`.

        Raises:
            ConfigError: if no layer hashes, keys are not shared, or sequences are divided over devices.
        """
        if not any(isinstance(pattern, Hash) for pattern in config.patterns):
            raise ConfigError("Reformer's attention takes the place of --attention hash, and no layer is of that kind")
        if not config.shared_qk:
            raise ConfigError("Reformer's attention shares queries and keys: add --model.shared-qk")
        if any(isinstance(pattern, Hash) and pattern.rotated for pattern in config.patterns):
            raise ConfigError("Reformer's attention hashes by content alone; leave out --model.rotated")
        if config.context is not None:
            raise ConfigError("Reformer's attention takes whole sequences; leave context out of --mesh")
        model: Any = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))  # its layers are exchanged
        for block in model.blocks:
            if isinstance(block.attention.pattern, Hash):
                block.attention = ReformerSelfAttention(block.attention, self.chunk)
        return nnx.graphdef(model)


class Shown(NamedTuple):
    """What a layer's rounds showed, as far as metrics ask."""

    pairs: Float32[Array, "B N"]
    length: int
    query_overflow: Int32[Array, ""]
    key_overflow: Int32[Array, ""]

    def density(self) -> Float32[Array, ""]:
        """Returns the sum over rounds of shown pairs, over those of dense causal attention."""
        return jnp.mean(self.pairs) / jnp.float32(causal_pairs(self.length, self.length))


class ReformerSelfAttention(nnx.Module):
    """A layer's projections around Reformer's attention.

    Args:
        layer: whose projections, pattern, rotary positions and scale these are.
        chunk: as of `Reformer`.
    """

    def __init__(self, layer: SparseSelfAttention, chunk: int | None):
        self.query, self.value, self.out = layer.query, layer.value, layer.out
        self.pattern, self.rope_base, self.scale = layer.pattern, layer.rope_base, layer.scale
        self.chunk = chunk

    def __call__(self, x: jax.Array, *, key: Any, segment_ids: Any, return_plan: bool) -> tuple[jax.Array, Shown]:
        """Attends, as `SparseSelfAttention` does: buckets go by content, before rotary positions."""
        if segment_ids is not None:
            raise ConfigError(
                "Reformer's attention keeps no documents apart; leave out --data.separate-documents and --data.packing"
            )
        pattern, length = self.pattern, x.shape[1]
        assert isinstance(pattern, Hash)
        chunk = chunk_size(length, pattern.num_buckets) if self.chunk is None else min(self.chunk, length)
        q, v = self.query(x), self.value(x)
        buckets = hash_rounds(q, pattern.num_buckets, key, pattern.rounds, centred=pattern.centred)
        q, k = place(q, None, None, self.rope_base)
        o = reformer_attention(q, k, v, buckets, chunk=chunk, scale=self.scale)
        none = jnp.zeros((), jnp.int32)
        return self.out(o), Shown(shown_pairs(buckets, chunk), length, none, none)

    def init_cache(self, *_: Any, **__: Any) -> NoReturn:
        """Raises NotImplementedError: a cache would have to sort anew with each token."""
        raise NotImplementedError("Reformer's attention has no cache.")


if __name__ == "__main__":
    sys.exit(main())
