import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.hashing import hash_sides

KEY = jax.random.key(5)


def vectors(shape=(2, 40, 4, 16), seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_buckets", [2, 16, 64])
def test_range_and_dtype(num_buckets, dtype):
    bucket = sfj.lsh_buckets(vectors(dtype=dtype), num_buckets, KEY)
    assert bucket.shape == (2, 40, 4)
    assert bucket.dtype == jnp.int32
    assert bucket.min() >= 0
    assert bucket.max() < num_buckets


def test_all_buckets_are_used():
    bucket = sfj.lsh_buckets(vectors((4, 512, 2, 16)), 8, KEY)
    for head in range(2):
        counts = np.bincount(np.asarray(bucket[..., head]).ravel(), minlength=8)
        # Angles of random directions differ, and with them the shares, but not by as much as this.
        assert counts.min() > 2048 / 8 / 3, counts


def test_same_key_same_buckets():
    x = vectors()
    np.testing.assert_array_equal(sfj.lsh_buckets(x, 8, KEY), jax.jit(sfj.lsh_buckets, static_argnums=1)(x, 8, KEY))
    assert (sfj.lsh_buckets(x, 8, KEY) != sfj.lsh_buckets(x, 8, jax.random.key(6))).any()


def test_length_does_not_matter():
    x = vectors()
    factor = 2.0 ** jnp.asarray(np.random.default_rng(1).integers(-8, 8, (2, 40, 4, 1)), jnp.float32)
    np.testing.assert_array_equal(sfj.lsh_buckets(factor * x, 16, KEY), sfj.lsh_buckets(x, 16, KEY))


@pytest.mark.parametrize("num_buckets", [2, 16])
def test_opposite_vectors_fall_into_opposite_buckets(num_buckets):
    x = vectors()
    opposite = (sfj.lsh_buckets(x, num_buckets, KEY) + num_buckets // 2) % num_buckets
    np.testing.assert_array_equal(sfj.lsh_buckets(-x, num_buckets, KEY), opposite)


def test_near_vectors_share_buckets_more_than_far_ones():
    x = vectors((1, 400, 1, 16))
    near = x + 0.1 * vectors((1, 400, 1, 16), seed=1)
    far = vectors((1, 400, 1, 16), seed=2)
    bucket = sfj.lsh_buckets(x, 16, KEY)
    assert np.mean(sfj.lsh_buckets(near, 16, KEY) == bucket) > 0.75
    assert np.mean(sfj.lsh_buckets(far, 16, KEY) == bucket) < 0.25


def test_a_position_hashes_alone():
    x = vectors()
    np.testing.assert_array_equal(sfj.lsh_buckets(x[:1, 7:9], 16, KEY), sfj.lsh_buckets(x, 16, KEY)[:1, 7:9])


def test_each_head_has_its_own_rotation():
    x = jnp.broadcast_to(vectors((2, 40, 1, 16)), (2, 40, 4, 16))
    bucket = sfj.lsh_buckets(x, 16, KEY)
    for head in range(1, 4):
        assert (bucket[..., head] != bucket[..., 0]).any()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_share_the_rotation_of_their_key_head(key_heads):
    k = vectors((2, 40, key_heads, 16))
    q = jnp.repeat(k, 4 // key_heads, axis=2)
    key_bucket = sfj.lsh_buckets(k, 16, KEY)
    query_bucket = sfj.lsh_buckets(q, 16, KEY, num_rotations=key_heads)
    np.testing.assert_array_equal(query_bucket, jnp.repeat(key_bucket, 4 // key_heads, axis=2))


class TestCentred:
    def test_hashes_what_is_off_the_mean_so_far(self):
        x = vectors()
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1.0, 41.0)[None, :, None, None]
        expected = sfj.lsh_buckets(x - mean, 16, KEY)
        np.testing.assert_array_equal(sfj.lsh_buckets(x, 16, KEY, centred=True), expected)

    def test_later_vectors_do_not_matter(self):
        x = vectors()
        bucket = sfj.lsh_buckets(x, 16, KEY, centred=True)
        np.testing.assert_array_equal(sfj.lsh_buckets(x[:, :23], 16, KEY, centred=True), bucket[:, :23])

    def test_what_all_vectors_have_in_common_does_not_matter(self):
        x = vectors((1, 400, 1, 16))
        shifted = x + 10 * vectors((1, 1, 1, 16), seed=1)
        assert jnp.bincount(sfj.lsh_buckets(shifted, 16, KEY).ravel()).max() > 350
        bucket = sfj.lsh_buckets(shifted, 16, KEY, centred=True)
        assert jnp.bincount(bucket.ravel()).max() < 80
        assert np.mean(bucket == sfj.lsh_buckets(x, 16, KEY, centred=True)) > 0.99

    def test_query_and_key_sides_each_by_their_own_mean(self):
        q, k = vectors(), vectors(seed=1) + 5
        buckets = hash_sides(q, k, 16, KEY, centred=True)
        for bucket, x in zip(buckets, (q, k), strict=True):
            np.testing.assert_array_equal(bucket, sfj.lsh_buckets(x, 16, KEY, centred=True))

    def test_attention_by_such_buckets(self):
        q, k, v = (vectors(seed=seed) + 3 for seed in range(3))
        query_bucket, key_bucket = (sfj.lsh_buckets(x, 8, KEY, centred=True) for x in (q, k))
        expected = sfj.sparse_attention(q, k, v, sfj.hash_sparse(query_bucket, key_bucket))
        np.testing.assert_array_equal(sfj.hash_sparse_attention(q, k, v, 8, KEY, centred=True), expected)


def test_no_gradient():
    def weighted(x):
        return jnp.sum(sfj.lsh_buckets(x, 8, KEY).astype(jnp.float32) * x[..., 0])

    x = vectors()
    gradient = jax.grad(weighted)(x)
    assert not gradient[..., 1:].any()
    np.testing.assert_array_equal(gradient[..., 0], sfj.lsh_buckets(x, 8, KEY).astype(jnp.float32))


def test_zero_vectors_have_a_bucket():
    bucket = sfj.lsh_buckets(jnp.zeros((1, 3, 1, 8)), 4, KEY)
    assert (bucket == bucket[0, 0, 0]).all()
    assert 0 <= bucket[0, 0, 0] < 4
