"""Each pattern function shows what its name says, and keep masks keep what they promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj

LENGTH = 12
QUERY, KEY = np.arange(LENGTH)[:, None], np.arange(LENGTH)
RNG = np.random.default_rng(0)
GROUP, KEY_GROUP = (RNG.integers(0, 3, (2, LENGTH, heads), np.int32) for heads in (4, 2))
KEEP, KEY_KEEP = (RNG.random((2, LENGTH, heads)) < 0.6 for heads in (4, 2))


def pairs(query, key, fits):
    """[B T N] and [B S K] -> [B N T S], by a function of the two sides."""
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return fits(query.swapaxes(1, 2)[..., None], key.swapaxes(1, 2)[:, :, None])


SAME_GROUP = pairs(GROUP, KEY_GROUP, np.equal)
BOTH_KEPT = pairs(KEEP, KEY_KEEP, np.logical_and)


def test_causal():
    np.testing.assert_array_equal(sfj.causal(LENGTH).mask()[0, 0], QUERY >= KEY)
    np.testing.assert_array_equal(sfj.causal(LENGTH, 7).mask()[0, 0], (QUERY >= KEY)[:, :7])
    np.testing.assert_array_equal(sfj.causal(3, LENGTH, 9).mask()[0, 0], (QUERY >= KEY)[9:])
    np.testing.assert_array_equal(sfj.causal(LENGTH, window=3).mask()[0, 0], (QUERY >= KEY) & (QUERY - KEY < 3))


@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal):
    ids = GROUP[..., 0]
    same = ids[:, :, None] == ids[:, None]
    expected = same & (QUERY >= KEY) if causal else same
    np.testing.assert_array_equal(sfj.packed(jnp.asarray(ids), causal=causal).mask()[:, 0], expected)
    windowed = sfj.packed(jnp.asarray(ids), causal=causal, window=4)
    np.testing.assert_array_equal(windowed.mask()[:, 0], expected & (QUERY - KEY < 4))


def test_packed_with_ids_of_the_keys():
    ids, key_ids = GROUP[..., 0], KEY_GROUP[:, :5, 0]
    plan = sfj.packed(jnp.asarray(ids), jnp.asarray(key_ids), causal=False)
    np.testing.assert_array_equal(plan.mask()[:, 0], ids[:, :, None] == key_ids[:, None])


@pytest.mark.parametrize("causal", [True, False])
def test_qk_sparse(causal):
    plan = sfj.qk_sparse(jnp.asarray(KEEP), jnp.asarray(KEY_KEEP), causal=causal, window=5)
    expected = BOTH_KEPT & (QUERY - KEY < 5)
    np.testing.assert_array_equal(plan.mask(), expected & (QUERY >= KEY) if causal else expected)


@pytest.mark.parametrize(("causal", "exclude_self"), [(True, False), (True, True), (False, False)])
def test_hash_sparse(causal, exclude_self):
    plan = sfj.hash_sparse(jnp.asarray(GROUP), jnp.asarray(KEY_GROUP), causal=causal, exclude_self=exclude_self)
    order = (QUERY > KEY if exclude_self else QUERY >= KEY) if causal else np.ones_like(QUERY >= KEY)
    np.testing.assert_array_equal(plan.mask(), SAME_GROUP & order)


def test_several_groups_at_once():
    ids = (GROUP[:, :, :1] == 1).astype(np.int32)
    plan = sfj.make_plan(
        query_group=(jnp.asarray(ids), jnp.asarray(GROUP)), key_group=(jnp.asarray(ids), jnp.asarray(KEY_GROUP))
    )
    np.testing.assert_array_equal(plan.mask(), SAME_GROUP & pairs(ids, ids, np.equal) & (QUERY >= KEY))


def test_patterns_make_plans_under_vmap():
    groups = jnp.asarray(GROUP)
    together = jax.vmap(lambda g: sfj.hash_sparse(g[None], g[None]).mask()[0])(groups)
    np.testing.assert_array_equal(together, sfj.hash_sparse(groups, groups).mask())


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_random_keep_keeps_an_exact_count(length, rate):
    keep = sfj.random_keep(jax.random.key(0), (2, length, 3), rate)
    assert keep.shape == (2, length, 3)
    assert keep.dtype == jnp.bool_
    assert (np.sum(keep, axis=1) == math.ceil((1 - rate) * length)).all()


def test_random_keep_differs_by_head_and_key():
    keep, same, other = (np.asarray(sfj.random_keep(jax.random.key(s), (2, 64, 2), 0.5)) for s in (0, 0, 1))
    np.testing.assert_array_equal(keep, same)
    assert (keep != other).any()
    assert (keep[..., 0] != keep[..., 1]).any()
    assert (keep[0] != keep[1]).any()


def test_random_keep_is_uniform():
    keep = sfj.random_keep(jax.random.key(2), (400, 16, 4), 0.5)
    share = np.mean(keep, axis=(0, 2))
    # 1600 draws: six standard deviations of 1/80.
    np.testing.assert_allclose(share, 0.5, atol=0.075)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 5, LENGTH])
def test_top_keep_keeps_the_best(dtype, count):
    scores = jnp.asarray(RNG.integers(-3, 4, (2, LENGTH, 3)), dtype)
    keep = np.asarray(sfj.top_keep(scores, count))
    for index in np.ndindex(2, 3):
        column = np.asarray(scores, np.float64)[index[0], :, index[1]]
        best = sorted(range(LENGTH), key=lambda t: (-column[t], t))[:count]
        assert sorted(np.flatnonzero(keep[index[0], :, index[1]])) == sorted(best)


def test_top_keep_takes_nan_for_the_lowest():
    scores = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf, jnp.nan])[None, :, None]
    np.testing.assert_array_equal(sfj.top_keep(scores, 2)[0, :, 0], [False, True, False, True, False])
    assert np.sum(sfj.top_keep(scores, 4)) == 4


def test_counts_are_exact_capacities():
    keep = sfj.random_keep(jax.random.key(0), (2, 50, 3), 0.3)
    count = math.ceil(0.7 * 50)
    plan = sfj.qk_sparse(keep, keep, query_capacity=count, key_capacity=count)
    assert plan.runs.k_start.shape[-1] == plan.runs.q_start.shape[-1] == count
    assert not plan.overflow.any()
