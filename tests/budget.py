"""The error budget of a kernel: twice what dense attention in the same dtype errs against float32, and a rounding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.reference import reference_attention
from tests.cases import Inputs


class Results(NamedTuple):
    """Outputs of attention and the gradients of its inputs."""

    o: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array


def with_gradients(attention, inputs: Inputs) -> Results:
    """Runs `attention(q, k, v) -> (o, lse)` forward, and backward from the cotangents of both."""
    (o, lse), vjp = jax.vjp(attention, inputs.q, inputs.k, inputs.v)
    return Results(o, lse, *vjp((inputs.do.astype(o.dtype), inputs.dlse)))


@functools.partial(jax.jit, static_argnames=("implementation", "config"))
def attend(inputs: Inputs, plan: sfj.AttentionPlan, implementation: str | None = None, config: Config | None = None):
    """Runs `sparse_attention` under a plan so."""
    options = {"implementation": implementation, "config": config, "return_residual": True}
    return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, **options), inputs)


def truth(inputs: Inputs, mask: Array, scale: float | None = None) -> Results:
    """The reference in float32, whatever the dtype of the inputs."""
    inputs = Inputs(*(x.astype(jnp.float32) for x in inputs))
    return with_gradients(lambda q, k, v: reference_attention(q, k, v, mask, scale=scale, return_residual=True), inputs)


def dense(inputs: Inputs, mask: Array, scale: float | None = None) -> Results:
    """Plain dense attention in the dtype of the inputs: products and probabilities in it, softmax in float32."""

    def attention(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        # GPUs round the operands of float32 products unless told not to; of short dtypes this asks nothing.
        s = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest").astype(jnp.float32) * factor
        some = mask.any(axis=-1, keepdims=True)
        lse = jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1, where=mask | ~some, keepdims=True)
        p = jnp.where(mask, jnp.exp(jnp.where(mask, s - lse, 0.0)), 0.0)
        o = jnp.einsum("bnts,bsnh->btnh", p.astype(q.dtype), v, precision="highest")
        return o, jnp.where(some, lse, -jnp.inf)[..., 0].swapaxes(1, 2)

    return with_gradients(attention, inputs)


@functools.partial(jax.jit, static_argnames="scale")
def judges(inputs: Inputs, mask: Array | np.ndarray, scale: float | None = None) -> tuple[Results, Results]:
    """The truth and its dense peer, of a mask [B N T S] whose first two axes may be 1: compiled once for a shape."""
    batch, length, heads, _ = inputs.q.shape
    mask = jnp.broadcast_to(mask, (batch, heads, length, inputs.k.shape[1]))
    return truth(inputs, mask, scale), dense(inputs, mask, scale)


# Float32 sums in another order: what the cases need beyond twice the peer's error is 9e-7 of the largest value.
ROUNDING = 2e-6


def assert_within_budget(got: NamedTuple, true: NamedTuple, peer: NamedTuple) -> None:
    """Asserts for each tensor: non-finite values in the same places, error at most twice the peer's and a rounding."""
    for name in true._fields:
        x, exact, other = (np.asarray(getattr(r, name)).astype(np.float64) for r in (got, true, peer))
        assert x.shape == exact.shape, f"{name}: shape {x.shape}, expected {exact.shape}"
        np.testing.assert_array_equal(x[~np.isfinite(exact)], exact[~np.isfinite(exact)], f"{name} where not finite")
        finite = np.isfinite(exact)
        assert np.isfinite(x[finite]).all(), f"{name} is not finite in {np.sum(~np.isfinite(x[finite]))} places"
        if not finite.any():
            continue
        error, budget = (np.abs(y[finite] - exact[finite]).max() for y in (x, other))
        budget = 2 * budget + ROUNDING * max(1.0, np.abs(exact[finite]).max())
        assert error <= budget, f"{name}: error {error:.3g} exceeds its budget {budget:.3g}"
