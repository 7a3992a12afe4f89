"""Counts of a plan against counts of its mask, pair by pair and tile by tile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from tests import definition
from tests.cases import BY_NAME, CASES

COUNTED = [case for case in CASES if case.dtype == "float32" and case.shape.T < 1000]


def slot_mask(runs):
    slot = np.arange(runs.q_start.shape[-1])
    return (np.asarray(runs.k_start)[..., None] <= slot) & (slot < np.asarray(runs.k_stop)[..., None])


def tiles_by_hand(seen, block_q, block_k):
    """Visited and wholly visible tiles of one head: a block of queries visits all tiles between its first and last."""
    visited = full = 0
    queries, keys = seen.shape
    for q in range(0, queries, block_q):
        block = seen[q : q + block_q]
        touched = [k for k in range(0, keys, block_k) if block[:, k : k + block_k].any()]
        visited += (touched[-1] - touched[0]) // block_k + 1 if touched else 0
        full += sum(k + block_k <= keys and block[:, k : k + block_k].all() for k in touched)
    return visited, full


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_counts(case):
    plan, seen = definition.plan(case), definition.visible(case)
    stats = plan.stats(block_q=16, block_k=8)
    heads = plan.runs.k_start.shape[0] * plan.runs.k_start.shape[1]
    copies = seen.shape[0] * seen.shape[1] // heads
    assert stats.heads == heads
    assert stats.visible_pairs == seen.sum() / copies
    causal_pairs = sum(min(i + 1, case.shape.keys) for i in range(case.shape.T))
    assert stats.density == pytest.approx(seen.sum() / copies / heads / causal_pairs)
    assert stats.density == pytest.approx(float(plan.density()), rel=1e-5)
    assert stats.empty_queries == (~seen.any(axis=-1)).sum() / copies
    assert stats.total_tiles == heads * -(-case.shape.T // 16) * -(-case.shape.keys // 8)
    by_head = slot_mask(plan.runs).reshape(heads, *plan.runs.k_start.shape[-1:], -1)
    visited, full = np.sum([tiles_by_hand(head, 16, 8) for head in by_head], axis=0)
    assert stats.full_tiles == full
    # A block that opens with an empty run may visit tiles before its first visible pair.
    assert visited <= stats.executed_tiles <= stats.total_tiles
    if (np.asarray(plan.runs.k_start) < np.asarray(plan.runs.k_stop)).all():
        assert stats.executed_tiles == visited


@pytest.mark.parametrize(
    ("name", "largest"),
    [("causal", 63), ("own_bucket", 1), ("one_bucket", 63), ("no_keys", 0), ("qk50_capacities", 16)],
)
def test_largest_group(name, largest):
    assert definition.plan(BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]).stats().largest_group == largest


def test_largest_group_counts_kept_keys():
    case = BY_NAME["B2-T63-N4-K2-H32-broadcast_axes-f32"]
    arrays = case.arrays()
    counts = [np.bincount(arrays["key_group"][b, arrays["key_keep"][b, :, 0], 0], minlength=1).max() for b in range(2)]
    assert definition.plan(case).stats().largest_group == max(counts)


def test_dense_causal_in_numbers():
    stats, dense = sfj.causal(256).stats(block_q=64, block_k=64), sfj.expected_time_share(256, 1.0)
    assert dense is not None
    assert dataclasses.asdict(stats) == {
        "heads": 1,
        "visible_pairs": 256 * 257 // 2,
        "density": 1.0,
        "block_q": 64,
        "block_k": 64,
        "total_tiles": 16,
        "executed_tiles": 10,
        "full_tiles": 6,
        "empty_queries": 0,
        "largest_group": 256,
        "expected_time": dense._replace(share=dense.own_dense),
    }
    assert stats.tile_efficiency == pytest.approx(256 * 257 / 2 / (10 * 64 * 64))


def test_numbers_are_python_numbers():
    stats = definition.plan(BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]).stats()
    for name, value in dataclasses.asdict(stats).items():
        assert name == "expected_time" or type(value) in (int, float), name


def test_expected_time_is_that_of_the_plans_method_and_density():
    bucket = jax.random.randint(jax.random.key(0), (1, 512, 1), 0, 4)
    one = jnp.zeros_like(bucket)
    keep = sfj.random_keep(jax.random.key(1), (1, 512, 1), 0.5)
    hashed, dropped = sfj.hash_sparse(bucket, bucket).stats(), sfj.qk_sparse(keep, keep).stats()
    assert hashed.expected_time == sfj.expected_time_share(512, hashed.density, method="hash")
    assert dropped.expected_time == sfj.expected_time_share(512, dropped.density, method="qk")
    assert str(hashed.expected_time) in str(hashed)
    for unknown in (
        sfj.causal(512, 256),
        sfj.causal(512, window=100),
        sfj.hash_sparse(bucket, bucket, window=100),
        sfj.qk_sparse(jnp.zeros_like(keep), keep),
        sfj.make_plan(query_group=one, key_group=one, causal=False),
    ):
        assert unknown.stats().expected_time is None
        assert "not known" in str(unknown.stats())


def test_printing():
    text = str(sfj.causal(256).stats(block_q=64, block_k=64))
    for part in ("32,896", "1.0000 of dense causal", "10 of 16", "62.50%", "6 wholly visible", "64 x 64", "256 keys"):
        assert part in text
    nothing = definition.plan(BY_NAME["B2-T63-N4-K2-H32-nothing_kept-f32"]).stats()
    assert "0.0000 of dense causal" in str(nothing)
    assert nothing.executed_tiles == 0


def test_not_under_jit():
    with pytest.raises(ValueError, match=r"under jit.*plan\.density\(\)"):
        jax.jit(lambda plan: plan.stats().visible_pairs)(sfj.causal(8))
