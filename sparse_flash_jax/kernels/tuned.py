"""Tiles that `benchmarks/tune.py` found on a GPU, read from the file that $SPARSE_FLASH_TILES names."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sparse_flash_jax.kernels.config import Blocks, Config, HopperBlocks

VARIABLE = "SPARSE_FLASH_TILES"
_BLOCKS = {"mosaic": HopperBlocks, "triton": Blocks}


def tuned_config(implementation: str, dtype: Any, head_dim: int, *, long_runs: bool) -> Config | None:
    """Returns the tiles found for the least head dim from this one on; None without a file, or such a row in it.

    Raises:
        ValueError: if the file cannot be read as one that `benchmarks/tune.py` writes.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    kind = (implementation, jnp.dtype(dtype).name, long_runs)
    rows = {size: config for (*other, size), config in _read(path).items() if tuple(other) == kind and size >= head_dim}
    return rows[min(rows)] if rows else None


@functools.cache
def _read(path: str) -> dict[tuple[str, str, bool, int], Config]:
    try:
        rows = json.loads(Path(path).read_text("utf-8"))["rows"]
        return {
            (row["implementation"], row["dtype"], row["long_runs"], row["head_dim"]): Config(
                *(_BLOCKS[row["implementation"]](**row[name]) for name in ("forward", "dq", "dkv")), fused=row["fused"]
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"${VARIABLE} names {path}, which is no file of tiles as benchmarks/tune.py writes it: {error!r}; write it "
            "anew, or leave the variable out."
        ) from error
