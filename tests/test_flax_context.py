"""Layers over sequences that are divided over devices: what one device gives, and the same density."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.flax import linen
from sparse_flash_jax.flax.auto import Auto
from sparse_flash_jax.flax.nnx import QK, BlockTopK, Dense, Hash, SparseSelfAttention, Window

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

B, T, D, N = 2, 32, 16, 4
KEY = jax.random.key(7)
X = jax.random.normal(jax.random.key(1), (B, T, D))
PARTS = 4
DOCUMENTS = jnp.asarray([[0] * 5 + [1] * 14 + [2] * 13, [0] * 30 + [1] * 2], jnp.int32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, PARTS), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def layers(pattern, mesh):
    """A layer for whole sequences, and one with its parameters for divided ones."""
    make = lambda context: SparseSelfAttention(
        D, N, pattern, num_key_heads=2, rope_base=100.0, context=context, rngs=nnx.Rngs(0)
    )
    return make(None), make(sfj.Context("sequence", zigzag=True, batch="data", mesh=mesh))


def divided(x, mesh):
    return jax.device_put(sfj.to_zigzag(x, PARTS), NamedSharding(mesh, PartitionSpec("data", "sequence")))


@pytest.mark.parametrize(
    ("pattern", "segment_ids"),
    [
        (Window(9), DOCUMENTS),
        (Hash(4, exclude_self=True, rotated=True), DOCUMENTS),
        (QK((0.6, 0.2, 0.5, 0.9), scored=True), DOCUMENTS),
        (Auto(Hash(4)), None),
    ],
    ids=["window_in_documents", "hash_in_documents", "scored_in_documents", "auto"],
)
def test_as_on_one_device(pattern, segment_ids, mesh):
    whole, parts = layers(pattern, mesh)

    def attended(layer, x, segment_ids):
        out, plan = layer(x, key=KEY, segment_ids=segment_ids, return_plan=True)
        return jnp.sum(out**2), (out, plan.density(), plan.query_overflow.sum() + plan.key_overflow.sum())

    gradients = nnx.jit(nnx.grad(attended, argnums=(0, 1), has_aux=True))
    (of_layer, dx), (out, density, _) = gradients(whole, X, segment_ids)
    ids = None if segment_ids is None else divided(segment_ids, mesh)
    (of_parts, dx_parts), (out_parts, density_parts, overflow) = gradients(parts, divided(X, mesh), ids)
    np.testing.assert_allclose(sfj.from_zigzag(np.asarray(out_parts), PARTS), out, atol=2e-6)
    np.testing.assert_allclose(sfj.from_zigzag(np.asarray(dx_parts), PARTS), dx, atol=2e-5)
    for x, y in zip(jax.tree.leaves(of_parts), jax.tree.leaves(of_layer), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert float(density_parts) == pytest.approx(float(density), rel=1e-6)
    assert int(overflow) == 0


def test_linen_inside_of_shard_map(mesh):
    """Rows are those of the device; in order, and gathered."""
    context = sfj.Context("sequence", "gather")
    layer = linen.SparseSelfAttention(N, Hash(4), rope_base=100.0)
    params = layer.init(jax.random.key(0), X, key=KEY)
    rows = PartitionSpec("data", "sequence")
    attend = jax.jit(
        jax.shard_map(
            lambda params, x: dataclasses.replace(layer, context=context).apply(params, x, key=KEY),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
        )
    )
    np.testing.assert_allclose(attend(params, X), np.asarray(layer.apply(params, X, key=KEY)), atol=2e-6)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Dense(backend="xla"), "takes whole sequences; leave it out"),
        (Hash(4, centred=True), "leave out centred"),
        (Hash(4, rounds=2), "takes whole sequences; leave out rounds"),
        (Hash(4), "draws random rotations"),
        (QK(0.5), "drops tokens at random"),
        (Window(5, sinks=1), "takes whole sequences; leave out sinks"),
        (BlockTopK(8, 2), "takes whole sequences"),
    ],
)
def test_what_a_divided_sequence_does_not_take(pattern, message, mesh):
    _, parts = layers(pattern, mesh)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        parts(divided(X, mesh), key=KEY if isinstance(pattern, Hash) and pattern.centred else None)


def test_dropping_wants_all_tokens(mesh):
    _, parts = layers(QK(0.5), mesh)
    rows = PartitionSpec("data", "sequence")
    with pytest.raises(NotImplementedError, match="outside of shard_map"):
        jax.shard_map(lambda x: parts(x, key=KEY), mesh=mesh, in_specs=rows, out_specs=rows)(X)
