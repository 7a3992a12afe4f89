"""Sparse attention as it is called: against the reference by error budget, and what holds exactly."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import sparse_flash_jax as sfj
from tests import definition
from tests.budget import assert_within_budget, judges, with_gradients
from tests.cases import BASE, BY_NAME, CASES, Case, Inputs, Pattern, Shape

HASH = BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]


@jax.jit
def sparse(inputs, plan):
    return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, return_residual=True), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_within_budget(case):
    inputs = case.inputs()
    got = sparse(inputs, definition.plan(case))
    assert got.o.dtype == inputs.q.dtype
    assert got.lse.dtype == jnp.float32
    assert_within_budget(got, *judges(inputs, definition.visible(case)))


def any_pattern(seed: int, buckets: int, share: float, documents: bool) -> Pattern:
    """Buckets, documents and keep masks of one random generator, skewed as it likes."""

    def arrays(rng: np.random.Generator, shape: Shape) -> dict:
        rng = np.random.default_rng([seed, shape.T])
        groups = {
            "query_group": rng.integers(0, buckets, shape.query_axes) ** 2 % buckets,
            "key_group": rng.integers(0, buckets, shape.key_axes) ** 2 % buckets,
        }
        ids = np.cumsum(rng.random((shape.B, shape.T, 1)) < 0.05, axis=1) if documents else np.zeros((1, shape.T, 1))
        return {
            **{name: (ids.astype(np.int32), group.astype(np.int32)) for name, group in groups.items()},
            "query_keep": rng.random(shape.query_axes) < share,
            "key_keep": rng.random(shape.key_axes) < share,
        }

    return Pattern(f"drawn_{seed}_{buckets}_{share}_{documents}", arrays)


@hypothesis.given(
    seed=st.integers(0, 2**31),
    buckets=st.integers(1, 20),
    share=st.sampled_from((0.1, 0.5, 1.0)),
    documents=st.booleans(),
    window=st.none() | st.integers(1, 70),
    causal=st.booleans(),
    shape=st.sampled_from((BASE, Shape(B=1, T=130, N=2, H=8))),
)
def test_any_pattern_within_budget(seed, buckets, share, documents, window, causal, shape):
    pattern = any_pattern(seed, buckets, share, documents)
    case = Case(shape, dataclasses.replace(pattern, window=window, causal=causal))
    inputs, plan = case.inputs(), case.plan()
    mask = definition.visible(case)
    np.testing.assert_array_equal(definition.full_mask(plan, case), mask)
    assert_within_budget(sparse(inputs, plan), *judges(inputs, mask))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_without_a_visible_pair_are_exactly_zero(case):
    plan, seen = definition.plan(case), definition.visible(case)
    got = sparse(case.inputs(), plan)
    lonely = ~seen.any(axis=-1).swapaxes(1, 2)  # [B T N]
    group = case.shape.N // case.shape.key_heads
    unseen = ~seen.any(axis=-2).reshape(case.shape.B, -1, group, case.shape.keys).any(axis=2).swapaxes(1, 2)
    for name, rows in (("o", lonely), ("dq", lonely), ("dk", unseen), ("dv", unseen)):
        assert not np.asarray(getattr(got, name))[rows].any(), name
    np.testing.assert_array_equal(np.isneginf(got.lse), lonely)


def test_repeats_bit_by_bit():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    first, second = sparse(inputs, plan), sparse(inputs, plan)
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), name)


def test_jit_changes_no_bit():
    inputs = HASH.inputs()
    first = sparse(inputs, definition.plan(HASH))
    with_plan_inside = jax.jit(lambda inputs, arguments: sparse(inputs, sfj.hash_sparse(*arguments)))
    arguments = HASH.plan_arguments()
    inside = with_plan_inside(inputs, (arguments["query_group"], arguments["key_group"]))
    o, lse = sfj.sparse_attention(*inputs[:3], definition.plan(HASH), return_residual=True)
    for name, eager in (("o", o), ("lse", lse)):
        np.testing.assert_array_equal(getattr(first, name), eager, name)
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(inside, name), name)


def test_residual_is_not_part_of_the_output():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    o = sfj.sparse_attention(*inputs[:3], plan)
    np.testing.assert_array_equal(o, sparse(inputs, plan).o)


@pytest.mark.parametrize("scale", [0.0, 0.7, -1.3])
def test_scale(scale):
    inputs, plan = HASH.inputs(), definition.plan(HASH)

    @jax.jit
    def scaled(inputs, plan):
        return with_gradients(
            lambda q, k, v: sfj.sparse_attention(q, k, v, plan, scale=scale, return_residual=True), inputs
        )

    assert_within_budget(scaled(inputs, plan), *judges(inputs, definition.visible(HASH), scale))


def test_large_scores_do_not_overflow():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    inputs = inputs._replace(q=100 * inputs.q)
    got, (exact, _) = sparse(inputs, plan), judges(inputs, definition.visible(HASH))
    np.testing.assert_allclose(got.o, exact.o, atol=1e-3)
    for name in ("dq", "dk", "dv"):
        assert np.isfinite(getattr(got, name)).all(), name


@pytest.mark.parametrize(
    "name",
    ["causal", "window9", "hash16", "hash4_exclude_self_window9", "qk50", "packed", "packed_hash3_qk50", "lonely"],
)
def test_no_gradient_from_what_is_hidden(name):
    """Changing hidden keys changes no bit; the gradient of one query's output is exactly 0 in all that it sees not."""
    case = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]
    inputs, plan, seen = case.inputs(), definition.plan(case), definition.visible(case)
    for i in (0, 20, 62):
        do, dlse = (jnp.zeros_like(x).at[:, i].set(x[:, i]) for x in (inputs.do, inputs.dlse))
        got = sparse(Inputs(*inputs[:3], do, dlse), plan)
        assert not np.delete(got.dq, i, axis=1).any()
        hidden = ~seen[:, :, i].reshape(2, 2, 2, 63).any(axis=2).swapaxes(1, 2)  # [B S K]
        assert not np.asarray(got.dk)[hidden].any()
        assert not np.asarray(got.dv)[hidden].any()


def test_cotangents_of_infinite_lse_reach_nothing():
    """A loss on lse is likely to have NaN gradients where lse is -inf."""
    case = BY_NAME["B2-T63-N4-K2-H32-qk50-f32"]
    inputs, plan = case.inputs(), definition.plan(case)
    lonely = jnp.asarray(~definition.visible(case).any(axis=-1).swapaxes(1, 2))
    clean, tainted = (sparse(inputs._replace(dlse=jnp.where(lonely, x, inputs.dlse)), plan) for x in (0.0, jnp.nan))
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(tainted, name), getattr(clean, name), name)


def test_later_tokens_change_no_earlier_bit():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    later = inputs._replace(k=inputs.k.at[:, 40:].set(7.0), v=inputs.v.at[:, 40:].set(-3.0))
    first, second = sparse(inputs, plan), sparse(later, plan)
    np.testing.assert_array_equal(first.o[:, :40], second.o[:, :40])
    assert (first.o[:, 40:] != second.o[:, 40:]).any()


@jax.jit
def outputs_of(q, k, v, plan):
    return sfj.sparse_attention(q, k, v, plan, return_residual=True)


@pytest.mark.parametrize("name", ["causal", "qk50", "hash4_exclude_self", "packed_window5"])
def test_gradients_by_finite_differences(name):
    pattern = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"].pattern
    case = Case(BASE._replace(B=1, T=13, H=4), pattern)
    plan = definition.plan(case)
    some = jnp.asarray(definition.visible(case).any(axis=-1).swapaxes(1, 2))

    def outputs(q, k, v):
        o, lse = outputs_of(q, k, v, plan)
        return o, jnp.where(some, lse, 0.0)

    check_grads(outputs, case.inputs()[:3], order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_hash_sparse_attention_hashes_plans_and_attends():
    q, k, v = HASH.inputs()[:3]
    key = jax.random.key(3)
    plan = sfj.hash_sparse(
        sfj.lsh_buckets(q, 4, key, num_rotations=2), sfj.lsh_buckets(k, 4, key), exclude_self=True, window=30
    )
    expected = sfj.sparse_attention(q, k, v, plan, scale=0.5, return_residual=True)
    got = sfj.hash_sparse_attention(q, k, v, 4, key, exclude_self=True, window=30, scale=0.5, return_residual=True)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    alone = sfj.hash_sparse_attention(q, k, v, 4, key, exclude_self=True, window=30, scale=0.5, implementation="xla")
    np.testing.assert_array_equal(alone, expected[0])


def test_qk_sparse_attention_plans_and_attends():
    case = BY_NAME["B2-T63-N4-K2-H32-qk50_capacities-f32"]
    q, k, v = case.inputs()[:3]
    query_keep, key_keep = (jnp.asarray(case.arrays()[name]) for name in ("query_keep", "key_keep"))
    expected = sfj.sparse_attention(q, k, v, definition.plan(case), return_residual=True)
    got = sfj.qk_sparse_attention(
        q, k, v, query_keep, key_keep, query_capacity=32, key_capacity=16, return_residual=True
    )
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(sfj.qk_sparse_attention(q, k, v, query_keep, key_keep), expected[0], atol=1e-6)


def test_one_bucket_is_dense_causal():
    inputs = HASH.inputs()
    one = sfj.hash_sparse(jnp.zeros((1, 63, 1), jnp.int32), jnp.zeros((1, 63, 1), jnp.int32))
    grouped, plain = sparse(inputs, one), sparse(inputs, sfj.causal(63))
    for name in plain._fields:
        np.testing.assert_array_equal(getattr(grouped, name), getattr(plain, name), name)


def test_decoding_step_by_step_is_the_whole():
    """A query at a traced offset over a cache gives that row of the whole."""
    case = BY_NAME["B2-T63-N4-K2-H32-causal-f32"]
    q, k, v = case.inputs()[:3]
    whole = sfj.sparse_attention(q, k, v, definition.plan(case))

    @jax.jit
    def step(q, offset):
        return sfj.sparse_attention(q, k, v, sfj.causal(1, 63, offset))

    for t in (0, 17, 62):
        np.testing.assert_allclose(step(q[:, t : t + 1], jnp.int32(t))[:, 0], whole[:, t], atol=1e-6)
