"""The training steps that are compared: one model and one run, told apart by attention alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from passes import mha_attention, mha_calls
from selection import Case, Shape, causal
from timing import measure

from models.transformer import TransformerConfig
from sparse_flash_jax.flax.nnx import SparseSelfAttention
from sparse_flash_jax.flax.shared_keys import normalise
from sparse_flash_jax.patterns import causal as causal_plan
from training.config import BatchConfig, TrainConfig
from training.presets import PRESETS

KINDS = ("none", "dense", "causal", "mha", "hash", "centred")  # what others are compared with comes first
HASHED = ("hash", "centred")
VOCABULARY = 50_304
BUCKETS, LONG_BUCKETS, LONG = 16, 64, 65_536  # 64 buckets from this length on
MHA_BACKWARD_SIDES = (32, 64, 128)
MHA_SHAPE = Shape(B=4, T=8192, N=12, H=64)  # on which the side is chosen

QUICK_VOCABULARY = 128
QUICK_MODEL = {"layers": 2, "width": 64, "heads": 2, "dtype": "float32"}

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Variant(NamedTuple):
    """Attention of one kind; buckets for those that hash alone."""

    kind: str
    buckets: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}{self.buckets or ''}"


def variants(kinds: list[str], length: int, buckets: list[int] | None) -> list[Variant]:
    """Returns the kinds in the order of `KINDS`, those that hash once for each number of buckets; None picks it."""
    buckets = buckets or [BUCKETS if length < LONG else LONG_BUCKETS]
    chosen = [Variant(kind) for kind in KINDS if kind in kinds and kind not in HASHED]
    return chosen + [Variant(kind, count) for kind in HASHED if kind in kinds for count in buckets]


def settings(variant: Variant, length: int, tokens: int, *, quick: bool) -> TrainConfig:
    """Returns the settings of a run of the paper's model that would take this step; quick, those of a tiny one."""
    preset = PRESETS["paper-8k"][1]
    model = dataclasses.replace(preset.model, **QUICK_MODEL) if quick else preset.model
    if variant.buckets is not None:
        centred = variant.kind == "centred"
        model = dataclasses.replace(model, attention=("hash",), buckets=variant.buckets, centred=centred)
    else:
        jax_backend = "cudnn" if jax.default_backend() == "gpu" else "xla"
        backend = "sparse_flash" if variant.kind == "causal" else jax_backend
        model = dataclasses.replace(model, attention=("dense",), dense_backend=backend)
    return dataclasses.replace(preset, model=model, batch=BatchConfig(length=length, size=max(1, tokens // length)))


def vocabulary(*, quick: bool) -> int:
    """Returns the number of tokens that there are."""
    return QUICK_VOCABULARY if quick else VOCABULARY


def with_attention(variant: Variant, structure: nnx.GraphDef, params: nnx.State) -> nnx.GraphDef:
    """Returns the model's structure with the variant's attention, for the same parameters.

    Raises:
        ImportError, NotImplementedError: if this JAX or device has no `mha`.
    """
    if variant.kind not in ("none", "mha"):
        return structure  # what the settings say
    attention = _add if variant.kind == "none" else mha_attention(_mha_side())
    model = nnx.merge(structure, params)
    for block in model.blocks:
        block.attention = Replaced(block.attention, attention)
    return nnx.graphdef(model)


class Replaced(nnx.Module):
    """A layer's projections around another attention of q, k and v.

    Args:
        layer: whose projections these are.
        attention: q, k and v [B T N H] to o [B T N H].
    """

    def __init__(self, layer: SparseSelfAttention, attention: Attention):
        self.query, self.key, self.value, self.out = layer.query, nnx.data(layer.key), layer.value, layer.out
        self.attention = attention

    def __call__(self, x: jax.Array, *, key: Any, segment_ids: None, return_plan: bool) -> Any:
        """Attends; the plan is the causal one."""
        q, v = self.query(x), self.value(x)
        k = normalise(q) if self.key is None else self.key(x)
        return self.out(self.attention(q, k, v)), causal_plan(x.shape[1], x.shape[1])


def _add(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return q + k + v


@functools.cache
def _mha_side() -> int:
    """The side of the backward tiles with which `mha` by itself is fastest."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"mha needs a GPU, the device is a {jax.default_backend()}.")
    seconds = {}
    for side in MHA_BACKWARD_SIDES:
        call = mha_calls(Case(MHA_SHAPE, causal, "bfloat16"), side)["mha_forward_backward"]
        try:
            seconds[side] = measure(call.function, *call.args, samples=3).median
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # more shared memory than there is
            print(f"mha with backward tiles of {side}: {str(error).splitlines()[0][:120]}")
    if not seconds:
        raise NotImplementedError(f"mha runs with backward tiles of none of {MHA_BACKWARD_SIDES}.")
    return min(seconds, key=lambda side: seconds[side])


def flops(variant: Variant, model: TransformerConfig, batch: BatchConfig, params: nnx.State) -> dict[str, float]:
    """Returns FLOPs of a step: of the `model` around its attention, and of `attention`; what is done again is not work.

        model     = 6 * parameters of matrix products * tokens; the tied embedding counts once, as the output
        attention = 12 * H for each visible pair, query head and layer: q k^T and p v at 2 H, twice that backward

    A dense sequence has T (T + 1) / 2 visible pairs, hash-sparse attention is taken to have 1 / num_buckets of them.
    """
    matrices = [leaf for leaf in jax.tree.leaves((params["blocks"], params["embedding"])) if leaf.ndim > 1]
    pairs = batch.length * (batch.length + 1) / 2 / (variant.buckets or 1)
    attention = 0.0 if variant.kind == "none" else 12.0 * model.width * model.num_layers * batch.size * pairs
    return {"model": 6.0 * sum(x.size for x in matrices) * batch.size * batch.length, "attention": attention}
