"""Plans exactly against the definitions: masks, orders, runs and their transposes, capacities, offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_flash_jax as sfj
from tests import definition, oracle
from tests.cases import BY_NAME, CASES

INT32 = st.integers(-(2**31), 2**31 - 1)


def assert_well_formed(plan):
    """Monotone bounds, each pair of bounds the other's transpose, and orders that are permutations."""
    runs = plan.runs
    assert runs.plain
    for name, bound in zip(runs._fields[:4], runs[:4], strict=True):
        assert bound.dtype == jnp.int32, name
        assert (np.diff(np.asarray(bound), axis=-1) >= 0).all(), f"{name} decreases"
    query_slot, key_slot = (np.arange(x.shape[-1]) for x in (runs.k_start, runs.q_start))
    by_query = (np.asarray(runs.k_start)[..., None] <= key_slot) & (key_slot < np.asarray(runs.k_stop)[..., None])
    by_key = (np.asarray(runs.q_start)[..., None] <= query_slot) & (query_slot < np.asarray(runs.q_stop)[..., None])
    by_query, by_key = np.broadcast_arrays(by_query, by_key.swapaxes(-1, -2))
    np.testing.assert_array_equal(by_query, by_key, "runs by query and by key differ")
    assert (np.asarray(runs.k_start) <= np.asarray(runs.k_stop)).all()
    assert (np.asarray(runs.q_start) <= np.asarray(runs.q_stop)).all()
    assert_permutation(plan.query_order, plan.query_slot, runs.k_start.shape[-1], plan.query_length)
    assert_permutation(plan.key_order, plan.key_slot, runs.q_start.shape[-1], plan.key_length)


def assert_permutation(order, slot, slots, length):
    if order is None:
        assert slot is None
        assert slots == length
        return
    assert order.shape[-1] == slots
    assert slot.shape[-1] == length
    order, slot = np.asarray(order).reshape(-1, slots), np.asarray(slot).reshape(-1, length)
    for positions, places in zip(order, slot, strict=True):
        np.testing.assert_array_equal(places[positions], np.arange(slots), "slot does not invert order")
        assert (np.delete(places, positions) == slots).all(), "a position without a slot has one"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_is_the_definition(case):
    np.testing.assert_array_equal(definition.full_mask(definition.plan(case), case), definition.visible(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_is_well_formed(case):
    assert_well_formed(definition.plan(case))


@st.composite
def plan_arguments(draw):
    """Any groups, keep masks and rule, over few shapes."""
    batch, heads, key_heads = draw(st.sampled_from([(1, 1, 1), (2, 4, 2), (1, 3, 1)]))
    lengths = draw(st.sampled_from([(7, 7), (11, 6), (1, 8)]))
    ids = draw(st.lists(INT32, min_size=1, max_size=5))
    depth = draw(st.integers(0, 2))
    arrays = {}
    for side, length, side_heads in (("query", lengths[0], heads), ("key", lengths[1], key_heads)):
        shapes = st.sampled_from([(batch, length, side_heads), (1, length, side_heads), (batch, length, 1)])
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        groups = tuple(rng.choice(np.array(ids, np.int32), draw(shapes)) for _ in range(depth))
        if groups:
            arrays[f"{side}_group"] = groups if depth > 1 else groups[0]
        if not groups or draw(st.booleans()):
            arrays[f"{side}_keep"] = rng.random(draw(shapes)) < 0.6
    causal = draw(st.booleans())
    options = {
        "causal": causal,
        "exclude_self": causal and draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 3, 2**31])),
        "query_offset": draw(st.integers(-9, 9)),
        "query_capacity": draw(st.sampled_from([None, 1, 5])),
        "key_capacity": draw(st.sampled_from([None, 4])),
    }
    return (batch, heads, lengths), arrays, options


@settings(max_examples=15)
@given(plan_arguments())
def test_any_plan_is_the_definition(drawn):
    (batch, heads, (query_length, key_length)), arrays, options = drawn
    offset = options.pop("query_offset")
    # Under jit, where what does not fit is dropped.
    plan = jax.jit(lambda arrays, offset: sfj.make_plan(**arrays, **options, query_offset=offset))(arrays, offset)
    assert_well_formed(plan)
    seen = oracle.visible(
        batch=batch,
        query_length=query_length,
        key_length=key_length,
        query_heads=heads,
        **arrays,
        **options,
        query_offset=offset,
    )
    mask = np.asarray(plan.mask())
    mask = np.broadcast_to(np.repeat(mask, heads // mask.shape[1], axis=1), seen.shape)
    np.testing.assert_array_equal(mask, seen)


def test_groups_at_a_million_tokens():
    length = 2**20
    ids = np.array([-(2**31), -(2**31) + 1, -1, 0, 7, 2**31 - 2, 2**31 - 1], np.int32)
    group = np.random.default_rng(0).choice(ids, (1, length, 1))
    plan = sfj.make_plan(query_group=jnp.asarray(group), key_group=jnp.asarray(group))
    order = np.lexsort((np.arange(length), group[0, :, 0]))
    ordered = group[0, order, 0]
    slots = np.arange(length)
    assert plan.query_order is not None
    np.testing.assert_array_equal(plan.query_order[0, 0], order)
    np.testing.assert_array_equal(plan.runs.k_start[0, 0], np.searchsorted(ordered, ordered, "left"))
    np.testing.assert_array_equal(plan.runs.k_stop[0, 0], slots + 1)
    np.testing.assert_array_equal(plan.runs.q_start[0, 0], slots)
    np.testing.assert_array_equal(plan.runs.q_stop[0, 0], np.searchsorted(ordered, ordered, "right"))


def test_dense_causal_permutes_nothing():
    plan = sfj.causal(12)
    assert plan.query_order is plan.query_slot is plan.key_order is plan.key_slot is None
    assert (plan.batch_size, plan.query_heads, plan.key_heads) == (1, 1, 1)
    assert (plan.query_length, plan.key_length) == (12, 12)


@pytest.mark.parametrize("offset", [-3, 0, 4, 59, 200])
def test_offset_may_be_traced(offset):
    @jax.jit
    def planned(offset):
        return sfj.causal(5, 64, offset, window=9)

    i, j = np.arange(5)[:, None] + offset, np.arange(64)
    expected = (i >= j) & (i - j < 9)
    plan = planned(jnp.int32(offset))
    assert_well_formed(plan)
    np.testing.assert_array_equal(plan.mask()[0, 0], expected)
    np.testing.assert_array_equal(sfj.causal(5, 64, offset, window=9).mask()[0, 0], expected)


KEEP = np.array([[True, False, True, True, False, True, True], [False, True, False, False, True, False, False]])


def capped(query_keep, key_keep):
    return sfj.make_plan(query_keep=query_keep, key_keep=key_keep, query_capacity=3, key_capacity=4)


def keep_masks():
    query_keep = jnp.asarray(KEEP[None].swapaxes(1, 2))  # [1 T 2], 5 and 2 kept
    return query_keep, jnp.ones((1, 7, 1), bool)


def test_overflow_outside_jit_names_side_head_and_counts():
    query_keep, key_keep = keep_masks()
    with pytest.raises(ValueError, match=r"query_capacity=3 .* head 0 of batch entry 0 keeps 5 queries .*1 of 2 heads"):
        capped(query_keep, key_keep)
    with pytest.raises(ValueError, match=r"key_capacity=4 .* head 0 of batch entry 0 keeps 7 keys"):
        capped(query_keep[..., 1:], key_keep)


def test_overflow_inside_jit_drops_the_latest_and_is_counted():
    query_keep, key_keep = keep_masks()
    plan = jax.jit(capped)(query_keep, key_keep)
    assert_well_formed(plan)
    np.testing.assert_array_equal(plan.query_overflow, [[2, 0]])
    np.testing.assert_array_equal(plan.key_overflow, [[3]])
    np.testing.assert_array_equal(plan.overflow, [[5, 3]])
    np.testing.assert_array_equal(plan.query_order[0, 0], [0, 2, 3])
    np.testing.assert_array_equal(plan.key_order[0, 0], [0, 1, 2, 3])
    sees = np.asarray(plan.mask()).any(axis=-1)[0]
    np.testing.assert_array_equal(sees, [[1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0]])


def test_capacity_that_fits_drops_nothing():
    query_keep, key_keep = keep_masks()
    plan = sfj.make_plan(query_keep=query_keep, key_keep=key_keep, query_capacity=5, key_capacity=100)
    assert plan.runs.k_start.shape[-1] == 5
    assert plan.runs.q_start.shape[-1] == 7
    assert not plan.overflow.any()
    np.testing.assert_array_equal(plan.mask(), sfj.qk_sparse(query_keep, key_keep).mask())


def test_overflow_is_per_batch_entry_and_head():
    case = BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]
    assert definition.plan(case).overflow.shape == (2, 4)
    assert not definition.plan(case).overflow.any()


@pytest.mark.parametrize("name", ["causal", "hash16", "packed", "qk50_capacities", "both_ways", "nothing_kept"])
def test_density_under_jit(name):
    case = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]
    density = jax.jit(sfj.AttentionPlan.density)(definition.plan(case))
    assert density.dtype == jnp.float32
    np.testing.assert_allclose(density, definition.visible(case).mean(axis=(0, 1)).sum() / (63 * 64 / 2), rtol=1e-6)


@pytest.mark.parametrize(("queries", "keys", "pairs"), [(3, 5, 6), (5, 3, 12), (1, 1, 1)])
def test_density_counts_against_dense_causal(queries, keys, pairs):
    np.testing.assert_allclose(sfj.causal(queries, keys).density(), 1.0, rtol=1e-6)
    everything = sfj.qk_sparse(jnp.ones((1, queries, 1), bool), jnp.ones((1, keys, 1), bool), causal=False)
    np.testing.assert_allclose(everything.density(), queries * keys / pairs, rtol=1e-6)


def test_plan_is_a_pytree_of_int32():
    leaves = jax.tree.leaves(definition.plan(BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("int32")}


@pytest.mark.parametrize(
    ("name", "long_runs"),
    [("causal", True), ("window9", True), ("qk50", True), ("hash16", False), ("packed_window5", False)],
)
def test_long_runs_where_nothing_divides_tokens(name, long_runs):
    case = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]
    plan, keep = definition.plan(case), case.arrays().get("key_keep")
    assert plan.long_runs == long_runs
    np.testing.assert_array_equal(plan.kept_keys, 63 if keep is None else keep.sum(axis=1))
