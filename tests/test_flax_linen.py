"""The Linen module and adapter: the same numbers as the NNX module with the same parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sparse_flash_jax as sfj
from sparse_flash_jax.flax import nnx as sparse_nnx
from sparse_flash_jax.flax.linen import QK, Dense, Hash, SparseSelfAttention, attention_fn

B, T, D, N = 2, 29, 32, 4
KEY = jax.random.key(7)
X = jax.random.normal(jax.random.key(1), (B, T, D))


def run(layer: linen.Module, params: Any, *inputs: Any, **options: Any) -> Any:
    return layer.apply(params, *inputs, **options)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (Dense(), {"num_key_heads": 2}),
        (Hash(4, exclude_self=True), {"shared_qk": True, "rope_base": 100.0}),
        (QK(0.3), {"use_bias": True}),
        (QK(0.3, scored=True), {"num_key_heads": 1}),
        (QK((0.2, 0.5, 0.3, 0.7), scored=True, score_gradient="straight_through"), {"num_key_heads": 2}),
    ],
    ids=str,
)
def test_linen_and_nnx_agree(pattern, options):
    ours = sparse_nnx.SparseSelfAttention(D, N, pattern, rngs=nnx.Rngs(0), **options)
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    layer = SparseSelfAttention(N, pattern, **options)
    fresh = layer.init(jax.random.key(0), X, key=KEY)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(run(layer, {"params": params}, X, key=KEY), ours(X, key=KEY), atol=1e-5)


def test_segments_and_plan():
    layer = SparseSelfAttention(N, Dense())
    params = layer.init(jax.random.key(0), X)
    segment_ids = jnp.asarray([[3] * 9 + [8] * 20] * B, jnp.int32)
    out, plan = run(layer, params, X, segment_ids=segment_ids, return_plan=True)
    np.testing.assert_allclose(out[:, 9:], run(layer, params, X[:, 9:]), atol=1e-5)
    assert isinstance(plan, sfj.AttentionPlan)


def test_bfloat16():
    layer = SparseSelfAttention(N, Dense(), dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), X)
    assert run(layer, params, X).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("pattern", [Dense(), Hash(4), QK(0.3)], ids=str)
def test_adapter_in_flax_attention(pattern):
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn(pattern, key=KEY))
    params: Any = layer.init(jax.random.key(0), X)

    def project(name):
        projection = params["params"][name]
        return jnp.einsum("btd,dnh->btnh", X, projection["kernel"]) + projection["bias"][None, None]

    q, k, v = (project(name) for name in ("query", "key", "value"))
    heads = sfj.sparse_attention(q, k, v, pattern.plan(q, k, key=KEY))
    out = params["params"]["out"]
    expected = jnp.einsum("btnh,nhd->btd", heads, out["kernel"]) + out["bias"][None, None]
    np.testing.assert_allclose(run(layer, params, X), expected, atol=1e-5)


def test_adapter_refuses_what_it_cannot_honour():
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn(Dense()))
    with pytest.raises(ValueError, match="mask"):
        layer.init(jax.random.key(0), X, mask=linen.make_causal_mask(X[..., 0]))
    dropping = linen.MultiHeadDotProductAttention(
        N, attention_fn=attention_fn(Dense()), dropout_rate=0.5, deterministic=False
    )
    with pytest.raises(ValueError, match="dropout_rate"):
        dropping.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
