"""Each pattern function shows what its name says."""

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
