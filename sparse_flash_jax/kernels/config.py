"""Block sizes: which tiles a kernel works in. Plans know nothing of them, so passes may tile differently."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of one pass: `rows` of the output's operand (queries; keys for dK/dV) by `columns` streamed past it."""

    rows: int
    columns: int
    num_warps: int = 4
    """Warps of a program on a GPU."""
    num_stages: int = 2
    """Streamed tiles in flight on a GPU."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the three passes."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks
    tf32: bool = False
    """Whether float32 products on a GPU's tensor cores may round their operands to tf32."""


def xla_config(query_slots: int, key_slots: int) -> Config:
    """Returns tiles for the XLA implementation.

    128 x 64 is the best all-round tile on two CPU cores (benchmarks/notes.md): a larger one is a fifth faster where
    runs are long, and up to twice as slow where they are short; a smaller one pays more loop overhead.
    """
    q, k = _multiple_of_8(query_slots), _multiple_of_8(key_slots)
    by_queries = Blocks(rows=min(128, q), columns=min(64, k))
    return Config(forward=by_queries, dq=by_queries, dkv=Blocks(rows=min(128, k), columns=min(64, q)))


def _multiple_of_8(slots: int) -> int:
    return -(-slots // 8) * 8


def triton_config(dtype: Any, head_dim: int, *, long_runs: bool) -> Config:
    """Returns tiles for the Triton implementation.

    Those that were fastest on an H100 at T = 16384 (benchmarks/notes.md): long runs, as of a dense causal plan, want
    large tiles; short ones, as of 16 buckets, small ones. Three stages of the largest fit the 99 KiB of shared memory
    of compute capability 8.6 and 8.9, and so every GPU from 8.0 on.

    Args:
        dtype: of q, k and v.
        head_dim: H.
        long_runs: whether a run spans many tiles.
    """
    if jnp.dtype(dtype).itemsize == 4 or head_dim > 128:
        columns = 16 if jnp.dtype(dtype).itemsize * head_dim > 512 else 32
        small = Blocks(rows=32, columns=columns, num_warps=4, num_stages=2)
        return Config(forward=small, dq=small, dkv=small)
    if not long_runs:
        small = Blocks(rows=64, columns=32, num_warps=4, num_stages=3)
        return Config(forward=small, dq=small, dkv=small)
    if head_dim > 64:
        square = Blocks(rows=64, columns=64, num_warps=4, num_stages=2)
        return Config(forward=Blocks(rows=128, columns=64, num_warps=4, num_stages=2), dq=square, dkv=square)
    return Config(
        forward=Blocks(rows=128, columns=64, num_warps=4, num_stages=3),
        dq=Blocks(rows=128, columns=64, num_warps=4, num_stages=2),
        dkv=Blocks(rows=128, columns=32, num_warps=4, num_stages=3),
    )
