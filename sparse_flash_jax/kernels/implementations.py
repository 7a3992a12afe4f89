"""The implementations of interval attention: what each can do, which one a device gets, and its tiles.

Each is a module of functions `forward`, `backward_dq` and `backward_dkv`, imported when first chosen; that of "mosaic"
has `backward` besides, both in one kernel, for a `Config` that is `fused`.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from sparse_flash_jax.kernels.config import (
    FUSED_HEAD_DIM,
    Blocks,
    Config,
    HopperBlocks,
    mosaic_config,
    mosaic_config_beyond_runs,
    triton_config,
    within_blocks,
    xla_config,
)
from sparse_flash_jax.kernels.tiles import BlockSizes, Runs
from sparse_flash_jax.kernels.tuned import tuned_config
from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.permute import Permutation
from sparse_flash_jax.validation import IMPLEMENTATIONS, check_implementation_name

_HEAD_DIM = 256
"""The largest of the GPU kernels."""
_TRITON_CAPABILITY = 8.0
_MOST_HASHED = 256  # buckets whose projections fit into the registers
_MOSAIC_DTYPES = ("bfloat16", "float16")  # those of operands in registers


def check_implementation(implementation: str | None, dtype: Any, head_dim: int, config: Config | None = None) -> None:
    """Raises unless the implementation is None, or one that can do this on the default device.

    Args:
        implementation: "mosaic", "triton", "xla" or None.
        dtype: of q, k and v.
        head_dim: H.
        config: its tiles; with `interpret`, GPU kernels run on any device.

    Raises:
        ValueError: if the implementation is unknown, or the tiles are not of its kind.
        NotImplementedError: if it cannot do this.
    """
    check_implementation_name(implementation)
    if config is not None and config.fused and head_dim > FUSED_HEAD_DIM:
        raise ValueError(f"config.fused takes head dims up to {FUSED_HEAD_DIM}, got {head_dim}.")
    if implementation is None:
        return
    if config is not None and not _fits(config, implementation):
        got, expected = type(config.forward).__name__, _blocks_of(implementation).__name__
        raise ValueError(f"implementation={implementation!r} takes a config of {expected}, got {got}.")
    lacks = _what_lacks(implementation, dtype, head_dim, interpret=config is not None and config.interpret)
    if lacks:
        raise NotImplementedError(f"implementation={implementation!r} {lacks}; use implementation='xla', or None.")


def check_block_sizes(implementation: str, sizes: BlockSizes) -> None:
    """Raises NotImplementedError unless the implementation has tiles of which blocks of so many tokens are made."""
    lacks = _what_lacks_of_blocks(implementation, sizes)
    if lacks:
        raise NotImplementedError(f"implementation={implementation!r} {lacks}; use implementation='xla', or None.")


def _what_lacks_of_blocks(implementation: str, sizes: BlockSizes) -> str | None:
    least, got = {"mosaic": 64, "triton": 16, "xla": 1}[implementation], (sizes.queries, sizes.keys)
    return f"takes blocks of multiples of {least} tokens, got {got}" if any(x % least for x in got) else None


def pick_implementation(dtype: Any, head_dim: int, config: Config | None = None, runs: Runs | None = None) -> str:
    """Returns the fastest implementation that can do this on the default device, with these tiles if there are any.

    Raises:
        NotImplementedError: if no implementation that takes such tiles can.
    """
    interpret, lacks = config is not None and config.interpret, {}
    for name in (name for name in IMPLEMENTATIONS if _fits(config, name)):
        lacks[name] = _what_lacks(name, dtype, head_dim, interpret=interpret)
        if lacks[name] is None and runs is not None and runs.blocks is not None:
            lacks[name] = _what_lacks_of_blocks(name, runs.blocks.sizes)
        if lacks[name] is None:
            return name
    raise NotImplementedError("; ".join(f"implementation={name!r} {lack}" for name, lack in lacks.items()) + ".")


def kernels_of(implementation: str) -> ModuleType:
    """Returns the module of an implementation. Nothing of Pallas is imported before."""
    return importlib.import_module(f"sparse_flash_jax.kernels.{implementation}")


def order_to_write(implementation: str, config: Config, side: Permutation | None) -> Int32[Array, "B A L"] | None:
    """Returns the order by which kernels write this side's rows to their positions; None: they leave them by slot.

    Those of "mosaic" take one where each position has a slot, so that all is written; not in the interpreter.
    """
    if side is None or implementation != "mosaic" or config.interpret:
        return None
    return side.order if side.order.shape[2] == side.slot.shape[2] else None


def reads_in_place(implementation: str, config: Config, lengths: tuple[int, int], head_dim: int) -> bool:
    """Returns whether kernels can take so many queries and keys by position, [B T N H] and [B S K H]."""
    return implementation == "mosaic" and kernels_of(implementation).reads_in_place(config, lengths, head_dim)


def whole_slots(implementation: str) -> int:
    """Returns what numbers of slots are to be a multiple of, so that kernels need no padded copies."""
    return 128 if implementation == "mosaic" else 1


def counting_kernels() -> Callable[..., Any] | None:
    """Returns the kernels that plan by counting, or None where the default device or this JAX has none."""
    return _triton_kernel("counting", "count_tokens")


def hashing_kernel(num_buckets: int) -> Callable[..., Any] | None:
    """Returns the kernel that hashes into so many buckets, or None where the default device or this JAX has none."""
    return _triton_kernel("hashing", "hash_rows") if num_buckets <= _MOST_HASHED else None


def by_platform(cuda: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """Returns what `cuda` makes of the operands where this is compiled for an NVIDIA GPU, else what `default` does.

    A GPU's host may compute on its CPU, too. Both ways must agree in the mesh axes that their outputs vary over.
    """
    return lax.platform_dependent(*vary_alike(operands), cuda=cuda, default=default)


def _triton_kernel(module: str, name: str) -> Callable[..., Any] | None:
    if not has_gpu_kernels():
        return None
    return getattr(importlib.import_module(f"sparse_flash_jax.kernels.triton.{module}"), name)


@functools.cache
def has_triton() -> bool:
    """Whether this JAX has Pallas' Triton backend, which it means to drop."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def default_config(implementation: str, *, dtype: Any, head_dim: int, runs: Runs, long_runs: bool = False) -> Config:
    """Returns the tiles that suit the shapes, the length of the runs and the default device."""
    if implementation == "xla":
        config = xla_config(query_slots=runs.k_start.shape[2], key_slots=runs.q_start.shape[2])
    else:
        config = tuned_config(implementation, dtype, head_dim, long_runs=long_runs)
    if config is None and implementation == "mosaic":
        if runs.plain:
            config = mosaic_config(head_dim, long_runs=long_runs)
        else:
            sizes = None if runs.blocks is None else (runs.blocks.sizes.queries, runs.blocks.sizes.keys)
            config = mosaic_config_beyond_runs(head_dim, long_runs=long_runs, blocks=sizes)
    elif config is None:
        config = triton_config(dtype, head_dim, long_runs=long_runs, capability=_compute_capability())
    return within_runs(config if runs.plain else dataclasses.replace(config, fused=False), runs, head_dim)


def within_runs(config: Config, runs: Runs, head_dim: int) -> Config:
    """Returns tiles of which the listed blocks are made, if there are any; no larger than those given."""
    if runs.blocks is None:
        return config
    sizes = runs.blocks.sizes
    return within_blocks(config, sizes.queries, sizes.keys, head_dim)


def _blocks_of(implementation: str) -> type:
    return HopperBlocks if implementation == "mosaic" else Blocks


def _fits(config: Config | None, implementation: str) -> bool:
    return config is None or isinstance(config.forward, _blocks_of(implementation))


def _what_lacks(implementation: str, dtype: Any, head_dim: int, *, interpret: bool) -> str | None:
    if implementation == "xla":
        return None
    if implementation == "mosaic" and jnp.dtype(dtype).name not in _MOSAIC_DTYPES:
        return f"takes {' and '.join(_MOSAIC_DTYPES)}, got {jnp.dtype(dtype).name}"
    if head_dim > _HEAD_DIM:
        return f"has head dims up to {_HEAD_DIM}, got {head_dim}"
    capability, needed = _compute_capability(), "9.0" if implementation == "mosaic" else f"{_TRITON_CAPABILITY} or more"
    if not (interpret or (capability == 9.0 if implementation == "mosaic" else capability >= _TRITON_CAPABILITY)):
        kind = _default_device().device_kind
        return f"needs an NVIDIA GPU of compute capability {needed}, and the default device is {kind}"
    if implementation == "triton" and not has_triton():
        return "needs Pallas' Triton backend, which this JAX has not"
    return None


def default_device_kind() -> str:
    """Returns what JAX calls the default device: "cpu", "NVIDIA H100 80GB HBM3"."""
    return _default_device().device_kind


def has_gpu_kernels() -> bool:
    """Whether this package has kernels for plans, hashes and rows on the default device, and this JAX compiles them."""
    return _compute_capability() >= _TRITON_CAPABILITY and has_triton()


def cudnn_attends(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's causal attention, as `jax.nn.dot_product_attention` has it, can do this on the default device."""
    capability = _compute_capability()
    largest = 256 if capability >= 9.0 else 128 if capability >= 8.0 else 0  # as JAX checks them
    return jnp.dtype(dtype).name in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= largest


def _compute_capability() -> float:
    """Compute capability of the default device, 0 where that is no NVIDIA GPU."""
    try:
        return float(getattr(_default_device(), "compute_capability", 0.0))
    except ValueError:  # a GPU of another make names its architecture here
        return 0.0


def _default_device() -> Any:
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]
