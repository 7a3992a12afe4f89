"""The NNX module and adapter against `sparse_attention` called by hand on the same projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_flash_jax as sfj
from sparse_flash_jax.flax.heads import rotate
from sparse_flash_jax.flax.nnx import QK, Dense, Hash, SparseSelfAttention, attention_fn
from sparse_flash_jax.flax.shared_keys import normalise

B, T, D, N = 2, 33, 32, 4
KEY = jax.random.key(7)
X = jax.random.normal(jax.random.key(1), (B, T, D))


def make(pattern, **options):
    return SparseSelfAttention(D, N, pattern, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("pattern", [Dense(), Dense(window=4), Hash(4), Hash(4, exclude_self=True), QK(0.3)], ids=str)
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
def test_module_is_the_primitive_on_its_projections(pattern, num_key_heads):
    layer = make(pattern, num_key_heads=num_key_heads)
    assert layer.key is not None
    q, k, v = layer.query(X), layer.key(X), layer.value(X)
    plan = pattern.plan(q, k, key=KEY)
    expected = layer.out(sfj.sparse_attention(q, k, v, plan))
    np.testing.assert_allclose(layer(X, key=KEY), expected, atol=1e-6)


def test_shared_keys_and_rotary_positions():
    layer = make(Hash(4, exclude_self=True), shared_qk=True, rope_base=100.0)
    assert layer.key is None
    q, v = layer.query(X), layer.value(X)
    bucket = sfj.lsh_buckets(q, 4, KEY)
    plan = sfj.hash_sparse(bucket, bucket, exclude_self=True)
    positions = jnp.arange(5, 5 + T, dtype=jnp.int32)[None]
    q, k = (rotate(x, positions, 100.0) for x in (q, normalise(q)))
    expected = layer.out(sfj.sparse_attention(q, k, v, plan))
    np.testing.assert_allclose(layer(X, key=KEY, positions=positions), expected, atol=1e-5)


def test_scored_dropping_learns_its_scores():
    layer = make(QK(0.5, scored=True), num_key_heads=2)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    for name in ("query_score", "key_score"):
        gradient = gradients[name]["kernel"][...]
        assert float(jnp.max(jnp.abs(gradient))) > 0
        assert bool(jnp.all(jnp.isfinite(gradient)))


def test_segments_are_separate_sequences():
    layer = make(Dense(), shared_qk=True)
    segment_ids = jnp.asarray([[0] * 20 + [1] * 13] * B, jnp.int32)
    packed = layer(X, segment_ids=segment_ids)
    np.testing.assert_allclose(packed[:, :20], layer(X[:, :20]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 20:], layer(X[:, 20:]), atol=1e-5)


def test_dense_backend_is_the_same_attention():
    ours, theirs = make(Dense(window=9)), make(Dense(window=9, backend="xla"))
    np.testing.assert_allclose(ours(X), theirs(X), atol=1e-5)
    with pytest.raises(ValueError, match="segment_ids"):
        theirs(X, segment_ids=jnp.zeros((B, T), jnp.int32))


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    layer = make(Hash(4), dtype=jnp.bfloat16)
    assert layer(X, key=KEY).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {np.dtype("float32")}


def test_returned_plan_is_the_one_used():
    out, plan = make(Hash(4))(X, key=KEY, return_plan=True)
    assert out.shape == X.shape
    assert 0 < float(plan.density()) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_heads": 3}, "num_key_heads must divide"),
        ({"num_key_heads": 2, "shared_qk": True}, "shared_qk"),
        ({"head_dim": 5, "rope_base": 10.0}, "head_dim must be even"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        make(Dense(), **options)


@pytest.mark.parametrize("pattern", [Dense(), Hash(4), QK(0.3)], ids=str)
def test_adapter_in_flax_attention(pattern):
    layer = nnx.MultiHeadAttention(
        N, D, attention_fn=attention_fn(pattern, key=KEY), decode=False, rngs=nnx.Rngs(0), num_kv_heads=2
    )
    q, k, v = layer.query(X), layer.key(X), layer.value(X)
    expected = layer.out(sfj.sparse_attention(q, k, v, pattern.plan(q, k, key=KEY)))
    np.testing.assert_allclose(layer(X), expected, atol=1e-6)


def test_adapter_dense_is_flax_causal_attention():
    ours = nnx.MultiHeadAttention(N, D, attention_fn=attention_fn(Dense()), decode=False, rngs=nnx.Rngs(0))
    theirs = nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(X), theirs(X, is_causal=True), atol=1e-5)
    one = ours(X[0])
    np.testing.assert_allclose(one, ours(X)[0], atol=1e-5)


def test_adapter_shares_queries():
    q, k, v = (jax.random.normal(key, (B, T, N, 8)) for key in jax.random.split(KEY, 3))
    out = attention_fn(Hash(4), key=KEY, shared_qk=True)(q, k, v)
    bucket = sfj.lsh_buckets(q, 4, KEY)
    plan = sfj.hash_sparse(bucket, bucket)
    np.testing.assert_allclose(out, sfj.sparse_attention(q, normalise(q), v, plan), atol=1e-6)


def test_adapter_refuses_what_it_cannot_honour():
    def layer(**options):
        return nnx.MultiHeadAttention(
            N, D, attention_fn=attention_fn(Dense()), decode=False, rngs=nnx.Rngs(0), **options
        )

    with pytest.raises(ValueError, match="mask"):
        layer()(X, mask=jnp.ones((B, N, T, T), bool))
    with pytest.raises(ValueError, match="dropout_rate"):
        layer(dropout_rate=0.1, deterministic=False)(X)
    with pytest.raises(ValueError, match="module"):
        layer()(X, sow_weights=True)
    with pytest.raises(ValueError, match="scores"):
        attention_fn(QK(0.3, scored=True))


def test_adapter_takes_a_dense_backend():
    q, k, v = jax.random.normal(jax.random.key(3), (3, B, T, N, D // N))
    ours, theirs = (attention_fn(Dense(window=9, backend=backend))(q, k, v) for backend in (None, "xla"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
