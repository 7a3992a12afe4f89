"""The primitive under jit, vmap, remat, scan, pmap and shard_map: the same numbers, and no work done twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparse_flash_jax as sfj
from tests.jaxprs import calls, primitives

BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 8, 24, 4, 2, 8
NUM_BUCKETS = 3
DEVICES = jax.device_count()  # 8 on a CPU

# A GPU sorts where the number of buckets is not known, and counts where it is.
sorted_and_counted = pytest.mark.parametrize("num_buckets", [None, NUM_BUCKETS], ids=["sorted", "counted"])


@pytest.fixture(scope="module")
def arrays():
    return drawn("float32")


def drawn(dtype):
    """q, k, v, a cotangent, and bucket ids of queries and keys."""
    rng = np.random.default_rng(0)
    queries, keys = (BATCH, LENGTH, HEADS), (BATCH, LENGTH, KEY_HEADS)
    q, k, v, do = (jnp.asarray(rng.standard_normal((*s, HEAD_DIM)), dtype) for s in (queries, keys, keys, queries))
    return q, k, v, do, *(jnp.asarray(rng.integers(0, NUM_BUCKETS, s), jnp.int32) for s in (queries, keys))


def hashed(q, k, v, do, query_bucket, key_bucket, *, num_buckets=None):
    """o, lse and the gradients of <o, do> + sum(lse), planned from buckets."""
    plan = sfj.hash_sparse(query_bucket, key_bucket, num_buckets=num_buckets)
    return attended(q, k, v, do, plan)


def attended(q, k, v, do, plan, **options):
    attend = functools.partial(sfj.sparse_attention, plan=plan, return_residual=True, **options)
    outputs, vjp = jax.vjp(attend, q, k, v)
    return (*outputs, *vjp((do, jnp.ones_like(outputs[1]))))


@pytest.fixture(scope="module")
def expected(arrays):
    return jax.jit(hashed)(*arrays)


def assert_same(got, expected):
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv")[-len(got) :], got, expected, strict=True):
        assert_close(np.asarray(x).reshape(y.shape), y, name)


def assert_close(x, y, name):
    """Up to the rounding of a few sums in y's dtype."""
    tolerance = 16 * float(jnp.finfo(y.dtype).eps)
    assert x.dtype == y.dtype
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance, err_msg=name)


@sorted_and_counted
def test_vmap_over_a_batch_axis(arrays, expected, num_buckets):
    split = [x.reshape(4, 2, *x.shape[1:]) for x in arrays]
    attend = functools.partial(hashed, num_buckets=num_buckets)
    assert_same(jax.jit(jax.vmap(attend))(*split), expected)


@sorted_and_counted
def test_vmap_with_the_same_buckets_for_all(arrays, num_buckets):
    split = [x.reshape(4, 2, *x.shape[1:]) for x in arrays[:4]]
    buckets = [x[:2] for x in arrays[4:]]
    attend = functools.partial(hashed, num_buckets=num_buckets)
    got = jax.jit(jax.vmap(attend, in_axes=(0, 0, 0, 0, None, None)))(*split, *buckets)
    assert_same(got, jax.jit(hashed)(*arrays[:4], *(jnp.tile(x, (4, 1, 1)) for x in buckets)))


def test_vmap_with_one_plan_for_all(arrays):
    plan = sfj.causal(LENGTH, window=9)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in arrays[:4]]
    got = jax.jit(jax.vmap(attended, in_axes=(0, 0, 0, 0, None)))(*split, plan)
    assert_same(got, jax.jit(attended)(*arrays[:4], plan))


def test_vmap_over_capacities(arrays):
    """Where a head of one entry keeps too many, that entry's overflow counts it."""
    keep = jnp.ones((4, 2, LENGTH, 1), bool).at[0, :, 20:].set(False)
    plan = jax.vmap(lambda keep: sfj.qk_sparse(keep, keep, query_capacity=20))(keep)
    np.testing.assert_array_equal(plan.query_overflow[..., 0], [[0, 0], [4, 4], [4, 4], [4, 4]])


def loss(q, k, v, query_bucket, key_bucket, *, num_buckets=None):
    plan = sfj.hash_sparse(query_bucket, key_bucket, num_buckets=num_buckets)
    o, lse = sfj.sparse_attention(jnp.sin(q), k, v, plan, return_residual=True)
    return jnp.sum(jnp.cos(o), dtype=jnp.float32) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))


SAVED = jax.checkpoint_policies.save_only_these_names(*sfj.RESIDUAL_NAMES, sfj.PLAN_NAME)
SAVED_ROWS = jax.checkpoint_policies.save_only_these_names(*sfj.RESIDUAL_NAMES, sfj.PLAN_NAME, sfj.ROWS_NAME)
GRADIENTS = {
    "plain": loss,
    "remat": jax.checkpoint(loss),
    "remat_with_names": jax.checkpoint(loss, policy=SAVED),
    "remat_with_rows": jax.checkpoint(loss, policy=SAVED_ROWS),
    "remat_counted": jax.checkpoint(functools.partial(loss, num_buckets=NUM_BUCKETS), policy=SAVED),
}


@pytest.mark.parametrize("how", ["remat", "remat_with_names", "remat_with_rows", "remat_counted"])
def test_remat(arrays, how):
    q, k, v, _, *buckets = arrays
    got, plain = (jax.jit(jax.grad(GRADIENTS[h], argnums=(0, 1, 2)))(q, k, v, *buckets) for h in (how, "plain"))
    assert_same(got, plain)


# Runs of the forward kernel, moves of q, k and v, and sorts: one for the queries and one for the keys.
@pytest.mark.parametrize(
    ("how", "forwards", "moves", "sorts"),
    [("plain", 1, 1, 2), ("remat", 2, 2, 4), ("remat_with_names", 1, 2, 2), ("remat_with_rows", 1, 1, 2)],
)
def test_named_residuals_are_not_made_twice(arrays, how, forwards, moves, sorts):
    q, k, v, _, *buckets = arrays
    jaxpr = jax.make_jaxpr(jax.grad(GRADIENTS[how], argnums=(0, 1, 2)))(q, k, v, *buckets)
    assert calls(jaxpr, "_backward") == 1
    assert primitives(jaxpr).count("sort") == sorts
    assert calls(jaxpr, "_attend") == forwards
    assert calls(jaxpr, "_to_slots") == moves


def layer(x, key):
    """A residual layer of hash-sparse attention with a hash of its own."""
    return x + sfj.hash_sparse_attention(x, x, jnp.sin(x), 4, key), None


@pytest.mark.parametrize("policy", [None, SAVED], ids=["plain", "remat_with_names"])
def test_scan_over_layers(arrays, policy):
    x, keys = arrays[0][:2], jax.random.split(jax.random.key(0), 2)
    scanned_layer = layer if policy is None else jax.checkpoint(layer, policy=policy)

    def scanned(x):
        return jnp.sum(jnp.sin(jax.lax.scan(scanned_layer, x, keys)[0]), dtype=jnp.float32)

    def one_by_one(x):
        return jnp.sum(jnp.sin(layer(layer(x, keys[0])[0], keys[1])[0]), dtype=jnp.float32)

    (value, dx), (expected, expected_dx) = (jax.jit(jax.value_and_grad(f))(x) for f in (scanned, one_by_one))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(dx, expected_dx, "dx")


@pytest.mark.skipif(BATCH % DEVICES != 0, reason=f"needs a number of devices that divides {BATCH}")
class TestDevices:
    @sorted_and_counted
    def test_pmap(self, arrays, expected, num_buckets):
        split = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in arrays]
        assert_same(jax.pmap(functools.partial(hashed, num_buckets=num_buckets))(*split), expected)

    def mesh(self):
        over_heads = 2 if DEVICES % 2 == 0 else 1
        return jax.make_mesh((DEVICES // over_heads, over_heads), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)

    @sorted_and_counted
    def test_shard_map_over_batch_and_heads(self, arrays, expected, num_buckets):
        spec = PartitionSpec("data", None, "heads")
        attend = functools.partial(hashed, num_buckets=num_buckets)
        run = jax.shard_map(attend, mesh=self.mesh(), in_specs=(spec,) * 6, out_specs=(spec,) * 5)
        assert_same(jax.jit(run)(*arrays), expected)

    def test_shard_map_with_a_plan_that_all_share(self, arrays):
        plan, spec = sfj.causal(LENGTH), PartitionSpec("data", None, "heads")
        run = jax.shard_map(
            attended,
            mesh=self.mesh(),
            in_specs=(*(spec,) * 4, PartitionSpec()),
            out_specs=(spec,) * 5,
        )
        assert_same(jax.jit(run)(*arrays[:4], plan), jax.jit(attended)(*arrays[:4], plan))

    def test_gradient_through_shard_map(self, arrays):
        q, k, v, _, *buckets = arrays
        spec = PartitionSpec("data", None, "heads")

        def summed(q, k, v, *buckets):
            return jax.lax.psum(loss(q, k, v, *buckets), ("data", "heads"))

        run = jax.shard_map(summed, mesh=self.mesh(), in_specs=(spec,) * 5, out_specs=PartitionSpec())
        got, plain = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v, *buckets) for f in (run, loss))
        assert_same(got, plain)

    def test_jit_with_sharded_inputs(self, arrays, expected):
        sharding = NamedSharding(self.mesh(), PartitionSpec("data", None, "heads"))
        assert_same(jax.jit(hashed)(*(jax.device_put(x, sharding) for x in arrays)), expected)
