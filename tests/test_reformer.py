"""Reformer's attention, the baseline of benchmarks/: against dense attention under a mask that numpy makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj


@pytest.fixture(scope="module")
def reformer(benchmark_module):
    return benchmark_module("reformer")


def shown_by_a_round(bucket, chunk):
    """[T T] of one head: whether token j is before i, in its bucket, and in its chunk or the one before."""
    slots = sorted(range(len(bucket)), key=lambda token: (bucket[token], token))
    chunk_of = {token: slot // chunk for slot, token in enumerate(slots)}
    mask = np.zeros((len(bucket), len(bucket)), bool)
    for i in range(len(bucket)):
        for j in range(i):
            mask[i, j] = bucket[i] == bucket[j] and chunk_of[i] - chunk_of[j] in (0, 1)
    return mask


def masks(buckets, chunk):
    """[R B N T T] of rounds, batch entries and heads."""
    by_head = np.stack([np.swapaxes(np.asarray(ids), 1, 2) for ids in buckets])
    flat = [shown_by_a_round(ids.tolist(), chunk) for ids in by_head.reshape(-1, by_head.shape[-1])]
    return np.stack(flat).reshape(*by_head.shape, by_head.shape[-1])


def dense(q, k, v, mask, scale):
    """Attention under a mask [B N T T]; a token that sees nothing outputs its own value."""
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    alone = ~mask.any(axis=-1, keepdims=True) & np.eye(mask.shape[-1], dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(mask | alone, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def with_gradients(attend, q, k, v, do):
    def both(q, k, v, do):
        o, pull_back = jax.vjp(attend, q, k, v)
        return o, *pull_back(do)

    return jax.jit(both)(q, k, v, do)


def inputs(length, rounds, num_buckets=4, heads=2, dtype="float32"):
    rng = np.random.default_rng(length)
    q, k, v, do = (jnp.asarray(rng.standard_normal((2, length, heads, 8)), dtype) for _ in range(4))
    # One bucket is as large as all others together, so that chunks part it.
    ids = rng.integers(0, 2 * num_buckets, (rounds, 2, length, heads), np.int32)
    return q, k, v, do, [jnp.asarray(each) for each in np.minimum(ids, num_buckets)]


@pytest.mark.parametrize(("length", "chunk", "rounds"), [(45, 8, 3), (6, 8, 2), (1, 4, 1)])
def test_outputs_and_gradients_are_those_of_the_mask(reformer, length, chunk, rounds, monkeypatch):
    monkeypatch.setattr(reformer, "GROUP_PAIRS", 5 * 2 * chunk * chunk)  # groups of 5 chunks, and a rest
    q, k, v, do, buckets = inputs(length, rounds)
    shown = masks(buckets, chunk)
    attend = lambda q, k, v: reformer.reformer_attention(q, k, v, buckets, chunk=chunk, scale=0.7)
    found = with_gradients(attend, q, k, v, do)
    expected = with_gradients(lambda q, k, v: dense(q, k, v, shown.any(axis=0), 0.7), q, k, v, do)
    for name, got, wanted in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5, err_msg=name)
    pairs = reformer.shown_pairs(buckets, chunk)
    np.testing.assert_array_equal(pairs, shown.sum(axis=(0, 3, 4)))
    if length > 2 * chunk:
        by_bucket = masks(buckets, length).any(axis=0)
        assert shown.any(axis=0).sum() < by_bucket.sum()  # something was missed


def test_one_chunk_is_exact_hash_attention(reformer):
    q, _, v, _, _ = inputs(40, 1)
    k = jnp.asarray(np.asarray(q) / np.linalg.norm(q, axis=-1, keepdims=True))

    @jax.jit
    def both(q, k, v, key):
        chunked = reformer.reformer_attention(q, k, v, reformer.hash_rounds(q, 4, key, 2), chunk=40)
        exact = sfj.hash_sparse_attention(q, k, v, 4, key, exclude_self=True, rounds=2, return_residual=True)
        return chunked, *exact

    chunked, exact, lse = map(np.asarray, both(q, k, v, jax.random.key(7)))
    some = lse > -np.inf
    assert 0 < (~some).sum() < 40
    np.testing.assert_allclose(chunked, np.where(some[..., None], exact, v), rtol=0, atol=2e-6)


def test_bfloat16_is_as_exact_as_its_dtype(reformer):
    q, k, v, _, buckets = inputs(48, 2, dtype="bfloat16")
    o = reformer.reformer_attention(q, k, v, buckets, chunk=8)
    assert o.dtype == jnp.bfloat16
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact = dense(q, k, v, masks(buckets, 8).any(axis=0), 8**-0.5)
    np.testing.assert_allclose(o.astype(jnp.float32), exact, rtol=0, atol=0.04)


def test_chunks_are_twice_the_mean_bucket(reformer):
    assert [reformer.chunk_size(*x) for x in ((4096, 16), (100, 16), (64, 1), (4, 16))] == [512, 12, 64, 1]


def test_memory_is_linear_in_length(reformer):
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length, 2), jnp.int32)
        loss = lambda q, ids: jnp.sum(reformer.reformer_attention(q, q, q, [ids, ids], chunk=32))
        analysis = jax.jit(jax.grad(loss)).lower(q, ids).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)


def test_refuses_no_rounds(reformer):
    q, k, v, _, buckets = inputs(8, 1)
    for arguments in (([], 4), (buckets, 0)):
        with pytest.raises(ValueError, match="at least one round and a chunk"):
            reformer.reformer_attention(q, k, v, arguments[0], chunk=arguments[1])
