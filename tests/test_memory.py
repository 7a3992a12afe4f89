"""No array of T x S elements, and memory linear in length: read off the jaxpr, and off what XLA allocates."""

import jax
import jax.numpy as jnp
import pytest

import sparse_flash_jax as sfj
from tests.jaxprs import largest_array

HEADS, KEY_HEADS, HEAD_DIM = 2, 1, 8


def hashed(q, k, v, window=None):
    return sfj.hash_sparse_attention(q, k, v, 16, jax.random.key(0), window=window, return_residual=True)


def dropped(q, k, v):
    keep = [sfj.random_keep(jax.random.key(i), x.shape[:3], 0.5) for i, x in enumerate((q, k))]
    half = q.shape[1] // 2
    return sfj.qk_sparse_attention(q, k, v, *keep, query_capacity=half, key_capacity=half, return_residual=True)


def causal(q, k, v):
    return sfj.sparse_attention(q, k, v, sfj.causal(q.shape[1]), return_residual=True)


def documents(q, k, v):
    ids = jnp.arange(q.shape[1], dtype=jnp.int32)[None] // 100
    return sfj.sparse_attention(q, k, v, sfj.packed(ids), return_residual=True)


def quadratic(q, k, v):
    return sfj.reference_attention(q, k, v, sfj.causal(q.shape[1]).mask(), return_residual=True)


PATTERNS = [hashed, dropped, causal, documents]


def shapes(length):
    return [jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def forward_and_backward(attention):
    def run(q, k, v):
        (o, lse), vjp = jax.vjp(attention, q, k, v)
        return o, vjp((o, lse))

    return run


@pytest.mark.parametrize("attention", PATTERNS)
def test_no_array_is_quadratic(attention):
    run = forward_and_backward(attention)
    sizes = [largest_array(jax.make_jaxpr(run)(*shapes(length))) for length in (8192, 16384)]
    assert sizes[1] <= 2 * sizes[0]
    # The largest arrays are q, o and their like.
    assert sizes[0] <= 2 * 8192 * HEADS * HEAD_DIM


def test_the_measure_sees_quadratic_arrays():
    assert largest_array(jax.make_jaxpr(forward_and_backward(quadratic))(*shapes(8192))) >= 8192**2


def test_allocated_memory_is_linear():
    run = jax.jit(forward_and_backward(hashed))
    analyses = [run.lower(*shapes(length)).compile().memory_analysis() for length in (2048, 8192)]
    if None in analyses:
        pytest.skip("XLA does not say here")
    small, large = (analysis.temp_size_in_bytes for analysis in analyses if analysis is not None)
    assert large <= 4.5 * small
    # Sorted copies, o, gradients and the plan: measured 7.2 times q.
    assert large <= 12 * 8192 * HEADS * HEAD_DIM * 4
