"""Attention in which each query sees one run of keys: the gradient rule.

Knows runs and nothing else of sparsity. The implementations compute forward, dQ and dK/dV; what they share is here.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import (
    check_implementation,
    default_config,
    kernels_of,
    pick_implementation,
)
from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.manual_axes import vary_alike

RESIDUAL_NAMES = ("sparse_attention_o", "sparse_attention_lse")
"""`checkpoint_name`s of o and lse: a remat policy that saves them does not run the forward kernel twice."""


def interval_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
    long_runs: bool = False,
) -> tuple[Float[Array, "B N T H"], Float32[Array, "B N T"]]:
    """Returns attention of each query over its run of keys, differentiable in q, k and v, through o and lse.

    Args:
        q: float [B N T H], in slot order.
        k: float [B K S H], in slot order; K divides N.
        v: float [B K S H].
        runs: the run of each query, and its transpose.
        scale: static factor on the scores; None for 1 / sqrt(H).
        implementation: "mosaic", "triton" or "xla"; None picks for the device.
        config: tile sizes, `HopperBlocks` for "mosaic" and `Blocks` for the others; None for those that suit the shapes
            and the device. `Config.interpret` runs GPU kernels in Pallas' interpreter, on any device.
        long_runs: whether runs span many tiles, which decides between tiles.

    Returns:
        o [B N T H] in q's dtype, 0 where a run is empty, and lse float32 [B N T], natural log, -inf there.

    Raises:
        ValueError: if the implementation is unknown.
        NotImplementedError: if the named implementation cannot do it.
    """
    check_implementation(implementation, q.dtype, q.shape[-1], config)
    implementation = pick_implementation(q.dtype, q.shape[-1], config) if implementation is None else implementation
    if config is None:
        config = default_config(implementation, dtype=q.dtype, head_dim=q.shape[-1], runs=runs, long_runs=long_runs)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    q, k, v, runs = vary_alike((q, k, v, runs))
    return _attention(q, k, v, runs, scale, implementation, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _attention(q, k, v, runs, scale, implementation, config):
    return kernels_of(implementation).forward(q, k, v, runs, scale=scale, config=config)


def _forward(q, k, v, runs, scale, implementation, config):
    outputs = _attention(q, k, v, runs, scale, implementation, config)
    o, lse = (checkpoint_name(x, name) for x, name in zip(outputs, RESIDUAL_NAMES, strict=True))
    return (o, lse), (q, k, v, runs, o, lse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(scale, implementation, config, residuals, cotangents):
    q, k, v, runs, o, lse = residuals
    do, dlse = cotangents
    # d lse / d s is p, as is d o / d s up to the row's mean, so lse's cotangent joins delta.
    delta = jnp.einsum(
        "bnth,bnth->bnt", o.astype(jnp.float32), do.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    delta = delta - dlse
    kernels, operands = kernels_of(implementation), (q, k, v, runs, lse, do, delta)
    if config.fused:
        return *kernels.backward(*operands, scale=scale, config=config), None
    dq = kernels.backward_dq(*operands, scale=scale, config=config)
    dk, dv = kernels.backward_dkv(*operands, scale=scale, config=config)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)
