"""Plans of listed blocks and of two runs: their meaning by definition, and attention under them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import mosaic, triton
from sparse_flash_jax.kernels.config import (
    Blocks,
    Config,
    HopperBlocks,
    hopper_bytes,
    mosaic_config,
    mosaic_config_beyond_runs,
    shared_memory,
    triton_config,
    within_blocks,
)
from tests.budget import assert_within_budget, attend, judges
from tests.gpus import H100, lowered, on, passes
from tests.patterns_beyond_runs import BATCH, CASES, HEADS, KEY_KEEP, LENGTH, SEGMENTS, inputs

NAMES = list(CASES)
INTERPRETED = {
    "triton": Config(Blocks(32, 16), Blocks(16, 32), Blocks(16, 16), interpret=True),
    "mosaic": Config(
        HopperBlocks(2, 128, 2, turns=True, overlap=True),
        HopperBlocks(2, 64, 3),
        HopperBlocks(2, 64, 2, rows_in_registers=True, tiles=2),
        interpret=True,
    ),
}


@functools.cache
def plan_of(name):
    return CASES[name].plan()


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_their_definition(name):
    plan, visible = plan_of(name), CASES[name].visible
    mask = np.asarray(plan.mask())
    mask = np.broadcast_to(np.repeat(mask, HEADS // mask.shape[1], axis=1), visible.shape)
    np.testing.assert_array_equal(mask, visible)
    assert float(plan.density()) == pytest.approx(visible.sum() / visible[:, :, 0, 0].size / (LENGTH * 151 / 2))
    stats = plan.stats(block_q=32, block_k=32)
    assert stats.density == pytest.approx(float(plan.density()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_within_budget(name):
    drawn, visible = inputs("float32"), CASES[name].visible
    got = attend(drawn, plan_of(name))
    assert_within_budget(got, *judges(drawn, visible))
    lonely = ~visible.any(axis=3).swapaxes(1, 2)
    unseen = ~visible.any(axis=(1, 2))[:, :, None]  # there is one key head
    for x, rows in ((got.o, lonely), (got.dq, lonely), (got.dk, unseen), (got.dv, unseen)):
        assert not np.asarray(x)[np.broadcast_to(rows, x.shape[:3])].any()
    np.testing.assert_array_equal(np.isneginf(got.lse), lonely)


@pytest.mark.parametrize("name", ["blocks", "blocks_all", "blocks_both_ways", "sinks_all", "union_apart"])
def test_triton_interpreted(name):
    drawn = inputs("float32")
    got = attend(drawn, plan_of(name), implementation="triton", config=INTERPRETED["triton"])
    assert_within_budget(got, *judges(drawn, CASES[name].visible))


@pytest.mark.parametrize("name", ["blocks64_all", "sinks_all"])
def test_mosaic_interpreted(name):
    drawn = inputs("bfloat16")
    got = attend(drawn, plan_of(name), implementation="mosaic", config=INTERPRETED["mosaic"])
    assert_within_budget(got, *judges(drawn, CASES[name].visible))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, dtype):
    """By the kernels that are picked: for float32, and for blocks that Hopper's do not take, those of Triton or XLA."""
    drawn = inputs(dtype)
    assert_within_budget(attend(drawn, plan_of(name)), *judges(drawn, CASES[name].visible))


@pytest.mark.parametrize(
    ("name", "head_dim"), [("blocks64_all", 64), ("sinks_all", 64), ("blocks64_all", 192), ("sinks_all", 128)]
)
def test_kernels_lower_for_cuda(name, head_dim):
    runs = jax.eval_shape(plan_of(name)._replace).runs
    runs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), runs)
    blocks = None if runs.blocks is None else (64, 64)
    with on(H100):
        for kernels, config in (
            (mosaic, mosaic_config_beyond_runs(head_dim, long_runs=True, blocks=blocks)),
            (triton, triton_config("bfloat16", head_dim, long_runs=False, capability=9.0)),
        ):
            config = within_blocks(config, *blocks, head_dim) if blocks else config
            for kernel, operands in passes(kernels, "bfloat16", head_dim, runs, LENGTH):
                text = lowered(functools.partial(kernel, scale=0.1, config=config), *operands)
                assert "mosaic_gpu" in text or "triton" in text


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("long_runs", [False, True])
def test_blocks_side_by_side_fit_shared_memory(head_dim, long_runs):
    plain = dataclasses.replace(mosaic_config(head_dim, long_runs=long_runs), fused=False)
    sizes = (64, 128, 192, 512)
    for rows, columns in itertools.product(sizes, sizes):
        for config in (plain, mosaic_config_beyond_runs(head_dim, long_runs=long_runs, blocks=(rows, columns))):
            config = within_blocks(config, rows, columns, head_dim)
            for tile, block, row_operands in (
                (config.forward, rows, 1),
                (config.dq, rows, 2),
                (config.dkv, columns, 2),
            ):
                assert hopper_bytes(tile, row_operands, head_dim) <= shared_memory(9.0)
                assert block % (tile.rows // tile.walks) == 0
                assert not (tile.turns and tile.walks > 1)
    assert within_blocks(plain, 512, 512, head_dim).dkv.walks == 1


def test_wide_blocks_lower_for_cuda():
    """Those of which shared memory holds one walk alone, and would not hold two."""
    runs = jax.eval_shape(lambda mask: sfj.block_sparse(mask, (64, 128)), jnp.ones((1, 4, 4, 2), bool)).runs
    config = mosaic_config_beyond_runs(128, long_runs=True, blocks=(64, 128))
    config = within_blocks(config, 64, 128, 128)
    with on(H100):
        for kernel, operands in passes(mosaic, "bfloat16", 128, runs, 256):
            assert "mosaic_gpu" in lowered(functools.partial(kernel, scale=0.1, config=config), *operands)


def test_walks_are_of_lists():
    drawn, tile = inputs("bfloat16"), HopperBlocks(2, 64, 2, walks=2)
    with pytest.raises(ValueError, match="walks are of listed blocks"):
        attend(drawn, sfj.causal(LENGTH), implementation="mosaic", config=Config(tile, tile, tile, interpret=True))


def test_planned_under_jit():
    """Nothing but shapes has to be known: the mask may be data."""
    drawn, mask = inputs("float32"), np.random.default_rng(0).random((BATCH, HEADS, 5, 5)) < 0.5

    @jax.jit
    def planned_and_attended(inputs, mask, segment_ids, key_keep):
        plan = sfj.block_sparse(mask, 30, segment_ids=segment_ids, key_keep=key_keep)
        return attend(inputs, plan), plan.mask()

    got, seen = planned_and_attended(drawn, jnp.asarray(mask), jnp.asarray(SEGMENTS), jnp.asarray(KEY_KEEP))
    plan = sfj.block_sparse(jnp.asarray(mask), 30, segment_ids=jnp.asarray(SEGMENTS), key_keep=jnp.asarray(KEY_KEEP))
    np.testing.assert_array_equal(seen, plan.mask())
    for x, y in zip(got, attend(drawn, plan), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["blocks_all", "sinks_all"])
def test_vmap_over_a_batch_axis(name):
    drawn, plan = inputs("float32"), plan_of(name)
    plan = jax.tree.map(lambda x: jnp.broadcast_to(x, (BATCH, *x.shape[1:])), plan)
    mapped = jax.jit(jax.vmap(with_runs_of_one))(jax.tree.map(lambda x: x[:, None], (drawn, plan)))
    for x, y in zip(mapped, attend(drawn, plan), strict=True):
        np.testing.assert_allclose(x[:, 0], y, atol=1e-5)


def with_runs_of_one(operands):
    return attend(*operands)


def test_fewer_blocks_listed():
    """Lists may be as short as the longest row; outside `jit` a longer one is an error, inside its last are hidden."""
    mask = jnp.asarray(np.tri(5, dtype=bool))[None, None]
    for most in (5, 7):
        np.testing.assert_array_equal(
            sfj.block_sparse(mask, 30, max_listed=most).mask(), sfj.block_sparse(mask, 30).mask()
        )
    with pytest.raises(ValueError, match="max_listed=4 is too small: a block of queries sees 5"):
        sfj.block_sparse(mask, 30, max_listed=4)
    cut = jax.jit(lambda mask: sfj.block_sparse(mask, 30, max_listed=4).mask())(mask)
    expected = np.asarray(sfj.block_sparse(mask, 30).mask()).copy()
    expected[..., 120:] = False
    np.testing.assert_array_equal(cut, expected)


def test_blocks_of_flex_attention():
    """As `BlockMask` holds them: partial and full blocks in lists of their own, in any order."""
    partial, full = np.zeros((1, 2, 4, 4), bool), np.zeros((1, 2, 4, 4), bool)
    partial[..., [0, 1, 2, 3], [0, 1, 2, 3]] = True
    full[:, 0, 3, [0, 2]] = full[:, 1, 2, 0] = True

    def lists(mask):
        order = np.argsort(~mask, axis=-1, kind="stable")
        return mask.sum(axis=-1), order

    (counts, indices), (full_counts, full_indices) = lists(partial), lists(full)
    indices = np.where(np.arange(4) < counts[..., None], indices, 0)  # what is not listed may be anything
    full_indices[:, 0, 3, :2] = full_indices[:, 0, 3, 1::-1]
    plan = sfj.from_flex(counts, indices, 8, full_kv_num_blocks=full_counts, full_kv_indices=full_indices, causal=True)
    expected = sfj.block_sparse(jnp.asarray(partial | full), 8)
    np.testing.assert_array_equal(plan.mask(), expected.mask())
    indices[0, 0, 0, :2], counts[0, 0, 0] = 1, 2
    with pytest.raises(ValueError, match="must list a block once, got one 2 times"):
        sfj.from_flex(counts, indices, 8, causal=True)
    indices[0, 0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"kv_indices must be in \[0, 4\)"):
        sfj.from_flex(counts, indices, 8, causal=True)


def test_best_blocks_and_the_own():
    drawn, size, count = inputs("float32"), 16, 3
    plan = sfj.block_top_k(drawn.q, drawn.k, size, count)
    means = [
        np.stack([np.asarray(x, np.float64)[:, i : i + size].mean(axis=1) for i in range(0, LENGTH, size)], axis=1)
        for x in (drawn.q, np.repeat(drawn.k, HEADS, axis=2))
    ]
    score = np.einsum("bcnh,bdnh->bncd", *means)
    blocks = score.shape[-1]
    chosen = np.zeros(score.shape, bool)
    for place in np.ndindex(*score.shape[:3]):
        row = place[2]
        best = np.argsort(-score[place][:row], kind="stable")[: count - 1]
        chosen[place][[*best, row]] = True
    expected = sfj.block_sparse(jnp.asarray(chosen), size, query_length=LENGTH, key_length=LENGTH)
    np.testing.assert_array_equal(plan.mask(), expected.mask())
    assert plan.runs.blocks is not None
    assert plan.runs.blocks.key_index.shape == (BATCH, HEADS, blocks, count)
    np.testing.assert_array_equal(sfj.block_top_k(drawn.q, drawn.k, size, 99).mask()[0, 0], np.tri(LENGTH, dtype=bool))


MASK = jnp.ones((1, 1, 5, 5), bool)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sfj.block_sparse(MASK.astype(jnp.int32), 30), TypeError, "block_mask must be bool"),
        (lambda: sfj.block_sparse(MASK, 0), ValueError, "block_size must be at least 1"),
        (lambda: sfj.block_sparse(MASK, 30, query_length=100), ValueError, "query_length 100 is 4 blocks of 30"),
        (lambda: sfj.block_sparse(MASK, 30, key_keep=jnp.ones((1, 9, 1), bool)), ValueError, "must be of 150 tokens"),
        (lambda: sfj.block_sparse(MASK, 30, segment_ids=jnp.ones((1, 9), jnp.int32)), ValueError, "are for T == S"),
        (lambda: sfj.sinks_and_window(9, 0, 3), ValueError, "sinks must be at least 1"),
        (lambda: sfj.sinks_and_window(9, 1, 0), ValueError, "window must be"),
        (lambda: sfj.prefix_lm(jnp.ones((1, 9))), TypeError, "prefix must be bool"),
        (lambda: sfj.chunked(9, 0), ValueError, "chunk must be at least 1"),
        (lambda: sfj.dilated(9, 0), ValueError, "stride must be at least 1"),
        (lambda: sfj.union(sfj.causal(9), sfj.chunked(9, 3)), NotImplementedError, "give make_plan the groups"),
        (lambda: sfj.union(sfj.causal(9), sfj.sinks_and_window(9, 1, 2)), NotImplementedError, "of one run for each"),
        (lambda: sfj.intersect(sfj.causal(9), sfj.causal(8)), ValueError, "for the same lengths"),
        (
            lambda: sfj.intersect(sfj.block_sparse(MASK, 30), sfj.block_sparse(MASK, 30)),
            NotImplementedError,
            "combine the masks for block_sparse",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_blocks_that_kernels_do_not_take():
    drawn = inputs("bfloat16")
    plan = sfj.block_sparse(jnp.ones((1, 1, 3, 3), bool), 50)
    for name, least in (("mosaic", 64), ("triton", 16)):
        with pytest.raises(NotImplementedError, match=f"takes blocks of multiples of {least} tokens"):
            sfj.sparse_attention(*drawn[:3], plan, implementation=name, config=INTERPRETED[name])


def test_fused_gradients_are_for_one_run():
    drawn, block = inputs("bfloat16"), HopperBlocks(2, 64, 2)
    config = Config(block, block, block, fused=True, interpret=True)
    with pytest.raises(ValueError, match="leave fused out"):
        sfj.sparse_attention(*drawn[:3], plan_of("sinks"), implementation="mosaic", config=config)
